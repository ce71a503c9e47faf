"""The websocket protocol of openpi (Physical Intelligence): the unmodified `openpi-client` from PyPI can drive a robot with it.

A client connects and receives the policy's metadata. Then each binary message is an observation, a msgpack map in which an array
is a map of "__ndarray__", "data", "dtype" and "shape"; each answer is a map of actions and "server_timing". An error is sent as
one line of text, which the client raises. Internal errors are not exposed: their details go to the server's log only.
"""

import asyncio
import hmac
import logging
import math
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http import HTTPStatus
from typing import Protocol

import msgpack
import numpy as np
from websockets.asyncio.server import Server, ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from nanochat.errors import UserError

logger = logging.getLogger(__name__)
LOCAL = ("127.0.0.1", "::1", "localhost")
MAX_MESSAGE = 16 * 2**20  # bytes: a few camera frames
MAX_CONNECTIONS = 8
MAX_QUEUE = 1  # messages read ahead; the client waits for each answer before the next observation
MAX_ITEMS = 1024  # items in one list or map of a message
MAX_VALUES = (
    10_000  # items in all lists and maps of a message: an item needs up to 100 times its message size in memory
)
IDLE_S = 600  # a connection without an observation for this many seconds is closed
# A fixed table, because np.dtype also parses comma-separated lists, and needs seconds for a long one
DTYPES = {
    dtype.str: dtype
    for order in "<>"
    for dtype in (np.dtype(order + kind) for kind in "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split())
}


class RobotPolicy(Protocol):
    """What the server needs, such as serving.policy.SafePolicy.

    metadata: sent to every client when it connects.
    session: returns a new function for one connection, observation -> answer; its UserErrors are sent to the client.
    """

    metadata: dict

    def session(self) -> Callable[[dict], dict]: ...


async def start_server(
    policy: RobotPolicy, host: str = "127.0.0.1", port: int = 8000, token: str | None = None
) -> Server:
    """Serve until the returned server is closed. port: 0 for any free port. token: what clients must send (their `api_key`).

    Raises OSError if the address is not available.
    """
    if host not in LOCAL and token is None:
        logger.warning("everyone who can reach %s port %d can move this robot: set a token", host, port)
    worker = ThreadPoolExecutor(1)  # the model runs outside the event loop, one observation at a time
    connections: set[ServerConnection] = set()

    def admit(connection: ServerConnection, request):
        """Before the handshake: health checks, the token, and the number of connections."""
        if request.path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        given = ", ".join(request.headers.get_all("Authorization"))
        if token is not None and not hmac.compare_digest(given.encode(), f"Api-Key {token}".encode()):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "wrong or missing token\n")
        if len(connections) >= MAX_CONNECTIONS:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections\n")
        return None

    async def handle(connection: ServerConnection) -> None:
        connections.add(connection)
        try:
            await answer_observations(connection, policy, worker)
        except ConnectionClosed:
            logger.info("%s disconnected", connection.remote_address)
        finally:
            connections.discard(connection)

    return await serve(
        handle,
        host,
        port,
        process_request=admit,
        origins=[None],  # browsers always send an origin: no web page can connect to a server on its visitor's machine
        compression=None,
        max_size=MAX_MESSAGE,
        max_queue=MAX_QUEUE,
    )


async def answer_observations(connection: ServerConnection, policy: RobotPolicy, worker: ThreadPoolExecutor) -> None:
    """Answer the observations of one connection, in order, until it closes."""
    act, loop, previous_ms = policy.session(), asyncio.get_running_loop(), None
    await connection.send(msgpack.packb(policy.metadata, default=pack_array))
    while True:
        try:
            async with asyncio.timeout(IDLE_S):
                message = await connection.recv()
        except TimeoutError:
            return await connection.close(reason=f"no observation for {IDLE_S} s")
        since = time.perf_counter()
        answer = await loop.run_in_executor(worker, answer_to, message, act, previous_ms)
        await connection.send(answer)
        if isinstance(answer, bytes):
            previous_ms = 1e3 * (time.perf_counter() - since)


def answer_to(message: bytes | str, act: Callable[[dict], dict], previous_ms: float | None) -> bytes | str:
    """The packed actions for an observation, or one line of text with the error. Runs outside the event loop.

    previous_ms: how long the connection's previous answer took, from receiving its observation to sending it.
    """
    try:
        observation, since = unpack(message), time.perf_counter()
        actions = act(observation)
        timing = {"infer_ms": 1e3 * (time.perf_counter() - since)}
        if previous_ms is not None:
            timing["prev_total_ms"] = previous_ms
        return msgpack.packb(actions | {"server_timing": timing}, default=pack_array)
    except UserError as error:
        line = " ".join(str(error).split())[:500] or f"invalid observation ({type(error).__name__})"
        logger.info("refused an observation: %s", line)
        return line
    except Exception:  # does not expose internal errors to the client
        logger.exception("the policy failed")
        return "internal error"


async def serve_policy(policy: RobotPolicy, host: str, port: int, token: str | None) -> None:
    """Serve until SIGTERM or until the task is cancelled (Ctrl-C). Open connections are closed with code 1001, going away."""
    server = await start_server(policy, host, port, token)
    address = ", ".join(f"ws://{name[0]}:{name[1]}" for name in (s.getsockname() for s in server.sockets))
    print(f"serving {address}; press Ctrl-C to stop", flush=True)
    with suppress(NotImplementedError):  # Windows
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.close)
    try:
        await server.wait_closed()
    finally:
        server.close()
        await server.wait_closed()


# ---- msgpack with arrays ----


def unpack(message: bytes | str) -> dict:
    """The observation in a message. Raises ValueError for anything but a map of plain values and numeric arrays."""
    if isinstance(message, str):
        raise UserError("an observation must be a binary msgpack message, got text")
    values = 0

    def counted(item: dict | list):
        nonlocal values
        values += len(item)
        if values > MAX_VALUES:
            raise UserError(f"the message has more than {MAX_VALUES} values outside of arrays")
        return unpack_array(item) if isinstance(item, dict) else item

    try:
        found = msgpack.unpackb(
            message,
            object_hook=counted,
            list_hook=counted,
            max_map_len=MAX_ITEMS,
            max_array_len=MAX_ITEMS,
            max_ext_len=0,
        )
    except ValueError as error:
        raise UserError(f"the message is not valid msgpack: {str(error) or type(error).__name__}") from error
    except (TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise UserError(f"the message is not valid msgpack: {type(error).__name__}") from error
    if not isinstance(found, dict):
        raise UserError(f"an observation must be a map, got {type(found).__name__}")
    return found


def unpack_array(item: dict):
    """Decode a map that encodes a numpy array or scalar; return any other map unchanged. Raises ValueError."""
    if b"__ndarray__" in item:
        dtype, data, shape = checked_dtype(item.get(b"dtype")), item.get(b"data"), item.get(b"shape")
        if not isinstance(data, bytes) or not isinstance(shape, (list, tuple)) or len(shape) > 8:
            raise UserError("an array needs bytes and a shape of at most 8 axes")
        if not all(type(n) is int and n >= 0 for n in shape):
            raise UserError("the shape of an array must be non-negative integers")
        if math.prod(shape) * dtype.itemsize != len(data):
            raise UserError(f"an array of shape {shape} and type {dtype} does not match its {len(data)} bytes of data")
        return np.frombuffer(data, dtype).reshape(shape)
    if b"__npgeneric__" in item:
        value = item.get(b"data")
        if not isinstance(value, (bool, int, float)):
            raise UserError("a numpy scalar needs a number as its data")
        return checked_dtype(item.get(b"dtype")).type(value)
    return item


def checked_dtype(name) -> np.dtype:
    """The dtype of a boolean, integer or float type name. Others are refused: unpacking an object array can run code."""
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise UserError(f"arrays must hold booleans, integers or floats, got the type {str(name)[:40]!r}")
    return dtype


def pack_array(value):
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"cannot send a {type(value).__name__}")
