"""Chunks that continue committed actions: what both heads make of them, how a policy learns it, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from nanochat.acting import RETURN, joined, known_rows
from nanochat.action_heads import ActionBatch
from nanochat.agent import Agent
from nanochat.checkpoint import save_checkpoint
from nanochat.errors import UserError
from nanochat.robot_gpt import RobotGPT
from nanochat.training.robot_batches import give_known
from nanochat.training.robot_models import adopted
from tests.test_robot_gpt import inputs, inputs_of, make_model, prompt_of
from tests.tiny_policy import make_tokenizer

TOKENIZER = make_tokenizer(["open the door", "press the red button"])


def with_committed(model, committed=2, scale=0.3):
    """The same policy, which was also shown committed actions in training: their weights are random, or zero (scale 0)."""
    new = adopted(model, replace(model.config, committed=committed))
    torch.manual_seed(1)
    torch.nn.init.normal_(new.committed_projector.weight, std=scale)
    return new.eval()


@pytest.fixture(scope="module", params=["continuous", "bins"])
def agent(request):
    model = make_model(TOKENIZER, request.param)
    return Agent(with_committed(model) if request.param == "continuous" else model, TOKENIZER)


def committed(n=3, steps=2, seed=0):
    return np.random.default_rng(seed).uniform(-0.9, 0.9, (n, steps, 4)).astype(np.float32)


def test_a_chunk_begins_with_the_committed_actions_and_the_rest_depends_on_them(agent):
    assert agent.metadata["committed"] == 2  # one action of the chunk at least is new
    free = agent.act(*inputs())
    for steps in (1, 2):
        given = agent.act(*inputs(), committed(steps=steps))
        np.testing.assert_array_equal(given[:, :steps], committed(steps=steps))
        assert np.abs(given[:, steps:] - free[:, steps:]).max() > 1e-3
        other = agent.act(*inputs(), committed(steps=steps, seed=1))
        assert np.abs(given[:, steps:] - other[:, steps:]).max() > 1e-3
    np.testing.assert_array_equal(agent.act(*inputs(), committed(steps=0)), free)


def test_rows_do_not_mix_their_committed_actions(agent):
    images, states, texts = inputs()
    together = agent.act(images, states, texts, committed())
    for row in range(3):
        alone = agent.act([images[row]], states[row : row + 1], [texts[row]], committed()[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], atol=1e-4)


def test_an_old_policy_that_gets_the_ability_to_learn_them_acts_as_before():
    model = make_model(TOKENIZER, "continuous")
    new, old = Agent(with_committed(model, scale=0.0), TOKENIZER), Agent(model, TOKENIZER)
    np.testing.assert_array_equal(new.act(*inputs()), old.act(*inputs()))
    np.testing.assert_allclose(new.act(*inputs(), committed()), old.act(*inputs(), committed()), atol=1e-6)
    fresh = RobotGPT(new.model.config)
    fresh.init_weights()
    assert not fresh.committed_projector.weight.any()


def test_a_difference_from_the_last_committed_action_dies_away():
    """Against the equation of motion: x'' = 2 ln(r) x' - ln(r)^2 x, integrated in small steps."""
    chunks, given = np.zeros((1, 7, 2)), np.array([[[9.0, 9.0], [0.7, 0.2], [1.0, -2.0]]])
    chunks[0, 2] = 0.5  # what the chunk itself would have done in the last committed step
    found, n = joined(chunks, given)[0], 20_000
    np.testing.assert_array_equal(found[:3], given[0])
    x, v, rate = found[2] - 0.5, found[2] - 0.5 - found[1], np.log(RETURN)
    for step in range(3, 7):
        for _ in range(n):
            x, v = x + v / n, v + (2 * rate * v - rate**2 * x) / n
        np.testing.assert_allclose(found[step], x, atol=1e-3)
    np.testing.assert_array_equal(joined(chunks, given[:, :0]), chunks)
    one = joined(chunks, given[:, 2:])  # one action: its change is unknown, so the difference begins level
    np.testing.assert_allclose(one[0, 1], given[0, 2] * (1 - rate) * RETURN, atol=1e-6)
    agreeing = np.random.default_rng(0).normal(size=(1, 5, 2))
    np.testing.assert_allclose(joined(agreeing, agreeing[:, :3]), agreeing)  # nothing to agree on


@torch.no_grad()
def test_the_continuous_head_adds_learnt_ones_to_the_act_token():
    """Against plain embeddings: the row with the projected actions added to its last token."""
    model = with_committed(make_model(TOKENIZER, "continuous"), committed=1)
    images, states, texts = inputs(1)
    vectors, given = model.look(images), committed(1, 2)  # one more than was learnt: the first is shown, both are kept
    normalised = torch.from_numpy(model.state_scale.normalize(states))
    row = inputs_of(model, [[*prompt_of(TOKENIZER, texts[0]), model.config.act_token_id]], vectors, normalised)
    x = model.embed(row)
    known = torch.cat([torch.from_numpy(model.action_scale.normalize(given))[0, 0], torch.ones(1)])
    x[0, -1] += model.committed_projector.weight @ known
    model.embed = lambda inputs: x
    own = model.action_scale.restore(model.action_head(model.hidden(row)[0, -1]).view(1, 3, 4).numpy())
    del model.embed
    np.testing.assert_allclose(Agent(model, TOKENIZER).act(*inputs(1), given), joined(own, given), atol=1e-5)


@torch.no_grad()
def test_for_bins_they_are_the_tokens_before():
    model = make_model(TOKENIZER, "bins")
    images, states, texts = inputs(1)
    given, first = committed(1), model.config.bin_token_id
    ids = [*prompt_of(TOKENIZER, texts[0]), *(model.action_scale.to_bins(given) + first).flatten().tolist()]
    normalised = torch.from_numpy(model.state_scale.normalize(states))
    for _ in range(4):
        logits = model.logits(model.hidden(inputs_of(model, [ids], model.look(images), normalised)))[0, -1]
        ids.append(first + int(logits[first : first + 256].argmax()))
    expected = model.action_scale.from_bins(np.array(ids[-4:]) - first)
    np.testing.assert_array_equal(Agent(model, TOKENIZER).act(*inputs(1), given)[0, 2], expected)


@pytest.mark.parametrize(
    "wrong",
    [
        committed(2),
        committed(steps=3),
        committed()[0],
        committed()[..., :3],
        np.full((3, 1, 4), np.nan),
        [[["a"] * 4]] * 3,
    ],
)
def test_what_is_no_committed_action_is_refused(agent, wrong):
    with pytest.raises(UserError, match="up to 2 rows of 4 finite numbers"):
        agent.act(*inputs(), wrong)


def test_a_checkpoint_keeps_it(tmp_path):
    model = with_committed(make_model(TOKENIZER, "continuous"))
    save_checkpoint(tmp_path / "c", model, TOKENIZER, {})
    again, one = Agent.load(tmp_path / "c"), Agent(model, TOKENIZER)
    np.testing.assert_allclose(again.act(*inputs(), committed()), one.act(*inputs(), committed()), atol=1e-5)
    for wrong in (3, -1, 1.5):
        with pytest.raises(UserError, match="committed must be"):
            replace(model.config, committed=wrong)


def test_starting_from_a_policy_with_another_number_learns_them_anew():
    model = with_committed(make_model(TOKENIZER, "continuous"))
    for n in (1, 2, 0):
        new = adopted(model, replace(model.config, committed=n))
        assert torch.equal(new.action_head.weight, model.action_head.weight)
        if n == 2:
            assert torch.equal(new.committed_projector.weight, model.committed_projector.weight)
    assert new.committed_projector is None
    assert not adopted(model, replace(model.config, committed=1)).committed_projector.weight.any()


# ---- training


def batch_of(model, chunks):
    """One row for each chunk, all with the same pictures and words, so that only committed actions tell them apart."""
    images, states, texts = inputs(1)
    vectors = model.look(images * len(chunks))
    normalised = torch.from_numpy(model.state_scale.normalize(states)).repeat(len(chunks), 1)
    ids = [[*prompt_of(TOKENIZER, texts[0]), model.config.act_token_id]] * len(chunks)
    row_inputs = inputs_of(model, ids, vectors, normalised)
    inside = torch.ones(chunks.shape[:2], dtype=torch.bool)
    return ActionBatch(row_inputs, torch.full_like(row_inputs.idx, -1), chunks, inside)


def test_training_gives_up_to_so_many_actions_and_does_not_learn_them():
    model, chunks = with_committed(make_model(TOKENIZER, "continuous")), torch.randn(200, 3, 4)
    batch = give_known(batch_of(model, chunks), 2, np.random.default_rng(0))
    counts = batch.inputs.committed[..., -1].sum(1).int()
    assert set(counts.tolist()) == {0, 1, 2}
    assert 0.6 < (counts == 0).float().mean() < 0.9  # most rows are as they are without a delay
    for row, count in enumerate(counts.tolist()):
        assert batch.inside[row].tolist() == [False] * count + [True] * (3 - count)
        assert torch.equal(batch.inputs.committed[row, :count, :-1], chunks[row, :count])
        assert not batch.inputs.committed[row, count:].any()
    known = known_rows(chunks.numpy(), counts.numpy(), 2, None)
    assert np.array_equal(known, batch.inputs.committed.numpy())


def test_a_policy_learns_what_only_committed_actions_tell():
    """Chunks at rest, at places that the picture does not show."""
    torch.manual_seed(0)
    model, rng = with_committed(make_model(TOKENIZER, "continuous"), scale=0.0), np.random.default_rng(0)
    with torch.no_grad():
        model.action_head.weight.zero_()
    model.requires_grad_(False)
    for module in (model.committed_projector, model.action_head, model.transformer.h):
        module.requires_grad_(True)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    base = batch_of(model, torch.zeros(32, 3, 4))

    def at_places():
        return replace(base, chunks=(torch.rand(32, 1, 4) * 2 - 1).expand(-1, 3, -1))

    for _ in range(150):
        optimizer.zero_grad()
        batch = give_known(at_places(), 2, rng)
        model.action_head.loss(model, model.hidden(batch.inputs), batch).backward()
        optimizer.step()
    told = untold = at_places()
    known = torch.from_numpy(known_rows(told.chunks.numpy(), np.full(32, 2), 2, None))
    told = replace(told, inputs=replace(told.inputs, committed=known))
    losses = [model.action_head.loss(model, model.hidden(batch.inputs), batch).item() for batch in (told, untold)]
    assert losses[0] < 0.3 and losses[1] > 0.4  # 0.5 is the best guess without them
