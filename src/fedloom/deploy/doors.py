"""Connections of the public proxy: TLS handshakes, the headers of requests, and the number of connections.

uvicorn has no limits for these. Its timeout for idle connections starts after an answer and stops at the next byte. Its
`limit_concurrency` answers requests with 503, but keeps connections that send nothing.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from fedloom.deploy.node_keys import KeyRing

HEADER_S = 10.0  # time limit for a TLS handshake, and for the whole header of a request
CLOSE_S = 1.0  # time for the other end to read a refusal
# With 100 handshakes and httpx's 100 connections to the SuperLink, this is below the usual limit of 1024 open files.
MAX_CONNECTIONS = 800
MAX_UNKNOWN = 200  # maximum number of connections without a request signed by a node
MAX_HANDSHAKES, HANDSHAKES_PER_ADDRESS = 100, 50  # maximum numbers at the same time
# Connections from one address: at least 16, and 4 for each node, because all nodes may be behind one router.
PER_ADDRESS, PER_NODE = 16, 4
DOOR = "fedloom.door"  # key of the connection in the scope of a request


class Door(H11Protocol):
    """A connection. It is closed if there are too many connections, or if the header of a request does not arrive in time."""

    _cut: asyncio.TimerHandle | None = None
    since = 0.0  # time of the connection
    known = False  # whether a request on this connection was signed by a node
    ring: KeyRing | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout, or close the connection if there is no room for it."""
        super().connection_made(transport)
        self.since = self.loop.time()
        if self._has_room():
            self._watch()
        else:
            transport.abort()

    def _has_room(self) -> bool:
        """Return whether there is room for this connection. If it exceeds a limit, first close the oldest connection of an unknown client.

        A node signs its first request immediately after it connects, so it replaces unknown clients that hold connections.
        """
        doors = [door for door in self.connections if isinstance(door, Door) and not door.transport.is_closing()]
        same = [door for door in doors if self.client and door.client and door.client[0] == self.client[0]]
        unknown = [door for door in doors if not door.known]
        n_keys = len(self.ring.keys) if self.ring else 0
        crowded = same if len(same) > max(PER_ADDRESS, PER_NODE * n_keys) else doors
        if crowded is doors and len(doors) <= MAX_CONNECTIONS and len(unknown) <= MAX_UNKNOWN:
            return True
        strangers = [door for door in crowded if door is not self and not door.known]
        if strangers:
            min(strangers, key=lambda door: door.since).transport.abort()
        return bool(strangers)

    def on_response_complete(self) -> None:
        """Close the connection soon if this end has closed it, without waiting long for the other end."""
        super().on_response_complete()
        if self.transport.is_closing():
            self.loop.call_later(CLOSE_S, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        """Stop the timeout if the data complete a header. Start it if a part of a header, or of a refused body, is still missing."""
        super().data_received(data)
        if self.scope is not None:
            self.scope[DOOR] = self  # type: ignore[literal-required]
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timeout."""
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._cut is None:
            self._cut = self.loop.call_later(HEADER_S, self.transport.abort)

    def _stop(self) -> None:
        if self._cut is not None:
            self._cut.cancel()
            self._cut = None


class _Early(asyncio.Protocol):
    """A protocol that stores data that arrive with the end of a TLS handshake, before the connection has its own protocol."""

    def __init__(self) -> None:
        self.data = b""

    def data_received(self, data: bytes) -> None:
        """Store the data."""
        self.data += data


class Handshakes:
    """Connections whose TLS handshake is not complete. If there are too many, the oldest one is closed."""

    def __init__(self, context: ssl.SSLContext, make: Callable[[], asyncio.Protocol]) -> None:
        """Prepare the handshakes. `make` returns the protocol of a connection after its handshake."""
        self._context, self._make = context, make
        self._open: dict[asyncio.Transport, str] = {}  # addresses of the connections, oldest first
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, transport: asyncio.Transport) -> None:
        """Start the handshake of a new connection."""
        transport.pause_reading()  # until the handshake has its protocol
        address = str((transport.get_extra_info("peername") or ("",))[0])
        self._open[transport] = address
        same = [other for other, its in self._open.items() if its == address]
        crowded = same if len(same) > HANDSHAKES_PER_ADDRESS else [*self._open]
        if crowded is same or len(crowded) > MAX_HANDSHAKES:
            crowded[0].abort()
            self._open.pop(crowded[0])
        task = asyncio.get_running_loop().create_task(self._secure(transport))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _secure(self, transport: asyncio.Transport) -> None:
        loop, early = asyncio.get_running_loop(), _Early()
        try:
            async with asyncio.timeout(HEADER_S):
                secure = await loop.start_tls(transport, early, self._context, server_side=True)
        except OSError:  # ssl.SSLError and TimeoutError are OSErrors
            transport.abort()
            return
        finally:
            self._open.pop(transport, None)
        if secure is None or secure.is_closing():
            return
        protocol = self._make()
        secure.set_protocol(protocol)
        protocol.connection_made(secure)
        if early.data:
            protocol.data_received(early.data)


class _Arrival(asyncio.Protocol):
    """A connection before its handshake."""

    def __init__(self, handshakes: Handshakes) -> None:
        self._handshakes = handshakes

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the handshake."""
        assert isinstance(transport, asyncio.Transport)
        self._handshakes.begin(transport)


class Server(uvicorn.Server):
    """uvicorn's server with limits on TLS handshakes, for which uvicorn has no settings."""

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Start listening."""
        loop = asyncio.get_running_loop()
        listen = loop.create_server

        async def create_server(make: Callable[[], Any], *, ssl: ssl.SSLContext, **rest: Any) -> Any:
            handshakes = Handshakes(ssl, make)
            return await listen(lambda: _Arrival(handshakes), **rest)

        loop.create_server = create_server  # type: ignore[method-assign,assignment]
        await super().startup(sockets)
