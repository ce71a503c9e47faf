"""Gated cross-attention against plain references: step 0, training, several pictures, and generation with the cache."""

import pytest
import torch
import torch.nn.functional as F

from nanochat.agent import Agent, Chat
from nanochat.checkpoint import load_checkpoint, save_checkpoint
from nanochat.conversation import user_message
from nanochat.engine import Engine
from nanochat.fusion import MATCH_SHARPNESS
from nanochat.gpt import GPT, GPTConfig, Inputs, norm, pad_rows
from nanochat.kv_cache import KVCache
from nanochat.multimodal_gpt import MultimodalGPT, MultimodalGPTConfig
from nanochat.tokenizer import Tokenizer
from tests.conftest import TINY, make_model
from tests.test_gpt import calls_of_a_block

IMAGE, N, D = 96, 4, 12  # placeholder, cells of a picture and their channels in the tiny model


def make_cross(**changes):
    """Random weights everywhere, gates and tables too."""
    return make_model(**dict(fusion="cross", vision_tokens_per_image=N, max_images=3) | changes)


@pytest.fixture
def model():
    return make_cross()


def pictures(*counts, seed=1):
    """For each row (n * N, D) vectors of its n pictures."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n * N, D, generator=generator) for n in counts]


ROWS = [[1, IMAGE, 5, IMAGE, 4, 8], [3, 2, 6], [5, 6, 7, 8, IMAGE, 10], [IMAGE, 2, IMAGE, IMAGE]]
COUNTS = [2, 0, 1, 3]


# ---- the meaning, written out


def plain_cells(model, vectors, number, before=None):
    """(N, C): the cells of one picture, the `number`-th of its row. before: vectors of the picture in front of it."""
    projector = model.vision_projector
    weights, change = projector.linear.weight, projector.change
    cells = norm(vectors) @ weights.T + projector.cell
    rows = torch.stack([cells[i] + projector.picture[number] for i in range(N)])
    if before is None:
        return rows
    earlier = norm(before) @ weights.T + projector.cell
    for i in range(N):
        likeness = torch.stack([MATCH_SHARPNESS * F.cosine_similarity(cells[i], other, dim=0) for other in earlier])
        alike = sum(weight * other for weight, other in zip(likeness.softmax(0), earlier, strict=True))
        seen = torch.cat([cells[i], cells[i] - earlier[i], cells[i] - alike])
        rows[i] += (change.c_fc.weight @ seen).clamp_min(0) ** 2 @ change.c_proj.weight.T
    return rows


def plain_cross(layer, x, shown):
    """x: (T, C) of one row; shown: [(place, cells)] of its pictures. One token and one head at a time."""
    H, width = layer.shape
    out = x.clone()
    for t in range(len(x)):
        cells = [c for place, c in shown if place <= t]
        if not cells:
            continue
        cells, q = torch.cat(cells), norm(x[t]) @ layer.c_q.weight.T
        heads = []
        for h in range(H):
            part = slice(h * width, (h + 1) * width)
            k, v = (cells @ layer.c_k.weight.T)[:, part], (cells @ layer.c_v.weight.T)[:, part]
            scores = (norm(k) @ norm(q[part])) / width**0.5
            heads.append(scores.softmax(0) @ v)
        out[t] = x[t] + torch.tanh(layer.gate) * (torch.cat(heads) @ layer.c_proj.weight.T)
    return out


def plain_logits(model, ids, vectors):
    """(T, vocab_size) of one row, with the text model's own blocks."""
    places = [t for t, token in enumerate(ids) if token == IMAGE] if len(vectors) else []
    each = vectors.view(-1, N, D)
    shown = [(place, plain_cells(model, each[n], n, each[n - 1] if n else None)) for n, place in enumerate(places)]
    x = norm(model.transformer.wte.weight[ids])
    for block, layer in zip(model.transformer.h, model.cross_attention, strict=True):
        x = plain_cross(layer, x, shown)
        x = block(x[None], model.cos[: len(ids)], model.sin[: len(ids)], None, None, 0.0)[0]
    return model.logits(norm(x))


@torch.no_grad()
@pytest.mark.parametrize("n_kv_head", [2, 4])
def test_logits_equal_the_plain_reference(n_kv_head):
    model = make_cross(n_kv_head=n_kv_head)
    vectors, idx = pictures(*COUNTS), pad_rows(ROWS, 0)
    logits = model(idx, vectors)
    for row, (ids, seen) in enumerate(zip(ROWS, vectors, strict=True)):
        torch.testing.assert_close(logits[row, : len(ids)], plain_logits(model, ids, seen), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_token_sees_the_pictures_before_it_only(model):
    ids = [1, 5, IMAGE, 6, IMAGE, 7]
    first, second, other = pictures(1, 1, 1)
    text = MultimodalGPT.forward(model, torch.tensor([ids]))[0]
    logits = model(torch.tensor([ids]), [torch.cat([first, second])])[0]
    changed = model(torch.tensor([ids]), [torch.cat([first, other])])[0]
    assert torch.equal(logits[:2], text[:2]) and not torch.isclose(logits[2:], text[2:]).all(-1).any()
    assert torch.equal(logits[:4], changed[:4]) and not torch.isclose(logits[4:], changed[4:]).all(-1).any()
    swapped = model(torch.tensor([ids]), [torch.cat([second, first])])[0]
    assert not torch.isclose(logits[5], swapped[5]).all()
    with torch.no_grad():
        model.vision_projector.picture.zero_()  # without their numbers and changes, two pictures are a set
        model.vision_projector.change.c_proj.weight.zero_()
    both = [model(torch.tensor([ids]), [torch.cat(pair)])[0] for pair in ((first, second), (second, first))]
    mixed = [plain_cross(model.cross_attention[0], torch.ones(1, 32), [(0, plain_cells(model, v, 0)) for v in pair])
             for pair in ((first, second), (second, first))]  # fmt: skip
    torch.testing.assert_close(*mixed)
    assert not torch.isclose(both[0][3], both[1][3]).all()  # but which one a token between them sees still counts


@torch.no_grad()
def test_the_first_picture_has_no_change_and_weights_without_changes_load(model):
    first, second = pictures(1, 1)
    one, two = torch.tensor([[1, IMAGE, 5, 5]]), torch.tensor([[1, IMAGE, IMAGE, 5]])
    state = {name: value for name, value in model.state_dict().items() if ".change." not in name}
    without = MultimodalGPT(model.config)
    without.init_weights()
    without.load_state_dict(state)
    without.set_compute_dtype(torch.float32)
    torch.testing.assert_close(without(one, [first]), model(one, [first]))
    both = [torch.cat([first, second])]
    assert not torch.isclose(without(two, both), model(two, both)).all(-1)[0, -1]


@torch.no_grad()
def test_at_step_0_it_is_the_text_model_to_the_bit():
    text = GPT(GPTConfig(**{name: TINY[name] for name in TINY if name != "vision_embedding_dim"}))
    torch.manual_seed(0)
    for p in text.parameters():
        p.normal_(0.0, 0.3)
    model = MultimodalGPT(MultimodalGPTConfig(**TINY, fusion="cross", vision_tokens_per_image=N))
    model.init_weights()
    assert all(layer.c_proj.weight.std() > 0 for layer in model.cross_attention)  # else the gate would never move
    missing = model.load_state_dict(text.state_dict(), strict=False).missing_keys
    assert {name.split(".")[0] for name in missing} == {"cross_attention", "vision_projector"}
    idx = pad_rows(ROWS, 0)
    for dtype in (torch.float32, torch.bfloat16):
        text.set_compute_dtype(dtype), model.set_compute_dtype(dtype)
        assert torch.equal(model(idx, pictures(*COUNTS)), text(idx))


# ---- training


@pytest.mark.parametrize("fusion", ["cross", "prefix"])
def test_a_picture_of_many_rows_is_projected_once(fusion):
    """`Inputs.shown` is a shorter way to say the same, with the same gradients."""
    model = make_cross(fusion=fusion)
    places = [IMAGE] * model.config.places_per_image
    rows = [[1, *places, *places, 7], [2, *places, 8], [5, 6], [3, *places, 9]]
    shown = torch.tensor([1, 0, 1, 1])
    vectors = pictures(2)[0].view(2, N, D).requires_grad_()
    idx, results, calls = pad_rows(rows, 0), [], []
    model.vision_projector.register_forward_pre_hook(lambda _, inputs: calls.append(inputs[0].numel() // (N * D)))
    for images, which in ((vectors[shown].flatten(0, 1), None), (vectors.flatten(0, 1), shown)):
        model.zero_grad()
        vectors.grad = None
        hidden = model.hidden(Inputs(idx, idx == IMAGE, images, shown=which))
        hidden[
            torch.tensor([len(row) - 1 for row in rows]).view(-1, 1) >= torch.arange(idx.size(1))
        ].square().sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((hidden.detach(), vectors.grad, gradients))
    assert calls == [4, 2]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("counts", [COUNTS, [0, 0, 0, 0], [1, 0, 0, 0]])
def test_gradients_are_finite_and_the_same_when_blocks_are_recomputed(counts):
    model = make_cross().train()
    rows = [[1, *[IMAGE] * n, 7, 8] for n in counts]
    model.dropout, gradients, calls = 0.3, [], calls_of_a_block(model)
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        torch.manual_seed(1)
        idx = pad_rows(rows, 0)
        seen = pictures(*counts) if sum(counts) else None
        model(idx, seen, targets=torch.randint(0, 90, idx.shape)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert len(calls) == (3 if model.gradient_checkpointing else 1)
    plain, recomputed = gradients
    torch.testing.assert_close(plain, recomputed)
    assert all(gradient.isfinite().all() for gradient in plain.values())
    moved = {name for name, gradient in plain.items() if gradient.any()}
    assert (
        {"cross_attention.0.gate", "vision_projector.linear.weight"} <= moved
        if sum(counts)
        else "lm_head.weight" in moved
    )


def test_gates_open_in_training_and_the_second_picture_answers_a_question():
    """The answer is a word about the second of two pictures: it can be learnt from its content only."""
    torch.manual_seed(0)
    model = MultimodalGPT(MultimodalGPTConfig(**TINY, fusion="cross", vision_tokens_per_image=N))
    model.init_weights()
    groups = model.param_groups()
    assert {"cross_attention.0.gate", "vision_projector.cell", "vision_projector.picture"} <= {
        name for name, p in model.named_parameters() if any(p is other for other in groups["outputs"])
    }
    optimizer = torch.optim.AdamW(sum(groups.values(), []), 0.01)
    kinds = torch.randn(2, N, D)
    choices = torch.tensor([[a, b] for a in (0, 1) for b in (0, 1)])  # (4, 2): which kind each picture is
    idx = torch.tensor([[1, IMAGE, IMAGE, 2]] * 4)
    targets = torch.full_like(idx, -1)
    targets[:, 3] = 10 + choices[:, 1]
    for _ in range(120):
        loss = model(idx, kinds[choices].flatten(1, 2), targets=targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(layer.gate != 0 for layer in model.cross_attention)
    with torch.no_grad():
        assert model(idx, kinds[choices].flatten(1, 2))[:, 3].argmax(-1).tolist() == (10 + choices[:, 1]).tolist()


@torch.no_grad()
def test_bfloat16_is_close_to_float32(model):
    idx, vectors = pad_rows(ROWS, 0), pictures(*COUNTS)
    exact = model(idx, vectors).softmax(-1)
    model.set_compute_dtype(torch.bfloat16)
    assert model.hidden(model.inputs(idx, vectors)).dtype == torch.bfloat16
    assert (model(idx, vectors).softmax(-1) - exact).abs().mean() < 0.1 * exact.mean()


# ---- generation


def uncached(model, prompt, vectors, n):
    """n greedy tokens by plain forwards over the whole row. Pictures are those of the prompt: the model, with its random weights,
    also says <|image|>."""
    ids = list(prompt)
    for _ in range(n):
        places = torch.tensor([[t < len(prompt) and token == IMAGE for t, token in enumerate(ids)]])
        seen = [vectors] if len(vectors) else None
        ids.append(int(model(torch.tensor([ids]), seen, places if len(vectors) else None)[0, -1].argmax()))
    return ids[len(prompt) :]


@torch.no_grad()
def test_batched_generation_equals_plain_forwards(model):
    vectors = pictures(*COUNTS)
    alone = [uncached(model, ids, seen, 10) for ids, seen in zip(ROWS, vectors, strict=True)]
    assert len({tuple(row) for row in alone}) == 4
    shown = [seen if len(seen) else None for seen in vectors]
    assert Engine(model).generate(ROWS, 10, images=shown) == alone
    # rows that come while others run, and leave before them
    engine, said = Engine(model), [[] for _ in ROWS]
    lengths = [10, 3, 6, 10]
    for row in range(len(ROWS)):
        assert engine.add(ROWS[row], lengths[row], images=shown[row]) == row
        for number, token in engine.step().items():
            said[number].append(token)
    while engine.rows:
        for number, token in engine.step().items():
            said[number].append(token)
    assert said == [row[:n] for row, n in zip(alone, lengths, strict=True)]


@torch.no_grad()
def test_pictures_are_projected_once(model):
    calls = []
    model.vision_projector.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    Engine(model).generate(ROWS, 5, images=[seen if len(seen) else None for seen in pictures(*COUNTS)])
    assert calls == [sum(COUNTS)]


@torch.no_grad()
def test_a_conversation_goes_on_rewinds_and_shows_more_pictures(model):
    engine, cache = Engine(model), Engine(model).new_cache()
    first, second, third = pictures(1, 1, 1)
    ids = [1, IMAGE, 5, 6]
    assert engine.generate([ids], 3, images=[first], cache=cache) == [uncached(model, ids, first, 3)]
    ids = [*ids, 8, IMAGE, 9]  # the second turn shows another picture
    cache.rewind([4])
    assert engine.generate([ids[4:]], 3, images=[second], cache=cache) == [
        uncached(model, ids, torch.cat([first, second]), 3)
    ]
    cache.rewind([5])  # back to before it, and the third instead
    ids = [*ids[:5], 11, IMAGE]
    expected = uncached(model, ids, torch.cat([first, third]), 3)
    assert engine.generate([ids[5:]], 3, images=[third], cache=cache) == [expected]
    assert expected != uncached(model, ids, torch.cat([first, second]), 3)
    cache.rewind([1])  # no picture is left
    assert engine.generate([[5, 6]], 3, cache=cache) == [uncached(model, [1, 5, 6], torch.zeros(0, D), 3)]


@torch.no_grad()
def test_caches_of_rows_with_and_without_pictures_join_and_branch(model):
    def read(ids, vectors):
        cache = Engine(model).new_cache()
        model.hidden(model.inputs(torch.tensor([ids]), vectors), cache)
        return cache

    shown = pictures(2, 0, 1)
    rows = [[1, IMAGE, IMAGE, 4], [3, 2], [IMAGE, 5, 6]]
    caches = [read(ids, [seen] if len(seen) else None) for ids, seen in zip(rows, shown, strict=True)]
    whole = KVCache.joined(KVCache.joined(*caches[:2]), caches[2])
    whole.keep_rows([2, 0, 1, 0])
    hidden = model.hidden(Inputs(torch.tensor([[7]] * 4)), whole)
    for line, row in enumerate([2, 0, 1, 0]):
        expected = plain_logits(model, [*rows[row], 7], shown[row])[-1]
        torch.testing.assert_close(model.logits(hidden[line, 0]), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_generate_with_image_takes_one_place_a_picture(model):
    vectors = pictures(2)[0].view(2, N, D)
    said = model.generate_with_image([5, 6], max_new_tokens=6, temperature=0.0, vision_embeddings=vectors)
    assert said == uncached(model, [IMAGE, IMAGE, 5, 6], vectors.flatten(0, 1), 6)
    mask = torch.tensor([[False, True, False, True]])
    idx = torch.tensor([[1, 2, 3, 4]])  # any token can be a picture's place
    marked, plain = model(idx, vectors.flatten(0, 1)[None], mask), model(idx)
    assert torch.equal(marked[0, 0], plain[0, 0]) and not torch.isclose(marked[0, 1:], plain[0, 1:]).all(-1).any()


def test_a_chat_about_two_pictures_equals_reading_it_all_again(tmp_path):
    tokenizer = Tokenizer.train(["what is it? is it red? a red box."] * 3, 300)
    image = tokenizer.special("<|image|>")
    made = make_cross(vocab_size=tokenizer.vocab_size, vision_token_id=image)
    save_checkpoint(tmp_path / "m", made, tokenizer, {"multi_turn": True, "images": 2})
    agent = Agent(*load_checkpoint(str(tmp_path / "m")))
    assert agent.model.config.fusion == "cross" and agent.places_per_image == 1
    vectors = pictures(2)[0].view(2, N, D)
    chat, messages = Chat(agent, vectors), []
    for turn, question in enumerate(("what is it?", "is it red?")):
        said = "".join(chat.say(question, 6))
        messages.append(user_message(question, 0 if turn else 2))
        assert said == "".join(agent.answer(agent.prompt(messages), vectors, 6))
        messages.append({"role": "assistant", "content": said})


# ---- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fusion": "add"}, "prefix or cross, got 'add'"),
        ({"fusion": 3}, "prefix or cross"),
        ({"max_images": 0}, "max_images must be an integer in 1"),
        ({"vision_tokens_per_image": 5}, "square number"),
        ({"use_vision_projection": False, "vision_embedding_dim": 32}, "needs the projection"),
    ],
)
def test_bad_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_cross(**changes)


def test_pictures_that_do_not_fit_are_refused(model):
    idx = torch.tensor([[1, IMAGE, 5]])
    with pytest.raises(ValueError, match=r"\[1\] places .* bring \[1\] vectors, expected 4 for each"):
        model(idx, torch.randn(1, D))
    with pytest.raises(ValueError, match="1 places for vision vectors, but 8 vectors were given, expected 4 for each"):
        Engine(model).add([1, IMAGE], 3, images=torch.randn(2, N, D))
    four = torch.tensor([[IMAGE] * 4])
    with pytest.raises(ValueError, match="4 pictures in one row, but this model tells at most 3 apart"):
        model(four, torch.randn(1, 4 * N, D))
    with pytest.raises(ValueError, match="4 pictures in one row"):
        model.hidden(Inputs(four, four == IMAGE, torch.randn(4 * N, D)))
    cache = Engine(model).new_cache()
    Engine(model).generate([[IMAGE, IMAGE, 1]], 1, images=[torch.randn(2, N, D)], cache=cache)
    with pytest.raises(ValueError, match="4 pictures in one row"):
        Engine(model).add([IMAGE, IMAGE], 1, images=torch.randn(2, N, D), cache=cache)
