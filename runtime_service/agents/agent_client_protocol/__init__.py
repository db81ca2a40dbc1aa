"""The `agent_client_protocol` kind: any agent that speaks the Agent Client Protocol over stdio."""
