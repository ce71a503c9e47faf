"""Beam search against an exhaustive search, transformers' and greedy decoding."""

import itertools

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from nanochat.beams import beam_search, beam_search_all
from nanochat.engine import Engine
from tests.conftest import make_model

IMAGE = 96  # vision_token_id of the test model


def log_probability(model, prompt, answer, vision=None):
    """The sum of the log probabilities of an answer, by one forward pass over the whole row."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *answer]]), vision)[0].double().log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer))


@pytest.mark.parametrize("seed", range(4))
def test_with_beams_for_everything_it_is_the_best_of_all_answers(seed):
    stop, n_tokens, longest = 4, 5, 3
    model = make_model(vocab_size=n_tokens, vision_token_id=3)
    with torch.no_grad():
        model.lm_head.weight.copy_(
            torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(seed))
        )
    others, scored = [token for token in range(n_tokens) if token != stop], {}
    for length in range(longest + 1):
        for answer in itertools.product(others, repeat=length):
            whole = [*answer, stop] if length < longest else answer
            scored[answer] = log_probability(model, [0, 1], whole) / len(whole)
    best = max(scored, key=scored.get)
    assert beam_search(model, [0, 1], longest, beams=64, stop_ids=[stop]) == list(best)


class Wrapped(PreTrainedModel, GenerationMixin):
    """One of our models as transformers' generation sees it: the whole row is read again for each token."""

    config_class = PretrainedConfig
    _is_stateful = False

    def __init__(self, model, vision):
        super().__init__(PretrainedConfig(vocab_size=model.config.vocab_size, num_hidden_layers=2))
        self.anchor, self.ours, self.vision = torch.nn.Parameter(torch.zeros(1)), [model], vision

    def forward(self, input_ids, **unused):
        vision = None if self.vision is None else self.vision.expand(len(input_ids), -1, -1)
        mask = torch.zeros_like(input_ids, dtype=torch.bool)
        mask[:, 0] = vision is not None  # the picture is the first token; a generated <|image|> is none
        return CausalLMOutput(logits=self.ours[0](input_ids, vision, mask))

    def prepare_inputs_for_generation(self, input_ids, **unused):
        return {"input_ids": input_ids}


@pytest.mark.parametrize("n_stops", [0, 1, 3])
@pytest.mark.parametrize("beams", [2, 3, 5])
@pytest.mark.parametrize("with_picture", [False, True])
def test_the_answers_of_transformers(beams, n_stops, with_picture):
    model, n_new, lengths = make_model(), 8, []
    with torch.no_grad():
        model.lm_head.weight *= 0.4  # closer scores
    for seed in range(4):
        rng = np.random.default_rng(seed)
        prompt = [IMAGE * with_picture, *rng.integers(0, 90, 5).tolist()]
        vision = torch.randn(1, 1, 12, generator=torch.Generator().manual_seed(seed)) if with_picture else None
        images = None if vision is None else vision[0]
        free = beam_search(model, prompt, n_new, beams=beams, images=images)
        stop_ids = [*dict.fromkeys(free[4:]), *range(90, 96)][:n_stops]  # tokens that come up
        settings = GenerationConfig(
            num_beams=beams, max_new_tokens=n_new, early_stopping=True, length_penalty=1.0, do_sample=False, use_cache=False,
            eos_token_id=stop_ids or None, pad_token_id=0,
        )  # fmt: skip
        expected = Wrapped(model, vision).generate(torch.tensor([prompt]), settings)[0, len(prompt) :].tolist()
        stops = [i for i, token in enumerate(expected) if token in stop_ids]
        expected = expected[: stops[0]] if stops else expected
        assert beam_search(model, prompt, n_new, beams=beams, stop_ids=stop_ids, images=images) == expected
        lengths.append(len(expected))
    assert (min(lengths) < n_new) == (n_stops > 0)


def test_many_prompts_at_once_have_the_answers_of_each_alone():
    model = make_model()
    prompts = [[IMAGE, 3, 4], [5], [6, 7, 8, 9, 10, IMAGE, 11], [12, 13]]
    images = [torch.randn(1, 12), None, torch.randn(1, 12), None]
    free = beam_search_all(model, prompts, 8, beams=3, images=images)
    for stop_ids in ([], [free[0][2], free[2][5]]):
        alone = [
            beam_search(model, prompt, 8, beams=3, stop_ids=stop_ids, images=image)
            for prompt, image in zip(prompts, images, strict=True)
        ]
        assert beam_search_all(model, prompts, 8, beams=3, stop_ids=stop_ids, images=images) == alone
    assert len({len(row) for row in alone}) > 1
    with pytest.raises(ValueError, match="empty list of prompts"):
        beam_search_all(model, [], 8)


def test_one_beam_is_greedy_and_more_find_likelier_answers():
    model, gains = make_model(), []
    vision = torch.randn(1, 12, generator=torch.Generator().manual_seed(1))
    for seed in range(5):
        prompt = [IMAGE, *np.random.default_rng(seed).integers(0, 90, 4).tolist()]
        (greedy,) = Engine(model).generate([prompt], 9, images=[vision])
        stops = [greedy[6]]
        (stopped,) = Engine(model).generate([prompt], 9, images=[vision], stop_ids=stops)
        assert beam_search(model, prompt, 9, beams=1, images=vision) == greedy
        assert beam_search(model, prompt, 9, beams=1, images=vision, stop_ids=stops) == stopped
        found = beam_search(model, prompt, 9, beams=4, images=vision)
        gains.append(
            log_probability(model, prompt, found, vision[None]) - log_probability(model, prompt, greedy, vision[None])
        )
    assert max(gains) > 0.1 and np.mean(gains) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, r"must be in 1..64 \(1 is greedy\), got 0"),
        ({"beams": 65}, "got 65"),
        ({"images": torch.zeros(2, 12)}, "1 places.*2 vectors"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 63}, "do not fit the context"),
    ],
)
def test_what_it_cannot_do(model, options, message):
    options = {"images": torch.zeros(1, 12), "max_new_tokens": 3} | options
    with pytest.raises(ValueError, match=message):
        beam_search(model, [1, IMAGE], **options)


def test_broken_weights_are_an_error(model):
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        beam_search(model, [1, 2], 3)
