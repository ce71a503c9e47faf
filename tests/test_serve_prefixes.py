"""Beginnings of prompts that are kept: the answers are those without them, and their memory is bounded."""

import asyncio

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nanochat.kv_cache import KVCache
from nanochat.onnx.cache import OnnxCache, Picture
from nanochat.serving.batching import Batcher
from nanochat.serving.prefixes import Prefixes, named
from nanochat.serving.requests import Request
from tests.conftest import make_model
from tests.serving import make_agent, png
from tests.test_serve_batching import alone, collected

COLOURS = ("red", "blue", "green")
WORDS = ("what is it?", "is it red?", "what is it? and what else?", "a red box. " * 8)


@pytest.fixture(scope="module", params=["prefix", "cross"])
def agent(request):
    """A model whose pictures take four places in the row, and one that looks at them beside it."""
    agent = make_agent(128, multi_turn=True, images=4)
    changes = dict(vars(agent.model.config)) | {"fusion": request.param, "max_images": 4}
    agent.model = make_model(**changes)
    agent.places_per_image = agent.model.config.places_per_image
    return agent


@pytest.fixture
def batcher(agent):
    found = Batcher(agent, max_rows=8, max_queue=32)
    yield found
    found.close()


def asked(agent, colours, text, new_tokens=8, **options):
    content = [*({"type": "image"} for _ in colours), {"type": "text", "text": text}]
    prompt = agent.prompt([{"role": "user", "content": content}])
    return Request(prompt, [png(colour) for colour in colours], new_tokens, **options)


def answers_of(batcher, *requests):
    async def all_at_once():
        return await asyncio.gather(*(collected(batcher, request) for request in requests))

    return asyncio.run(all_at_once())


def test_a_question_about_a_known_picture_reads_only_what_is_new(agent, batcher, monkeypatch):
    first, second = (asked(agent, ["red"], text) for text in WORDS[:2])
    answers_of(batcher, first)
    read, add = [], batcher.engine.add
    monkeypatch.setattr(
        batcher.engine, "add", lambda prompt, *rest, **more: (read.append(prompt), add(prompt, *rest, **more))[1]
    )
    [(texts, _, done)] = answers_of(batcher, second)
    assert [texts[0]] == list(alone(agent, second))
    assert done.cached_tokens >= 2 + agent.places_per_image and read == [second.prompt[done.cached_tokens :]]
    [(_, _, done)] = answers_of(batcher, asked(agent, ["blue"], WORDS[0]))
    assert done.cached_tokens == 0  # the same words about another picture
    assert answers_of(batcher, first)[0][2].cached_tokens == len(first.prompt) - 1


QUESTION = st.tuples(st.lists(st.sampled_from(COLOURS), max_size=3), st.sampled_from(WORDS), st.integers(1, 2))


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.lists(QUESTION, min_size=1, max_size=4), min_size=2, max_size=3))
def test_answers_are_those_without_kept_beginnings(agent, rounds):
    batcher = Batcher(agent, max_rows=8, max_queue=32)
    try:
        for questions in rounds:
            requests = [asked(agent, colours, text, n=n) for colours, text, n in questions]
            for request, (texts, _, done) in zip(requests, answers_of(batcher, *requests), strict=True):
                assert [texts.get(i, "") for i in range(request.n)] == list(alone(agent, request))
                assert 0 <= done.cached_tokens < len(request.prompt)
    finally:
        batcher.close()


def test_the_oldest_beginnings_are_forgotten(agent):
    cache = agent.model.new_cache(1, 64)
    cache.lengths = [64]
    each = cache.branch(0, 20, 20).nbytes
    prefixes = Prefixes(most_bytes=2 * each)
    for start in (100, 200, 300):
        prefixes.keep(tuple(range(start, start + 20)), cache, 0)
        assert prefixes.bytes <= 2 * each
    assert prefixes.find(tuple(range(100, 120)), 30) == (0, None)
    known, found = prefixes.find(tuple(range(300, 320)), 30)
    assert known == 19 and found.lengths == [19] and found.max_len == 30
    prefixes.keep(tuple(range(300, 325)), cache, 0)
    prefixes.keep(tuple(range(200, 220)), cache, 0)
    assert len(prefixes.kept) == 2 and prefixes.bytes == 2 * each  # five more tokens, or none, are not worth a copy


def test_a_prompt_is_named_by_its_pictures():
    assert named([1, 9, 9, 2, 9, 9], [b"a", b"b"], 9, 2) == (1, (b"a", 0), (b"a", 1), 2, (b"b", 0), (b"b", 1))
    assert named([1, 9], [], 9, 2) == (1, 9)  # without pictures, the placeholder is a word
    assert named([1, 9], [b"a"], 9, 2) is named([1, 9, 9, 9], [b"a"], 9, 2) is named([1], [b"a"], 9, 2) is None


def test_a_branch_is_a_copy_of_the_beginning_of_a_row():
    config, generator = make_model().config, np.random.default_rng(0)
    onnx, torches = OnnxCache(config, 2, 10), KVCache(config, 2, 10)
    onnx.store[...] = generator.normal(size=onnx.store.shape)
    torches.k, torches.v = map(torch.from_numpy, onnx.store.copy())
    onnx.pictures[1] = [Picture(at, np.zeros((1, 2), np.float32), [], []) for at in (2, 6)]
    for cache, stores in ((onnx, lambda cache: cache.store), (torches, lambda cache: np.stack([cache.k, cache.v]))):
        cache.lengths = [4, 7]
        branch = cache.branch(1, 5, 20)
        assert branch.lengths == [5] and branch.max_len == 20 and cache.lengths == [4, 7]
        np.testing.assert_array_equal(stores(branch)[:, :, 0, :, :5], stores(cache)[:, :, 1, :, :5])
        assert not stores(branch)[:, :, 0, :, 5:].any()
    assert onnx.branch(1, 5, 20).n_pictures(0) == 1
