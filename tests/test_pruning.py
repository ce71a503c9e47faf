"""Pruned checkpoints: what is removed, what stays, and that they train, load and export like others."""

import pytest
import torch

from nanochat.checkpoint import load_checkpoint, save_checkpoint
from nanochat.cli.export import prune
from nanochat.config import MultimodalGPTConfig
from nanochat.errors import UserError
from nanochat.export import export
from nanochat.gpt import GPT, GPTConfig, Inputs
from nanochat.multimodal_gpt import MultimodalGPT
from nanochat.pruning import pruned
from nanochat.tokenizer import Tokenizer
from tests.tiny_policy import random_model

SHAPE = dict(sequence_len=32, vocab_size=300, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)


@pytest.mark.parametrize("silent", ["c_fc", "c_proj"])
def test_units_that_do_nothing_are_removed_first_and_change_nothing(silent):
    config = MultimodalGPTConfig(**SHAPE, vision_embedding_dim=12, vision_tokens_per_image=4)
    model = random_model(MultimodalGPT, config)
    for number, module in enumerate([model.vision_projector, *(block.mlp for block in model.transformer.h)]):
        dead = torch.randperm(128, generator=torch.Generator().manual_seed(number))[:64]
        with torch.no_grad():
            if silent == "c_fc":
                module.c_fc.weight[dead] = 0
            else:
                module.c_proj.weight[:, dead] = 0
    smaller = pruned(model, 0.5)
    assert smaller.config.n_hidden == 64 and smaller.transformer.h[1].mlp.c_fc.weight.shape == (64, 32)
    assert not smaller.training and config.n_hidden == 0 and model.config.mlp_width == 128
    ids = torch.tensor([[5, *[299] * 4, 6, 7]])
    inputs = Inputs(ids, ids == 299, torch.randn(4, 12))
    with torch.no_grad():
        expected, found = (one.logits(one.hidden(inputs)) for one in (model, smaller))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert pruned(smaller, 0.5).config.mlp_width == 32


def test_a_pruned_checkpoint_is_smaller_and_trains_and_exports(tmp_path, capsys):
    model, tokenizer = random_model(GPT, GPTConfig(**SHAPE)), Tokenizer.train(["a few words"], 300)
    training = {"learnt": {"questions": True}, "step": 3, "steps": 3}
    save_checkpoint(tmp_path / "whole", model, tokenizer, training)
    (tmp_path / "whole/LICENSE").write_text("ours")
    prune(str(tmp_path / "whole"), tmp_path / "small", 0.3)
    said = capsys.readouterr().out
    assert "96 of 128 hidden units in each MLP, 0.04 of 0.04 M parameters" in said
    small, _, found = load_checkpoint(tmp_path / "small")
    assert found == training and (tmp_path / "small/LICENSE").read_text() == "ours"
    assert small.num_parameters() == model.num_parameters() - 2 * 2 * 32 * 32
    small.train()(torch.tensor([[1, 2, 3]]), targets=torch.tensor([[2, 3, 4]])).backward()
    assert small.transformer.h[0].mlp.c_fc.weight.grad.shape == (96, 32)
    sizes = [export(str(tmp_path / name), tmp_path / f"{name}-onnx").bytes for name in ("whole", "small")]
    assert sizes[1] < sizes[0] - 2 * 2 * 32 * 32 * 4 + 9000  # less the weights, up to the padding of each
    with pytest.raises(FileExistsError, match="small exists"):
        prune(str(tmp_path / "whole"), tmp_path / "small", 0.3)


@pytest.mark.parametrize(("ratio", "message"), [(0, "between 0 and 1"), (1, "between 0 and 1"), (float("nan"), "between"),
                                                (0.01, "leaves 128, in steps"), (0.99, "leaves 0")])  # fmt: skip
def test_a_ratio_that_leaves_all_or_nothing(ratio, message):
    with pytest.raises(UserError, match=message):
        pruned(GPT(GPTConfig(**SHAPE)), ratio)
