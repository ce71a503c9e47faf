"""The policy server over loopback: with openpi's own client, and with a raw client that sends invalid messages."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("websockets")
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from nanochat.errors import UserError
from nanochat.serving import openpi as module
from nanochat.serving.openpi import check_settings, unpack
from nanochat.serving.requests import Busy
from tests.serving import running

OBSERVATION = {
    "observation/image": np.arange(48, dtype=np.uint8).reshape(4, 4, 3),
    "observation/state": np.array([0.1, 0.2], np.float32),
    "prompt": "open the door",
}


class Echo:
    """Returns parts of the observation, so that both directions are checked."""

    metadata = {"chunk": 2, "name": "echo"}

    def __init__(self):
        self.go = threading.Event()  # a "slow" observation waits for it

    def session(self):
        calls = []

        def act(observation):
            calls.append(1)
            if observation["prompt"] == "raise":
                raise KeyError("a secret path")
            if observation["prompt"] == "refuse":
                raise UserError('"observation/state" must be\n2 finite numbers')
            if observation["prompt"] == "empty":
                raise UserError
            if observation["prompt"] == "slow":
                assert self.go.wait(20)
            if observation["prompt"] == "nothing":
                return None
            if observation["prompt"] == "objects":
                return {"actions": np.array([object()])}
            actions = np.stack(
                [observation["observation/state"], observation["observation/image"][0, 0, :2].astype(np.float32)]
            )
            return {"actions": actions, "calls": len(calls)}

        return act


@pytest.fixture
def serving():
    """Yields a function that starts a server in another thread and returns its port."""
    with ExitStack() as servers:
        worker = servers.enter_context(ThreadPoolExecutor(1))

        def run(function):
            return asyncio.get_running_loop().run_in_executor(worker, function)

        def start(policy=None, token=None, **settings):
            policy = policy or Echo()
            address = servers.enter_context(running({}, key=token, policy=policy, run=run, **settings))
            return int(address.rpartition(":")[2])

        yield start


def openpi(port, **settings):
    client = pytest.importorskip("openpi_client.websocket_client_policy")
    return client.WebsocketClientPolicy("127.0.0.1", port, **settings)


def raw(port, **settings):
    connection = connect(f"ws://127.0.0.1:{port}", compression=None, **settings)
    assert msgpack.unpackb(connection.recv()) == Echo.metadata
    return connection


def test_openpis_client_drives_it(serving):
    client = openpi(serving())
    assert client.get_server_metadata() == Echo.metadata
    first, second = client.infer(OBSERVATION), client.infer(OBSERVATION)
    np.testing.assert_array_equal(first["actions"], np.array([[0.1, 0.2], [0, 1]], np.float32))
    assert first["actions"].dtype == np.float32
    assert first["server_timing"]["infer_ms"] > 0 and "prev_total_ms" not in first["server_timing"]
    assert second["server_timing"]["prev_total_ms"] > 0
    assert (first["calls"], second["calls"]) == (1, 2)


def test_a_wrong_observation_gets_one_line_and_the_connection_stays_open(serving):
    client = openpi(serving())
    with pytest.raises(RuntimeError, match='"observation/state" must be 2 finite numbers$'):
        client.infer(OBSERVATION | {"prompt": "refuse"})
    assert client.infer(OBSERVATION)["actions"].shape == (2, 2)


def test_an_error_without_a_text_is_named_by_its_type(serving):
    with pytest.raises(RuntimeError, match=r"invalid observation \(UserError\)$"):
        openpi(serving()).infer(OBSERVATION | {"prompt": "empty"})


@pytest.mark.parametrize(
    "prompt, logged", [("raise", "a secret path"), ("nothing", "NoneType"), ("objects", "cannot send a ndarray")]
)
def test_internal_errors_are_not_exposed(serving, caplog, prompt, logged):
    client = openpi(serving())
    with pytest.raises(RuntimeError, match="^Error in inference server:\ninternal error$"):
        client.infer(OBSERVATION | {"prompt": prompt})
    assert logged in caplog.text
    assert client.infer(OBSERVATION)["actions"].shape == (2, 2)


def test_a_busy_server_says_so_and_the_connection_stays_open(serving, monkeypatch):
    waits = [Busy("64 requests wait already: try again in 1 s", 1)]
    plain = module.answer_observations

    async def busy_once(client, policy, run):
        async def refused(function):
            if waits:
                raise waits.pop()
            return await run(function)

        await plain(client, policy, refused)

    monkeypatch.setattr(module, "answer_observations", busy_once)
    client = openpi(serving())
    with pytest.raises(RuntimeError, match="64 requests wait already: try again in 1 s$"):
        client.infer(OBSERVATION)
    assert client.infer(OBSERVATION)["actions"].shape == (2, 2)


def test_two_robots_do_not_share_a_session(serving):
    port = serving()
    one, two = openpi(port), openpi(port)
    assert (
        one.infer(OBSERVATION)["calls"] == one.infer(OBSERVATION)["calls"] - 1 == two.infer(OBSERVATION)["calls"] == 1
    )


def test_the_event_loop_answers_while_the_model_runs(serving, caplog):
    policy = Echo()
    port = serving(policy)
    slow, other = raw(port), raw(port)
    slow.send(packed(OBSERVATION | {"prompt": "slow"}))
    other.send(packed(OBSERVATION))
    assert other.ping().wait(5)
    with pytest.raises(TimeoutError):  # observations are answered one at a time
        other.recv(timeout=0.1)
    slow.close()  # while its observation is processed
    policy.go.set()
    assert b"actions" in other.recv(timeout=10)
    assert "failed" not in caplog.text  # a client that disconnects is not an error


def packed(value):
    return msgpack.packb(value, default=module.pack_array)


ARRAY = {b"__ndarray__": True, b"data": b"12345678", b"dtype": "<f4", b"shape": [2]}


@pytest.mark.parametrize(
    "message",
    [
        "text",
        b"",
        b"\xc1garbage",
        packed([1, 2]),
        packed({"a": ARRAY | {b"dtype": "|O"}}),
        packed({"a": ARRAY | {b"dtype": "|V8"}}),
        packed({"a": ARRAY | {b"dtype": "f4,O"}}),
        packed({"a": ARRAY | {b"dtype": "(2,)f4"}}),
        packed({"a": ARRAY | {b"dtype": 7}}),
        packed({"a": ARRAY | {b"shape": [3]}}),
        packed({"a": ARRAY | {b"shape": [-2]}}),
        packed({"a": ARRAY | {b"shape": [2**40, 2**40]}}),
        packed({"a": ARRAY | {b"shape": [1] * 40}}),
        packed({"a": ARRAY | {b"data": "12345678"}}),
        packed({"a": ARRAY | {b"shape": [0, 2**62, 2**62], b"data": b""}}),
        packed({"a": ARRAY | {b"dtype": [["f", "<f4"]]}}),
        packed({"a": {b"__npgeneric__": True, b"data": b"x", b"dtype": "<f4"}}),
        packed({"a": {b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}}),
        packed({"a": {b"__npgeneric__": True, b"data": 1.5, b"dtype": "|u1"}}),
        packed({"a": {b"__npgeneric__": True, b"data": 1e18, b"dtype": "<f2"}}),
        packed({"a": {b"__npgeneric__": True, b"data": float("nan"), b"dtype": "<i4"}}),
        packed({"a": [[[]] * 1000] * 20}),
        packed({"a": [[{}] * 1000] * 20}),
        b"\x91" * 5000,
        b"\xdf\xff\xff\xff\xff",
        msgpack.packb({"a": msgpack.ExtType(5, b"x")}),
        msgpack.packb({1: 2}),
    ],
)
def test_an_invalid_message_is_refused_and_the_connection_stays_open(serving, message):
    connection = raw(serving())
    connection.send(message)
    answer = connection.recv(timeout=10)
    assert isinstance(answer, str) and answer != "internal error" and "\n" not in answer
    connection.send(packed(OBSERVATION))
    assert isinstance(connection.recv(timeout=10), bytes)


@pytest.mark.parametrize(
    "array, message",
    [
        (ARRAY | {b"shape": [3]}, "does not match its 8 bytes"),
        (ARRAY | {b"shape": [-1]}, "non-negative integers"),
        (ARRAY | {b"shape": [2.0]}, "non-negative integers"),
        (ARRAY | {b"shape": [2] + [1] * 40}, "at most 8 axes"),
        (ARRAY | {b"data": "12345678"}, "needs bytes"),
        (ARRAY | {b"dtype": ["<f4"]}, "booleans, integers or floats"),
        ({b"__npgeneric__": True, b"data": "7", b"dtype": "<f4"}, "needs a number as its data"),
        ({b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}, "of type uint8 cannot be 300"),
    ],
)
def test_the_error_says_what_is_wrong_with_an_array(array, message):
    with pytest.raises(ValueError, match=message):
        unpack(packed({"a": array}))


def test_text_has_its_own_error():
    with pytest.raises(ValueError, match="got text"):
        unpack("text")


def test_arrays_arrive_as_they_were_sent():
    for kind in ("b1", "i1", "<i2", ">i4", "<i8", "u1", "<u2", "<u4", "<u8", "<f2", "<f4", ">f8"):
        for sent in (np.arange(6).astype(kind).reshape(2, 3)[:, ::-1], np.zeros((0, 3), kind), np.array(1, kind)):
            found = unpack(packed({"array": sent, "number": sent.sum()}))
            assert found["array"].dtype == sent.dtype
            np.testing.assert_array_equal(found["array"], sent)
            assert found["number"] == sent.sum()


def test_a_long_dtype_is_not_parsed(monkeypatch):
    asked = []
    monkeypatch.setattr(np, "dtype", lambda *a, **k: asked.append(a))
    with pytest.raises(ValueError, match="booleans, integers or floats"):
        unpack(msgpack.packb({"a": ARRAY | {b"dtype": "f4," * 10_000 + "f4"}}))
    assert not asked  # numpy's parser needs seconds for a few million characters


def test_the_log_line_of_a_refusal_is_short(serving, caplog):
    caplog.set_level("INFO", "nanochat")
    connection = raw(serving())
    connection.send(packed({"a": ARRAY | {b"shape": ["x\n" * 100_000]}}))
    assert len(connection.recv(timeout=10)) <= 500
    assert "refused" in caplog.text and max(len(record.getMessage()) for record in caplog.records) < 600


def test_an_idle_connection_is_closed(serving, monkeypatch):
    connection = raw(serving())
    for _ in range(2):  # the limit counts from the second answer on, so that the first one may take its time
        connection.send(packed(OBSERVATION))
        assert isinstance(connection.recv(timeout=20), bytes)
        monkeypatch.setattr(module, "IDLE_S", 0.2)
    with pytest.raises(ConnectionClosed, match="no observation for 0.2 s"):
        connection.recv(timeout=20)


def test_messages_have_a_size_limit(serving, monkeypatch):
    monkeypatch.setattr(module, "MAX_MESSAGE", 10_000)
    connection = raw(serving())
    connection.send(b"x" * 10_001)
    with pytest.raises(ConnectionClosed) as error:
        connection.recv(timeout=10)
    assert error.value.rcvd.code == 1009


def test_a_wrong_token_is_refused(serving):
    port = serving(token="sesame")
    for headers in ({}, {"Authorization": "Api-Key open"}, {"Authorization": "sesame"}):
        with pytest.raises(InvalidStatus) as error:
            connect(f"ws://127.0.0.1:{port}", additional_headers=headers)
        assert error.value.response.status_code == 401
    assert openpi(port, api_key="sesame").infer(OBSERVATION)["calls"] == 1


def test_two_tokens_are_refused(serving):
    with socket.create_connection(("127.0.0.1", serving(token="sesame")), timeout=10) as peer:
        peer.sendall(
            b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n" + b"Authorization: Api-Key sesame\r\n" * 2 + b"\r\n"
        )
        assert peer.recv(100).startswith(b"HTTP/1.1 401")


def test_browsers_are_refused(serving):
    with pytest.raises(InvalidStatus) as error:
        connect(f"ws://127.0.0.1:{serving()}", origin="http://evil.example")
    assert error.value.response.status_code == 403


def test_health_check(serving):
    with urllib.request.urlopen(f"http://127.0.0.1:{serving(token='x')}/healthz", timeout=10) as answer:
        assert answer.status == 200


def test_one_client_per_episode(serving, monkeypatch, caplog):
    """openpi's client has no close(): abandoned ones stay connected, and the oldest makes room for the next."""
    monkeypatch.setattr(module, "IN_USE_S", 0.2)
    port, clients = serving(max_clients=2), []
    for _ in range(6):
        clients.append(openpi(port))
        assert clients[-1].infer(OBSERVATION)["calls"] == 1
    assert clients[-2].infer(OBSERVATION)["calls"] == 2  # the two newest are still served
    with pytest.raises(ConnectionClosed, match="another client needed the place"):
        clients[0].infer(OBSERVATION)
    lines = [record.getMessage() for record in caplog.records if "to make room for" in record.getMessage()]
    assert len(lines) == 4 and all("--max-clients" in line and "127.0.0.1:" in line for line in lines)


def test_the_longest_idle_client_makes_room(serving, monkeypatch):
    monkeypatch.setattr(module, "IN_USE_S", 0.2)
    port = serving(max_clients=2)
    first, second = openpi(port), openpi(port)
    first.infer(OBSERVATION)  # so the second has been idle for longer
    assert openpi(port).infer(OBSERVATION)["calls"] == 1
    assert first.infer(OBSERVATION)["calls"] == 2
    with pytest.raises(ConnectionClosed):
        second.infer(OBSERVATION)


def test_a_client_in_use_is_not_interrupted(serving, monkeypatch, caplog):
    monkeypatch.setattr(module, "WAIT_S", 0.3)
    monkeypatch.setattr(module, "IN_USE_S", 0.1)
    policy = Echo()
    port = serving(policy, max_clients=1)
    first = raw(port)
    first.send(packed(OBSERVATION | {"prompt": "slow"}))  # the model is slower than IN_USE_S
    late = connect(f"ws://127.0.0.1:{port}")
    with pytest.raises(ConnectionClosed, match="all 1 clients are in use"):
        late.recv(timeout=10)
    assert "all 1 clients are in use" in caplog.text
    policy.go.set()
    assert b"actions" in first.recv(timeout=10)
    assert openpi(port).infer(OBSERVATION)["calls"] == 1  # when the first is idle


def test_waiting_connections_are_limited_and_a_refusal_is_logged(serving, monkeypatch, caplog):
    monkeypatch.setattr(module, "MAX_WAITING", 1)
    port = serving(max_clients=1)
    first = raw(port)
    waits = connect(f"ws://127.0.0.1:{port}")
    with pytest.raises(InvalidStatus) as error:
        for _ in range(20):  # the server needs a moment to see that one waits
            connect(f"ws://127.0.0.1:{port}").close()
            time.sleep(0.05)
    assert error.value.response.status_code == 503 and "clients wait already" in caplog.text
    first.close()
    assert msgpack.unpackb(waits.recv(timeout=10)) == Echo.metadata


def test_a_client_that_gives_up_waiting_takes_no_place(serving, monkeypatch, caplog):
    monkeypatch.setattr(module, "IN_USE_S", 0.5)
    port = serving(max_clients=1)
    first = raw(port)
    connect(f"ws://127.0.0.1:{port}").close()
    time.sleep(0.7)
    first.send(packed(OBSERVATION))
    assert b"actions" in first.recv(timeout=10) and "to make room for" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"token": ""}, "the token is empty"),
        ({"token": " x"}, "printable ASCII"),
        ({"token": "x\n"}, "printable ASCII"),
        ({"token": "gehe\u00efm"}, "printable ASCII"),
        ({"host": ""}, "the host is empty"),
        ({"max_clients": 0}, "at least 1"),
        ({"port": 99999}, "0..65535"),
        ({"port": -1}, "0..65535"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, message):
    with pytest.raises(UserError, match=message):
        check_settings(**{"host": "127.0.0.1", "port": 0, "token": None, "max_clients": 1} | settings)


SERVES = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # in a background job SIGINT is ignored
from nanochat.cli.serve import LimitFlags
from nanochat.serving.app import create_app
from nanochat.serving.guard import Entrance
from nanochat.serving.http import serve
from nanochat.serving.models import Models
from nanochat.serving.sources import Sources
class Idle:
    metadata = {"chunk": 2, "name": "echo"}
    def session(self): return lambda observation: {}
serve(create_app(Models({}), Sources(), LimitFlags(), Entrance(), Idle(), None), "127.0.0.1", 0)
"""


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 0), (signal.SIGINT, -signal.SIGINT)])
def test_a_stopped_server_closes_its_connections(number, code):
    with subprocess.Popen([sys.executable, "-c", SERVES], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            connection = raw(int(re.search(rb":(\d+);", process.stdout.readline())[1]))
            process.send_signal(number)
            with pytest.raises(ConnectionClosed) as error:
                connection.recv(timeout=10)
            assert error.value.rcvd.code == 1012
            assert process.wait(10) == code
        finally:
            process.kill()


@given(st.binary(max_size=200))
def test_any_bytes_are_an_observation_or_a_value_error(message):
    try:
        assert isinstance(unpack(message), dict)
    except ValueError:
        pass
