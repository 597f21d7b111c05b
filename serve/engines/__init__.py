"""The engines: how each is started and probed."""
