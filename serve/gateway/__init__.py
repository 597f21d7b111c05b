"""The chat endpoint."""
