"""`hidden`, the one forward pass: it compiles as one graph for every model and every kind of input."""

import pytest
import torch

from nanochat.engine import Engine
from nanochat.gpt import GPT, Inputs
from tests.conftest import make_model
from tests.test_robot_gpt import make_model as make_robot
from tests.test_robot_gpt import tokenizer as tokenizer  # a fixture

IMAGE = 96


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()


def compiled(model):
    """No C++ compiler needed; fullgraph refuses `.item()`, `int(tensor)` and branches on values."""
    return torch.compile(model.hidden, fullgraph=True, backend="eager")


def text_model():
    return GPT(make_model().config), [Inputs(torch.randint(0, 90, (2, 7)))]


def picture_model():
    idx = torch.randint(0, 90, (2, 7))
    idx[0, 1] = idx[1, 2] = IMAGE
    return make_model(), [Inputs(idx), Inputs(idx, idx == IMAGE, torch.randn(2, 12))]


@pytest.mark.parametrize("make", [text_model, picture_model])
@torch.no_grad()
def test_it_compiles_as_one_graph_with_equal_results(make):
    model, cases = make()
    for p in model.parameters():
        p.normal_(0.0, 0.3)
    for inputs in cases:
        torch.testing.assert_close(compiled(model)(inputs), model.hidden(inputs))


@pytest.mark.parametrize("head", ["continuous", "bins"])
@torch.no_grad()
def test_a_robots_pictures_and_states_compile(tokenizer, head):
    model = make_robot(tokenizer, head)
    config = model.config
    idx = torch.tensor([[1, *[config.vision_token_id] * 4, config.state_token_id, 2, config.act_token_id]])
    inputs = Inputs(idx, idx == config.vision_token_id, torch.randn(4, 16), torch.randn(1, 2))
    torch.testing.assert_close(compiled(model)(inputs), model.hidden(inputs))


@torch.no_grad()
def test_prefill_and_cached_steps_compile():
    model = make_model()
    hidden, plain, fast = compiled(model), Engine(model).new_cache(2), Engine(model).new_cache(2)
    for length in (6, 1, 1, 1, 3):  # prompt, three single tokens, a second turn
        idx = torch.randint(0, 90, (2, length))
        torch.testing.assert_close(hidden(Inputs(idx), fast), model.hidden(Inputs(idx), plain))
    assert plain.lengths == fast.lengths == [12, 12]
    for cache in (plain, fast):  # rows of different lengths
        cache.rewind([9, 5])
    idx = torch.randint(0, 90, (2, 1))
    torch.testing.assert_close(hidden(Inputs(idx), fast), model.hidden(Inputs(idx), plain))


def test_gradients_are_those_of_the_uncompiled_pass():
    model, (_, inputs) = picture_model()
    inputs.images.requires_grad_()
    gradients = []
    for hidden in (model.hidden, compiled(model)):
        model.zero_grad()
        inputs.images.grad = None
        hidden(inputs).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.transformer.parameters()] + [inputs.images.grad.clone()])
    for plain, fast in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, fast)


def test_values_are_checked_where_callers_enter():
    model = make_model()
    with pytest.raises(ValueError, match="0..96"):
        model(torch.tensor([[1, 97]]))
    with pytest.raises(ValueError, match="outside the vocabulary"):
        Engine(model).add([1, 97], 3)
