"""The server of the page, and the requests that it accepts."""

import asyncio
import errno
import ipaddress
import socket
from typing import Any

from ldm_jax.tools.demo.controls import LOOPBACK
from ldm_jax.types import InputError

LOOPBACKS = ("127.0.0.1", "localhost", "::1")
"""Names of this machine that a page which listens to it alone may be asked by."""
MAX_HEADER = 2**14
"""Maximum bytes of a request's line and headers."""
SECONDS_TO_ASK = 10
"""Time in which a request must arrive, after the connection or the answer before."""
SECONDS_TO_ANSWER = 60
"""Time in which it must be answered, and the answer read."""
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


def own_names(port_in_use: socket.socket) -> tuple[str, ...]:
    """Return the names of a socket that listens to this machine alone; () of others."""
    host = port_in_use.getsockname()[0]
    address = ipaddress.ip_address(host)
    address = getattr(address, "ipv4_mapped", None) or address
    return (*LOOPBACKS, host, str(address)) if address.is_loopback else ()


class Gate:
    """Accepts the requests that a page needs, and no others.

    Only GET and HEAD; only this machine's own names as host, where the socket listens
    to this machine alone (against DNS rebinding); and no connection that a page of
    another site opens.

    Attributes:
      app: The ASGI application behind it.
      hosts: Host names that are accepted; () for any.
      num_pages: Web sockets that are open, one a page; at most `MAX_CONNECTIONS`.
    """

    def __init__(self, app: Any, hosts: tuple[str, ...]) -> None:
        self.app, self.hosts, self.num_pages = app, hosts, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or refuse it."""
        is_page = scope["type"] == "websocket"
        full = is_page and self.num_pages >= MAX_CONNECTIONS
        if scope["type"] in ("http", "websocket") and (full or not self._may(scope)):
            await _refuse(scope, send)
            return
        self.num_pages += is_page
        try:
            await self.app(scope, receive, send)
        finally:
            self.num_pages -= is_page

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


def _bounded_protocol() -> type[asyncio.Protocol]:
    """Return uvicorn's protocol with limits to connections and to their time.

    Half a request, a body that nobody reads and an answer that nobody reads would each
    hold a connection for ever.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class BoundedProtocol(H11Protocol):
        limit: float | None = None
        timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > 2 * MAX_CONNECTIONS:
                transport.abort()
            self.watch()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.watch()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            self.watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self.set_limit(None)
            super().connection_lost(exc)

        def watch(self) -> None:
            asked = self.cycle is not None and not self.cycle.response_complete
            if self.transport.get_protocol() is not self:  # a web socket now
                self.set_limit(None)
            else:
                self.set_limit(SECONDS_TO_ANSWER if asked else SECONDS_TO_ASK)

        def set_limit(self, seconds: float | None) -> None:
            if seconds == self.limit:
                return
            if self.timer is not None:
                self.timer.cancel()
            self.limit, self.timer = seconds, None
            if seconds is not None:
                self.timer = self.loop.call_later(seconds, self.transport.abort)

    return BoundedProtocol


def make_server(app: Any, port_in_use: socket.socket) -> Any:
    """Make the server of a page, uvicorn's `Server`.

    Args:
      app: The page, an ASGI application.
      port_in_use: The socket of `open_socket`.
    """
    import uvicorn

    config = uvicorn.Config(
        Gate(app, own_names(port_in_use)),
        http=_bounded_protocol(),
        h11_max_incomplete_event_size=MAX_HEADER,
        log_level="warning",
        limit_concurrency=MAX_CONNECTIONS,
        ws_max_size=MAX_MESSAGE,
        timeout_graceful_shutdown=SECONDS_TO_CLOSE,
        server_header=False,
    )
    return uvicorn.Server(config)


def serve(app: Any, port_in_use: socket.socket) -> None:
    """Serve until the program is interrupted; arguments as of `make_server`."""
    make_server(app, port_in_use).run(sockets=[port_in_use])
