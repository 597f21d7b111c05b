"""Messages to systemd (the protocol of sd_notify(3)); nothing happens where systemd did not start us."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


def notify(message: str) -> None:
    """Send `message`, such as READY=1."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    # The address may have outlived its listener; a message that nobody takes is no reason to end.
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender, suppress(OSError):
        sender.connect(f"\0{address[1:]}" if address.startswith("@") else address)
        sender.sendall(message.encode())
