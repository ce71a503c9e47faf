"""`nanochat average`: the mean of the weights, as torch makes it, and refusals for models that have none."""

from dataclasses import replace

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from nanochat.checkpoint import load_checkpoint, save_checkpoint
from nanochat.cli.export import average
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer
from tests.tiny_policy import make_policy, make_tokenizer, random_model

SHAPE = dict(sequence_len=32, vocab_size=300, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
TOKENIZER = Tokenizer.train(["a few words"], 300)


def saved(folder, seed=0, tokenizer=TOKENIZER, training=None, **shape):
    model = random_model(GPT, GPTConfig(**SHAPE | shape))
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=random)
    save_checkpoint(folder, model, tokenizer, training or {"learnt": {"questions": True}})
    return model


def test_the_mean_is_that_of_torch(tmp_path, capsys):
    models = [saved(tmp_path / name, seed) for seed, name in enumerate("abc")]
    reference = AveragedModel(models[0])
    for model in models:
        reference.update_parameters(model)
    average(tuple(str(tmp_path / name) for name in "abc"), tmp_path / "mean")
    assert "the mean of 3 checkpoints" in capsys.readouterr().out
    found = load_checkpoint(tmp_path / "mean")[0]
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(ids), reference.module.eval()(ids))
        assert not torch.allclose(found(ids), models[0].eval()(ids), atol=1e-2)


def test_a_name_given_twice_counts_twice(tmp_path):
    a, b = (saved(tmp_path / name, seed).state_dict() for seed, name in enumerate("ab"))
    average((str(tmp_path / "a"), str(tmp_path / "a"), str(tmp_path / "b")), tmp_path / "mean")
    found = load_checkpoint(tmp_path / "mean")[0].state_dict()
    for key in found:
        torch.testing.assert_close(found[key], (2 * a[key] + b[key]) / 3)


def test_a_model_with_an_encoder_and_its_record(tmp_path):
    """Counters of BatchNorm are whole numbers and stay; what each of them learnt from, and its licence, is kept."""
    tokenizer = make_tokenizer(["a few words"])
    model, learnt = make_policy(tokenizer), {"questions": False, "captions": False, "actions": True}
    training = {"recipe": {"data": "first", "seed": 1}, "learnt": learnt, "images": 1}
    save_checkpoint(tmp_path / "a", model, tokenizer, training)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    other = {
        "recipe": {"data": "other"},
        "earlier": [{"data": "oldest"}],
        "images": 2,
        "learnt": learnt | {"captions": True},
    }
    save_checkpoint(tmp_path / "b", model, tokenizer, other, extra={"NOTICE": b"theirs"})
    average((str(tmp_path / "a"), str(tmp_path / "b")), tmp_path / "mean")
    mean, _, record = load_checkpoint(tmp_path / "mean")
    for (name, parameter), other in zip(mean.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(parameter, other * (2 / 3), msg=name)
    assert [run["data"] for run in record["earlier"]] == ["oldest", "other"] and record["images"] == 2
    assert record["recipe"] == training["recipe"] and record["averaged"] == 2
    assert record["learnt"] == learnt | {"captions": True}
    assert (tmp_path / "mean/NOTICE").read_bytes() == b"theirs"


def test_scales_of_a_policy_may_differ_a_little(tmp_path):
    """Each run measures the scale of its states on its own data; the first one's is kept."""
    tokenizer = make_tokenizer(["a few words"])
    policy = make_policy(tokenizer)
    for name, high in (("a", 1.0), ("near", 1.05), ("far", 1.5)):
        policy.config = replace(policy.config, state_scale={"low": [0.0] * 4, "high": [1.0, 1.0, 1.0, high]})
        save_checkpoint(tmp_path / name, policy, tokenizer, {})
    average((str(tmp_path / "near"), str(tmp_path / "a")), tmp_path / "mean")
    assert load_checkpoint(tmp_path / "mean")[0].config.state_scale["high"][3] == 1.05
    with pytest.raises(UserError, match="a and .*far differ in state_scale"):
        average((str(tmp_path / "a"), str(tmp_path / "far")), tmp_path / "other")


def test_what_has_no_mean(tmp_path):
    saved(tmp_path / "a")
    saved(tmp_path / "wide", n_embd=64)
    saved(tmp_path / "words", tokenizer=Tokenizer.train(["other words here, and here again"] * 9, 300))
    a, out = str(tmp_path / "a"), tmp_path / "mean"
    with pytest.raises(
        UserError, match="differ in n_embd 32 and 64: average checkpoints that were trained on from the same"
    ):
        average((a, str(tmp_path / "wide")), out)
    with pytest.raises(UserError, match="different vocabularies"):
        average((a, str(tmp_path / "words")), out)
    with pytest.raises(UserError, match="two checkpoints or more, got .*a"):
        average((a,), out)
    assert not out.exists()
    with pytest.raises(FileExistsError, match="words exists"):
        average((a, a), tmp_path / "words")
