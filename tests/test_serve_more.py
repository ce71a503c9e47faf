"""/v1/responses, /v1/embeddings, /detect and /attention, with PyPI's openai client; and bodies that nobody meant."""

import base64
import json
import random

import numpy as np
import pytest

pytest.importorskip("fastapi")
import httpx
import openai

from nanochat.attention import attention_of_words
from nanochat.conversation import user_message
from nanochat.sampling import Sampling
from nanochat.serving.batching import Batcher
from nanochat.vision.detections import Detection
from nanochat.vision.images import open_image
from tests.serving import about, data_uri, make_agent, png, running


class Detector:
    def detect(self, image, conf):
        assert image.size == (8, 6)
        return [Detection((1.0, 1.0, 5.0, 4.0), 0.9, 3, "box")] if conf < 0.9 else []


@pytest.fixture(scope="module")
def agent():
    return make_agent(128)


@pytest.fixture(scope="module")
def address(agent):
    with running({"tiny": agent, "talks": make_agent(128, multi_turn=True)}, detector=Detector()) as found:
        yield found


def shown(*colours, question="what is it?"):
    pictures = [{"type": "input_image", "image_url": data_uri(colour)} for colour in colours]
    return [{"role": "user", "content": [*pictures, {"type": "input_text", "text": question}]}]


def test_a_response_says_what_a_chat_completion_says(client):
    chat = client.chat.completions.create(model="tiny", messages=about("red"), max_tokens=9)
    found = client.responses.create(model="tiny", input=shown("red"), max_output_tokens=9)
    assert found.output_text == chat.choices[0].message.content
    assert found.usage.total_tokens == chat.usage.total_tokens
    assert found.status == ("completed" if chat.choices[0].finish_reason == "stop" else "incomplete")
    assert client.responses.create(model="tiny", input="what is it?", max_output_tokens=3).output[0].role == "assistant"


SCHEMA = {
    "type": "object",
    "properties": {"red": {"type": "boolean"}},
    "required": ["red"],
    "additionalProperties": False,
}
AS_JSON = {"format": {"type": "json_schema", "name": "found", "schema": SCHEMA, "strict": True}}


def test_a_streamed_response_that_is_cut_off(client):
    events = list(client.responses.create(model="talks", input=shown("blue"), max_output_tokens=1, stream=True))
    assert [event.type for event in events][:2] == ["response.created", "response.in_progress"]
    assert (
        events[-1].type == "response.incomplete"
        and events[-1].response.incomplete_details.reason == "max_output_tokens"
    )
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text and [e.sequence_number for e in events] == list(range(len(events)))


def test_a_response_as_json_whole_and_streamed(client):
    pytest.importorskip("llguidance")
    found = client.responses.create(model="tiny", input=shown("red"), text=AS_JSON, max_output_tokens=40)
    assert list(json.loads(found.output_text)) == ["red"] and found.status == "completed"
    with client.responses.stream(model="tiny", input=shown("red"), text=AS_JSON, max_output_tokens=40) as stream:
        assert (
            "".join(event.delta for event in stream if event.type == "response.output_text.delta") == found.output_text
        )
        assert stream.get_final_response().output_text == found.output_text


def test_settings_of_the_sampling_reach_the_batcher(http, monkeypatch):
    asked, events = [], Batcher.events
    monkeypatch.setattr(
        Batcher, "events", lambda batcher, request: (asked.append(request), events(batcher, request))[1]
    )
    settings = {"temperature": 0.7, "top_p": 0.6, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3, "seed": 9}
    chat = {"messages": about("red"), "max_tokens": 2} | settings
    response = {"input": "what is it?", "max_output_tokens": 2, "temperature": 0.7, "top_p": 0.6}
    for path, body in (("/v1/chat/completions", chat), ("/v1/responses", response)):
        assert http.post(path, json=body).status_code == 200
    of_chat, of_response = (request.sampling for request in asked)
    assert of_chat == Sampling(**settings)
    assert of_response == Sampling(temperature=0.7, top_p=0.6, seed=of_response.seed)


def test_instructions_reach_a_model_of_conversations(client):
    plain = client.responses.create(model="talks", input="what?", max_output_tokens=3)
    told = client.responses.create(model="talks", input="what?", instructions="is it red?", max_output_tokens=3)
    assert told.usage.input_tokens > plain.usage.input_tokens
    with pytest.raises(openai.BadRequestError, match="stores no responses"):
        client.responses.create(model="tiny", input="what?", previous_response_id="resp_1")


def test_vectors_of_pictures(client, agent):
    found = client.embeddings.create(model="tiny", input=[data_uri("red"), data_uri("blue")])  # as base64: its default
    expected = agent.look([open_image(png("red")), open_image(png("blue"))]).mean(1)
    np.testing.assert_allclose([each.embedding for each in found.data], expected, rtol=1e-6)
    plain = client.embeddings.create(model="tiny", input=data_uri("red"), encoding_format="float")
    np.testing.assert_allclose(plain.data[0].embedding, expected[0], rtol=1e-6)
    with pytest.raises(openai.BadRequestError, match="input.0 is a text"):
        client.embeddings.create(model="tiny", input="a dog")


def test_objects(http):
    found = http.post("/detect", json={"image": data_uri()}).json()
    assert found == {"objects": [{"box": [1.0, 1.0, 5.0, 4.0], "score": 0.9, "class_id": 3, "class_name": "box"}]}
    assert http.post("/detect", json={"image": data_uri(), "conf": 0.95}).json() == {"objects": []}
    with running({"tiny": make_agent()}) as other:
        answer = httpx.post(f"{other}/detect", json={"image": data_uri()})
        assert answer.status_code == 503 and "--detect" in answer.json()["error"]["message"]


def test_where_words_looked(http, agent):
    found = http.post("/attention", json={"messages": about("red", "blue"), "answer": "a red box"}).json()
    prompt = agent.prompt([user_message("what is it?", 2)])
    vectors = agent.look([open_image(png(colour)) for colour in ("red", "blue")])
    expected = attention_of_words(agent.model, agent.tokenizer, prompt, "a red box", vectors)
    assert [word["text"] for word in found["words"]] == ["a", "red", "box"] and found["side"] == 2
    weights = np.array([word["pictures"] for word in found["words"]])
    np.testing.assert_allclose(weights, np.stack([word.mean for word in expected]), atol=1e-6)
    assert weights.shape == (3, 2, 4) and weights.std() > 0.01
    left, top, right, bottom = found["boxes"][0]
    assert (left, right) == (0, 1) and 0 < top < bottom < 1  # 8 x 6 pixels in a square
    assert http.post("/attention", json={"messages": about(), "answer": "x"}).status_code == 400


PATHS = ("/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/detect", "/attention", "/act")
ODD = [
    None,
    True,
    -1,
    0,
    2**70,
    1e308,
    "",
    "x" * 3000,
    "\u0000",
    "data:",
    "data:image/png;base64,AAAA",
    [],
    {},
    [[]],
    [{}],
    {"type": "text"},
]


def mutated(value, rng):
    """JSON with one place of it replaced, removed or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(sorted(value))
        rest = {k: v for k, v in value.items() if k != key}
        return rest if rng.random() < 0.1 else rest | {key: mutated(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = rng.randrange(len(value))
        return value[:i] + [mutated(value[i], rng)] * rng.choice((0, 1, 1, 3)) + value[i + 1 :]
    return rng.choice(ODD)


def test_no_body_makes_the_server_fail(http):
    """The same as `python -m benchmarks.serve_attack` does for longer."""
    rng = random.Random(0)
    chat = {
        "model": "tiny",
        "messages": about("red"),
        "max_tokens": 2,
        "n": 1,
        "stop": ["x"],
        "temperature": 0.5,
        "top_p": 0.5,
    }
    bodies = [
        chat | {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}},
        {"model": "tiny", "input": shown("red"), "max_output_tokens": 2, "text": {"format": {"type": "text"}}},
        {"model": "tiny", "input": [data_uri()], "encoding_format": "float"},
        {"image": data_uri(), "conf": 0.5},
        {"messages": about("red"), "answer": "a box"},
        {"observation/image": data_uri(), "observation/state": [0.0], "prompt": "x"},
    ]
    for _ in range(40):
        for path, body in zip(PATHS, bodies, strict=True):
            answer = http.post(
                path, content=json.dumps(mutated(body, rng)), headers={"Content-Type": "application/json"}
            )
            assert answer.status_code < 500 or answer.status_code == 503, (path, answer.text)
            assert answer.status_code == 200 or set(answer.json()["error"]) == {"message", "type", "param", "code"}
    picture = bytearray(png("red", (40, 40)))
    for _ in range(60):
        data = bytearray(picture)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        uri = f"data:image/png;base64,{base64.b64encode(data).decode()}"
        assert http.post("/v1/embeddings", json={"input": uri}).status_code in (200, 400)


def test_the_schema_describes_every_endpoint(http):
    api = http.get("/openapi.json").json()
    assert set(PATHS) | {"/v1/models", "/health", "/metrics", "/policy"} <= set(api["paths"])
    assert all(about["summary"] for methods in api["paths"].values() for about in methods.values())
