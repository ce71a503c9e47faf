"""The robot's client against our server over loopback: answers, refusals, time limits."""

import socket

import numpy as np
import pytest

pytest.importorskip("websockets")

from nanochat.errors import UserError
from nanochat.serving.client import PolicyClient, ServerGone
from tests.test_server import OBSERVATION, Echo, serving  # noqa: F401


def client_of(port, **settings):
    return PolicyClient(f"127.0.0.1:{port}", **settings)


def test_it_gets_the_metadata_and_chunks(serving):  # noqa: F811
    client = client_of(serving())
    assert client.metadata == Echo.metadata
    for _ in range(2):
        chunk = client.infer(OBSERVATION)
        np.testing.assert_array_equal(chunk, np.array([[0.1, 0.2], [0, 1]], np.float32))
        assert chunk.dtype == np.float32
    client.close()
    with pytest.raises(ServerGone, match="closed the connection"):
        client.infer(OBSERVATION)


def test_a_refused_observation_is_no_lost_server(serving):  # noqa: F811
    client = client_of(serving())
    with pytest.raises(UserError, match='refused the observation: "observation/state" must be 2 finite') as error:
        client.infer(OBSERVATION | {"prompt": "refuse"})
    assert not isinstance(error.value, ServerGone)
    assert client.infer(OBSERVATION).shape == (2, 2)


def test_a_server_that_does_not_answer_in_time_is_gone(serving):  # noqa: F811
    policy = Echo()
    client = client_of(serving(policy))
    assert client.infer(OBSERVATION).shape == (2, 2)
    client.timeout_s = 0.2  # not before: a busy machine may need longer for the handshake
    with pytest.raises(ServerGone, match="did not answer within 0.2 s"):
        client.infer(OBSERVATION | {"prompt": "slow"})
    policy.go.set()
    with pytest.raises(ServerGone, match="closed"):  # the late answer is not taken for this one
        client.infer(OBSERVATION)


def test_the_token_is_sent(serving):  # noqa: F811
    port = serving(token="sesame")
    assert client_of(port, token="sesame").infer(OBSERVATION).shape == (2, 2)
    with pytest.raises(UserError, match="wants a token"):
        client_of(port, token="open")


def test_no_server_and_no_address():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ServerGone, match="no policy server answers"):
            client_of(unused.getsockname()[1], timeout_s=2)
    for address in ("http://127.0.0.1:8000", "ws://", "ws://127.0.0.1:port"):
        with pytest.raises(UserError, match="is no address"):
            PolicyClient(address, timeout_s=2)
