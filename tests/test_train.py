"""Training runs on small pictures: gradients, resuming, and what a user can do wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nanochat.checkpoint import load_checkpoint, load_resume
from nanochat.data.sample import vqa_sample
from nanochat.evaluation.validation import three_ways
from nanochat.tokenizer import Tokenizer
from nanochat.training.batches import Rows, augment, collate, forget_words, hide
from nanochat.training.optimizers import learning_rate_factor, make_optimizers
from nanochat.training.pictures import PictureRun, build_model, open_eyes, texts_of, train
from nanochat.training.recipes import Folder
from nanochat.training.run import started_recipe

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


def new_run(recipe):
    """A run at its first step, without going."""
    from nanochat.data import load_dataset

    torch.manual_seed(0)
    samples = load_dataset(recipe.data, recipe.train_split).samples
    tokenizer = Tokenizer.train(texts_of(samples), recipe.vocab_size)
    model = build_model(recipe, tokenizer, torch.device("cpu"))
    data = Rows(samples, tokenizer, model.config)
    eyes, val_eyes = open_eyes(recipe, model, data, data, Path(recipe.out))
    start = {"step": 0, "seconds": 0.0, "history": []}
    return PictureRun(recipe, Path(recipe.out), model, tokenizer, data, data, 50, start, eyes, val_eyes)


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
    assert {"loss", "tokens_per_s", "images_per_s"} <= set(lines[0]) and lines[-1]["step"] == 120


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
        run = new_run(recipe)
        with torch.no_grad():  # a new head is zero, and sends no gradient back
            torch.manual_seed(1)
            for p in (run.model.lm_head.weight, *(b.attn.c_proj.weight for b in run.model.transformer.h)):
                p.normal_(0, 0.1)
        seen, named = {}, dict(run.model.named_parameters())

        def look(seen=seen, named=named):
            seen |= {name: p.grad.clone() for name, p in named.items() if p.grad is not None}

        for optimizer in run.optimizers:
            optimizer.step = look
        run.train_step()
        gradients.append(seen)
    whole, parts = gradients
    assert whole.keys() == parts.keys() and any(name.startswith("vision_encoder") for name in whole)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_trains_alike(pictures, tmp_path):
    losses = []
    for on in (False, True):
        run = new_run(recipe_for(pictures, tmp_path, gradient_checkpointing=on))
        losses.append([run.train_step()[0] for _ in range(4)])
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


def test_rewards_are_for_captions(pictures, described, tmp_path):
    with pytest.raises(ValueError, match="need captions"):
        train(recipe_for(pictures, tmp_path, steps=1, reward_steps=1))
    with pytest.raises(ValueError, match="2 or more"):
        train(recipe_for(described, tmp_path, steps=1, reward_steps=1, questions_per_image=1))
    assert not (tmp_path / "run").exists()


def test_the_encoder_of_a_checkpoint_can_be_taken_on(pictures, tmp_path):
    first = train(recipe_for(pictures, tmp_path, steps=2, train_encoder=True, encoder_lr=0.1))
    second = train(recipe_for(pictures, tmp_path, steps=2, encoder=str(first), layer="1", out=str(tmp_path / "second")))
    taken, given = (load_checkpoint(folder)[0].vision_encoder for folder in (second, first))
    assert len(taken.net.model) == 2
    for a, b in zip(taken.parameters(), given.parameters(), strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_checkpoint_goes_on_with_other_data(pictures, described, tmp_path):
    first = train(recipe_for(described, tmp_path, steps=4, train_encoder=True, vocab_size=300, image_size=64))
    given, words, _ = load_checkpoint(first)
    recipe = recipe_for(pictures, tmp_path, steps=1, start_from=str(first), out=str(tmp_path / "second"))
    rates = dict(matrix_lr=0.0, embedding_lr=0.0, head_lr=0.0)
    model, tokenizer, training = load_checkpoint(train(replace(recipe, **rates)))
    assert tokenizer.to_json() == words.to_json() and training["recipe"]["image_size"] == 64
    for name, tensor in given.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)
    recipe = replace(recipe, out=str(tmp_path / "third"), steps=2)
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
        stop_behind(monkeypatch, 1)
        train(recipe)
    moved, _, training = load_checkpoint(train(started_recipe(recipe)))  # as the command line goes on
    assert training["step"] == 2 and not torch.equal(moved.lm_head.weight, given.lm_head.weight)


def test_every_epoch_shows_every_picture_once_in_another_order(pictures, tmp_path):
    rows = new_run(recipe_for(pictures, tmp_path)).data
    n = len(rows.groups)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * n // 4, (epoch + 1) * n // 4)
        epochs.append([row.images[0] for step in steps for group in rows.step(step, 4, 1, seed=0) for row in group])
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(n)) and epochs[0] != epochs[1]
    assert all(len(group) == 2 for group in rows.step(0, 4, 5, seed=0))


def test_collate_pads_shifts_and_masks(pictures, tmp_path):
    rows = new_run(recipe_for(pictures, tmp_path)).data
    picked = [row for group in rows.groups[:2] for row in group]
    batch = collate(picked)
    for line, row in enumerate(picked):
        length = len(row.ids) - 1
        assert batch.idx[line, :length].tolist() == row.ids[:-1]
        expected = [i if m else -1 for i, m in zip(row.ids[1:], row.mask[1:], strict=True)]
        assert batch.targets[line].tolist() == expected + [-1] * (batch.idx.size(1) - length)
    assert len(batch.numbers) == 2 and batch.slots.tolist() == [0, 0, 1, 1]
    vectors = torch.tensor([[[1.0]], [[2.0]]])
    assert batch.spread(vectors).flatten().tolist() == [1, 1, 2, 2]


def test_augmentation_mirrors_shifts_and_keeps_range():
    x = torch.zeros(64, 3, 32, 32)
    x[:, :, :, :16] = 1.0
    rng = np.random.default_rng(0)
    assert augment(x, rng, "none", 0.0) is x
    mirrored = augment(x, rng, "horizontal", 0.0)[:, 0, 16, 4].round()
    assert 10 < mirrored.sum() < 54  # about half are mirrored
    moved = augment(x, rng, "none", 0.2)
    assert 0 <= moved.min() and moved.max() <= 1 and moved.sum((1, 2, 3)).std() > 10


def test_hidden_rows_are_zero_and_as_many_as_asked():
    vectors = torch.ones(1000, 2, 3)
    hidden = hide(vectors, np.random.default_rng(0), 0.2)
    zero = (hidden == 0).all((1, 2))
    assert 150 < zero.sum() < 250 and (hidden[~zero] == 1).all()


def test_word_dropout_hides_words_and_no_special_tokens(pictures, tmp_path):
    run = new_run(recipe_for(pictures, tmp_path))
    idx = collate([row for group in run.data.groups for row in group], pad_id=run.unknown_id).idx
    special = torch.isin(idx, torch.tensor(sorted(run.tokenizer.special_ids)))

    def hide_share(share):
        return forget_words(idx, np.random.default_rng(0), share, run.tokenizer.special_ids, run.unknown_id)

    everything = hide_share(1.0)
    assert torch.equal(everything[special], idx[special]) and (everything[~special] == run.unknown_id).all()
    hidden = (hide_share(0.3) != idx)[~special].float().mean()
    assert 0.2 < hidden < 0.4 and torch.equal(hide_share(0.0), idx)


def test_learning_rates_rise_stay_and_fall():
    recipe = Folder(warmup_steps=10, cooldown=0.5)
    factors = [learning_rate_factor(step, 100, recipe) for step in range(100)]
    assert factors[0] == 0.1 and factors[9:50] == [1.0] * 41 and factors[-1] == pytest.approx(0.02)
    run = object.__new__(PictureRun)
    run.recipe, run.steps = replace(recipe, reward_steps=20, reward_lr=0.1), 120
    rewarded = []
    for run.step in range(120):
        rewarded.append(run.rate_factor())
    assert rewarded[:100] == factors
    assert [rewarded[step] for step in (100, 110, 119)] == pytest.approx([0.1, 0.05, 0.005])


def test_parameters_have_the_optimiser_that_suits_them(pictures, tmp_path):
    run = new_run(recipe_for(pictures, tmp_path, train_encoder=True, vision_tokens=4))
    names = {id(p): name for name, p in run.model.named_parameters()}
    muon, adamw = (
        [names[id(p)] for g in o.param_groups for p in g["params"]] for o in make_optimizers(run.model, run.recipe)
    )
    assert all(".attn." in n or ".mlp." in n or "vision_projector.c_" in n for n in muon) and len(muon) == 8
    assert {"transformer.wte.weight", "lm_head.weight", "vision_projector.position"} <= set(adamw)
    assert sum(n.startswith("vision_encoder.") for n in adamw) == len(list(run.model.vision_encoder.parameters()))


def test_the_word_loss_reaches_the_encoder_and_knows_the_telling_words(pictures, tmp_path):
    recipe = recipe_for(pictures, tmp_path, train_encoder=True, word_loss=1.0, decoder_gradient=0.0, blind_share=0.0)
    run = new_run(recipe)
    # the end of the turn is in every answer and tells nothing; colours do
    end = run.tokenizer.special("<|assistant_end|>")
    assert all(words and end not in words for words in run.helper.words)
    by_colour = {tuple(run.helper.words[run.data.groups[i][0].images[0]]) for i in range(len(run.data.groups))}
    assert len(by_colour) == len(COLOURS)
    batch = collate([row for group in run.data.groups[:4] for row in group])
    answers, words = run.losses(batch, np.random.default_rng(0))
    answers.backward()
    encoder = run.model.vision_encoder.net.model[0].conv.weight
    assert encoder.grad is None or encoder.grad.abs().sum() == 0
    _, words = run.losses(batch, np.random.default_rng(0))
    words.backward()
    assert encoder.grad.abs().sum() > 0


def test_three_ways_are_equal_for_a_model_that_ignores_the_picture(pictures, tmp_path):
    run = new_run(recipe_for(pictures, tmp_path))
    check = three_ways(run.model, run.val, run.val_eyes, 4)
    assert check["aligned"] == pytest.approx(check["shuffled"]) == pytest.approx(check["blind"])


# ---- going on after a kill


def command(recipe, *more):
    fields = {**SMALL, "data": recipe.data, "out": recipe.out, "cache": recipe.cache} | {
        "steps": recipe.steps, "train_encoder": recipe.train_encoder, "save_every": recipe.save_every,
        "word_loss": recipe.word_loss,
    }  # fmt: skip
    flags = []
    for name, value in fields.items():
        flag = "--" + name.replace("_", "-")
        flags += [flag] if value is True else ["--no-" + flag[2:]] if value is False else [flag, str(value)]
    return [sys.executable, "-m", "nanochat.cli", "train", "folder", *flags, *more]


def heed_ctrl_c():
    """A shell's background processes ignore it, and hand that on to theirs."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_a_killed_run_goes_on_to_the_same_weights(pictures, tmp_path):
    recipe = recipe_for(pictures, tmp_path, steps=60, train_encoder=True, save_every=3, word_loss=1.0)
    process = subprocess.Popen(command(recipe), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    out, deadline = Path(recipe.out), time.monotonic() + 120
    while not (out / "manifest.json").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, _, training = load_checkpoint(out)
    assert 0 < training["step"] < 60 and training["step"] % 3 == 0
    done = subprocess.run(command(recipe, "--resume"), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = replace(recipe, out=str(tmp_path / "whole"))
    done = subprocess.run(command(whole), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (resumed, _, a), (unbroken, _, b) = load_checkpoint(recipe.out), load_checkpoint(whole.out)
    assert a["step"] == b["step"] == 60
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    for name, tensor in load_resume(whole.out).items():
        assert torch.equal(load_resume(recipe.out)[name], tensor), name


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_the_line_it_prints_goes_on(pictures, tmp_path, number):
    recipe = recipe_for(pictures, tmp_path, steps=100, save_every=5, train_encoder=True, word_loss=1.0)
    words = command(recipe, "--batchnorm", "train")
    process = subprocess.Popen(
        words, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=heed_ctrl_c
    )
    deadline = time.monotonic() + 120
    while not (Path(recipe.out) / "manifest.json").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in error
    stopped = load_checkpoint(recipe.out)[2]["step"]
    assert 0 < stopped < 100 and f"stopped at step {stopped} of 100 and saved" in error
    printed = error.split("go on with: nanochat ")[1].split()
    done = subprocess.run([*words[:3], *printed], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = replace(recipe, out=str(tmp_path / "whole"))
    done = subprocess.run(command(whole, "--batchnorm", "train"), env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    resumed, unbroken = (load_checkpoint(folder)[0].state_dict() for folder in (recipe.out, whole.out))
    for name, tensor in unbroken.items():
        assert torch.equal(resumed[name], tensor), name  # no half step, in BatchNorm's statistics neither


def stop_behind(monkeypatch, step):
    """Have every run stop behind that step, as after Ctrl-C."""
    take_step = PictureRun.train_step

    def stepping(self):
        result = take_step(self)
        self.stopping = self.step == step
        return result

    monkeypatch.setattr(PictureRun, "train_step", stepping)


@pytest.mark.parametrize(("stopped", "allowed"), [(5, True), (8, False)])
def test_a_run_may_become_longer_until_its_rates_fall(pictures, tmp_path, stopped, allowed):
    recipe = recipe_for(pictures, tmp_path, steps=12, cooldown=0.5, warmup_steps=2, train_encoder=True)
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(KeyboardInterrupt):
        stop_behind(monkeypatch, stopped)
        train(recipe)
    if not allowed:
        with pytest.raises(ValueError, match="steps=12 then, 16 now"):
            train(replace(recipe, resume=True, steps=16))
        return
    longer = train(replace(recipe, resume=True, steps=16))
    unbroken = train(replace(recipe, out=str(tmp_path / "unbroken"), steps=16))
    a, b = (load_checkpoint(folder)[0].state_dict() for folder in (longer, unbroken))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_another_recipe_is_no_resume(pictures, tmp_path):
    recipe = recipe_for(pictures, tmp_path, steps=2)
    train(recipe)
    with pytest.raises(ValueError, match="matrix_lr=0.02 then, 0.1 now"):
        train(replace(recipe, resume=True, matrix_lr=0.1))
    with pytest.raises(FileExistsError, match="--resume"):
        train(recipe)


def test_bad_recipes_are_refused_before_anything_is_written(pictures, tmp_path):
    for changes, message in (
        ({"data": str(tmp_path / "nothing")}, "nothing"),
        ({"layer": "p9"}, "unknown layer"),
        ({"vision_tokens": 3}, "square"),
        ({"sequence_len": 8}, "does not fit"),
        ({"vocab_size": 100}, "vocab_size"),
        ({"resume": True}, "no checkpoint"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
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


def test_a_broken_loss_is_an_error(pictures, tmp_path):
    run = new_run(recipe_for(pictures, tmp_path))
    with torch.no_grad():
        run.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="loss became nan"):
        run.train_step()


@pytest.mark.parametrize("where", ["train_step", "build_model"])
def test_a_full_gpu_is_one_line_that_helps(pictures, tmp_path, monkeypatch, where):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    if where == "train_step":
        monkeypatch.setattr(PictureRun, "train_step", full)
    else:
        monkeypatch.setattr("nanochat.training.pictures.build_model", full)
    with pytest.raises(MemoryError, match="device_batch_size.*gradient_checkpointing.*encoder_device"):
        train(recipe_for(pictures, tmp_path, steps=1))


def test_rows_of_several_pictures_and_of_none():
    tokenizer = Tokenizer.train(["which?"], 270)
    config = type("Config", (), {"vision_token_id": 3, "vision_tokens_per_image": 2, "sequence_len": 64})
    pair = vqa_sample(b"a", "which?", "left")
    two = replace(
        pair, images=(b"a", b"b"),
        messages=({"role": "user", "content": [{"type": "image"}, {"type": "image"}]}, pair.messages[1]),
    )  # fmt: skip
    none = replace(pair, images=(), messages=({"role": "user", "content": "hi"}, pair.messages[1]))
    rows = Rows([two, pair, none], tokenizer, config)
    batch = collate([row for group in rows.groups for row in group])
    assert batch.counts == [2, 1, 0] and batch.slots.tolist() == [0, 1, 0]
    spread = batch.spread(torch.arange(4.0).view(2, 2, 1))
    assert [v.flatten().tolist() for v in spread] == [[0, 1, 2, 3], [0, 1], []]
