"""The `a2a` kind: a remote agent behind the A2A protocol."""
