"""Whether a port can be served on: asked before a model is loaded, and again before serving."""

import socket


def check_port(host: str, port: int) -> None:
    """OSError, one line, where it is taken or the host is not this machine's."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            free.bind((host, port))
        except OSError as error:
            raise OSError(
                f"cannot serve on {host}, port {port}: {error.strerror}; choose another port="
            ) from error
