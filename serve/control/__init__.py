"""The control API: typed routes and server-sent events on a unix socket, for the CLI and the TUI. One file per noun."""
