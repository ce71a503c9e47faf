"""The policy's endpoints: openpi's websocket at / and /policy, and POST /act for one observation as JSON. No torch."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
from fastapi import APIRouter, WebSocket
from fastapi.responses import PlainTextResponse
from starlette.websockets import WebSocketDisconnect
from websockets.exceptions import ConnectionClosed

from nanochat.files import short_repr
from nanochat.serving.models import Limits
from nanochat.serving.openpi import MAX_CLIENTS, Places, RobotPolicy, Run, serve_connection
from nanochat.serving.policy import camera_keys
from nanochat.serving.problems import ApiError
from nanochat.serving.prompts import picture_at
from nanochat.serving.seen import opened
from nanochat.serving.sources import Sources

MAX_SESSIONS = 256  # of POST /act


def actions_router(
    policy: RobotPolicy | None, run: Run | None, sources: Sources, limits: Limits, max_clients: int = MAX_CLIENTS
) -> APIRouter:
    """run: runs the policy's function outside of the event loop, one at a time."""
    router, places, sessions = APIRouter(tags=["actions"]), Places(max_clients), Sessions(policy)

    @router.post("/act", summary="The next actions of a robot")
    async def act(body: dict[str, Any]):
        """One observation in the words of openpi: "observation/image" (or "observation/NAME" for each camera) as a data URI or
        base64, "observation/state" as a list of numbers, and the instruction as "prompt". "session": any name; the largest
        allowed change between actions is measured from the last action of the session."""
        if policy is None:
            raise ApiError(503, "this server has no policy: nanochat serve robot has one", code="no_policy")
        name = body.pop("session", None)
        if name is not None and not (isinstance(name, str) and 0 < len(name) <= 100):
            raise ApiError(400, f"session must be a text of 1 to 100 characters, got {short_repr(name)}", "session")
        observation = await with_pictures(body, policy.metadata.get("cameras", ()), sources, limits)
        step, since = sessions.find(name), time.perf_counter()
        actions = (await run(lambda: step(observation)))["actions"]
        return {"actions": actions.tolist(), "server_timing": {"infer_ms": 1e3 * (time.perf_counter() - since)}}

    @router.get("/policy", summary="What clients of the policy need to know")
    async def metadata():
        if policy is None:
            raise ApiError(503, "this server has no policy: nanochat serve robot has one", code="no_policy")
        return policy.metadata

    async def converse(websocket: WebSocket):
        if policy is None or places.full:
            why = "this server has no policy" if policy is None else "too many connections"
            return await websocket.send_denial_response(PlainTextResponse(f"{why}\n", 503))
        await websocket.accept()
        connection = Socket(websocket)
        try:
            await serve_connection(connection, policy, places, run)
        finally:
            connection.reader.cancel()

    router.add_api_websocket_route("/", converse)
    router.add_api_websocket_route("/policy", converse)
    return router


class Sessions:
    """Functions of a policy by the name of a session; the least recently used one is forgotten. Without a name, a new one."""

    def __init__(self, policy: RobotPolicy | None):
        self.policy, self.found = policy, OrderedDict()

    def find(self, name: str | None) -> Callable[[dict], dict]:
        if name is None:
            return self.policy.session()
        self.found[name] = self.found.pop(name, None) or self.policy.session()
        if len(self.found) > MAX_SESSIONS:
            self.found.popitem(last=False)
        return self.found[name]


async def with_pictures(body: dict, cameras: Sequence[str], sources: Sources, limits: Limits) -> dict:
    """The observation with its pictures as (H, W, 3) uint8 arrays."""
    keys = [key for i, name in enumerate(cameras or [""]) for key in camera_keys(name, i == 0)]
    found = dict(body)
    for key in keys:
        if isinstance(found.get(key), str):
            data = await picture_at(found[key], sources, key)
            found[key] = np.asarray(await asyncio.to_thread(opened, data, key, limits.max_pixels))
    return found


class Socket:
    """A websocket of the HTTP server as openpi's protocol uses it, see `openpi.Connection`. Messages are read ahead by one, so
    that a client that goes away is noticed while it waits."""

    def __init__(self, websocket: WebSocket):
        self.websocket, self.remote_address, self.is_open = websocket, websocket.client, True
        self.messages: asyncio.Queue[bytes | str | None] = asyncio.Queue(1)  # None: it is closed
        self.reader = asyncio.create_task(self.read())

    async def read(self) -> None:
        while True:
            message = await self.websocket.receive()
            if message["type"] == "websocket.disconnect":
                self.is_open = False
                return await self.messages.put(None)
            await self.messages.put(message["text"] if message.get("bytes") is None else message["bytes"])

    async def recv(self) -> bytes | str:
        message = await self.messages.get()
        if message is None:
            raise ConnectionClosed(None, None)
        return message

    async def send(self, message: bytes | str) -> None:
        try:
            await (self.websocket.send_text if isinstance(message, str) else self.websocket.send_bytes)(message)
        except (RuntimeError, WebSocketDisconnect) as error:
            raise ConnectionClosed(None, None) from error

    async def close(self, code: int = 1000, reason: str = "") -> None:
        if self.is_open:
            self.is_open = False
            with suppress(RuntimeError, WebSocketDisconnect):
                await self.websocket.close(code, reason)
