"""The websocket protocol of openpi (Physical Intelligence): the unmodified `openpi-client` from PyPI can drive a robot with it.

A client connects and receives the policy's metadata. Then each binary message is an observation, a msgpack map in which an array
is a map of "__ndarray__", "data", "dtype" and "shape"; each answer is a map of actions and "server_timing". An error is sent as
one line of text, which the client raises. Internal errors are not exposed: their details go to the server's log only.
"""

import asyncio
import ipaddress
import logging
import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import msgpack
import numpy as np
from websockets.exceptions import ConnectionClosed

from nanochat.errors import UserError
from nanochat.serving.requests import Busy

logger = logging.getLogger(__name__)
MAX_MESSAGE = 16 * 2**20  # bytes: a few camera frames
MAX_CLIENTS = 16  # served at a time
MAX_WAITING = 64  # connections that wait for their turn
IN_USE_S = 3  # a client that sent something in the last seconds is in use: no other client takes its place
WAIT_S = 30  # a new client waits so long for a place
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


class Connection(Protocol):
    """A websocket after its handshake. It raises ConnectionClosed once the other side is gone."""

    remote_address: tuple | None
    is_open: bool

    async def recv(self) -> bytes | str: ...
    async def send(self, message: bytes | str) -> None: ...
    async def close(self, code: int = 1000, reason: str = "") -> None: ...


Run = Callable[[Callable[[], Any]], Awaitable[Any]]


async def serve_connection(connection: Connection, policy: RobotPolicy, places: "Places", run: Run) -> None:
    """Answer one client until it goes. openpi's client has no close(), so an abandoned one stays connected: a further client
    takes the place of the one that has been idle the longest, or waits while all are in use. run: runs the policy's function
    outside of the event loop, one at a time."""
    client = Client(connection)
    try:
        if await places.enter(client):
            logger.info("%s connected (%d of %d clients)", client.name, len(places.clients), places.most)
            await answer_observations(client, policy, run)
    except ConnectionClosed:
        logger.info("%s disconnected", client.name)
    finally:
        places.leave(client)


def check_settings(host: str, port: int, token: str | None, max_clients: int) -> None:
    """Raises UserError for a setting that cannot be meant."""
    if not host.strip():
        raise UserError("the host is empty, which would listen on every address: say 0.0.0.0 if you mean that")
    if not 0 <= port <= 65535:
        raise UserError(f"the port must lie in 0..65535 (0 is any free one), got {port}")
    if max_clients < 1:
        raise UserError(f"max_clients must be at least 1, got {max_clients}")
    if token is not None and not token:
        raise UserError("the token is empty, so it would protect nothing: give one, or none at all to serve without")
    if token is not None and not (token.isascii() and token.isprintable() and token == token.strip()):
        raise UserError(
            "the token must be printable ASCII characters without spaces around them: clients send it in an HTTP header"
        )


def is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"


def peer(connection: Connection) -> str:
    """Address and port of the other side, for the log."""
    address = connection.remote_address
    return f"{address[0]}:{address[1]}" if address else "a client"


# ---- clients


@dataclass(eq=False)
class Client:
    """A connection after its handshake. since: when it last sent something. busy: an observation of it is being answered."""

    connection: Connection
    since: float = field(default_factory=time.monotonic)
    busy: bool = False

    def __post_init__(self):
        self.name = peer(self.connection)

    def idle_s(self) -> float:
        return 0.0 if self.busy else time.monotonic() - self.since


class Places:
    """The clients that are served, at most `most` of them."""

    def __init__(self, most: int):
        self.most, self.clients, self.waiting = most, set(), 0
        self.closing: set[asyncio.Task] = set()

    @property
    def full(self) -> bool:
        """Whether so many clients wait already that a further one is refused."""
        if self.waiting >= MAX_WAITING:
            logger.warning("refused a client: %d clients wait already", self.waiting)
        return self.waiting >= MAX_WAITING

    async def enter(self, client: Client) -> bool:
        """Wait for a place, which the client that has been idle the longest gives up if need be. Returns whether there is one;
        else the connection is closed."""
        self.waiting += 1
        try:
            end = time.monotonic() + WAIT_S
            while len(self.clients) >= self.most and client.connection.is_open:
                oldest = max(self.clients, key=Client.idle_s)
                if oldest.idle_s() >= IN_USE_S:
                    self.dismiss(oldest, client)
                elif time.monotonic() < end:
                    await asyncio.sleep(0.05)
                else:
                    logger.warning("refused %s: all %d clients are in use; see --max-clients", client.name, self.most)
                    await client.connection.close(1013, f"all {self.most} clients are in use: try again later")
                    return False
        finally:
            self.waiting -= 1
        self.clients.add(client)
        client.since = time.monotonic()
        return True

    def dismiss(self, client: Client, newcomer: Client) -> None:
        logger.warning(
            "%d clients are connected: closed %s, idle for %.0f s, to make room for %s; see --max-clients",
            len(self.clients), client.name, client.idle_s(), newcomer.name,
        )  # fmt: skip
        self.leave(client)
        task = asyncio.create_task(client.connection.close(1013, "idle, and another client needed the place"))
        self.closing.add(task)
        task.add_done_callback(self.closing.discard)

    def leave(self, client: Client) -> None:
        self.clients.discard(client)


async def answer_observations(client: Client, policy: RobotPolicy, run: Run) -> None:
    """Answer the observations of one connection, in order, until it closes."""
    act, previous_ms = policy.session(), None
    connection = client.connection
    await connection.send(msgpack.packb(policy.metadata, default=pack_array))
    while True:
        try:
            async with asyncio.timeout(IDLE_S):
                message = await connection.recv()
        except TimeoutError:
            logger.info("closed %s: no observation for %g s", client.name, IDLE_S)
            return await connection.close(reason=f"no observation for {IDLE_S} s")
        since, client.busy = time.perf_counter(), True
        try:
            try:
                answer = await run(partial(answer_to, message, act, previous_ms))
            except Busy as error:
                answer = str(error)
            await connection.send(answer)
        finally:
            client.since, client.busy = time.monotonic(), False
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
    except UserError:
        raise
    except msgpack.StackError as error:
        raise UserError("the message is not valid msgpack: it is nested too deeply") from error
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        reason = {"FormatError": "a byte has no meaning", "OutOfData": "it ends too early"}.get(type(error).__name__)
        raise UserError(f"the message is not valid msgpack: {reason or str(error) or type(error).__name__}") from error
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
        value, dtype = item.get(b"data"), checked_dtype(item.get(b"dtype"))
        if not isinstance(value, (bool, int, float)):
            raise UserError("a numpy scalar needs a number as its data")
        try:
            with np.errstate(over="raise"):
                scalar = dtype.type(value)
        except (OverflowError, FloatingPointError, ValueError) as error:  # ValueError: NaN as an integer
            raise UserError(f"a numpy scalar of type {dtype} cannot be {str(value)[:40]}") from error
        if dtype.kind != "f" and scalar != value:
            raise UserError(f"a numpy scalar of type {dtype} cannot be {str(value)[:40]}")
        return scalar
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
