"""OpenAI's HTTP API, with PyPI's openai client and with raw requests, over a real port."""

import json
import re
import time

import pytest

pytest.importorskip("fastapi")
import httpx
import openai

from nanochat.serving.batching import Batcher
from nanochat.serving.sources import Sources
from tests.serving import about, data_uri, make_agent, png, running

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def agent():
    return make_agent()


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    (folder / "red.png").write_bytes(png())
    (folder.parent / "secret.png").write_bytes(png())
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    return folder


@pytest.fixture(scope="module")
def address(agent, media):
    with running({"tiny": agent, "talks": make_agent(multi_turn=True)}, Sources(("pictures.example",), media)) as found:
        yield found


def test_the_models_and_what_they_can_do(client):
    models = {model.id: model for model in client.models.list()}
    assert list(models) == ["tiny", "talks"] and client.models.retrieve("tiny").id == "tiny"
    assert models["tiny"].modalities == {"input": ["text", "image"], "output": ["text"]}
    assert models["tiny"].context_length == 64 and models["tiny"].images == 2


def test_an_answer_is_the_agents_own(client, agent):
    answer = client.chat.completions.create(model="tiny", messages=about("red"), max_tokens=8)
    from nanochat.vision.images import open_image

    expected = "".join(agent.ask("what is it?", agent.look([open_image(png())]), 8))
    assert answer.choices[0].message.content == expected
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens and usage.completion_tokens <= 8
    assert answer.timings["predicted_n"] == usage.completion_tokens


def test_a_stream_says_the_same_in_pieces(client):
    asked = dict(model="tiny", messages=about("red", "blue"), n=2, temperature=1.0, seed=5, max_completion_tokens=10)
    whole = client.chat.completions.create(**asked)
    pieces, reasons, usage = ["", ""], [None, None], None
    for chunk in client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            pieces[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usage = chunk.usage or usage
    assert pieces == [choice.message.content for choice in whole.choices] and pieces[0] != pieces[1]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage.total_tokens == whole.usage.total_tokens


def test_stop_strings_and_log_probabilities(client):
    asked = dict(model="tiny", messages=about("green"), max_tokens=10, logprobs=True, top_logprobs=2)
    answer = client.chat.completions.create(**asked).choices[0]
    tokens = answer.logprobs.content
    assert b"".join(bytes(each.bytes) for each in tokens).decode("utf-8", "replace") == answer.message.content
    assert all(each.logprob == each.top_logprobs[0].logprob for each in tokens)  # greedy takes the likeliest
    text = answer.message.content
    assert len(text) > 3
    cut = client.chat.completions.create(**asked, stop=text[2:4]).choices[0]
    assert cut.message.content == text[: text.index(text[2:4])] and cut.finish_reason == "stop"


def test_json_that_fits_a_schema(client):
    pytest.importorskip("llguidance")
    schema = {
        "type": "object", "additionalProperties": False, "required": ["colour", "many"],
        "properties": {"colour": {"enum": ["red", "blue"]}, "many": {"type": "boolean"}},
    }  # fmt: skip
    wanted = {"type": "json_schema", "json_schema": {"name": "found", "schema": schema, "strict": True}}
    for seed in range(3):
        answer = client.chat.completions.create(
            model="tiny", messages=about("red"), max_tokens=50, response_format=wanted, temperature=1.5, seed=seed
        )
        found = json.loads(answer.choices[0].message.content)
        assert found["colour"] in ("red", "blue") and isinstance(found["many"], bool) and len(found) == 2
    with pytest.raises(openai.BadRequestError, match="cannot be followed"):
        wanted["json_schema"]["schema"] = {"type": "nothing"}
        client.chat.completions.create(model="tiny", messages=about("red"), response_format=wanted)


def test_a_model_of_single_questions_reads_the_last_one_and_says_so(client):
    turns = [*about("red"), {"role": "assistant", "content": "a box"}, {"role": "user", "content": "is it red?"}]
    last = client.chat.completions.create(model="tiny", messages=turns, max_tokens=5)
    alone = client.chat.completions.create(model="tiny", messages=about("red", question="is it red?"), max_tokens=5)
    assert last.choices[0].message.content == alone.choices[0].message.content
    assert "single questions" in last.notes[0] and "notes" not in alone.model_extra
    assert client.chat.completions.create(model="talks", messages=turns, max_tokens=5).usage.prompt_tokens > 15


def test_a_picture_as_base64_alone(client):
    expected = (
        client.chat.completions.create(model="tiny", messages=about("red"), max_tokens=5).choices[0].message.content
    )

    def ask(url):
        parts = [{"type": "text", "text": "what is it?"}, {"type": "image_url", "image_url": {"url": url}}]
        messages = [{"role": "user", "content": parts}]
        return client.chat.completions.create(model="tiny", messages=messages, max_tokens=5).choices[0].message.content

    assert ask(data_uri().partition(",")[2]) == expected


@pytest.mark.parametrize(
    ("name", "works"),
    [
        ("red.png", True),
        ("missing.png", False),
        ("../secret.png", False),
        ("link.png", False),
        ("", False),
        ("%00", False),
    ],
)
def test_files_only_below_the_media_path(http, media, name, works):
    body = {
        "messages": [
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": f"file://{media}/{name}"}}]}
        ]
    }
    answer = http.post(CHAT, json=body)
    assert answer.status_code == (200 if works else 400)
    assert works or "no such file below --media-path" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "status", "words"),
    [
        ({"model": "gpt-5"}, 404, "only: tiny, talks"),
        ({"messages": []}, 400, "messages"),
        ({"messages": "hi"}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, 400, "role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "the last message must be the user's"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, 400, "reads text and pictures"),
        ({"messages": about("red", "red", "red")}, 400, "has learnt questions about up to 2 pictures"),
        ({"messages": [{"role": "user", "content": "x" * 5000}]}, 400, "do not fit the context"),
        ({"messages": [{"role": "user", "content": "what? " * 200}]}, 400, "do not fit the context of 64"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "messages"),
        ({"temperature": 3}, 400, "temperature"),
        ({"temperature": float("nan")}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 17}, 400, "n"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"stop": [""]}, 400, "stop"),
        ({"top_logprobs": 2}, 400, "needs logprobs"),
        ({"tools": [{"type": "function"}]}, 400, "call no tools"),
        ({"surprise": 1}, 400, "Unrecognized request argument supplied: surprise"),
        ({"logit_bias": {"5": 1}}, 400, "not supported"),
    ],
)
def test_what_is_wrong_is_said_in_openais_shape(http, changes, status, words):
    text = json.dumps({"model": "tiny", "messages": about("red")} | changes)
    answer = http.post(CHAT, content=text, headers={"Content-Type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == status and words in error["message"], error
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]


@pytest.mark.parametrize(
    "url", ["data:image/png;base64,", "data:image/png;base64,%%%", "data:;,x", "!", "", "data:nothing", "http://[/"]
)
def test_what_is_no_picture(http, url):
    body = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}
    answer = http.post(CHAT, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_paths_and_methods_that_are_not_there(http):
    assert http.get("/v1/nothing").json()["error"]["message"].startswith("there is no /v1/nothing here")
    answer = http.get(CHAT)
    assert answer.status_code == 405 and "does not take GET" in answer.json()["error"]["message"]
    assert http.post(CHAT, content=b"{" * 100_000, headers={"Content-Type": "application/json"}).status_code == 400
    assert http.post(CHAT, content=b"[" * 100_000, headers={"Content-Type": "application/json"}).status_code == 400


def test_health_and_metrics(http):
    assert http.get("/health").json() == {"status": "ok"} and http.get("/healthz").text == "OK\n"
    http.post(CHAT, json={"messages": about("red"), "max_tokens": 2})
    found = http.get("/metrics").text
    assert 'nanochat_requests_total{path="/v1/chat/completions",status="200"}' in found
    assert 'nanochat_running{model="tiny"} 0.0' in found


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"Host": "evil.example"}, "wrong_host"),
        ({"Origin": "http://evil.example"}, "wrong_origin"),
        ({"Origin": "null"}, "wrong_origin"),
    ],
)
def test_other_pages_of_a_browser_may_not_ask(http, headers, code):
    answer = http.get("/v1/models", headers=headers)
    assert answer.status_code == 403 and answer.json()["error"]["code"] == code


def test_a_key(agent):
    with running({"tiny": agent}, key="sesame") as address, httpx.Client(base_url=address) as http:
        assert http.get("/health").status_code == 200
        for given in (
            {},
            {"Authorization": "Bearer wrong"},
            {"Authorization": "sesame"},
            {"Authorization": "Bearer \xff"},
        ):
            answer = http.get("/v1/models", headers={k: v.encode("latin-1") for k, v in given.items()})
            assert answer.status_code == 401 and answer.json()["error"]["code"] == "invalid_api_key"
        assert http.get("/v1/models", headers={"Authorization": "Bearer sesame"}).status_code == 200


def test_the_answer_to_a_client_that_goes_away_ends(monkeypatch):
    agent, step = make_agent(), Batcher.step
    agent.stop_ids = ()

    def step_when_gone(batcher):
        """The second token waits until the server knows that its client has gone."""
        for _ in range(1000 if batcher.new_tokens == 1 else 0):
            if any(ticket.gone for ticket, _ in batcher.running.values()):
                break
            time.sleep(0.01)
        step(batcher)

    monkeypatch.setattr(Batcher, "step", step_when_gone)
    asked = {"messages": about("red"), "max_tokens": 40, "stream": True}
    with running({"tiny": agent}) as address, httpx.Client(base_url=address, timeout=20) as http:
        with http.stream("POST", CHAT, json=asked) as answer:
            next(answer.iter_lines())
        while 'nanochat_running{model="tiny"} 0.0' not in (found := http.get("/metrics").text):
            pass
    tokens = float(re.search(r'nanochat_new_tokens_total{model="tiny"} (\S+)', found)[1])
    assert 1 <= tokens < 40
