"""Requests that join and leave a running batch: each gets the answer that it would get alone."""

import asyncio
import threading

import pytest

from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.sampling import Sampling
from nanochat.serving import batching
from nanochat.serving.answers import AnswerText, likely
from nanochat.serving.batching import Batcher
from nanochat.serving.requests import Busy, Done, Finished, Piece, Request, Ticket
from nanochat.serving.seen import Seen, TooLarge, key_of
from nanochat.tokenizer import StreamDecoder
from nanochat.vision.images import ImageError, open_image
from tests.serving import make_agent, png


@pytest.fixture(scope="module")
def agent():
    return make_agent(sequence_len=128)


@pytest.fixture
def batcher(agent):
    found = Batcher(agent, max_rows=4, max_queue=4)
    yield found
    found.close()


def prompt_of(agent, question, n_images=0):
    content = [{"type": "image"}] * n_images + [{"type": "text", "text": question}]
    return agent.prompt([{"role": "user", "content": content}])


async def collected(batcher, request):
    """({index: text}, {index: reason}, Done)"""
    texts, reasons, done = {}, {}, None
    async for event in batcher.events(request):
        if isinstance(event, Piece):
            texts[event.index] = texts.get(event.index, "") + event.text
        elif isinstance(event, Finished):
            reasons[event.index] = event.reason
        elif isinstance(event, Done):
            done = event
    return texts, reasons, done


def alone(agent, request):
    """The same answers by the engine, one after the other."""
    images = [agent.look([open_image(data) for data in request.pictures])] if request.pictures else None
    for sample in range(request.n):
        engine = Engine(agent.model)
        row = engine.add(
            request.prompt, request.max_new_tokens, sampling=request.sampling, stop_ids=agent.stop_ids, sample=sample,
            images=images[0] if images else None,
        )  # fmt: skip
        tokens = []
        while row in engine.rows:
            said = engine.step()
            tokens += [said[row]] if row in said else []
        yield agent.tokenizer.decode(tokens)


def test_answers_in_a_batch_equal_those_alone(agent, batcher):
    requests = [
        Request(prompt_of(agent, "what is it?", 1), [png("red")], 12),
        Request(prompt_of(agent, "is it red? and what else is it?", 2), [png("red"), png("blue")], 20),
        Request(prompt_of(agent, "what else?"), (), 5, n=3, sampling=Sampling(temperature=1, seed=7)),
        Request(prompt_of(agent, "a box"), (), 30),
    ]

    async def all_at_once():
        return await asyncio.gather(*[collected(batcher, request) for request in requests])

    for request, (texts, reasons, done) in zip(requests, asyncio.run(all_at_once()), strict=True):
        assert [texts.get(i, "") for i in range(request.n)] == list(alone(agent, request))
        assert set(reasons.values()) <= {"stop", "length"} and len(reasons) == request.n
        assert done.prompt_tokens == len(request.prompt)
    assert not batcher.running and not batcher.engine.rows


def test_a_long_prompt_in_parts_gives_the_same_answer(agent, batcher, monkeypatch):
    request = Request(prompt_of(agent, "what is it? " * 6, 1), [png("green")], 8)
    whole = list(alone(agent, request))
    monkeypatch.setattr(batching, "CHUNK", 8)
    assert len(batcher.parts(request.prompt)) > 3
    texts, _, _ = asyncio.run(collected(batcher, request))
    assert [texts[0]] == whole


def test_the_second_question_about_a_picture_does_not_encode_it(agent, batcher):
    before = agent.looked
    first = asyncio.run(collected(batcher, Request(prompt_of(agent, "what?", 1), [png("pink")], 3)))
    second = asyncio.run(collected(batcher, Request(prompt_of(agent, "red?", 1), [png("pink")], 3)))
    assert agent.looked == before + 1 and (first[2].cached_pictures, second[2].cached_pictures) == (0, 1)


def test_a_known_picture_does_not_wait_behind_a_new_one(agent, batcher, monkeypatch):
    def ask(colour):
        return collected(batcher, Request(prompt_of(agent, "what is it?", 1), [png(colour)], 3))

    async def both():
        await ask("navy")
        encoding, go_on = threading.Event(), threading.Event()
        look = batcher.seen.look
        monkeypatch.setattr(batcher.seen, "look", lambda images: (encoding.set(), go_on.wait(20), look(images))[-1])
        new = asyncio.create_task(ask("olive"))
        await asyncio.to_thread(encoding.wait, 20)
        try:
            assert (await asyncio.wait_for(ask("navy"), 10))[2].cached_pictures == 1
            assert not new.done()
        finally:
            go_on.set()
        assert (await new)[2].cached_pictures == 0

    asyncio.run(both())


def test_a_full_queue_refuses_and_a_cancelled_request_leaves(agent, batcher):
    go = threading.Event()
    batcher.call(lambda: go.wait(10))  # the engine's thread is busy
    answers = [[] for _ in range(4)]
    tickets = [batcher.submit(Request(prompt_of(agent, "what?"), (), 100), heard.append) for heard in answers]
    with pytest.raises(Busy, match="4 requests wait already") as busy:
        batcher.submit(Request(prompt_of(agent, "what?"), (), 100), print)
    assert busy.value.retry_after >= 1
    tickets[0].gone = True
    go.set()
    while not all(heard and isinstance(heard[-1], Done) for heard in answers[1:]):
        assert batcher.threads[1].is_alive()
    assert answers[0] == []


def test_closing_the_events_ends_a_running_answer(agent, batcher, monkeypatch):
    monkeypatch.setattr(agent, "stop_ids", ())
    closed, step = threading.Event(), batcher.engine.step
    monkeypatch.setattr(batcher.engine, "step", lambda: (batcher.new_tokens and closed.wait(20), step())[1])

    async def leave():
        events = batcher.events(Request(prompt_of(agent, "what?"), (), 100))
        await anext(events)
        await events.aclose()
        closed.set()

    asyncio.run(leave())
    while batcher.running:
        assert batcher.threads[1].is_alive()
    assert 0 < batcher.new_tokens < 100


def test_a_request_that_is_too_late_is_refused_and_a_slow_answer_ends_as_it_is(agent, batcher, monkeypatch):
    with pytest.raises(Busy, match="waited for more than"):
        asyncio.run(collected(batcher, Request(prompt_of(agent, "what?"), (), 100, seconds=0)))
    with pytest.raises(Busy, match="waited for more than"), monkeypatch.context() as patch:
        patch.setattr(Ticket, "late", True)
        asyncio.run(batcher.look([png("red")]))
    request = Request(prompt_of(agent, "what?"), (), 100, seconds=30)

    async def slow():
        async for event in batcher.events(request):
            if isinstance(event, Piece):
                monkeypatch.setattr(Ticket, "late", True)
            last = event
        return last

    done = asyncio.run(slow())
    assert done.timed_out and done.new_tokens < 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 5}, "n must lie in 1..4"),
        ({"prompt": [1] * 200}, "do not fit the context of 128"),
        ({"prompt": []}, "at least one token"),
        ({"pictures": [b"no picture"]}, "the picture is not an image"),
        ({"pictures": [png("red")]}, "0 places for vision vectors"),
    ],
)
def test_a_wrong_request_fails_alone(agent, batcher, changes, message):
    request = Request(**{"prompt": prompt_of(agent, "what?"), "max_new_tokens": 3} | changes)

    async def both():
        good = collected(batcher, Request(prompt_of(agent, "a box"), (), 30))
        return await asyncio.gather(collected(batcher, request), good, return_exceptions=True)

    wrong, good = asyncio.run(both())
    assert isinstance(wrong, UserError) and message in str(wrong)
    assert good[2].new_tokens > 0


def test_a_step_that_fails_does_not_end_the_batcher(agent, batcher, monkeypatch):
    def broken(*args):
        raise RuntimeError("no memory")

    monkeypatch.setattr(agent.model, "read", broken, raising=False)
    with pytest.raises(RuntimeError, match="no memory"):
        asyncio.run(collected(batcher, Request(prompt_of(agent, "what?"), (), 3)))
    monkeypatch.undo()
    assert asyncio.run(collected(batcher, Request(prompt_of(agent, "what?"), (), 3)))[2].prompt_tokens


def test_stop_strings_are_never_shown(agent):
    tokens = agent.tokenizer.encode("a red box. and what else?")
    text = AnswerText(StreamDecoder(agent.tokenizer), ["box. and", "zzz"])
    shown = ""
    for token in tokens:
        shown += text.feed(token)
        assert "b" not in shown  # held back until it is clear that it is no stop
        if text.stopped:
            break
    assert text.stopped and shown + text.flush() == "a red "
    other = AnswerText(StreamDecoder(agent.tokenizer), ["else? no"])
    assert "".join(map(other.feed, tokens)) + other.flush() == "a red box. and what else?" and not other.stopped


def test_log_probabilities_are_those_of_the_logits():
    import numpy as np
    import torch

    logits = np.random.default_rng(0).normal(size=50).astype(np.float32) * 5
    reference = torch.log_softmax(torch.from_numpy(logits).double(), 0)
    found = likely(logits, 7, 3)
    assert found.logprob == pytest.approx(reference[7].item())
    values, ids = reference.topk(3)
    assert [i for i, _ in found.top] == ids.tolist()
    np.testing.assert_allclose([p for _, p in found.top], values)


def test_the_oldest_pictures_are_forgotten():
    import numpy as np

    seen = Seen(lambda images: np.zeros((len(images), 4, 4), np.float32), max_pixels=1000, most_bytes=150)

    def vectors_of(*pictures):
        return seen.vectors(key_of(pictures), pictures)

    for colour in ("red", "blue", "green"):
        vectors_of(png(colour))
    assert seen.bytes == 128 and len(seen.found) == 2
    assert vectors_of(png("green"))[1] == 1 and vectors_of(png("red"))[1] == 0
    with pytest.raises(TooLarge, match="40 x 30 pixels, the limit of this server is 1,000"):
        vectors_of(png("red", (40, 30)))
    with pytest.raises(ImageError, match="picture 2 is empty"):
        vectors_of(png("red"), b"")
