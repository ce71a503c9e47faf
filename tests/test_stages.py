"""Training in stages: what a recipe names moves, at its own rate, and nothing else does; and what optimisers resume."""

from dataclasses import replace

import pytest
import torch

from nanochat.checkpoint import load_checkpoint
from nanochat.data.lerobot_writer import write_dataset
from nanochat.data.sample import vqa_sample
from nanochat.errors import UserError
from nanochat.files import DataError
from nanochat.training.batches import Rows
from nanochat.training.optimizers import load_optimizers, make_optimizers, optimizer_tensors
from nanochat.training.out_folder import release_folder
from nanochat.training.recipes import Folder, Robot
from nanochat.training.run import Run
from nanochat.training.task import set_training
from nanochat.vision.timm_encoder import TimmEncoder, described
from tests.test_robot_train import SIZE, TINY, toy_episode
from tests.test_training_runs import make_pictures

FEW = TINY | dict(images_per_step=4, questions_per_step=2)
FUSIONS = ("prefix", "cross")
RATES = dict(matrix_lr=0.011, projector_lr=0.012, embedding_lr=0.013, head_lr=0.014, encoder_lr=0.015)
SMALL = dict(
    layer="p5", image_size=64, vision_tokens=4, vocab_size=280, n_layer=2, n_head=2, n_embd=32, sequence_len=48, device="cpu",
    images_per_step=8, warmup_steps=1, eval_every=1000, save_every=1000, val_images=4, steps=3, word_loss=0.0,
    decoder_gradient=1.0, train_encoder=False, batchnorm="train",
)  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("stages") / "pictures", 12)


@pytest.fixture(scope="module")
def robot(tmp_path_factory):
    path = tmp_path_factory.mktemp("toy") / "demos"
    write_dataset(path, (toy_episode(n, length=6) for n in range(24)), 10, "toy", (SIZE, SIZE, 3))
    return path


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A small network of timm with its weights in a file. Its BatchNorm has statistics, as that of a pretrained one."""
    torch.manual_seed(0)
    small = TimmEncoder(described("test_efficientnet", [0.5] * 3, [0.5] * 3, 64))
    small.train()
    for _ in range(20):
        small(torch.rand(4, 3, 64, 64))
    path = tmp_path_factory.mktemp("encoder") / "small.pth"
    torch.save(small.net.state_dict(), path)
    return f"timm:test_efficientnet={path}"


def recipe_for(pictures, encoder, tmp_path, **changes):
    where = {"data": str(pictures), "encoder": encoder, "out": str(tmp_path / "run"), "cache": str(tmp_path / "c")}
    return Folder(**SMALL | where | changes)


@pytest.fixture(scope="module")
def started(pictures, encoder, tmp_path_factory):
    """Checkpoints to start from, one for each fusion, in which every weight matters."""
    folder = tmp_path_factory.mktemp("started")
    for fusion in FUSIONS:
        run = Run(recipe_for(pictures, encoder, folder, fusion=fusion, out=str(folder / fusion)))
        no_zeros(run.model)
        run.save()
        release_folder(run.out)
    return folder


def no_zeros(model):
    """A new model's output layers, gates and tables are zero, and let no gradient pass to what is before them."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("vision_encoder."):
                parameter.normal_(0, 0.3, generator=generator)


def moved_in(run, steps=3):
    """(names of parameters, names of buffers) that differ after some steps."""
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    for _ in range(steps):
        run.take_step()
    moved = {name for name, value in run.model.state_dict().items() if not torch.equal(value, before[name])}
    parameters = {name for name, _ in run.model.named_parameters()}
    return moved & parameters, moved - parameters


def of_encoder(run, *starts):
    return {
        name
        for name, _ in run.model.named_parameters()
        if name.startswith(tuple(f"vision_encoder.net.{s}" for s in starts))
    }


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("projector", dict(train_decoder=False)),
        ("decoder", {}),
        ("encoder from p5", dict(train_encoder=True, train_encoder_from="p5")),
        ("encoder from p4", dict(train_encoder=True, train_encoder_from="p4", train_decoder=False)),
        ("encoder", dict(train_encoder=True)),
    ],
)
def test_what_the_recipe_names_moves_and_nothing_else(pictures, started, tmp_path, fusion, stage, changes):
    run = Run(recipe_for(pictures, "", tmp_path, start_from=str(started / fusion), **changes))
    names = {name for name, _ in run.model.named_parameters() if not name.startswith("vision_encoder.")}
    names -= {name for name in names if ".change." in name}  # no question shows two pictures, so none changes
    expected = {name for name in names if name.startswith(("vision_projector.", "cross_attention."))}
    assert expected and (fusion == "cross") == any(name.startswith("cross_attention.") for name in expected)
    if changes.get("train_decoder", True):
        expected |= names
    # the blocks of timm's network behind the last one at stride 16, or 8
    parts = {"encoder from p5": ["blocks.4."], "encoder from p4": ["blocks.3.", "blocks.4."], "encoder": [""]}.get(
        stage, []
    )
    encoder_parts = of_encoder(run, *parts) if parts else set()
    moved, buffers = moved_in(run)
    assert moved == expected | encoder_parts
    # BatchNorm's statistics move in the trained part only
    norms = {name for name, module in run.model.named_modules() if isinstance(module, torch.nn.BatchNorm2d)}
    assert {module_of(name) for name in buffers} == norms & {module_of(name) for name in encoder_parts}


def module_of(name):
    return name.rsplit(".", 1)[0]


@pytest.mark.parametrize("fusion", FUSIONS)
def test_each_part_has_its_own_rate(pictures, encoder, tmp_path, fusion):
    recipe = recipe_for(
        pictures, encoder, tmp_path, fusion=fusion, train_encoder=True, train_encoder_from="p5", **RATES
    )
    run = Run(recipe)
    names = {id(p): name for name, p in run.model.named_parameters()}
    rates = {
        names[id(p)]: group["peak_lr"] for o in run.optimizers for group in o.param_groups for p in group["params"]
    }
    assert rates.keys() == {name for name, p in run.model.named_parameters() if p.requires_grad}
    for name, rate in rates.items():
        if name.startswith("vision_encoder."):
            assert rate == RATES["encoder_lr"], name
        elif name == "transformer.wte.weight":
            assert rate == RATES["embedding_lr"], name
        elif name.startswith("transformer."):
            assert rate == RATES["matrix_lr"], name
        elif name.endswith(".weight") and name != "lm_head.weight":
            assert name.startswith(("vision_projector.", "cross_attention.")) and rate == RATES["projector_lr"], name
        else:  # tables, gates and the head
            assert rate == RATES["head_lr"], name


def test_frozen_statistics_stay_where_only_the_weights_train(pictures, started, tmp_path):
    changes = dict(train_encoder=True, train_encoder_from="p5", batchnorm="frozen", train_decoder=False)
    run = Run(recipe_for(pictures, "", tmp_path, start_from=str(started / "prefix"), **changes))
    moved, buffers = moved_in(run)
    assert of_encoder(run, "blocks.4.") < moved and not buffers


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(train_encoder_from="p5"), "--train-encoder-from p5 needs --train-encoder"),
        (dict(train_encoder=True, train_encoder_from="p9"), "no layer 'p9': it has p2, p3, p4, p5"),
        (dict(train_encoder=True, train_encoder_from="p5", layer="p4"), "no layer 'p5': it has p2, p3, p4"),
        (dict(train_decoder=False), "--no-train-decoder needs a decoder that has learnt: add --start-from"),
        (dict(projector_lr=-1.0), "--projector-lr must be at least 0"),
        (dict(dropout=1.5), "dropout is a share"),
    ],
)
def test_stages_that_cannot_be_are_refused_before_anything_is_written(pictures, encoder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        Run(recipe_for(pictures, encoder, tmp_path, **changes))
    assert not (tmp_path / "run").exists()


def test_stages_follow_each_other(pictures, started, tmp_path):
    """Projector, then the decoder too, then the end of the encoder: each starts from the checkpoint of the one before."""
    stages = (dict(train_decoder=False), {}, dict(train_encoder=True, train_encoder_from="p5"))
    start, models = str(started / "cross"), [load_checkpoint(started / "cross")[0].state_dict()]
    for number, changes in enumerate(stages):
        out = str(tmp_path / str(number))
        run = Run(recipe_for(pictures, "", tmp_path, out=out, start_from=start, **changes))
        run.take_step()
        run.save()
        start = out
        models.append(load_checkpoint(out)[0].state_dict())
    parts = (
        "cross_attention.0.c_q.weight",
        "transformer.h.0.mlp.c_fc.weight",
        "vision_encoder.net.blocks.4.0.bn1.weight",
    )
    for number, (before, after) in enumerate(zip(models, models[1:], strict=False)):
        assert [not torch.equal(before[part], after[part]) for part in parts] == [part <= number for part in range(3)]


# ---- robots have the same flags


def test_fields_that_robots_share_work_for_them(robot, tmp_path):
    recipe = Robot(data=str(robot), out=str(tmp_path / "first"), train_encoder=False, **FEW)
    with pytest.raises(UserError, match="--no-train-decoder needs a decoder that has learnt"):
        Run(replace(recipe, train_decoder=False))
    first = Run(recipe)
    no_zeros(first.model)
    first.save()
    recipe = replace(recipe, train_decoder=False, start_from=str(first.out), out=str(tmp_path / "second"))
    run = Run(recipe)
    moved, buffers = moved_in(run, 1)
    assert moved and all(name.startswith(("vision_projector.", "glances.")) for name in moved) and not buffers
    losses = []
    for dropout in (0.0, 0.5):
        set_training(run.model, replace(recipe, dropout=dropout))
        losses.append(run.task.backward(1).value)
    assert losses[0] != losses[1]


# ---- resuming


def first_step(run):
    no_zeros(run.model)
    run.take_step()
    return optimizer_tensors(run.optimizers)


def test_a_run_older_than_the_projectors_rate_resumes(robot, tmp_path):
    """Its optimisers numbered all matrices in the order of the model; a robot has some behind the projector."""
    run = Run(Robot(data=str(robot), out=str(tmp_path / "run"), **FEW))
    first_step(run)
    named = [
        name for name, p in run.model.named_parameters() if run.model.param_group(name, p) in ("matrices", "projector")
    ]
    assert named[-1] == "state_projector.weight" and "vision_projector.c_proj.weight" in named
    by_name = dict(run.model.named_parameters())
    old = torch.optim.Muon([by_name[name] for name in named], lr=0.02, adjust_lr_fn="original")
    for number, name in enumerate(named):
        old.state[by_name[name]]["momentum_buffer"] = torch.full_like(by_name[name], float(number))
    load_optimizers(run.optimizers[:1], optimizer_tensors([old]))
    for number, name in enumerate(named):
        assert (run.optimizers[0].state[by_name[name]]["momentum_buffer"] == number).all(), name


def test_the_state_of_other_parameters_is_refused(pictures, encoder, tmp_path):
    run = Run(recipe_for(pictures, encoder, tmp_path))
    state = first_step(run)
    load_optimizers(make_optimizers(run.model, run.recipe), state)
    other = Run(recipe_for(pictures, encoder, tmp_path, fusion="cross", out=str(tmp_path / "other")))
    with pytest.raises(UserError, match="fits none of this run's parameters: it was saved by another version"):
        load_optimizers(other.optimizers, state)
    fewer = Run(recipe_for(pictures, encoder, tmp_path, n_layer=1, out=str(tmp_path / "fewer")))
    with pytest.raises(UserError, match="fits none of this run's parameters"):
        load_optimizers(fewer.optimizers, state)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_stage_resumes_to_the_same_weights(pictures, encoder, tmp_path, fusion):
    """Bit for bit: with dropout of activations and of features, mirroring, a frozen encoder and a rate of the projector."""
    settings = dict(
        fusion=fusion, dropout=0.3, feature_dropout=0.2, label_smoothing=0.1, flip="horizontal", word_dropout=0.1, steps=5,
        blind_share=0.2, **RATES,
    )  # fmt: skip
    whole = recipe_for(pictures, encoder, tmp_path, out=str(tmp_path / "whole"), **settings)
    unbroken, parts = Run(whole), replace(whole, out=str(tmp_path / "parts"))
    stopped = Run(parts)
    for _ in range(2):
        stopped.take_step()
    stopped.save()
    release_folder(stopped.out)
    torch.manual_seed(99)  # a new process has other random numbers
    resumed = Run(replace(parts, resume=True))
    for _ in range(4):
        unbroken.take_step()
    for _ in range(2):
        resumed.take_step()
    for of in (lambda run: run.model.state_dict(), lambda run: optimizer_tensors(run.optimizers)):
        expected, found = of(unbroken), of(resumed)
        assert expected.keys() == found.keys() and expected
        for name, value in expected.items():
            assert torch.equal(value, found[name]), name


# ---- pictures that the model cannot take


def test_more_pictures_than_the_model_has_numbers_for_name_the_row(pictures, encoder, tmp_path):
    run = Run(recipe_for(pictures, encoder, tmp_path, fusion="cross"))
    images = sorted(pictures.glob("*.png"))[:9]
    sample = replace(vqa_sample(images[0], "which?", "red"), where="pairs.jsonl:7")
    content = [{"type": "image"}] * 9 + [{"type": "text", "text": "which?"}]
    nine = replace(sample, images=tuple(images), messages=({"role": "user", "content": content}, sample.messages[-1]))
    config = replace(run.model.config, sequence_len=200)
    with pytest.raises(
        DataError, match="pairs.jsonl:7: the conversation has 9 pictures, but the model takes 8 at most"
    ):
        Rows([nine], run.tokenizer, config)
    assert Rows([nine], run.tokenizer, replace(config, fusion="prefix")).groups
    assert Rows([nine], run.tokenizer, replace(config, max_images=9)).groups
