"""What happens to a request before it is read: who may come in, and how much they may send. Plain ASGI, no framework.

Browsers send cookies and requests for any web page that asks them to. So a request that names another origin than this server is
refused unless --cors allows it, and a server that listens on this machine only answers to the names of this machine (or a page
could reach it by a DNS name of its own, "DNS rebinding").
"""

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from nanochat.serving.problems import ApiError, error_response

logger = logging.getLogger(__name__)
OPEN_PATHS = ("/", "/health", "/healthz", "/docs", "/openapi.json")  # for everyone, like everything below /page/
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
BODY_S = 30.0  # for the whole body of a request
MAX_OPEN = 512  # requests at a time
MAX_HELD = 512 * 2**20  # bytes of bodies at a time


@dataclass(frozen=True)
class Entrance:
    """api_key: what clients must send. local: the server listens on this machine only. cors: origins of other pages that may ask,
    or * for all. max_bytes: of a body."""

    api_key: str | None = None
    local: bool = True
    cors: Sequence[str] = ()
    max_bytes: int = 32 * 2**20


class Guard:
    """Wraps an ASGI app. count: called with the path, the status and the seconds of each request."""

    def __init__(self, app, entrance: Entrance, count: Callable[[str, int, float], None]):
        self.app, self.entrance, self.count = app, entrance, count
        self.open = self.held = 0

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        headers: dict[str, str] = {}
        for name, value in ((name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]):
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        cors = self.cors_headers(headers.get("origin"))
        try:
            self.check(scope, headers)
        except ApiError as error:
            return await self.refuse(error, scope, receive, send, cors)
        if scope["type"] == "websocket":
            return await self.app(scope, receive, send)
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await send({"type": "http.response.start", "status": 204, "headers": cors})
            return await send({"type": "http.response.body", "body": b""})
        await self.answer(scope, receive, send, headers, cors)

    async def answer(self, scope, receive, send, headers: dict[str, str], cors: list) -> None:
        since, status, held = time.perf_counter(), 500, 0

        async def counted(message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *cors]
            await send(message)

        self.open += 1
        try:
            body = await self.body(receive, headers)
            held = len(body)
            self.held += held
            await self.app(scope, replayed(body, receive), counted)
        except ApiError as error:
            await self.refuse(error, scope, receive, counted, [])
        finally:
            self.open, self.held = self.open - 1, self.held - held
            self.count(scope["path"], status, time.perf_counter() - since)

    def check(self, scope, headers: dict[str, str]) -> None:
        entrance, path = self.entrance, scope["path"]
        host = headers.get("host", "")
        if entrance.local and host.rsplit(":", 1)[0] not in LOCAL_NAMES and host not in LOCAL_NAMES:
            raise ApiError(403, f"this server answers to {', '.join(LOCAL_NAMES)} only (--host)", code="wrong_host")
        origin = headers.get("origin")
        if origin and urlsplit(origin).netloc != host and not {"*", origin} & set(entrance.cors):
            raise ApiError(403, "pages of other origins may not ask this server (--cors)", code="wrong_origin")
        preflight = scope["type"] == "http" and scope["method"] == "OPTIONS"
        if (
            entrance.api_key is None
            or path in OPEN_PATHS
            and scope["type"] == "http"
            or path.startswith("/page/")
            or preflight
        ):
            return
        given = headers.get("authorization", "").partition(" ")
        known = given[0].lower() in ("bearer", "api-key")
        if not (known and hmac.compare_digest(given[2].strip().encode(), entrance.api_key.encode())):
            raise ApiError(401, "wrong or missing API key: send Authorization: Bearer KEY", code="invalid_api_key")

    def cors_headers(self, origin: str | None) -> list[tuple[bytes, bytes]]:
        if not origin or not {"*", origin} & set(self.entrance.cors):
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")), (b"vary", b"origin"),
            (b"access-control-allow-headers", b"authorization, content-type"),
            (b"access-control-allow-methods", b"GET, POST"),
        ]  # fmt: skip

    async def body(self, receive, headers: dict[str, str]) -> bytes:
        """The whole body. Raises ApiError where it is too large or too slow, or where there are too many requests."""
        most = self.entrance.max_bytes
        too_large = ApiError(413, f"a request has at most {most:,} bytes here", code="request_too_large")
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > most:
            raise too_large
        if self.open > MAX_OPEN or self.held > MAX_HELD:
            raise ApiError(429, "too many requests at a time", code="rate_limit_exceeded", retry_after=1)
        found = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    found += message.get("body", b"")
                    if len(found) > most:
                        raise too_large
                    if message["type"] == "http.disconnect" or not message.get("more_body"):
                        return bytes(found)
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {BODY_S:g} s", code="timeout") from None

    async def refuse(self, error: ApiError, scope, receive, send, cors: list) -> None:
        logger.info("refused %s: %s", (scope.get("client") or ["a client"])[0], error)
        response = error_response(error)
        response.raw_headers += cors
        if scope["type"] == "websocket":
            await receive()  # its "connect"
            head = {"type": "websocket.http.response.start", "status": error.status, "headers": response.raw_headers}
            await send(head)
            return await send({"type": "websocket.http.response.body", "body": response.body})
        await response(scope, receive, send)


def replayed(body: bytes, receive):
    """An ASGI `receive` that gives a body that was read already, then what the original one gives."""
    given = False

    async def again():
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
