"""Scales and bins, glances, and the robot's model against plain forward passes."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nanochat.actions import N_BINS, Scale
from nanochat.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from nanochat.policy import Policy, Served
from nanochat.robot_gpt import ACT, BINS, STATE, Glances, RobotGPT, RobotGPTConfig, action_prompt, pad_right
from nanochat.tokenizer import Tokenizer
from nanochat.vision import YOLOv9Plus

VALUES = hnp.arrays(np.float32, (12, 3), elements=st.floats(-1e3, 1e3, width=32))


@given(VALUES)
def test_scale_restores_what_it_normalized(values):
    scale = Scale.fit(values)
    np.testing.assert_allclose(scale.restore(scale.normalize(values)), values, rtol=1e-4, atol=1e-3)


@given(VALUES)
def test_bins_are_as_fine_as_promised(values):
    scale = Scale.fit(values)
    bins = scale.to_bins(values)
    assert bins.min() >= 0 and bins.max() < N_BINS
    inside = np.clip(values, scale.center - scale.half, scale.center + scale.half)
    # half a bin, and what float32 loses on the way
    assert (np.abs(scale.from_bins(bins) - inside) <= scale.half / N_BINS + 1e-5 * np.abs(values).max() + 1e-6).all()
    np.testing.assert_array_equal(scale.to_bins(scale.from_bins(bins)), bins)


def test_percentiles_are_minus_one_and_one():
    values = np.random.default_rng(0).normal(3, 2, (5000, 1))
    low, high = np.quantile(values, (0.01, 0.99))
    np.testing.assert_allclose(Scale.fit(values).normalize(np.array([[low], [high]])), [[-1], [1]], atol=1e-5)


def test_a_dimension_that_hardly_moves_does_not_explode():
    rng = np.random.default_rng(0)
    values = np.stack([rng.normal(0, 1, 500), 0.7 + rng.normal(0, 1e-7, 500), np.full(500, 2.0)], 1)
    normalized = Scale.fit(values).normalize(values)
    assert np.abs(normalized[:, 1:]).max() < 1e-3
    assert np.abs(normalized[:, 0]).max() > 0.9


@pytest.mark.parametrize("values", [np.zeros((0, 2)), np.array([[np.nan]]), np.zeros(3)])
def test_scale_of_nothing_is_refused(values):
    with pytest.raises(ValueError, match="finite"):
        Scale.fit(values)


def test_scale_of_a_strangers_config_is_checked():
    with pytest.raises(ValueError, match="finite lists"):
        Scale([0.0, float("nan")], [1.0, 1.0])
    with pytest.raises(ValueError, match="below"):
        Scale([1.0], [0.0])


def test_a_glance_tells_places_apart():
    """What a grid of averages would lose: the same features elsewhere give another token."""
    glances, seen = Glances(2, 3, 5), []
    for row, column in [(0, 0), (0, 8), (8, 0), (15, 15)]:
        maps = torch.zeros(1, 2, 16, 16)
        maps[0, :, row, column] = 10.0
        seen.append(glances(maps)[0])
    assert seen[0].shape == (3, 5)
    for i, one in enumerate(seen):
        assert all((one - other).abs().max() > 1e-3 for other in seen[:i])


# ---- the model ----


@pytest.fixture(scope="module")
def tokenizer():
    made = Tokenizer.train(["open the door", "press the red button"], 300)
    made.add_special_tokens([STATE, ACT, *BINS])
    return made


def make_model(tokenizer, head, state_dim=2):
    torch.manual_seed(0)
    encoder = YOLOv9Plus("yolov9t.yaml", image_size=64).truncate("2")
    config = RobotGPTConfig(
        sequence_len=96, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32,
        vision_embedding_dim=16, map_channels=32, vision_tokens_per_image=4, vision_layer="2", vision_image_size=64,
        vision_token_id=tokenizer.special("<|image|>"), action_head=head, chunk=3,
        state_scale=asdict(Scale([0.0] * state_dim, [1.0] * state_dim)), action_scale=asdict(Scale([-1.0] * 4, [1.0] * 4)),
        state_token_id=tokenizer.special(STATE), act_token_id=tokenizer.special(ACT),
        bin_token_id=tokenizer.special(BINS[0]),
    )  # fmt: skip
    model = RobotGPT(config)
    model.init_weights()
    for p in model.parameters():  # the zero-initialised outputs would make every answer the same
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.3)
    model.attach_encoder(encoder)
    return model.eval()


@pytest.fixture(scope="module", params=["continuous", "bins"])
def model(request, tokenizer):
    return make_model(tokenizer, request.param)


def inputs(n=3):
    rng = np.random.default_rng(1)
    images = list(rng.integers(0, 256, (n, 64, 64, 3), np.uint8))
    return images, rng.uniform(0, 1, (n, 2)).astype(np.float32), ["open the door", "press the red button", "open"][:n]


def test_a_chunk_does_not_depend_on_the_rest_of_the_batch(model, tokenizer):
    images, states, texts = inputs()
    policy = Policy(model, tokenizer, {})
    together = policy(images, states, texts)
    alone = np.concatenate([policy([i], s[None], [t]) for i, s, t in zip(images, states, texts, strict=True)])
    assert together.shape == (3, 3, 4) and together.dtype == np.float32
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_picture_state_and_words_all_matter(model, tokenizer):
    images, states, texts = inputs()

    def last_hidden(image, state, text):
        prompt = action_prompt(tokenizer, text, 4)
        states = torch.from_numpy(model.state_scale.normalize(state[None]))
        with torch.no_grad():
            return model.trunk(model.embed(torch.tensor([prompt]), model.encode_images([image]), states=states))[0, -1]

    base = last_hidden(images[0], states[0], texts[0])
    for other in ((images[1], states[0], texts[0]), (images[0], states[1], texts[0]), (images[0], states[0], texts[1])):
        assert (last_hidden(*other) - base).abs().max() > 1e-2


def test_bins_are_what_an_uncached_forward_would_say(tokenizer):
    model = make_model(tokenizer, "bins")
    images, states, texts = inputs()
    vectors = model.encode_images(images)
    prompts = [action_prompt(tokenizer, text, 4) for text in texts]
    normalized = torch.from_numpy(model.state_scale.normalize(states))
    spoken = model.speak_bins(prompts, vectors, normalized)
    first = model.config.bin_token_id
    for row, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(12):
            with torch.no_grad():
                x = model.embed(torch.tensor([ids]), vectors[row : row + 1], states=normalized[row : row + 1])
                logits = model.logits(model.trunk(x))[0, -1]
            ids.append(first + int(logits[first : first + N_BINS].argmax()))
        assert spoken[row].reshape(-1).tolist() == [i - first for i in ids[-12:]]


def test_states_and_their_places_must_match(model, tokenizer):
    idx = pad_right([action_prompt(tokenizer, "open", 4)], "cpu")
    vectors = torch.zeros(1, 4, model.config.vision_embedding_dim)
    with pytest.raises(ValueError, match="1 places for states"):
        model.embed(idx, vectors, states=torch.zeros(2, 2))
    with pytest.raises(ValueError, match="of 2 numbers"):
        model.embed(idx, vectors, states=torch.zeros(1, 3))


def test_a_checkpoint_brings_the_same_policy_back(model, tokenizer, tmp_path):
    save_checkpoint(tmp_path / "c", model, tokenizer, {})
    images, states, texts = inputs()
    again = Policy(*load_checkpoint(tmp_path / "c"))
    np.testing.assert_allclose(
        again(images, states, texts), Policy(model, tokenizer, {})(images, states, texts), atol=1e-5
    )


def test_a_checkpoint_that_only_talks_is_refused(tokenizer):
    with pytest.raises(ValueError, match="cannot act"):
        Policy(torch.nn.Linear(1, 1), tokenizer, {})


@pytest.mark.parametrize("change", [{"action_head": "flow"}, {"chunk": 0}, {"bin_token_id": 10_000}])
def test_a_strangers_config_is_checked(model, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        RobotGPTConfig(**asdict(model.config) | change)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"observation/image": np.zeros((4, 4), np.uint8)}, "observation/image"),
        ({"observation/image": np.zeros((4, 4, 3), np.float32)}, "observation/image"),
        ({"observation/state": np.array([0.0, np.nan])}, "observation/state"),
        ({"observation/state": np.zeros(3)}, "observation/state"),
        ({"observation/state": None}, "observation/state"),
        ({"prompt": "  "}, "prompt"),
        ({"prompt": 3}, "prompt"),
    ],
)
def test_a_broken_observation_is_named(model, tokenizer, change, named):
    images, states, texts = inputs(1)
    good = {"observation/image": images[0], "observation/state": states[0], "prompt": texts[0]}
    policy = Policy(model, tokenizer, {})
    assert policy.act(good)["actions"].shape == (3, 4)
    with pytest.raises(ValueError, match=named):
        policy.act(good | change)


def test_a_served_nan_stands_still_and_keeps_the_fingers(tokenizer, monkeypatch):
    policy = Policy(make_model(tokenizer, "continuous"), tokenizer, {})
    chunks = iter([np.full((3, 4), 0.5, np.float32), np.full((3, 4), np.nan, np.float32)])
    monkeypatch.setattr(policy, "act", lambda observation: {"actions": next(chunks)})
    act = Served(policy).session()
    np.testing.assert_allclose(act({})["actions"], 0.5)
    np.testing.assert_allclose(act({})["actions"], [[0, 0, 0, 0.5]] * 3)


def test_an_arm_that_is_told_where_to_be_holds_on_to_the_action_before(tokenizer, monkeypatch):
    policy = Policy(make_model(tokenizer, "continuous"), tokenizer, {})
    nothing = np.full((3, 4), np.nan, np.float32)
    chunks = iter([nothing, np.full((3, 4), 0.5, np.float32), nothing])
    monkeypatch.setattr(policy, "act", lambda observation: {"actions": next(chunks)})
    act = Served(policy, hold="last").session()
    with pytest.raises(ValueError, match="no action before"):
        act({})
    for _ in range(2):
        np.testing.assert_allclose(act({})["actions"], 0.5)


def test_limits_run_from_the_last_action_that_was_sent(tokenizer, monkeypatch):
    policy = Policy(make_model(tokenizer, "continuous"), tokenizer, {})
    monkeypatch.setattr(policy, "act", lambda observation: {"actions": np.full((3, 4), observation["to"], np.float32)})
    served = Served(policy, execute=2, max_change=0.1)
    act = served.session()
    sent = np.concatenate([act({"to": to})["actions"] for to in (0.0, 0.5, -0.5)])
    assert served.metadata["chunk"] == 2 and len(sent) == 6
    np.testing.assert_allclose(sent[:, 0], [0, 0, 0.1, 0.2, 0.1, 0.0], atol=1e-6)


@pytest.mark.parametrize("wrong", [dict(execute=0), dict(execute=4), dict(max_change=0), dict(hold="middle")])
def test_serving_refuses_settings_that_are_none(tokenizer, wrong):
    with pytest.raises(ValueError):
        Served(Policy(make_model(tokenizer, "continuous"), tokenizer, {}), **wrong)


def test_none_is_a_hidden_picture(model, tokenizer):
    images, states, texts = inputs(2)
    policy = Policy(model, tokenizer, {})
    seen, half = policy(images, states, texts), policy([images[0], None], states, texts)
    np.testing.assert_allclose(half[0], seen[0], atol=1e-5)
    hidden = policy([None, None], states, texts)
    assert np.abs(half[1] - seen[1]).max() > 1e-4
    np.testing.assert_allclose(half[1], hidden[1], atol=1e-5)


@settings(max_examples=20)
@given(hnp.arrays(np.float32, (1, 2), elements=st.floats(-1e6, 1e6, width=32)))
def test_any_state_gives_finite_actions(values):
    assert np.isfinite(POLICY(inputs(1)[0], values, ["open"])).all()


def build_policy():
    made = Tokenizer.train(["open the door"], 300)
    made.add_special_tokens([STATE, ACT, *BINS])
    return Policy(make_model(made, "continuous"), made, {})


POLICY = build_policy()


def test_checkpoint_errors_are_checkpoint_errors(model, tokenizer, tmp_path):
    save_checkpoint(tmp_path / "c", model, tokenizer, {})
    path = tmp_path / "c" / "config.json"
    path.write_text(path.read_text().replace('"chunk": 3', '"chunk": 0'))
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "c")
