"""Cached generation against the plain uncached forward, and the choice of tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.engine import Engine
from nanochat.gpt import GPT, Inputs, pad_rows
from nanochat.kv_cache import KVCache
from nanochat.sampling import Sampling, choose
from tests.conftest import make_model

IMAGE = 96  # vision_token_id of the test model: the last of its vocabulary


def uncached(model, prompt, n, vision=None):
    """Greedy generation by running the whole row again for every token."""
    ids = list(prompt)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids]), vision)[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def test_cached_logits_equal_uncached(model):
    idx = torch.randint(0, 90, (2, 20))
    cache = Engine(model).new_cache(2)
    steps = [model(idx[:, :7], kv_cache=cache)]  # a prompt,
    steps += [model(idx[:, t : t + 1], kv_cache=cache) for t in range(7, 12)]  # single tokens,
    steps += [model(idx[:, 12:], kv_cache=cache)]  # and a second turn of several
    torch.testing.assert_close(torch.cat(steps, 1), model(idx), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_cached_logits_equal_uncached_with_images_and_ragged_rows(model):
    prompts = [[1, IMAGE, IMAGE, 4], [IMAGE, 2], [5, 6, 7, 8, 9, 10, IMAGE]]
    vision = [torch.randn(2, 12), torch.randn(1, 12), torch.randn(1, 12)]
    cache = Engine(model).new_cache(3)
    idx = pad_rows(prompts, 0)
    hidden = model.hidden(Inputs(idx, idx == IMAGE, torch.cat(vision)), cache)
    cache.rewind([len(prompt) for prompt in prompts])
    steps = [hidden[torch.arange(3), [len(prompt) - 1 for prompt in prompts]]]
    for token in (11, 12):
        steps.append(model.hidden(Inputs(torch.full((3, 1), token)), cache)[:, 0])
    for row, prompt in enumerate(prompts):
        whole = model(torch.tensor([prompt + [11, 12]]), vision[row][None])[0]
        for step, hidden in enumerate(steps):
            torch.testing.assert_close(model.logits(hidden)[row], whole[len(prompt) - 1 + step], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_batched_generation_equals_single_rows(model):
    prompts = [[1, 2, 3], [4], [IMAGE, 9, 9, 9, 9, 9], [7, IMAGE]]
    vision = [torch.zeros(0, 12), torch.zeros(0, 12), torch.randn(1, 12), torch.randn(1, 12)]
    alone = [uncached(model, p, 12, v[None] if len(v) else None) for p, v in zip(prompts, vision, strict=True)]
    assert len({tuple(row) for row in alone}) == 4
    engine = Engine(model)
    assert engine.generate(prompts, 12, images=vision) == alone
    # rows stop early, each at its own place, and the others go on
    stops = {alone[0][3], alone[2][6]}
    expected = [row[: min([row.index(s) for s in stops if s in row], default=12)] for row in alone]
    assert len({len(row) for row in expected}) > 1
    assert engine.generate(prompts, 12, images=vision, stop_ids=stops) == expected


def test_chat_turns_continue_the_cache(model):
    engine, cache = Engine(model), None
    cache = engine.new_cache()
    first = [5, 6, 7]
    said = engine.generate([first], 6, cache=cache)[0]
    held = cache.lengths[0]
    assert held == len(first) + 5  # the last token has not been through the model
    second = said[-1:] + [8, 9]
    assert engine.generate([second], 6, cache=cache)[0] == uncached(model, first + said + [8, 9], 6)


def test_one_picture_many_questions(model):
    engine, cache = Engine(model), None
    cache, vision = engine.new_cache(), torch.randn(1, 1, 12)
    engine.generate([[1, IMAGE, 2]], 1, images=[vision[0]], cache=cache)
    assert cache.lengths == [3]
    for question in ([3, 4], [5], [6, 7, 8]):
        cache.rewind([3])
        assert engine.generate([question], 5, cache=cache)[0] == uncached(model, [1, IMAGE, 2, *question], 5, vision)
    with pytest.raises(ValueError, match="rewound"):
        cache.rewind([60])
    with pytest.raises(ValueError, match="one row"):
        engine.generate([[1], [2]], 2, cache=cache)
    with pytest.raises(ValueError, match="one row"):
        engine.add([1], 2, cache=engine.new_cache(2))


def run(engine, until=lambda: False):
    """Step until all rows have ended; returns {row: its tokens}."""
    said = {}
    while engine.rows and not until():
        for row, token in engine.step().items():
            said.setdefault(row, []).append(token)
    return said


def merged(*parts):
    return {row: [token for part in parts for token in part.get(row, [])] for row in set().union(*parts)}


def test_rows_that_enter_late_say_what_they_say_alone(model):
    """Rows with and without a picture, of other lengths, enter while others run; one continues a cache of its caller."""
    vision, engine = torch.randn(1, 12), Engine(model)
    turn = [8, 9]
    cache = engine.new_cache()
    first_turn = Engine(model).generate([[5, 6, 7]], 6, cache=cache)[0]
    first = engine.add([1, 2, 3], 12)
    parts = [engine.step(), engine.step()]
    second, third = engine.add([4, IMAGE, 6, 7, 8, 9], 9, images=vision), engine.add([9], 3)
    parts += [engine.step(), engine.step()]
    fourth = engine.add([first_turn[-1], *turn], 5, cache=cache)
    said = merged(*({row: [token] for row, token in part.items()} for part in parts), run(engine))
    assert said[first] == uncached(model, [1, 2, 3], 12)
    assert said[second] == uncached(model, [4, IMAGE, 6, 7, 8, 9], 9, vision[None])
    assert said[third] == uncached(model, [9], 3)
    assert said[fourth] == uncached(model, [5, 6, 7, *first_turn, *turn], 5)
    assert not engine.rows and engine.cache is None


def test_each_row_has_its_own_sampling_and_stop_ids(model):
    engine = Engine(model)
    plain = uncached(model, [1, 2], 8)
    greedy = engine.add([1, 2], 8)
    stopped = engine.add([1, 2], 8, stop_ids=[plain[4]])
    chosen = engine.add([1, 2], 8, sampling=Sampling(temperature=1.0, allowed_ids=(3, 5)))
    said = run(engine)
    assert said[greedy] == plain
    assert said[stopped] == plain[: plain.index(plain[4])]
    assert len(said[chosen]) == 8 and set(said[chosen]) <= {3, 5}


def test_a_dropped_row_leaves_and_the_others_do_not_notice(model):
    engine = Engine(model)
    rows = [engine.add(prompt, 10) for prompt in ([1, 2, 3], [4], [5, 6, 7, 8])]
    before = [engine.step() for _ in range(3)]
    waiting = engine.add([9], 4)
    engine.drop(rows[1])
    engine.drop(waiting)
    engine.drop(99)  # unknown rows are ignored
    said = merged(*({row: [token] for row, token in part.items()} for part in before), run(engine))
    assert said[rows[0]] == uncached(model, [1, 2, 3], 10) and said[rows[2]] == uncached(model, [5, 6, 7, 8], 10)
    assert len(said[rows[1]]) == 3 and waiting not in said


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(1, 9), st.integers(1, 7)), min_size=1, max_size=6), st.randoms()
)
def test_any_schedule_of_rows_gives_the_answers_of_single_rows(schedule, random):
    """(step at which it enters, length of the prompt, new tokens) of each row."""
    engine, said, expected = Engine(MODEL), {}, {}
    prompts = [[random.randrange(90) for _ in range(length)] for _, length, _ in schedule]
    for step in range(8):
        for (start, _, n), prompt in zip(schedule, prompts, strict=True):
            if start == step:
                expected[engine.add(prompt, n)] = uncached(MODEL, prompt, n)
        for row, token in engine.step().items():
            said.setdefault(row, []).append(token)
    assert merged(said, run(engine)) == expected


MODEL = make_model()


def test_a_short_prompt_gets_its_first_token_in_a_step_of_its_own(model):
    prompts, engine, said = ([1, 2, 3], [4, 5], list(range(1, 40))), Engine(model), {}

    def step():
        found = engine.step()
        for row, token in found.items():
            said.setdefault(row, []).append(token)
        return set(found)

    first = engine.add(prompts[0], 6)
    assert step() == {first}
    second = engine.add(prompts[1], 6)
    assert step() == {second} and step() == {first, second}
    third = engine.add(prompts[2], 6)  # long: read beside the others
    assert step() == {first, second, third}
    while engine.rows:
        step()
    assert list(said.values()) == [Engine(model).generate([prompt], 6)[0] for prompt in prompts]


def test_short_prompts_never_stop_the_answers_that_run(model):
    engine = Engine(model)
    first = engine.add([1, 2, 3], 6)
    for _ in range(12):
        engine.add([4, 5], 1)
        engine.step()
    assert first not in engine.rows


def test_a_joined_cache_holds_the_rows_of_both():
    config = MODEL.config
    first, second = KVCache(config, 2, 5), KVCache(config, 1, 9)
    for cache, value in ((first, 1.0), (second, 2.0)):
        cache.k += value
        cache.v += value
        cache.lengths = [3] * len(cache.lengths)
    both = KVCache.joined(first, second)
    assert both.max_len == 9 and both.lengths == [3, 3, 3] and both.k.shape[3] == both.v.shape[3] == 9
    assert (both.k[:, :2, :, :3] == 1).all() and (both.v[:, 2, :, :3] == 2).all() and not both.k[..., 3:, :].any()


@pytest.mark.parametrize(
    ("prompt", "vectors", "message"),
    [
        ([1, IMAGE], torch.zeros(2, 12), "1 places.*2 vectors"),
        ([1, IMAGE, IMAGE], torch.zeros(1, 12), "2 places.*1 vectors"),
        ([IMAGE], torch.zeros(1, 13), "vision_embedding_dim is 12"),
        ([IMAGE], torch.full((1, 12), float("inf")), "NaN or infinite"),
    ],
)
def test_vision_vectors_that_do_not_fit_are_refused(model, prompt, vectors, message):
    with pytest.raises(ValueError, match=message):
        Engine(model).add(prompt, 4, images=vectors)


def test_a_cache_belongs_to_one_row_at_a_time(model):
    engine = Engine(model)
    cache = engine.new_cache()
    first = engine.add([1, 2, 3], 2, cache=cache)
    for _ in range(2):  # while the row waits, and while it runs
        with pytest.raises(ValueError, match="one row at a time"):
            engine.add([4], 2, cache=cache)
        engine.step()
    assert first not in engine.rows
    engine.add([4], 2, cache=cache)
    with pytest.raises(ValueError, match="the cache holds 5 tokens, and 7 are needed"):
        engine.add([1, 2, 3], 4, cache=engine.new_cache(1, 5))


def test_the_repetition_penalty_is_of_the_answer_and_not_of_what_is_cached(model):
    """The same answer whether the prompt is new or in the cache."""
    penalty = Sampling(repetition_penalty=2.0)
    plain = Engine(model).generate([[1, 2, 3, 4]], 12, sampling=penalty)[0]
    cache = Engine(model).new_cache()
    Engine(model).generate([[1, 2, 3]], 1, cache=cache)
    assert Engine(model).generate([[4]], 12, sampling=penalty, cache=cache)[0] == plain
    assert plain != Engine(model).generate([[1, 2, 3, 4]], 12)[0]


def test_a_text_model_takes_no_vision_vectors(model):
    with pytest.raises(ValueError, match="text model"):
        Engine(GPT(model.config)).add([1, IMAGE], 4, images=torch.zeros(1, 12))


def test_a_stream_complains_when_it_is_made(model):
    with pytest.raises(ValueError, match="context"):
        Engine(model).stream([[1] * 60], 10)


def test_seeds_reproduce_and_rows_are_independent(model):
    engine, warm = Engine(model), Sampling(temperature=1.0, seed=7)
    prompts = [[1, 2], [3, 4, 5]]
    both = engine.generate(prompts, 20, sampling=warm)
    assert both == engine.generate(prompts, 20, sampling=warm)
    assert both[0] == engine.generate(prompts[:1], 20, sampling=warm)[0]
    assert both != engine.generate(prompts, 20, sampling=Sampling(temperature=1.0, seed=8))


def test_greedy_is_deterministic_and_streams(model):
    engine = Engine(model)
    steps = engine.stream([[1, 2, 3]], 9)
    assert [step[0] for step in steps] == engine.generate([[1, 2, 3]], 9)[0] == uncached(model, [1, 2, 3], 9)


@pytest.mark.parametrize(
    ("prompts", "n", "message"),
    [
        ([[1, 97]], 4, "97 is outside"),
        ([[1, -1]], 4, "-1 is outside"),
        ([[]], 4, "empty"),
        ([], 4, "empty"),
        ([[1] * 60], 5, "context of 64"),
        ([[1]], 0, "max_new_tokens"),
    ],
)
def test_bad_prompts_are_refused(model, prompts, n, message):
    with pytest.raises(ValueError, match=message):
        Engine(model).generate(prompts, n)


def test_nan_weights_are_an_error_not_an_answer():
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        Engine(model).generate([[1]], 3)


# ---- choosing one token

logits_strategy = st.lists(st.floats(-15, 15, width=32), min_size=2, max_size=40).map(lambda v: np.array(v, np.float32))


def possible(logits, sampling, draws=200):
    rng = np.random.default_rng(0)
    return {choose(logits, sampling, rng) for _ in range(draws)}


@given(logits_strategy)
@settings(max_examples=50)
def test_every_filter_keeps_the_likeliest_and_only_what_it_should(logits):
    best, p = int(logits.argmax()), np.exp(logits - logits.max(), dtype=np.float64)
    p /= p.sum()
    assert possible(logits, Sampling(temperature=0), 3) == {best}
    assert logits[list(possible(logits, Sampling(temperature=1, top_k=1), 20))] == pytest.approx(logits[best])
    assert all(p[i] >= 0.5 * p.max() * (1 - 1e-6) for i in possible(logits, Sampling(temperature=1, min_p=0.5), 50))
    kept = possible(logits, Sampling(temperature=1, top_p=0.5), 50)
    assert all(p[p > p[i]].sum() < 0.5 + 1e-6 for i in kept)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_probabilities(temperature):
    p, rng, sampling = np.array([0.5, 0.3, 0.2]), np.random.default_rng(0), Sampling(temperature=temperature)
    draws = np.bincount([choose(np.log(p).astype(np.float32), sampling, rng) for _ in range(4000)])
    expected = p ** (1 / temperature)
    np.testing.assert_allclose(draws / 4000, expected / expected.sum(), atol=0.03)


def test_top_p_and_top_k_by_hand():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    assert possible(logits, Sampling(temperature=1, top_p=0.6)) == {0, 1}
    assert possible(logits, Sampling(temperature=1, top_k=3)) == {0, 1, 2}
    assert possible(logits, Sampling(temperature=1, min_p=0.45)) == {0, 1, 2}


def test_repetition_penalty_lowers_what_was_said():
    logits = np.array([2.0, 1.5, -1.0], np.float32)
    assert choose(logits, Sampling(repetition_penalty=2.0), None, history=[0]) == 1
    assert choose(np.array([-1.0, -1.5], np.float32), Sampling(repetition_penalty=2.0), None, history=[0]) == 1


@pytest.mark.parametrize(
    "fields",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": -1},
     {"repetition_penalty": 0}, {"allowed_ids": ()}],
)  # fmt: skip
def test_bad_sampling_is_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        Sampling(**fields)
