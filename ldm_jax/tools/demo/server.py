"""The server of the page, and the requests that it accepts."""

import errno
import socket
from typing import Any

from ldm_jax.tools.demo.controls import LOOPBACK
from ldm_jax.types import InputError

LOOPBACKS = ("127.0.0.1", "localhost", "::1")
MAX_MESSAGE = 2**16
"""Maximum bytes of a page's message: a text and some numbers."""
MAX_CONNECTIONS = 64
SECONDS_TO_CLOSE = 2


def open_socket(host: str, port: int) -> socket.socket:
    """Open a listening socket.

    Args:
      host: Address or name of this machine.
      port: 0 for any that is free.

    Raises:
      InputError: If the address is not this machine's, or the port is not available.
    """
    try:
        kind, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        port_in_use = socket.socket(kind, socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise _no_address(host) from None
    try:
        # A port that was closed a minute ago is free; one in use is not.
        port_in_use.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        port_in_use.bind(address)
        port_in_use.listen()
    except OSError as error:
        port_in_use.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(
                f"--port: {port} is in use, wanted a free one; try --port 0 for any"
            ) from None
        if error.errno == errno.EACCES:
            raise InputError(
                f"--port: may not listen at {port}, wanted one of your own; try 1024 "
                "or above"
            ) from None
        raise _no_address(host) from None
    return port_in_use


def _no_address(host: str) -> InputError:
    return InputError(
        f"--host: got {host!r}, wanted an address of this machine; try {LOOPBACK}, or "
        "0.0.0.0 for all of its addresses"
    )


def address_of(port_in_use: socket.socket) -> str:
    """Return the URL of a listening socket."""
    host, port = port_in_use.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


class Gate:
    """Accepts the requests that a page needs, and no others.

    Only GET and HEAD; only this machine's own names as host, where the socket listens
    to this machine alone (against DNS rebinding); and no connection that a page of
    another site opens.

    Attributes:
      app: The ASGI application behind it.
      hosts: Host names that are accepted; () for any.
    """

    def __init__(self, app: Any, hosts: tuple[str, ...]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] in ("http", "websocket") and not self._may(scope):
            await _refuse(scope, send)
            return
        await self.app(scope, receive, send)

    def _may(self, scope: Any) -> bool:
        headers = dict(scope["headers"])
        if scope["type"] == "http" and scope["method"] not in ("GET", "HEAD"):
            return False
        host = headers.get(b"host", b"").decode("latin-1").lower()
        name = host.rpartition(":")[0] if host[-1:].isdigit() and ":" in host else host
        if self.hosts and name.strip("[]") not in self.hosts:
            return False
        origin = headers.get(b"origin", b"").decode("latin-1").lower()
        return not origin or origin.partition("://")[2] == host


async def _refuse(scope: Any, send: Any) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    plain = [(b"content-type", b"text/plain")]
    await send({"type": "http.response.start", "status": 403, "headers": plain})
    await send({"type": "http.response.body", "body": b"not from here\n"})


def serve(app: Any, port_in_use: socket.socket) -> None:
    """Serve until the program is interrupted.

    Args:
      app: The page, an ASGI application.
      port_in_use: The socket of `open_socket`.
    """
    import uvicorn

    own = port_in_use.getsockname()[0] in LOOPBACKS
    config = uvicorn.Config(
        Gate(app, LOOPBACKS if own else ()),
        log_level="warning",
        limit_concurrency=MAX_CONNECTIONS,
        ws_max_size=MAX_MESSAGE,
        timeout_graceful_shutdown=SECONDS_TO_CLOSE,
        server_header=False,
    )
    uvicorn.Server(config).run(sockets=[port_in_use])
