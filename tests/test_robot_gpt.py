"""The robot's model: glances, states, action heads, each against plain forward passes."""

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nanochat.action_heads import ActionBatch
from nanochat.actions import ACT, BINS, N_BINS, STATE, Scale
from nanochat.agent import Agent
from nanochat.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from nanochat.conversation import action_message, render
from nanochat.errors import UserError
from nanochat.fusion import Glances
from nanochat.gpt import Inputs, pad_rows
from nanochat.robot_gpt import RobotGPT, RobotGPTConfig
from nanochat.tokenizer import Tokenizer
from nanochat.vision import YOLOv9Plus
from tests.tiny_policy import random_weights


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


def prompt_of(tokenizer, text):
    return render(tokenizer, [action_message(text)], 4, for_completion=True).ids


def inputs_of(model, ids, vectors, states):
    """Rows of one length, one picture and one normalised state each."""
    idx = torch.tensor(ids)
    return Inputs(idx, idx == model.config.vision_token_id, vectors.flatten(0, 1), states)


def test_the_prompt_is_picture_state_instruction(tokenizer):
    special = tokenizer.special
    assert prompt_of(tokenizer, "open the door") == [
        special("<|bos|>"), special("<|user_start|>"), *[special("<|image|>")] * 4, special(STATE),
        *tokenizer.encode("open the door"), special("<|user_end|>"), special("<|assistant_start|>"),
    ]  # fmt: skip


def test_a_chunk_does_not_depend_on_the_rest_of_the_batch(model, tokenizer):
    images, states, texts = inputs()
    agent = Agent(model, tokenizer)
    together = agent.act(images, states, texts)
    alone = np.concatenate([agent.act([i], s[None], [t]) for i, s, t in zip(images, states, texts, strict=True)])
    assert together.shape == (3, 3, 4) and together.dtype == np.float32
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_picture_state_and_instruction_all_matter(model, tokenizer):
    images, states, texts = inputs()

    @torch.no_grad()
    def last_hidden(image, state, text):
        states = torch.from_numpy(model.state_scale.normalize(state[None]))
        return model.hidden(inputs_of(model, [prompt_of(tokenizer, text)], model.look([image]), states))[0, -1]

    base = last_hidden(images[0], states[0], texts[0])
    for other in ((images[1], states[0], texts[0]), (images[0], states[1], texts[0]), (images[0], states[0], texts[1])):
        assert (last_hidden(*other) - base).abs().max() > 1e-2


@torch.no_grad()
def test_bins_are_what_an_uncached_forward_says(tokenizer):
    model = make_model(tokenizer, "bins")
    images, states, texts = inputs()
    vectors = model.look(images)
    prompts = [prompt_of(tokenizer, text) for text in texts]
    actions = model.act(prompts, vectors, states)
    normalised = torch.from_numpy(model.state_scale.normalize(states))
    first = model.config.bin_token_id
    for row, prompt in enumerate(prompts):
        ids = list(prompt)
        for _ in range(12):
            hidden = model.hidden(inputs_of(model, [ids], vectors[row : row + 1], normalised[row : row + 1]))
            logits = model.logits(hidden)[0, -1]
            ids.append(first + int(logits[first : first + N_BINS].argmax()))
        bins = np.array(ids[-12:]).reshape(3, 4) - first
        np.testing.assert_array_equal(actions[row], model.action_scale.from_bins(bins))


@torch.no_grad()
def test_a_chunk_is_the_linear_map_of_the_act_tokens_hidden_state(tokenizer):
    model = make_model(tokenizer, "continuous")
    images, states, texts = inputs(1)
    vectors, prompt = model.look(images), prompt_of(tokenizer, texts[0])
    normalised = torch.from_numpy(model.state_scale.normalize(states))
    hidden = model.hidden(inputs_of(model, [[*prompt, model.config.act_token_id]], vectors, normalised))[0, -1]
    expected = model.action_scale.restore((model.action_head.weight @ hidden).view(3, 4).numpy())
    np.testing.assert_allclose(model.act([prompt], vectors, states)[0], expected, atol=1e-5)


def test_losses_count_what_lies_inside_the_episode_only(model, tokenizer):
    """Both heads against their plain formula; what is behind the episode's end changes nothing."""
    images, states, texts = inputs(2)
    rng = np.random.default_rng(0)
    actions, inside = rng.uniform(-0.9, 0.9, (2, 3, 4)).astype(np.float32), np.array([[1, 1, 1], [1, 0, 0]], bool)
    prompts = [prompt_of(tokenizer, text) for text in texts]
    with torch.no_grad():
        vectors = model.look(images)

    def loss(actions):
        rows = model.action_head.rows(prompts, actions, inside)
        idx = pad_rows([ids for ids, _ in rows], prompts[0][0])
        masks = pad_rows([mask for _, mask in rows], 0)
        targets = torch.full_like(idx, -1)
        targets[:, :-1] = torch.where(masks[:, 1:] == 1, idx[:, 1:], -1)
        normalised = torch.from_numpy(model.state_scale.normalize(states))
        batch = ActionBatch(
            inputs_of(model, idx.tolist(), vectors, normalised), targets,
            torch.from_numpy(model.action_scale.normalize(actions)), torch.from_numpy(inside),
        )  # fmt: skip
        hidden = model.hidden(batch.inputs)
        if model.config.action_head == "bins":
            plain = F.cross_entropy(model.logits(hidden).flatten(0, 1), targets.flatten(), ignore_index=-1)
        else:
            at_act = hidden[idx == model.config.act_token_id]
            predicted = (at_act @ model.action_head.weight.T).view(2, 3, 4)
            plain = (predicted - batch.chunks)[torch.from_numpy(inside)].abs().mean()
        value = model.action_head.loss(model, hidden, batch)
        torch.testing.assert_close(value, plain)
        return value.item()

    outside, within = actions.copy(), actions.copy()
    outside[1, 1:] = -outside[1, 1:]
    within[1, 0] = -within[1, 0]
    assert loss(outside) == pytest.approx(loss(actions), abs=1e-6)
    assert abs(loss(within) - loss(actions)) > 1e-4


def test_pictures_states_and_instructions_must_match_in_number(model, tokenizer):
    images, states, texts = inputs(2)
    agent = Agent(model, tokenizer)
    for wrong in ((images[:1], states, texts), (images, states[:1], texts), (images, states, texts[:1])):
        with pytest.raises(ValueError, match="as many of each"):
            agent.act(*wrong)
    with pytest.raises(ValueError, match="2 numbers a state"):
        agent.act(images, np.zeros((2, 3)), texts)


def test_an_instruction_that_does_not_fit_the_context_is_a_users_error(model, tokenizer):
    images, states, _ = inputs(1)
    with pytest.raises(UserError, match="do not fit the context"):
        Agent(model, tokenizer).act(images, states, ["zq" * 60])


def test_no_pictures_get_no_actions(model, tokenizer):
    actions = Agent(model, tokenizer).act([], np.zeros((0, 2), np.float32), [])
    assert actions.shape == (0, 3, 4) and actions.dtype == np.float32


def test_a_checkpoint_brings_the_same_policy_back(model, tokenizer, tmp_path):
    save_checkpoint(tmp_path / "c", model, tokenizer, {})
    again, one = Agent.load(tmp_path / "c"), Agent(model, tokenizer)
    np.testing.assert_allclose(again.act(*inputs()), one.act(*inputs()), atol=1e-5)
    assert again.metadata == one.metadata
    assert again.metadata["chunk"] == 3 and again.metadata["action_dim"] == 4 and again.metadata["state_dim"] == 2


def test_optimiser_groups_of_a_robot(model):
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {group: [names[id(p)] for p in params] for group, params in model.param_groups().items()}
    assert groups["embeddings"] == ["transformer.wte.weight"]
    head = ["action_head.weight"] if model.config.action_head == "continuous" else []
    assert sorted(groups["outputs"]) == sorted(["lm_head.weight", "vision_projector.position", *head])
    assert {name.split(".")[0] for name in groups["encoder"]} == {"vision_encoder", "glances"}
    assert {name.split(".")[0] for name in groups["matrices"]} == {"transformer", "state_projector"}
    assert {name.split(".")[0] for name in groups["projector"]} == {"vision_projector"}
    assert sum(map(len, groups.values())) == len(names)


@pytest.mark.parametrize(
    "change", [{"action_head": "flow"}, {"chunk": 0}, {"bin_token_id": 10_000}, {"fusion": "cross"}]
)
def test_a_strangers_config_is_checked(model, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        RobotGPT(RobotGPTConfig(**asdict(model.config) | change))


def test_none_is_a_masked_picture(model, tokenizer):
    images, states, texts = inputs(2)
    agent = Agent(model, tokenizer)
    seen, half = agent.act(images, states, texts), agent.act([images[0], None], states, texts)
    np.testing.assert_allclose(half[0], seen[0], atol=1e-5)
    hidden = agent.act([None, None], states, texts)
    assert np.abs(half[1] - seen[1]).max() > 1e-4
    np.testing.assert_allclose(half[1], hidden[1], atol=1e-5)


@settings(max_examples=20)
@given(hnp.arrays(np.float32, (1, 2), elements=st.floats(-1e6, 1e6, width=32)))
def test_any_state_gives_finite_actions_or_is_refused(values):
    if (np.abs(values - 0.5) <= 3.5).all():  # trained on 0..1; three times that range is accepted on both sides
        assert np.isfinite(AGENT.act(inputs(1)[0], values, ["open"])).all()
    else:
        with pytest.raises(UserError, match=r"lay between 0 and 1 in the training data \(accepted: -3 to 4\)"):
            AGENT.act(inputs(1)[0], values, ["open"])


@pytest.mark.parametrize(
    "states",
    [[["1", "0"]], [[True, 0.5]], np.array([[True, False]]), [[0.5, None]], [[0.5]], [[1e300, 0.5]], "text", None],
)
def test_what_is_no_state_is_refused(states):
    with pytest.raises(UserError, match="finite numbers|numbers a state|state of 2 numbers|in the training data"):
        AGENT.act(inputs(1)[0], states, ["open"])


def test_the_state_may_lie_where_it_did_in_training(tokenizer):
    config = make_model(tokenizer, "continuous").config
    rare = {"low": [0.0, 0.0], "high": [1.0, 90.0]}  # beyond the percentiles, as a number that is rarely not 0
    agent = Agent(RobotGPT(replace(config, state_range=rare)), tokenizer)
    agent.model.normalised_states(np.array([[0.5, 89.0]]), 1)
    with pytest.raises(UserError, match="the state: number 1 of 2 is 57.3, but lay between 0 and 1"):
        agent.model.normalised_states(np.array([[57.3, 89.0]]), 1)


@pytest.mark.parametrize("head", ["continuous", "bins"])
def test_a_policy_without_a_state_reads_none(tokenizer, head, tmp_path):
    config = make_model(tokenizer, head).config
    model = random_weights(replace(config, state_scale={}, targets="absolute"))
    model.attach_encoder(AGENT.model.vision_encoder)
    save_checkpoint(tmp_path / "c", model, tokenizer, {})
    agent = Agent.load(tmp_path / "c")
    assert (agent.metadata["state_dim"], agent.metadata["targets"]) == (0, "absolute")
    images = inputs(2)[0]
    actions = agent.act(images, None, ["open", "close"])
    np.testing.assert_array_equal(agent.act(images, np.zeros((2, 0)), ["open", "close"]), actions)
    for shown, words in ((images[::-1], ["open", "close"]), (images, ["close", "close"])):
        other = agent.act(shown, None, words)  # the first robot sees another picture, or reads another word
        assert np.abs(other[0] - actions[0]).max() > 1e-3
    with pytest.raises(UserError, match="trained without a state, got shape"):
        agent.act(images, np.zeros((2, 1)), ["open", "close"])


def test_targets_of_older_checkpoints_are_relative(tokenizer):
    config = make_model(tokenizer, "continuous").config
    assert config.targets == "relative" and config.state_range == {}
    with pytest.raises(UserError, match="targets must be one of relative, absolute, got 'both'"):
        replace(config, targets="both")
    for name in ("state_scale", "state_range", "action_scale"):
        for wrong in ([], None, 3, "low"):
            with pytest.raises(UserError, match="a scale must be an object with low and high"):
                replace(config, **{name: wrong})
    with pytest.raises(UserError, match="state_range must have 2 numbers, got 1"):
        replace(config, state_range={"low": [0.0], "high": [1.0]})


def build_agent():
    made = Tokenizer.train(["open the door"], 300)
    made.add_special_tokens([STATE, ACT, *BINS])
    return Agent(make_model(made, "continuous"), made)


AGENT = build_agent()


def test_checkpoint_errors_are_checkpoint_errors(model, tokenizer, tmp_path):
    save_checkpoint(tmp_path / "c", model, tokenizer, {})
    path = tmp_path / "c" / "config.json"
    path.write_text(path.read_text().replace('"chunk": 3', '"chunk": 0'))
    with pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / "c")
