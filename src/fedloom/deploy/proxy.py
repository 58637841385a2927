"""The public entry point of a federation. It forwards Flower's node API (`/v1/fleet/...`) to the SuperLink and refuses everything else.

The SuperLink serves its control API on the same port as its node API, without authentication. Anyone who can reach it can start runs and
register nodes. It therefore listens only on the loopback interface. Nodes connect to this proxy, which has the same certificate.

Flower's nodes sign a timestamp in the headers of every request. The proxy checks this signature before it reads the body, so a client
without a key cannot fill the proxy's memory with bodies. The proxy accepts each signature only once, so a captured header cannot be used
again. The SuperLink checks the signature again.

This module imports neither torch nor the rest of fedloom, except for the parts of this package that it needs.
"""

from __future__ import annotations

import asyncio
import re
import ssl
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fedloom.deploy.doors import DOOR, Door, Server
from fedloom.deploy.node_keys import KeyRing, Refused

ALLOWED = re.compile(rb"/v1/fleet/[a-z]+(-[a-z]+)*")
MAX_BODY = 64 * 2**20  # maximum size in bytes; Flower splits tensors into chunks of 5 MB
HOP = {b"connection", b"host", b"keep-alive", b"te", b"trailer", b"transfer-encoding", b"upgrade", b"content-length"}
TIMEOUT_S = 60.0  # limit for the SuperLink's answer and for a body. A large body has more time:
BODY_RATE = 64 * 2**10  # average number of bytes per second that a body must have after that
LOWEST_RATE = 16 * 2**10  # bytes per second that a body must have over each STEP_S, after the first GRACE_S
STEP_S, GRACE_S = 10.0, 5.0
MAX_HELD = 2**30  # maximum number of bytes of all bodies together
MAX_HELD_BY_NODE = 2**28


def allowed(method: str, path: bytes) -> bool:
    """Return whether a request is forwarded: a POST request to a plain path of the node API, without escapes or relative segments."""
    return method == "POST" and ALLOWED.fullmatch(path) is not None


def make_app(upstream: str, client: httpx.AsyncClient, keys: KeyRing) -> Starlette:
    """Return the proxy as an ASGI application.

    Args:
        upstream: the SuperLink, such as `https://127.0.0.1:9091`.
        client: HTTP client for connections to the SuperLink.
        keys: the keys whose requests are forwarded.
    """
    return Starlette(routes=[Route("/{path:path}", _Forward(upstream, client, keys))])


class _Forward:
    """Answers requests with any HTTP method."""

    def __init__(self, upstream: str, client: httpx.AsyncClient, keys: KeyRing) -> None:
        self._upstream, self._client, self._keys = upstream, client, keys
        self._held = Counter[bytes]()  # number of bytes of bodies that are being read and forwarded, by key

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        response = await self._answer(request)
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        path = request.scope.get("raw_path") or b""
        if not allowed(request.method, path) or request.url.query:
            return _refusal("forbidden", 403)
        if "flwr-public-key" not in request.headers:
            return _refusal("not signed", 401)
        key = self._keys.signer(request.headers)
        if isinstance(key, Refused):
            return _refusal_of_key(key) if key.status == 412 else _refusal(key.reason, key.status)
        if isinstance(door := request.scope.get(DOOR), Door):
            door.known = True
        body = bytearray()
        try:
            return await self._read(request, body, key) or await self._forward(request, path.decode(), body)
        finally:
            self._held[key] -= len(body)

    async def _read(self, request: Request, body: bytearray, key: bytes) -> Response | None:
        """Read the body of a request. Return a refusal if it is too large or too slow, or if all bodies together are too large."""
        step = STEP_S * LOWEST_RATE
        try:
            async with asyncio.timeout(min(TIMEOUT_S, GRACE_S + STEP_S)) as limit:
                clock = asyncio.get_running_loop().time
                end, step_end, step_at = clock() + TIMEOUT_S, clock() + GRACE_S + STEP_S, step
                async for chunk in request.stream():
                    body += chunk
                    self._held[key] += len(chunk)
                    if len(body) > MAX_BODY:
                        return PlainTextResponse("too large", 413)
                    if self._held[key] > MAX_HELD_BY_NODE or self._held.total() > MAX_HELD:
                        return PlainTextResponse("too busy", 503)
                    if len(body) >= step_at:
                        step_end, step_at = clock() + STEP_S, len(body) + step
                    limit.reschedule(min(end + len(body) / BODY_RATE, step_end))
        except TimeoutError:
            return PlainTextResponse("too slow", 408)
        return None

    async def _forward(self, request: Request, path: str, body: bytearray) -> Response:
        headers = [(name, value) for name, value in request.headers.raw if name not in HOP]
        try:
            answer = await self._client.post(f"{self._upstream}{path}", content=bytes(body), headers=headers)
        except httpx.HTTPError:
            return PlainTextResponse("the SuperLink does not answer", 503)
        kept = {k: v for k, v in answer.headers.items() if k.encode() not in HOP and k != "content-encoding"}
        return Response(answer.content, answer.status_code, kept)


def _refusal(words: str, status: int) -> Response:
    """Return an answer after which the connection is closed without reading the body."""
    return PlainTextResponse(words, status, {"connection": "close"})


def _refusal_of_key(refused: Refused) -> Response:
    """Return Flower's answer to a node that it cannot activate. The SuperNode then prints the reason; after a 401, it prints none."""
    failed = {"code": 2004, "detail": f"Failed to activate SuperNode: {refused.reason}"}
    return JSONResponse(failed, refused.status, {"connection": "close"})


def make_server(host: str, port: int, superlink_port: int, folder: Path) -> Server:
    """Return a federation's proxy, ready to run. `folder` contains its certificate and the certificate of the authority."""
    trust = ssl.create_default_context(cafile=str(folder / "ca.crt"))
    keys = KeyRing(folder / "keys")
    keys.refresh()
    client = httpx.AsyncClient(verify=trust, timeout=TIMEOUT_S, trust_env=False)
    config = uvicorn.Config(
        make_app(f"https://127.0.0.1:{superlink_port}", client, keys),
        host=host,
        port=port,
        http=type("Door", (Door,), {"ring": keys}),
        ws="none",
        loop="asyncio",  # the handshake limits need it; otherwise, an installed uvloop would be used
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
