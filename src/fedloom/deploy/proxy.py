"""The public entry point of a federation: forwards Flower's node API (`/v1/fleet/...`) to the SuperLink, and refuses everything else.

The SuperLink serves its control API on the same port as its node API, without authentication: anyone who can reach it can start runs
and register nodes. It therefore listens only on the loopback interface. Nodes connect to this proxy, which has the same certificate.

Flower's nodes sign a timestamp in the headers of every request. The proxy checks this signature before it reads the body, so a client
without a key cannot fill its memory with bodies. The SuperLink checks the signature again.

This file is run by its path, so that neither torch nor the rest of fedloom is imported.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import sys
import time
from base64 import b64decode
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

ALLOWED = re.compile(rb"/v1/fleet/[a-z]+(-[a-z]+)*")
MAX_BODY = 64 * 2**20  # bytes; Flower splits tensors into chunks of 5 MB
HOP = {b"connection", b"host", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"content-length"}
TIMEOUT_S = 60.0  # for the SuperLink's answer, and for a body, which has more time if it is large:
BODY_RATE = 64 * 2**10  # bytes per second that a body must have on average after that
HEADER_S = 10.0  # for a TLS handshake, and for the whole header of a request
CLOSE_S = 1.0  # for the other end to read a refusal
MAX_CONNECTIONS = 800  # with httpx's 100 connections to the SuperLink, below the usual limit of 1024 open files
MAX_UNKNOWN = 200  # connections without a request that was signed by a node
MAX_HELD = 2**30  # bytes of all bodies together
MAX_HELD_BY_NODE = 2**28
PER_ADDRESS, PER_NODE = (
    16,
    4,
)  # connections from one address: at least 16, and 4 for each node, because all nodes may be behind one router
WINDOW_S = (-5.0, 305.0)  # age of a signed timestamp; the same as Flower's
DOOR = "fedloom.door"  # key of a request's connection in its scope
REREAD_S = 1.0  # shortest interval between two checks of the folder of keys


def allowed(method: str, path: bytes) -> bool:
    """Return whether a request is forwarded: a POST to a plain path of the node API, without escapes or relative segments."""
    return method == "POST" and ALLOWED.fullmatch(path) is not None


class NodeKeys:
    """The public keys of the federation's nodes, in a folder that is read again when its files change."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen: object = None
        self._looked = 0.0
        self.keys: dict[bytes, ec.EllipticCurvePublicKey] = {}  # by PEM, as in Flower's headers

    def refresh(self) -> None:
        """Read the keys again if a file changed."""
        if self._looked and time.monotonic() - self._looked < REREAD_S:
            return
        self._looked = time.monotonic()
        files = sorted(self._folder.glob("*.pub"))
        seen = [(file, file.stat().st_mtime_ns) for file in files]
        if seen != self._seen:
            loaded = [load_ssh_public_key(file.read_bytes()) for file in files]
            pems = [key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo) for key in loaded]
            self._seen, self.keys = seen, dict(zip(pems, loaded, strict=True))  # type: ignore[arg-type]

    def signer(self, headers: Mapping[str, str]) -> bytes | None:
        """Return the key of the node that signed a request recently, or None. With an unknown key, the signature is not checked."""
        self.refresh()
        try:
            pem = b64decode(headers["flwr-public-key"], validate=True)
            text = headers["flwr-timestamp"]
            age = (datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()
            if pem not in self.keys or not WINDOW_S[0] < age < WINDOW_S[1]:
                return None
            signature = b64decode(headers["flwr-signature"], validate=True)
            self.keys[pem].verify(signature, text.encode("ascii"), ec.ECDSA(hashes.SHA256()))
        except (KeyError, ValueError, TypeError, InvalidSignature):
            return None
        return pem


def make_app(upstream: str, client: httpx.AsyncClient, keys: NodeKeys) -> Starlette:
    """Return the proxy as an ASGI application.

    Args:
        upstream: the SuperLink, such as `https://127.0.0.1:9091`.
        client: HTTP client for connections to the SuperLink.
        keys: the keys whose requests are forwarded.
    """
    return Starlette(routes=[Route("/{path:path}", _Forward(upstream, client, keys))])


class _Forward:
    """Answer requests with any HTTP method."""

    def __init__(self, upstream: str, client: httpx.AsyncClient, keys: NodeKeys) -> None:
        self._upstream, self._client, self._keys = upstream, client, keys
        self._held = Counter[bytes]()  # bytes of bodies that are being read and forwarded, by key

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        response = await self._answer(request)
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        path = request.scope.get("raw_path") or b""
        if not allowed(request.method, path) or request.url.query:
            return _refusal("forbidden", 403)
        key = self._keys.signer(request.headers)
        if key is None:
            return _refusal_of_key() if "flwr-public-key" in request.headers else _refusal("not signed", 401)
        if isinstance(door := request.scope.get(DOOR), Door):
            door.known = True
        body = bytearray()
        try:
            return await self._forward(request, path.decode(), body, key)
        except TimeoutError:
            return PlainTextResponse("too slow", 408)
        finally:
            self._held[key] -= len(body)

    async def _forward(self, request: Request, path: str, body: bytearray, key: bytes) -> Response:
        async with asyncio.timeout(TIMEOUT_S) as limit:
            until = limit.when() or 0.0
            async for chunk in request.stream():
                body += chunk
                self._held[key] += len(chunk)
                if len(body) > MAX_BODY:
                    return PlainTextResponse("too large", 413)
                if self._held[key] > MAX_HELD_BY_NODE or self._held.total() > MAX_HELD:
                    return PlainTextResponse("too busy", 503)
                limit.reschedule(until + len(body) / BODY_RATE)
        headers = [(name, value) for name, value in request.headers.raw if name not in HOP]
        try:
            answer = await self._client.post(f"{self._upstream}{path}", content=bytes(body), headers=headers)
        except httpx.HTTPError:
            return PlainTextResponse("the SuperLink does not answer", 503)
        kept = {k: v for k, v in answer.headers.items() if k.encode() not in HOP and k != "content-encoding"}
        return Response(answer.content, answer.status_code, kept)


def _refusal(words: str, status: int) -> Response:
    """Return an answer after which the connection is closed, without reading the body."""
    return PlainTextResponse(words, status, {"connection": "close"})


def _refusal_of_key() -> Response:
    """Return Flower's answer to a node that it cannot activate, so that the SuperNode prints the reason; after a 401 it prints none."""
    reason = "its key is not among this federation's keys, or its clock differs by more than five minutes"
    failed = {"code": 2004, "detail": f"Failed to activate SuperNode: {reason}"}
    return JSONResponse(failed, 412, {"connection": "close"})


class Door(H11Protocol):
    """One connection. It is closed if there are too many connections, or if the header of a request does not arrive in time.

    uvicorn has neither limit. Its timeout for idle connections starts after an answer and stops at the next byte, and its
    `limit_concurrency` answers 503 to requests but keeps connections that send nothing.
    """

    _cut: asyncio.TimerHandle | None = None
    since = 0.0  # time of the connection
    known = False  # whether a request on this connection was signed by a node
    per_address = PER_ADDRESS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout, or close the connection if there is no room for it."""
        super().connection_made(transport)
        self.since = self.loop.time()
        if self._has_room():
            self._watch()
        else:
            transport.abort()

    def _has_room(self) -> bool:
        """Return whether there is room for this connection. If it exceeds a limit, close the oldest connection of a stranger first.

        A node signs its first request as soon as it is connected, so it replaces strangers that hold connections.
        """
        doors = [door for door in self.connections if isinstance(door, Door) and not door.transport.is_closing()]
        same = [door for door in doors if self.client and door.client and door.client[0] == self.client[0]]
        unknown = [door for door in doors if not door.known]
        crowded = same if len(same) > self.per_address else doors
        if crowded is doors and len(doors) <= MAX_CONNECTIONS and len(unknown) <= MAX_UNKNOWN:
            return True
        strangers = [door for door in crowded if door is not self and not door.known]
        if strangers:
            min(strangers, key=lambda door: door.since).transport.abort()
        return bool(strangers)

    def on_response_complete(self) -> None:
        """Do not wait long for the other end to close a connection that this end has closed."""
        super().on_response_complete()
        if self.transport.is_closing():
            self.loop.call_later(CLOSE_S, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        """Stop the timeout if this completes a header. Start it if part of a header, or of a refused body, has not arrived yet."""
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


class Server(uvicorn.Server):
    """uvicorn's server with a timeout for TLS handshakes, for which uvicorn has no setting."""

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Start listening."""
        loop = asyncio.get_running_loop()
        loop.create_server = partial(loop.create_server, ssl_handshake_timeout=HEADER_S)  # type: ignore[method-assign]
        await super().startup(sockets)


def make_server(host: str, port: int, superlink_port: int, folder: Path) -> Server:
    """Return a federation's proxy, ready to run. `folder` has its certificate and the authority's certificate."""
    trust = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    keys = NodeKeys(folder / "keys")
    keys.refresh()
    per_address = max(PER_ADDRESS, PER_NODE * len(keys.keys))
    client = httpx.AsyncClient(verify=trust, timeout=TIMEOUT_S, trust_env=False)
    config = uvicorn.Config(
        make_app(f"https://127.0.0.1:{superlink_port}", client, keys),
        host=host,
        port=port,
        http=type("Door", (Door,), {"per_address": per_address}),
        ws="none",
        ssl_certfile=folder / "server.crt",
        ssl_keyfile=folder / "server.key",
        log_level="warning",
        access_log=False,
        server_header=False,
        h11_max_incomplete_event_size=64 * 1024,
    )
    return Server(config)


if __name__ == "__main__":
    make_server(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])).run()
