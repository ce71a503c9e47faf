"""Training runs on small pictures: gradients, resuming, and what a user can do wrong."""

import ast
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nanochat.checkpoint import load_checkpoint, load_resume
from nanochat.data.sample import vqa_sample
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer
from nanochat.training import recipe as shared_fields
from nanochat.training import recipes
from nanochat.training.batches import Row, Rows, augment, make_batch, mask_images, mask_rows, mask_tokens
from nanochat.training.pictures import PictureTask
from nanochat.training.recipes import RECIPES, Folder
from nanochat.training.run import Run, started_recipe
from nanochat.training.task import set_training

ROOT = Path(__file__).parents[1]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "yellow": (230, 220, 30)}
SMALL = dict(
    encoder="yolov9t.yaml", layer="2", image_size=32, vision_tokens=1, vocab_size=280, n_layer=1, n_head=2, n_embd=32,
    sequence_len=48, images_per_step=8, warmup_steps=5, eval_every=1000, save_every=1000, device="cpu", val_images=8,
    train_encoder=False, batchnorm="frozen", encoder_lr=1e-3, word_loss=0.0, decoder_gradient=1.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of coloured squares with captions.csv: two questions a picture."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    lines = ["file,question,answer"]
    for i in range(40):
        name = list(COLOURS)[i % 4]
        array = np.full((32, 32, 3), 245, np.uint8)
        y, x = rng.integers(0, 16, 2)
        array[y : y + 16, x : x + 16] = COLOURS[name]
        Image.fromarray(array).save(folder / f"{i}.png")
        lines += [f"{i}.png,what color is it?,{name}", f"{i}.png,is it red?,{'yes' if name == 'red' else 'no'}"]
    (folder / "captions.csv").write_text("\n".join(lines))
    return folder


def recipe_for(pictures, tmp_path, **changes):
    return Folder(
        **SMALL | {"data": str(pictures), "out": str(tmp_path / "run"), "cache": str(tmp_path / "c")} | changes
    )


def train(recipe):
    return Run(recipe).train()


def interrupt_at(run, step):
    """Ctrl-C in the middle of that step."""
    backward = run.task.backward

    def interrupted(now):
        if now == step:
            os.kill(os.getpid(), signal.SIGINT)
        return backward(now)

    run.task.backward = interrupted


def randomize_zeros(model):
    """A new model's output layers are zero, and let no gradient pass."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in (model.lm_head.weight, *(block.attn.c_proj.weight for block in model.transformer.h)):
            p.normal_(0, 0.1)


def test_end_to_end_training_learns_from_the_picture(pictures, tmp_path):
    recipe = recipe_for(pictures, tmp_path, steps=120, train_encoder=True, batchnorm="train", encoder_lr=3e-3, seed=1)
    out = train(recipe)
    model, tokenizer, training = load_checkpoint(out)
    last = [line for line in training["history"] if "aligned" in line][-1]
    assert last["aligned_accuracy"] > 0.8
    assert last["shuffled_accuracy"] < last["aligned_accuracy"] - 0.2
    assert last["blind_accuracy"] < last["aligned_accuracy"] - 0.2
    assert model.vision_encoder is not None and training["recipe"]["seed"] == 1
    assert (out / "loss.png").read_bytes()[:4] == b"\x89PNG"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {"loss", "tokens_per_s", "images_per_s"} <= set(lines[1]) and lines[-1]["step"] == 120


def test_a_frozen_encoder_stays_as_it_was_and_grids_train(pictures, tmp_path):
    torch.manual_seed(0)
    recipe = recipe_for(pictures, tmp_path, steps=3, vision_tokens=4, layer="p3", image_size=64)
    model, _, _ = load_checkpoint(train(recipe))
    assert model.vision_projector.position.abs().sum() > 0
    again, _, _ = load_checkpoint(train(replace(recipe, out=str(tmp_path / "again"), steps=6)))
    for a, b in zip(model.vision_encoder.parameters(), again.vision_encoder.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("size", [1, 3])
def test_accumulated_gradients_are_those_of_the_large_batch(pictures, tmp_path, size):
    gradients = []
    for device_batch_size in (None, size):
        recipe = recipe_for(
            pictures, tmp_path, train_encoder=True, device_batch_size=device_batch_size, blind_share=0.0, word_loss=0.5
        )
        run = Run(recipe)
        randomize_zeros(run.model)
        set_training(run.model, recipe)
        run.task.backward(0)
        gradients.append({name: p.grad for name, p in run.model.named_parameters() if p.grad is not None})
    whole, parts = gradients
    assert whole.keys() == parts.keys() and any(name.startswith("vision_encoder") for name in whole)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_changes_no_loss(pictures, tmp_path):
    losses = []
    for on in (False, True):
        run = Run(recipe_for(pictures, tmp_path, gradient_checkpointing=on))
        losses.append([run.take_step().value for _ in range(4)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


@pytest.fixture
def described(pictures, tmp_path):
    """The same pictures with two captions each."""
    lines = (pictures / "captions.csv").read_text().splitlines()[1::2]
    rows = [line.split(",")[::2] for line in lines]  # file, colour
    captions = [f"{name},{text}" for name, c in rows for text in (f"a {c} square .", f"this is {c} on white")]
    (tmp_path / "captions.csv").write_text("\n".join(["file,caption", *captions]))
    for picture in pictures.glob("*.png"):
        (tmp_path / picture.name).write_bytes(picture.read_bytes())
    return tmp_path


def test_reward_steps_raise_the_reward_and_leave_the_encoder_alone(described, tmp_path):
    recipe = recipe_for(
        described,
        tmp_path,
        steps=60,
        reward_steps=60,
        reward_lr=0.3,
        questions_per_image=4,
        train_encoder=True,
        device_batch_size=4,
    )
    out = train(recipe)
    history = load_checkpoint(out)[2]["history"]
    rewards = [line["reward"] for line in history if "reward" in line]
    assert len(rewards) == 6 and rewards[-1] > 1.2 * rewards[0], rewards
    imitated = load_checkpoint(train(replace(recipe, reward_steps=0, out=str(tmp_path / "imitated"))))[0]
    before, after = imitated.vision_encoder.state_dict(), load_checkpoint(out)[0].vision_encoder.state_dict()
    for name, value in before.items():  # BatchNorm's statistics too
        torch.testing.assert_close(value, after[name], rtol=0, atol=0)
    resumed = train(replace(recipe, resume=True, reward_steps=70))  # more of the same is the same run
    assert load_checkpoint(resumed)[2]["step"] == 130


def test_a_checkpoint_records_what_it_learnt(pictures, described, tmp_path):
    first = train(recipe_for(pictures, tmp_path, steps=1))
    learnt = load_checkpoint(first)[2]["learnt"]
    assert learnt == {"questions": True, "captions": False, "actions": False}
    second = train(recipe_for(described, tmp_path, steps=1, out=str(tmp_path / "captions")))
    assert load_checkpoint(second)[2]["learnt"] == {"questions": False, "captions": True, "actions": False}
    both = train(recipe_for(described, tmp_path, steps=1, start_from=str(first), out=str(tmp_path / "both")))
    assert load_checkpoint(both)[2]["learnt"] == {"questions": True, "captions": True, "actions": False}


def test_rewards_are_for_captions(pictures, described, tmp_path):
    with pytest.raises(ValueError, match="need captions"):
        train(recipe_for(pictures, tmp_path, steps=1, reward_steps=1))
    with pytest.raises(ValueError, match="2 or more"):
        train(recipe_for(described, tmp_path, steps=1, reward_steps=1, questions_per_image=1))
    assert not (tmp_path / "run").exists()


def test_a_context_too_short_for_sampled_captions_is_refused_before_the_first_step(described, tmp_path):
    settings = dict(steps=1, reward_steps=1, out=str(tmp_path / "short"), sequence_len=40)
    with pytest.raises(
        UserError, match=r"captions of up to 32 tokens, which take \d+ .* use --sequence-len \d+"
    ) as error:
        Run(recipe_for(described, tmp_path, **settings))
    needed = int(str(error.value).split("--sequence-len ")[1].split(",")[0])
    Run(recipe_for(described, tmp_path, **settings | dict(sequence_len=needed))).train()


def test_the_encoder_of_a_checkpoint_can_be_used(pictures, tmp_path):
    first = train(recipe_for(pictures, tmp_path, steps=2, train_encoder=True, encoder_lr=0.1))
    second = train(recipe_for(pictures, tmp_path, steps=2, encoder=str(first), layer="1", out=str(tmp_path / "second")))
    taken, given = (load_checkpoint(folder)[0].vision_encoder for folder in (second, first))
    assert len(taken.net.model) == 2
    for a, b in zip(taken.parameters(), given.parameters(), strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_training_starts_from_a_checkpoint_with_other_data(pictures, described, tmp_path):
    first = train(recipe_for(described, tmp_path, steps=4, train_encoder=True, vocab_size=300, image_size=64))
    given, words, _ = load_checkpoint(first)
    recipe = recipe_for(pictures, tmp_path, steps=1, start_from=str(first), out=str(tmp_path / "second"))
    rates = dict(matrix_lr=0.0, embedding_lr=0.0, head_lr=0.0)
    model, tokenizer, training = load_checkpoint(train(replace(recipe, **rates)))
    assert tokenizer.to_json() == words.to_json() and training["recipe"]["image_size"] == 64
    for name, tensor in given.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)
    recipe = replace(recipe, out=str(tmp_path / "third"), steps=2)
    stop_after(recipe, 1)
    moved, _, training = load_checkpoint(train(started_recipe(recipe)))  # as the command line resumes
    assert training["step"] == 2 and not torch.equal(moved.lm_head.weight, given.lm_head.weight)


def test_every_epoch_shows_every_picture_once_in_another_order(pictures, tmp_path):
    rows = Run(recipe_for(pictures, tmp_path)).task.rows
    n = len(rows.groups)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * n // 4, (epoch + 1) * n // 4)
        epochs.append([row.images[0] for step in steps for group in rows.step(step, 4, 1, seed=0) for row in group])
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(n)) and epochs[0] != epochs[1]
    assert all(len(group) == 2 for group in rows.step(0, 4, 5, seed=0))


def test_batches_are_padded_shifted_and_masked(pictures, tmp_path):
    rows = Run(recipe_for(pictures, tmp_path)).task.rows
    picked = [row for group in rows.groups[:2] for row in group]
    batch = make_batch(picked)
    for line, row in enumerate(picked):
        length = len(row.ids) - 1
        assert batch.idx[line, :length].tolist() == row.ids[:-1]
        expected = [i if m else -1 for i, m in zip(row.ids[1:], row.mask[1:], strict=True)]
        assert batch.targets[line].tolist() == expected + [-1] * (batch.idx.size(1) - length)
    assert len(batch.numbers) == 2 and batch.slots.tolist() == [0, 0, 1, 1]
    vectors = torch.tensor([[[1.0]], [[2.0]]])
    assert batch.in_rows(vectors).flatten().tolist() == [1, 1, 2, 2]


def test_augmentation_mirrors_shifts_and_keeps_range():
    x = torch.zeros(64, 3, 32, 32)
    x[:, :, :, :16] = 1.0
    rng = np.random.default_rng(0)
    assert augment(x, rng, "none", 0.0) is x
    mirrored = augment(x, rng, "horizontal", 0.0)[:, 0, 16, 4].round()
    assert 10 < mirrored.sum() < 54  # about half are mirrored
    moved = augment(x, rng, "none", 0.2)
    assert 0 <= moved.min() and moved.max() <= 1 and moved.sum((1, 2, 3)).std() > 10


def test_masked_pictures_are_zero_and_as_many_as_asked():
    vectors = torch.ones(1000, 2, 3)
    masked = mask_images(vectors, np.random.default_rng(0), 0.2)
    zero = (masked == 0).all((1, 2))
    assert 150 < zero.sum() < 250 and (masked[~zero] == 1).all()
    batch = make_batch([Row([1, 2], [0, 1], (row % 7, 7)) for row in range(500)])
    seen, masked = mask_rows(vectors[:8], batch, np.random.default_rng(0), 0.2)
    shown = masked.slots
    assert (seen[:8] == 1).all() and (seen[8] == 0).all() and len(seen) == 9
    masked = (shown == 8).view(500, 2)  # both pictures of a row, or none
    assert torch.equal(masked[:, 0], masked[:, 1]) and 50 < masked[:, 0].sum() < 150
    assert torch.equal(shown[shown < 8], batch.slots[shown < 8])


def test_word_dropout_replaces_text_and_no_special_tokens(pictures, tmp_path):
    task = Run(recipe_for(pictures, tmp_path)).task
    idx = make_batch([row for group in task.rows.groups for row in group]).idx
    special = torch.isin(idx, torch.tensor(sorted(task.tokenizer.special_ids)))

    def dropped(share):
        return mask_tokens(idx, np.random.default_rng(0), share, task.tokenizer.special_ids, task.unknown_id)

    everything = dropped(1.0)
    assert torch.equal(everything[special], idx[special]) and (everything[~special] == task.unknown_id).all()
    assert 0.2 < (dropped(0.3) != idx)[~special].float().mean() < 0.4 and torch.equal(dropped(0.0), idx)


def test_learning_rates_rise_stay_and_fall(described, tmp_path):
    recipe = recipe_for(described, tmp_path, steps=100, warmup_steps=10, cooldown=0.5)
    plain = Run(recipe).task
    factors = [plain.rate_factor(step) for step in range(100)]
    assert factors[0] == 0.1 and factors[9:50] == [1.0] * 41 and factors[-1] == pytest.approx(0.02)
    rewarded = Run(replace(recipe, reward_steps=20, reward_lr=0.1)).task
    assert rewarded.steps == 120 and [rewarded.rate_factor(step) for step in range(100)] == factors
    assert [rewarded.rate_factor(step) for step in (100, 110, 119)] == pytest.approx([0.1, 0.05, 0.005])


def test_a_step_uses_the_learning_rate_of_that_step(pictures, tmp_path):
    run = Run(recipe_for(pictures, tmp_path, steps=10, warmup_steps=4, matrix_lr=0.4, head_lr=0.8))
    run.take_step()
    run.take_step()
    muon, adamw = run.optimizers
    assert muon.param_groups[0]["lr"] == pytest.approx(0.2)
    assert [group["lr"] for group in adamw.param_groups] == pytest.approx([5e-3 / 2, 0.4])


def test_parameters_have_the_optimiser_that_suits_them(pictures, tmp_path):
    run = Run(recipe_for(pictures, tmp_path, train_encoder=True, vision_tokens=4, word_loss=1.0))
    names = {id(p): name for name, p in run.model.named_parameters()}
    names |= {id(p): f"auxiliary.{name}" for name, p in run.task.auxiliary.named_parameters()}
    muon, adamw = ([[names[id(p)] for p in g["params"]] for g in o.param_groups] for o in run.optimizers)
    block = [
        f"transformer.h.0.{name}.weight"
        for name in ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]
    assert muon == [[*block, "vision_projector.c_fc.weight", "vision_projector.c_proj.weight"]]
    embeddings, outputs, encoder, auxiliary = adamw
    assert embeddings == ["transformer.wte.weight"]
    assert outputs == ["lm_head.weight", "vision_projector.position"]
    assert encoder == [f"vision_encoder.{name}" for name, _ in run.model.vision_encoder.named_parameters()]
    assert auxiliary == ["auxiliary.linear.weight", "auxiliary.linear.bias"]


def test_the_auxiliary_loss_reaches_the_encoder_and_predicts_specific_words(pictures, tmp_path):
    recipe = recipe_for(pictures, tmp_path, train_encoder=True, word_loss=1.0, decoder_gradient=0.0, blind_share=0.0)
    run = Run(recipe)
    task, tokens = run.task, run.task.auxiliary.tokens
    # the end of the turn is in every answer and tells nothing; colours do
    end = run.tokenizer.special("<|assistant_end|>")
    assert all(found and end not in found for found in tokens)
    assert len({tuple(tokens[group[0].images[0]]) for group in task.rows.groups}) == len(COLOURS)
    batch = make_batch([row for group in task.rows.groups[:4] for row in group])
    randomize_zeros(run.model)
    answers, _ = task.losses(batch, np.random.default_rng(0))
    answers.backward()
    assert all(p.grad is None or p.grad.abs().sum() == 0 for p in run.model.vision_encoder.parameters())
    assert run.model.vision_projector.c_fc.weight.grad.abs().sum() > 0
    _, auxiliary = task.losses(batch, np.random.default_rng(0))
    auxiliary.backward()
    assert next(run.model.vision_encoder.parameters()).grad.abs().sum() > 0


def test_a_share_of_the_decoders_gradient_reaches_the_encoder(pictures, tmp_path):
    sums = []
    for share in (1.0, 0.25):
        recipe = recipe_for(pictures, tmp_path, train_encoder=True, decoder_gradient=share, blind_share=0.0)
        run = Run(recipe)
        randomize_zeros(run.model)
        set_training(run.model, recipe)
        run.task.backward(0)
        sums.append(next(run.model.vision_encoder.parameters()).grad)
    assert sums[0].abs().sum() > 0
    torch.testing.assert_close(sums[1], 0.25 * sums[0], rtol=1e-4, atol=1e-9)


def test_validation_conditions_are_equal_only_for_a_model_that_ignores_the_picture(pictures, tmp_path):
    run = Run(recipe_for(pictures, tmp_path, train_encoder=True))
    randomize_zeros(run.model)
    check = run.validate()
    assert len({round(check[name], 5) for name in ("aligned", "shuffled", "blind")}) == 3
    with torch.no_grad():
        run.model.vision_projector.c_proj.weight.zero_()  # the vision token is the same for every picture
    check = run.validate()
    assert check["aligned"] == pytest.approx(check["shuffled"]) == pytest.approx(check["blind"])


def test_a_single_validation_picture_has_no_shuffled_score(pictures, tmp_path):
    recipe = recipe_for(pictures, tmp_path, steps=1, data=str(tmp_path))
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "black.png")
    Image.fromarray(np.full((32, 32, 3), 255, np.uint8)).save(tmp_path / "white.png")
    rows = ["black.png,what color is it?,black", "white.png,what color is it?,white"]
    (tmp_path / "captions.csv").write_text("\n".join(["file,question,answer", *rows]))
    last = load_checkpoint(train(recipe))[2]["history"][-1]
    assert "shuffled" not in last and {"aligned", "blind", "aligned_accuracy"} <= last.keys()


def test_every_field_of_a_recipe_has_help():
    """The text below the field; a field that only changes a default inherits it."""
    known = {}
    source = "".join(Path(module.__file__).read_text() for module in (shared_fields, recipes))
    for item in ast.parse(source).body:
        if isinstance(item, ast.ClassDef):
            helped = {name: text for base in item.bases for name, text in known[base.id].items()}
            for field, after in zip(item.body, [*item.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign):
                    below = (
                        after.value.value
                        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
                        else None
                    )
                    helped[field.target.id] = below or helped.get(field.target.id)
            known[item.name] = helped
    for kind in RECIPES.values():
        helped = known[kind.__name__]
        assert set(helped) == {field.name for field in fields(kind)}
        assert all(helped.values()), [name for name, text in helped.items() if not text]


# ---- resuming


def command(recipe):
    fields = {**SMALL, "data": recipe.data, "out": recipe.out, "cache": recipe.cache} | {
        "steps": recipe.steps, "train_encoder": recipe.train_encoder, "save_every": recipe.save_every,
        "word_loss": recipe.word_loss, "batchnorm": recipe.batchnorm, "eval_every": recipe.eval_every,
    }  # fmt: skip
    flags = []
    for name, value in fields.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else ["--no-" + flag[2:]] if value is False else [flag, str(value)]
    return [sys.executable, "-m", "nanochat", "train", "folder", *flags]


def heed_ctrl_c():
    """And a lost terminal. A shell's background processes ignore the one, nohup's the other, and hand that on to theirs."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def unbroken(pictures, tmp_path_factory):
    """A recipe, and the checkpoint of a run of it that was not stopped."""
    recipe = recipe_for(pictures, tmp_path_factory.mktemp("unbroken"), **STOPPED)
    return recipe, train(recipe)


# BatchNorm's statistics are trained: half a step, or one step too many, would show in them too
STOPPED = dict(steps=60, train_encoder=True, batchnorm="train", save_every=3, word_loss=1.0)


def start(recipe):
    """The command as a process, once it has saved for the first time."""
    process = subprocess.Popen(
        command(recipe), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (Path(recipe.out) / "manifest.json").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    return process


def assert_same_run(out, unbroken):
    """Weights, statistics, and the state of the optimisers and of the auxiliary head, to the bit."""
    (resumed, _, a), (whole, _, b) = load_checkpoint(out), load_checkpoint(unbroken)
    assert a["step"] == b["step"] == 60
    for name, tensor in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    expected, found = load_resume(unbroken), load_resume(out)
    assert expected.keys() == found.keys() and any(name.startswith("helper.") for name in found)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_a_killed_run_resumes_to_the_same_weights(pictures, tmp_path, unbroken):
    recipe = recipe_for(pictures, tmp_path, **STOPPED)
    process = start(recipe)
    process.send_signal(signal.SIGKILL)
    process.wait()
    step = load_checkpoint(recipe.out)[2]["step"]
    assert 0 < step < 60 and step % 3 == 0
    train(replace(recipe, resume=True))
    assert_same_run(recipe.out, unbroken[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_prints_the_command_that_resumes(pictures, tmp_path, unbroken, number):
    recipe = recipe_for(pictures, tmp_path, **STOPPED, out=str(tmp_path / "my run"))
    process = start(recipe)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    stopped = load_checkpoint(recipe.out)[2]["step"]
    assert 0 < stopped < 60 and f"stopped at step {stopped} of 60 and saved" in error
    words = shlex.split(error.split("resume with: ")[1])
    assert words == ["nanochat", "train", "folder", "--out", recipe.out, "--resume"]
    if number == signal.SIGINT:
        done = subprocess.run(
            [*command(recipe)[:3], *words[1:]], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert_same_run(recipe.out, unbroken[1])


def stop_after(recipe, step):
    """Train, and send SIGINT, as Ctrl-C does, during that step."""
    run = Run(recipe)
    interrupt_at(run, step - 1)
    with pytest.raises(KeyboardInterrupt, match=f"stopped at step {step} of"):
        run.train()


@pytest.mark.parametrize(("stopped", "allowed"), [(5, True), (8, False)])
def test_a_run_may_become_longer_until_its_rates_fall(pictures, tmp_path, stopped, allowed):
    recipe = recipe_for(pictures, tmp_path, steps=12, cooldown=0.5, warmup_steps=2, train_encoder=True)
    stop_after(recipe, stopped)
    if not allowed:
        expected = (
            r"is at step 8 and was started with 12 steps, now 16: its learning rates depend on that from step 6 on.*"
            r"Finish it with: nanochat train folder --out \S+ --resume; then train on from it with: nanochat train folder "
            r"--data \S+ --start-from \S+run --out \S+run-2 --steps 4"
        )
        with pytest.raises(UserError, match=expected):
            train(replace(recipe, resume=True, steps=16))
        return
    longer = train(replace(recipe, resume=True, steps=16))
    unbroken = train(replace(recipe, out=str(tmp_path / "unbroken"), steps=16))
    a, b = (load_checkpoint(folder)[0].state_dict() for folder in (longer, unbroken))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_another_recipe_is_no_resume(pictures, tmp_path):
    recipe = recipe_for(pictures, tmp_path, steps=2)
    train(recipe)
    with pytest.raises(ValueError, match="--matrix-lr was 0.02, now 0.1"):
        train(replace(recipe, resume=True, matrix_lr=0.1))
    with pytest.raises(FileExistsError, match="--resume"):
        train(recipe)


def test_bad_recipes_are_refused_before_anything_is_written(pictures, tmp_path):
    for changes, message in (
        ({"data": str(tmp_path / "nothing")}, "nothing"),
        ({"layer": "p9"}, "unknown layer"),
        ({"vision_tokens": 3}, "square"),
        ({"sequence_len": 8}, r"captions.csv:\d+: the conversation .* has \d+ tokens, but the context has 8"),
        ({"vocab_size": 100}, "a vocabulary has at least"),
        ({"resume": True}, "no checkpoint"),
        ({"steps": 0}, "--steps must be at least 1, got 0"),
        ({"jitter": -1.0}, "jitter is a share"),
        ({"epochs": float("nan")}, "epochs"),
        ({"device": "tpu"}, "auto, cpu, cuda"),
        ({"encoder": str(pictures)}, "no checkpoint"),
        ({"tokenizer": "none.json"}, "none.json"),
        ({"device": "cuda"}, "CUDA") if not torch.cuda.is_available() else ({"image_size": 33}, "multiple of 32"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            train(recipe_for(pictures, tmp_path, **{"steps": 1} | changes))
        assert not (tmp_path / "run").exists()


def test_a_lost_run_stops_before_anything_is_saved(pictures, tmp_path):
    run = Run(recipe_for(pictures, tmp_path, steps=30, save_every=1))
    with torch.no_grad():
        run.model.lm_head.weight.fill_(float("nan"))
    before = {name: tensor.clone() for name, tensor in run.model.named_parameters()}
    with pytest.raises(UserError, match="lm_head.weight is no longer finite at step 1, so this step is not saved"):
        run.train()
    for name, tensor in run.model.named_parameters():  # no update with such gradients
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)
    assert not run.out.exists()


def spoil(run, steps, kind):
    """Make the gradient of these steps NaN, by the loss of the answers, by the auxiliary loss, or by one gradient alone."""
    backward, task = run.task.backward, run.task

    def spoilt(step):
        if step not in steps:
            return backward(step)
        if kind == "auxiliary":
            loss = task.auxiliary.loss
            task.auxiliary.loss = lambda *args: loss(*args) * float("nan")
            result = backward(step)
            task.auxiliary.loss = loss
            return result
        result = backward(step)
        next(run.model.vision_encoder.parameters()).grad[0] = float("nan" if kind == "gradient" else "inf")
        return replace(result, value=float("nan")) if kind == "loss" else result

    run.task.backward = spoilt


SPOILT = dict(train_encoder=True, batchnorm="train", word_loss=1.0)


@pytest.mark.parametrize(("scale", "expected"), [(1000.0, 1.0), (1e-4, None)])
def test_large_gradients_are_scaled_to_norm_one_and_small_ones_are_left_alone(pictures, tmp_path, scale, expected):
    run = Run(recipe_for(pictures, tmp_path, steps=4))
    randomize_zeros(run.model)
    backward, norms = run.task.backward, {}

    def norm():
        grads = [p.grad for p in run.model.parameters() if p.grad is not None]
        return torch.stack([g.float().norm() for g in grads]).norm().item()

    def scaled_backward(step):
        result = backward(step)
        for p in run.model.parameters():
            if p.grad is not None:
                p.grad.mul_(scale)
        norms["before"] = norm()
        return result

    run.task.backward = scaled_backward
    hook = run.optimizers[0].register_step_pre_hook(lambda *args: norms.update(used=norm()))
    run.take_step()
    hook.remove()
    assert (norms["before"] > 1) == (expected is not None)
    assert norms["used"] == pytest.approx(expected or norms["before"], rel=1e-3)


@pytest.mark.parametrize("kind", ["loss", "auxiliary", "gradient", "infinite"])
def test_a_step_whose_gradient_is_not_finite_is_skipped_and_counted(pictures, tmp_path, kind, capsys):
    run = Run(recipe_for(pictures, tmp_path, steps=6, **SPOILT))
    spoil(run, {2, 4}, kind)
    model, _, training = load_checkpoint(run.train())
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert training["skipped"] == 2 and training["step"] == 6
    json.loads(json.dumps(training), parse_constant=pytest.fail)  # no NaN in the record
    output = capsys.readouterr().out
    assert "step 2 is skipped: its " in output and "2 steps were skipped" in output


@pytest.mark.parametrize("kind", ["auxiliary", "gradient"])
def test_many_skipped_steps_in_a_row_stop_the_run_and_keep_its_checkpoint(pictures, tmp_path, kind):
    run = Run(recipe_for(pictures, tmp_path, steps=40, save_every=4, **SPOILT))
    spoil(run, range(5, 40), kind)
    with pytest.raises(UserError, match="10 steps in a row were skipped, the last is step 14.*checkpoint.*is intact"):
        run.train()
    model, _, training = load_checkpoint(run.out)
    assert training["step"] == 12 and all(tensor.isfinite().all() for tensor in model.state_dict().values())


@pytest.mark.parametrize("where", ["backward", "new_model"])
def test_a_full_gpu_is_one_line_that_helps(pictures, tmp_path, monkeypatch, where):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(PictureTask, where, full)
    with pytest.raises(MemoryError, match="--device-batch-size.*--gradient-checkpointing.*--encoder-device cpu"):
        train(recipe_for(pictures, tmp_path, steps=1))


def test_rows_of_several_pictures_and_of_none():
    tokenizer = Tokenizer.train(["which?"], 270)
    config = type("Config", (), {"fusion": "prefix", "vision_token_id": 3, "places_per_image": 2, "sequence_len": 64})
    pair = vqa_sample(b"a", "which?", "left")
    two = replace(
        pair, images=(b"a", b"b"),
        messages=({"role": "user", "content": [{"type": "image"}, {"type": "image"}]}, pair.messages[1]),
    )  # fmt: skip
    none = replace(pair, images=(), messages=({"role": "user", "content": "hi"}, pair.messages[1]))
    rows = Rows([two, pair, none], tokenizer, config)
    batch = make_batch([row for group in rows.groups for row in group])
    assert batch.counts == [2, 1, 0] and batch.slots.tolist() == [0, 1, 0]
    in_rows = batch.in_rows(torch.arange(4.0).view(2, 2, 1))
    assert in_rows.flatten().tolist() == [0, 1, 2, 3, 0, 1]
