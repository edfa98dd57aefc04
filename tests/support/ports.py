"""A port for a server of a test."""

import socket


def free_port() -> int:
    """Of 127.0.0.1, free a moment ago: for servers that must be told one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
