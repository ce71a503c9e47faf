"""Policies with several cameras: names, the prompt, what each camera's weights see, and cameras that are missing."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.agent import Agent
from nanochat.cameras import by_camera, short_names
from nanochat.checkpoint import save_checkpoint
from nanochat.conversation import action_message, render
from nanochat.errors import UserError
from nanochat.fusion import Glances
from nanochat.gpt import Inputs
from nanochat.robot_gpt import RobotGPTConfig
from tests.tiny_policy import make_policy, make_tokenizer, policy_like

CAMERAS = ["front", "wrist"]
TOKENIZER = make_tokenizer(["open the door", "press the red button"])


def make_model(head="continuous", **changes):
    """`make_policy` with two cameras."""
    return policy_like(make_policy(TOKENIZER), **dict(cameras=CAMERAS, action_head=head) | changes)


MODELS = {head: make_model(head) for head in ("continuous", "bins")}
AGENT = Agent(MODELS["continuous"], TOKENIZER)
FORGIVING = Agent(make_model(camera_dropout=0.2), TOKENIZER)


def observations(n=3, seed=0):
    rng = np.random.default_rng(seed)
    shown = [{name: rng.integers(0, 256, (64, 64, 3), np.uint8) for name in CAMERAS} for _ in range(n)]
    return shown, rng.uniform(0, 1, (n, 4)).astype(np.float32), ["open the door", "press the red button", "open"][:n]


# ---- names


def test_a_camera_has_a_short_name():
    assert short_names(["observation.images.front", "observation.images.wrist", "top"]) == ["front", "wrist", "top"]
    assert short_names(["left.rgb", "right.rgb", "observation.image"]) == ["left.rgb", "right.rgb", "image"]
    assert short_names(["observation.images."]) == ["observation.images."]


@given(st.lists(st.text("ab.", min_size=1, max_size=5), unique=True, max_size=6))
def test_short_names_are_as_different_as_the_columns(columns):
    names = short_names(columns)
    assert len(set(names)) == len(columns) and all(map(str.endswith, columns, names))


def test_pictures_come_in_the_order_of_the_policys_cameras():
    assert by_camera({"wrist": 2, "front": 1}, CAMERAS, False) == [1, 2]
    assert by_camera({"observation.images.wrist": 2, "observation.images.front": 1}, CAMERAS, False) == [1, 2]
    assert by_camera(None, CAMERAS, False) == [None, None]
    assert by_camera("a.png", ["front"], False) == by_camera("a.png", [], False) == ["a.png"]
    assert by_camera({"left.rgb": 1, "right.rgb": 2}, ["left.rgb", "right.rgb"], False) == [1, 2]


@pytest.mark.parametrize("shown", [{"front": 1}, {"front": 1, "wrist": None}, 1, {"observation.images.front": 1}])
def test_a_missing_camera_is_named_or_masked_if_training_hid_some(shown):
    with pytest.raises(UserError, match=r"no picture of the camera wrist; this policy needs .* \(front, wrist\)"):
        by_camera(shown, CAMERAS, False)
    assert by_camera(shown, CAMERAS, True) == [1, None]


@pytest.mark.parametrize("may_be_missing", [False, True])
def test_an_unknown_camera_is_named(may_be_missing):
    with pytest.raises(UserError, match="no camera 'wirst'; it has front, wrist"):
        by_camera({"front": 1, "wirst": 2}, CAMERAS, may_be_missing)
    with pytest.raises(UserError, match="no camera 'front' and 'wrist'; it reads one camera: give its picture alone"):
        by_camera({"front": 1, "wrist": 2}, [], may_be_missing)
    assert by_camera({"front": 1}, [], may_be_missing) == [1]


@pytest.mark.parametrize("cameras", ["front", ["front", "front"], [""], [3], ["x" * 300], [str(n) for n in range(17)]])
def test_a_strangers_cameras_are_checked(cameras):
    with pytest.raises(UserError, match="different names, such as front and wrist"):
        RobotGPTConfig(**asdict(MODELS["continuous"].config) | {"cameras": cameras})


@pytest.mark.parametrize("share", [-0.1, 1, "0.1", None, float("nan")])
def test_a_strangers_dropout_is_checked(share):
    with pytest.raises(UserError, match="camera_dropout must be a share"):
        RobotGPTConfig(**asdict(MODELS["continuous"].config) | {"camera_dropout": share})


# ---- the model


def test_each_camera_has_weights_of_its_own():
    """Two cameras at once against two modules with one camera each."""
    both, maps = Glances(3, 4, 5, n_cameras=2), torch.randn(7, 3, 16, 16)
    found = both(maps, [4, 3])
    weights, biases = both.linear.weight.chunk(2), both.linear.bias.chunk(2)
    for camera, part in enumerate((slice(0, 4), slice(4, 7))):
        one = Glances(3, 4, 5)
        one.load_state_dict({"linear.weight": weights[camera], "linear.bias": biases[camera]})
        torch.testing.assert_close(found[part], one(maps[part]))
    torch.testing.assert_close(both(maps), both(maps, [7, 0]))  # without counts, all are of the first


def test_the_prompt_has_places_for_each_camera():
    special = TOKENIZER.special
    assert render(TOKENIZER, [action_message("open", 2)], 4, for_completion=True).ids == [
        special("<|bos|>"), special("<|user_start|>"), *[special("<|image|>")] * 8, special("<|state|>"),
        *TOKENIZER.encode("open"), special("<|user_end|>"), special("<|assistant_start|>"),
    ]  # fmt: skip


@torch.no_grad()
def test_all_cameras_in_one_pass_see_what_each_sees_alone():
    model, (shown, _, _) = MODELS["continuous"], observations()
    rows = [[pictures["front"], pictures["wrist"]] for pictures in shown]
    rows[1][0] = None
    found = model.look_around(rows).unflatten(1, (2, 4))  # (B, K, N, D)
    assert not found[1, 0].any()
    torch.testing.assert_close(found[::2, 0], model.look([rows[0][0], rows[2][0]]), atol=1e-5, rtol=1e-4)
    maps = [model.vision_encoder.maps(pixels_of(row[1]), ["2"])["2"] for row in rows]
    linear = model.glances.linear
    cells = torch.nn.functional.adaptive_avg_pool2d(torch.cat(maps), 8).flatten(1)
    expected = cells @ linear.weight[len(linear.weight) // 2 :].T + linear.bias[len(linear.bias) // 2 :]
    torch.testing.assert_close(found[:, 1].flatten(1), expected, atol=1e-4, rtol=1e-4)


def pixels_of(picture):
    return torch.from_numpy(picture).permute(2, 0, 1)[None] / 255


@torch.no_grad()
def test_a_chunk_follows_from_both_pictures_by_a_plain_forward_pass():
    model, (shown, states, texts) = MODELS["continuous"], observations(1)
    vectors = model.look_around([[shown[0][name] for name in CAMERAS]])
    prompt = render(TOKENIZER, [action_message(texts[0], 2)], 4, for_completion=True).ids
    idx = torch.tensor([[*prompt, model.config.act_token_id]])
    normalised = torch.from_numpy(model.state_scale.normalize(states))
    inputs = Inputs(idx, idx == model.config.vision_token_id, vectors.flatten(0, 1), normalised)
    hidden = model.hidden(inputs)[0, -1]
    expected = model.action_scale.restore((model.action_head.weight @ hidden).view(3, 4).numpy())
    np.testing.assert_allclose(AGENT.act(shown, states, texts)[0], expected, atol=1e-5)


@pytest.mark.parametrize("head", MODELS)
def test_a_chunk_does_not_depend_on_the_rest_of_the_batch(head):
    agent, (shown, states, texts) = Agent(MODELS[head], TOKENIZER), observations()
    together = agent.act(shown, states, texts)
    alone = [agent.act([s], x[None], [t])[0] for s, x, t in zip(shown, states, texts, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize("camera", CAMERAS)
def test_every_camera_matters_and_they_are_not_alike(camera):
    shown, states, texts = observations(1)
    other = observations(1, seed=5)[0][0]
    base = AGENT.act(shown, states, texts)
    assert np.abs(AGENT.act([shown[0] | {camera: other[camera]}], states, texts) - base).max() > 1e-3
    exchanged = {"front": shown[0]["wrist"], "wrist": shown[0]["front"]}
    assert np.abs(AGENT.act([exchanged], states, texts) - base).max() > 1e-3


def test_a_camera_may_be_missing_where_training_hid_some():
    shown, states, texts = observations(2)
    lacking = [shown[0], {"front": shown[1]["front"]}]
    with pytest.raises(UserError, match="no picture of the camera wrist"):
        AGENT.act(lacking, states, texts)
    base, found = FORGIVING.act(shown, states, texts), FORGIVING.act(lacking, states, texts)
    np.testing.assert_allclose(found[0], base[0], atol=1e-5)
    assert np.abs(found[1] - base[1]).max() > 1e-4
    np.testing.assert_allclose(FORGIVING.act([None, {}], states, texts)[0], AGENT.act([None] * 2, states, texts)[0])


def test_cameras_are_in_the_checkpoint_and_in_the_metadata(tmp_path):
    save_checkpoint(tmp_path / "c", FORGIVING.model, TOKENIZER, {})
    again, (shown, states, texts) = Agent.load(tmp_path / "c"), observations()
    np.testing.assert_allclose(again.act(shown, states, texts), FORGIVING.act(shown, states, texts), atol=1e-5)
    assert (again.metadata["cameras"], again.metadata["camera_dropout"]) == (CAMERAS, 0.2)


def test_a_question_is_about_the_first_camera():
    seen = AGENT.look(observations(1)[0][0]["front"])
    assert seen.shape == (1, 4, 16)
    said = Agent(AGENT.model, TOKENIZER, {"learnt": {"questions": True}}).ask("is it open?", seen, max_new_tokens=2)
    assert isinstance("".join(said), str)
