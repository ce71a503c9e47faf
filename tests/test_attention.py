"""The attention of an answer's words to the cells of pictures, against the weights that a forward pass really used."""

import copy

import pytest
import torch
import torch.nn.functional as F

from nanochat.agent import Agent
from nanochat.attention import attention_of_words, attention_to_images, word_tokens
from nanochat.conversation import user_message
from nanochat.cross_attention import GatedCrossAttention
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer
from tests.conftest import TINY, make_model

IMAGE, N, D, LAYERS, HEADS = 96, 4, 12, 2, 4
FUSIONS = ("prefix", "cross")


def tiny(fusion, **changes):
    return make_model(**dict(fusion=fusion, vision_tokens_per_image=N, max_images=3) | changes)


def row(model, n_images=2):
    """(ids of a row, vectors): text before, between and behind the pictures."""
    places = [IMAGE] * model.config.places_per_image
    ids = [1, *places, 5, *places, 7, 8][: None if n_images == 2 else 3 + len(places)]
    return ids, torch.randn(n_images, N, D, generator=torch.Generator().manual_seed(1))


def self_weights(model, ids, vectors, monkeypatch):
    """The weights of self-attention in a forward pass, each (H, T, T), from its own kernel: values that are one-hot give back
    the weights."""
    found, kernel = [], F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        keys = k.size(-2)
        found.append(kernel(q, k, torch.eye(keys).expand(*k.shape[:-2], keys, keys), **options)[0])
        return kernel(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    with torch.no_grad():
        model(torch.tensor([ids]), [vectors.flatten(0, 1)])
    monkeypatch.undo()
    return found


def cross_weights(model, ids, vectors, monkeypatch):
    """The same of cross-attention, (H, T, P * N), from the layer's own forward without gate and output projection: a head is
    as wide as two pictures have cells."""
    found, forward = [], GatedCrossAttention.forward

    def spy(layer, x, keys, values, mask, blind, dropout):
        bare = copy.deepcopy(layer)
        bare.c_proj.weight.copy_(torch.eye(x.size(-1)))
        bare.gate.fill_(100.0)
        one_hot = torch.eye(2 * N)[:, None].expand(values.shape)
        y = forward(bare, x, keys, one_hot, mask, blind, 0.0) - x
        found.append(y[0].unflatten(-1, (HEADS, 2 * N)).transpose(0, 1))
        return forward(layer, x, keys, values, mask, blind, dropout)

    monkeypatch.setattr(GatedCrossAttention, "forward", spy)
    with torch.no_grad():
        model(torch.tensor([ids]), [vectors.flatten(0, 1)])
    monkeypatch.undo()
    return found


@pytest.mark.parametrize("n_kv_head", [2, 4])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_weights_are_those_that_the_forward_pass_used(fusion, n_kv_head, monkeypatch):
    model = tiny(fusion, n_kv_head=n_kv_head)
    ids, vectors = row(model)
    used = (self_weights if fusion == "prefix" else cross_weights)(model, ids, vectors, monkeypatch)
    found = attention_to_images(model, ids, vectors)
    assert found.shape == (LAYERS, HEADS, len(ids), 2, N) and found.dtype == torch.float32 and len(used) == LAYERS
    places = [i for i, token in enumerate(ids) if token == IMAGE]
    for layer in range(LAYERS):
        expected = used[layer][:, :, places] if fusion == "prefix" else used[layer]
        torch.testing.assert_close(found[layer], expected.unflatten(-1, (2, N)), rtol=1e-4, atol=1e-5)
    assert not found[:, :, 0].any()
    between = ids.index(5)
    assert not found[:, :, between, 1].any() and found[:, :, between, 0].any()  # the second picture comes later
    shares = found.sum((3, 4))[:, :, -1]
    if fusion == "cross":
        torch.testing.assert_close(shares, torch.ones(LAYERS, HEADS))
    else:
        assert ((0 < shares) & (shares < 1)).all()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_recording_changes_nothing(fusion):
    model = tiny(fusion)
    model.dropout = 0.5
    model.train()
    ids, vectors = row(model)
    first, second = (attention_to_images(model, ids, vectors) for _ in range(2))
    assert torch.equal(first, second) and model.training  # no dropout inside, and the mode comes back
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(UserError, match="places"):
        attention_to_images(model, ids, vectors[:1])
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.set_compute_dtype(torch.bfloat16)
    torch.testing.assert_close(attention_to_images(model, ids, vectors), first, rtol=0, atol=0.05)


# ---- words


TOKENIZER = Tokenizer.train(["a red box", "the red bus", "a bus"] * 3, 300)


@pytest.mark.parametrize("text", ["a red bus", "  a  zebra, größer als\tein bus.", "red", "bus 日本 x", "no."])
def test_words_have_the_tokens_that_they_are_made_of(text):
    tokens = TOKENIZER.encode(text)
    words = word_tokens(TOKENIZER, tokens)
    assert [word for word, _ in words] == [word.strip() for word in text.split(" ") if word]
    for word, places in words:
        assert TOKENIZER.decode([tokens[i] for i in places]).strip() == word
    used = [i for _, places in words for i in places]
    assert used == sorted(set(used))
    assert {TOKENIZER.decode([tokens[i]]) for i in set(range(len(tokens))) - set(used)} <= {" ", "  "}


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_word_is_where_its_tokens_are_predicted(fusion):
    model = make_model(
        vocab_size=TOKENIZER.vocab_size, vision_token_id=TOKENIZER.special("<|image|>"), vision_tokens_per_image=N,
        fusion=fusion,
    )  # fmt: skip
    agent = Agent(model, TOKENIZER, {"images": 2})
    vectors = torch.randn(2, N, D, generator=torch.Generator().manual_seed(2))
    prompt, answer = agent.prompt([user_message("what is it?", 2)]), "a zebra box"
    words = attention_of_words(model, TOKENIZER, prompt, answer, vectors)
    assert [word.text for word in words] == ["a", "zebra", "box"]
    tokens = TOKENIZER.encode(answer)
    whole = attention_to_images(model, [*prompt, *tokens], vectors)  # one position more changes no other
    start = len(prompt) - 1  # the last of the prompt says the first word
    n = [len(places) for _, places in word_tokens(TOKENIZER, tokens)]
    assert n == [1, 5, 1]  # five letters that are not merged; the blank before them is a token, and of no word
    for word, (first, end) in zip(words, ((0, 1), (2, 7), (7, 8)), strict=True):
        torch.testing.assert_close(word.weights, whole[:, :, start + first : start + end].mean(2))
        torch.testing.assert_close(word.mean, word.weights.mean((0, 1)))
    assert attention_of_words(model, TOKENIZER, prompt, "", vectors) == []


# ---- models without cells


def test_models_without_cells():
    one = make_model()
    text = GPT(GPTConfig(**{name: TINY[name] for name in TINY if name != "vision_embedding_dim"}))
    for model, message in ((one, "as one vector"), (text, "a text model"), (Agent.load("robot").model, "glances")):
        with pytest.raises(UserError, match=f"this model has no cells.*{message}"):
            attention_to_images(model, [1, 2], torch.zeros(1, 1, D))
