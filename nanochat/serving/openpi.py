"""A policy behind a socket: openpi's protocol (Physical Intelligence), so that `openpi-client` from PyPI drives it unchanged.

A client connects by websocket and is sent the policy's metadata. Then each binary message is an observation, a msgpack map whose
arrays are maps themselves ("__ndarray__", "data", "dtype", "shape"), and each answer a map of actions with "server_timing". What
cannot be answered is told in one line of text, which the client raises as an error; details stay in this side's log.
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

logger = logging.getLogger(__name__)
LOCAL = ("127.0.0.1", "::1", "localhost")
MAX_MESSAGE = 16 * 2**20  # bytes: a few camera frames
MAX_CONNECTIONS = 8
MAX_QUEUE = 1  # messages read ahead; the client waits for each answer before it asks again
MAX_ITEMS = 1024  # of a list or map in a message
MAX_VALUES = 10_000  # of all lists and maps of a message: small ones take a hundred times their bytes in memory
IDLE_S = 600  # seconds without an observation, after which a connection is closed
# numpy would also read comma lists as structures, and takes seconds for a long one
DTYPES = {
    dtype.str: dtype
    for order in "<>"
    for dtype in (np.dtype(order + kind) for kind in "b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split())
}


class Servable(Protocol):
    """metadata: what clients are told. session: what answers one connection's observations; may raise ValueError for them."""

    metadata: dict

    def session(self) -> Callable[[dict], dict]: ...


async def start_server(policy: Servable, host: str = "127.0.0.1", port: int = 8000, token: str | None = None) -> Server:
    """Serve until the returned server is closed. port 0 is a free one. token: clients must know it (`api_key` of the client).

    Raises OSError where the address cannot be had.
    """
    if host not in LOCAL and token is None:
        logger.warning("anybody who can reach %s port %d can move this robot: set a token", host, port)
    worker = ThreadPoolExecutor(1)  # the network runs beside the loop, one observation at a time
    connections: set[ServerConnection] = set()

    def admit(connection: ServerConnection, request):
        """Before the handshake: health checks, and who may come in."""
        if request.path == "/healthz":
            return connection.respond(HTTPStatus.OK, "OK\n")
        given = ", ".join(request.headers.get_all("Authorization"))
        if token is not None and not hmac.compare_digest(given.encode(), f"Api-Key {token}".encode()):
            return connection.respond(HTTPStatus.UNAUTHORIZED, "a token is needed\n")
        if len(connections) >= MAX_CONNECTIONS:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "too many connections\n")
        return None

    async def talk(connection: ServerConnection) -> None:
        connections.add(connection)
        try:
            await converse(connection, policy, worker)
        except ConnectionClosed:
            logger.info("%s has gone", connection.remote_address)
        finally:
            connections.discard(connection)

    return await serve(
        talk,
        host,
        port,
        process_request=admit,
        origins=[None],  # browsers name theirs: no web page may reach a server on its reader's machine
        compression=None,
        max_size=MAX_MESSAGE,
        max_queue=MAX_QUEUE,
    )


async def converse(connection: ServerConnection, policy: Servable, worker: ThreadPoolExecutor) -> None:
    """Answer the observations of one connection until it is closed."""
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
    """The actions for an observation, packed, or the line that says why there are none. Runs beside the loop.

    previous_ms: what the connection's last answer took from the arrival of its observation to its departure.
    """
    try:
        observation, since = unpack(message), time.perf_counter()
        actions = act(observation)
        timing = {"infer_ms": 1e3 * (time.perf_counter() - since)}
        if previous_ms is not None:
            timing["prev_total_ms"] = previous_ms
        return msgpack.packb(actions | {"server_timing": timing}, default=pack_array)
    except ValueError as error:
        line = " ".join(str(error).split())[:500]
        logger.info("refused: %s", line)
        return line
    except Exception:  # whatever it is, the peer is told no more than that
        logger.exception("the policy failed")
        return "internal error"


async def run(policy: Servable, host: str, port: int, token: str | None) -> None:
    """Serve until SIGTERM, or until the task is cancelled, as by Ctrl-C; clients are told that the server goes."""
    server = await start_server(policy, host, port, token)
    address = ", ".join(f"ws://{name[0]}:{name[1]}" for name in (s.getsockname() for s in server.sockets))
    print(f"serving {address}; Ctrl-C ends it", flush=True)
    with suppress(NotImplementedError):  # Windows
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.close)
    try:
        await server.wait_closed()
    finally:
        server.close()
        await server.wait_closed()


# ---- msgpack with arrays ----


def unpack(message: bytes | str) -> dict:
    """An observation. Raises ValueError for anything but a map of plain values and arrays of numbers."""
    if isinstance(message, str):
        raise ValueError("an observation is a binary msgpack message, got text")
    values = 0

    def counted(item: dict | list):
        nonlocal values
        values += len(item)
        if values > MAX_VALUES:
            raise ValueError(f"more than {MAX_VALUES} values outside of arrays")
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
        raise ValueError(f"this is no observation in msgpack: {error or type(error).__name__}") from error
    except (TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise ValueError(f"this is no observation in msgpack: {type(error).__name__}") from error
    if not isinstance(found, dict):
        raise ValueError(f"an observation is a map, got {type(found).__name__}")
    return found


def unpack_array(item: dict):
    """A map that stands for an array or a number of numpy's becomes one; any other stays."""
    if b"__ndarray__" in item:
        dtype, data, shape = checked_dtype(item.get(b"dtype")), item.get(b"data"), item.get(b"shape")
        if not isinstance(data, bytes) or not isinstance(shape, (list, tuple)) or len(shape) > 8:
            raise ValueError("an array needs bytes and a shape of at most 8 axes")
        if not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("the shape of an array is of whole numbers from 0")
        if math.prod(shape) * dtype.itemsize != len(data):
            raise ValueError(f"an array of shape {shape} and type {dtype} has not {len(data)} bytes")
        return np.frombuffer(data, dtype).reshape(shape)
    if b"__npgeneric__" in item:
        value = item.get(b"data")
        if not isinstance(value, (bool, int, float)):
            raise ValueError("a number of numpy's needs a number")
        return checked_dtype(item.get(b"dtype")).type(value)
    return item


def checked_dtype(name) -> np.dtype:
    """Booleans, integers and floats; an object array would run code of the peer's choice."""
    dtype = DTYPES.get(name) if isinstance(name, str) else None
    if dtype is None:
        raise ValueError(f"arrays are of booleans, integers or floats, got the type {str(name)[:40]!r}")
    return dtype


def pack_array(value):
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    if isinstance(value, np.generic) and value.dtype.kind in "biuf":
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    raise TypeError(f"cannot send a {type(value).__name__}")
