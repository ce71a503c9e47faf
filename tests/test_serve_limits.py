"""What a server refuses before it works for it: large bodies, many pictures, other origins, and more than its queue holds."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import pytest

pytest.importorskip("fastapi")
import httpx

from nanochat.cli.serve import LimitFlags
from nanochat.serving import guard
from nanochat.serving.batching import Batcher
from nanochat.serving.guard import Entrance
from tests.serving import about, make_agent, running

CHAT = "/v1/chat/completions"
FRIEND = "https://friend.example"


@pytest.fixture(scope="module")
def address():
    agent = make_agent(images=3)
    with running(
        {"tiny": agent}, limits=LimitFlags(max_pictures=2), entrance=Entrance(cors=(FRIEND,), max_bytes=5000)
    ) as found:
        yield found


def test_a_body_that_says_that_it_is_too_large_is_not_awaited(address):
    connection = HTTPConnection(address.removeprefix("http://"), timeout=10)
    connection.putrequest("POST", CHAT)
    connection.putheader("Content-Length", "5001")
    connection.endheaders()  # and nothing after it
    answer = connection.getresponse()
    assert answer.status == 413 and json.loads(answer.read())["error"]["code"] == "request_too_large"
    connection.close()


def test_a_body_that_grows_too_large_is_refused(http):
    """In pieces, without a Content-Length."""
    answer = http.post(CHAT, content=(b"x" * 1000 for _ in range(6)))
    assert answer.status_code == 413 and "at most 5,000 bytes" in answer.json()["error"]["message"]
    assert http.post(CHAT, content=(b"x" * 1000 for _ in range(5))).status_code == 400  # read, and no JSON


@pytest.mark.parametrize(("name", "most"), [("MAX_OPEN", 0), ("MAX_HELD", -1)])
def test_too_many_requests_at_a_time_are_refused(http, monkeypatch, name, most):
    monkeypatch.setattr(guard, name, most)
    answer = http.get("/v1/models")
    assert answer.status_code == 429 and answer.headers["Retry-After"] == "1"
    assert answer.json()["error"]["message"] == "too many requests at a time"


def test_only_pages_of_the_named_origin_may_read_answers(http):
    for path, headers in ((CHAT, {}), ("/v1/models", {}), ("/v1/models", {"Access-Control-Request-Method": "POST"})):
        method = "OPTIONS" if headers else "GET"
        friend = http.request(method, path, headers=headers | {"Origin": FRIEND})
        assert friend.status_code != 403 and friend.headers["Access-Control-Allow-Origin"] == FRIEND
        other = http.request(method, path, headers=headers | {"Origin": "https://other.example"})
        assert other.status_code == 403 and "Access-Control-Allow-Origin" not in other.headers
    assert "Access-Control-Allow-Origin" not in http.get("/v1/models").headers


def test_the_server_limits_the_pictures_of_a_request(http):
    """The model has learnt three."""
    assert http.post(CHAT, json={"messages": about("red", "blue"), "max_tokens": 2}).status_code == 200
    answer = http.post(CHAT, json={"messages": about("red", "blue", "red"), "max_tokens": 2})
    assert answer.status_code == 400 and answer.json()["error"]["code"] == "too_many_images"
    assert "3 pictures in one request, the limit is 2" in answer.json()["error"]["message"]


def test_a_full_queue_says_when_to_ask_again(monkeypatch):
    go, run_engine = threading.Event(), Batcher.run_engine
    monkeypatch.setattr(Batcher, "run_engine", lambda batcher: (go.wait(20), run_engine(batcher)))
    asked = {"messages": [{"role": "user", "content": "what is it?"}], "max_tokens": 2}
    with (
        running({"tiny": make_agent()}, limits=LimitFlags(max_queue=1)) as address,
        httpx.Client(base_url=address, timeout=30) as http,
        ThreadPoolExecutor(1) as worker,
    ):
        first = worker.submit(http.post, CHAT, json=asked)
        while 'nanochat_queued{model="tiny"} 1.0' not in http.get("/metrics").text:
            assert not first.done()
            time.sleep(0.01)
        answer = http.post(CHAT, json=asked)
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(answer.headers["Retry-After"]) >= 1
        go.set()
        assert first.result().status_code == 200
