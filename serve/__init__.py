"""Everything that listens: the daemon, the control API, the gateway, the engines."""
