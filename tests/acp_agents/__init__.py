"""Agents that speak the Agent Client Protocol, well and badly: scripts that tests run as processes."""
