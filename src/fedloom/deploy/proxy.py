"""The public entry point of a federation: forwards Flower's node API (`/v1/fleet/...`) to the SuperLink, and refuses everything else.

The SuperLink serves its control API on the same port as its node API, without authentication: anyone who reaches it can start runs and
register nodes. It therefore listens only on the loopback interface. Nodes connect to this proxy, which has the same certificate.

This file is run by its path, so that neither torch nor the rest of fedloom is imported.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import sys
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

ALLOWED = re.compile(rb"/v1/fleet/[a-z]+(-[a-z]+)*")
MAX_BODY = 64 * 2**20  # bytes; Flower splits tensors into chunks of 5 MB
HOP = {b"connection", b"host", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"content-length"}
TIMEOUT_S = 60.0
HEADER_S = 10.0  # for a TLS handshake, and for the whole header of a request
MAX_CONNECTIONS = 800  # with httpx's 100 connections to the SuperLink, below the usual limit of 1024 open files
MAX_HELD = 2**30  # bytes of all bodies together; senders are not authenticated before the body is read


def allowed(method: str, path: bytes) -> bool:
    """Return whether a request is forwarded: a POST to a plain path of the node API, without escapes or relative segments."""
    return method == "POST" and ALLOWED.fullmatch(path) is not None


def make_app(upstream: str, client: httpx.AsyncClient) -> Starlette:
    """Return the proxy as an ASGI application.

    Args:
        upstream: the SuperLink, such as `https://127.0.0.1:9091`.
        client: HTTP client for connections to the SuperLink.
    """
    return Starlette(routes=[Route("/{path:path}", _Forward(upstream, client))])


class _Forward:
    """Answer requests of any method."""

    def __init__(self, upstream: str, client: httpx.AsyncClient) -> None:
        self._upstream, self._client = upstream, client
        self._held = 0  # bytes of bodies that are being read and forwarded

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        response = await self._answer(request)
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        path = request.scope.get("raw_path") or b""
        if not allowed(request.method, path) or request.url.query:
            return PlainTextResponse("forbidden", 403)
        body = bytearray()
        try:
            return await self._forward(request, path.decode(), body)
        except TimeoutError:
            return PlainTextResponse("too slow", 408)
        finally:
            self._held -= len(body)

    async def _forward(self, request: Request, path: str, body: bytearray) -> Response:
        async with asyncio.timeout(TIMEOUT_S):
            async for chunk in request.stream():
                body += chunk
                self._held += len(chunk)
                if len(body) > MAX_BODY:
                    return PlainTextResponse("too large", 413)
                if self._held > MAX_HELD:
                    return PlainTextResponse("too busy", 503)
        headers = [(name, value) for name, value in request.headers.raw if name not in HOP]
        try:
            answer = await self._client.post(f"{self._upstream}{path}", content=bytes(body), headers=headers)
        except httpx.HTTPError:
            return PlainTextResponse("the SuperLink does not answer", 503)
        kept = {k: v for k, v in answer.headers.items() if k.encode() not in HOP and k != "content-encoding"}
        return Response(answer.content, answer.status_code, kept)


class Door(H11Protocol):
    """One connection. It is closed if there are too many connections, or if the header of a request does not arrive in time.

    uvicorn has neither limit. Its timeout for idle connections starts after an answer and stops at the next byte, and its
    `limit_concurrency` answers 503 to requests but keeps connections that send nothing.
    """

    _cut: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout, or close the connection if there are too many."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            transport.abort()
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        """Stop the timeout if this completes a header. Start it for part of a header, or for the rest of a refused body."""
        super().data_received(data)
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
    client = httpx.AsyncClient(verify=trust, timeout=TIMEOUT_S, trust_env=False)
    config = uvicorn.Config(
        make_app(f"https://127.0.0.1:{superlink_port}", client),
        host=host,
        port=port,
        http=Door,
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
