"""What surrounds the steps of a training run: the statistics that are saved, its folder, its data, its record, its memory."""

import errno
import io
import json
import os
import pty
import shlex
import shutil
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

from nanochat.agent import Agent
from nanochat.checkpoint import CheckpointError, load_checkpoint, load_resume
from nanochat.errors import UserError
from nanochat.training import task
from nanochat.training.averaging import average_checkpoints
from nanochat.training.history import advice
from nanochat.training.recipes import Folder
from nanochat.training.resuming import check_record, first_state
from nanochat.training.run import Run, stop_signals
from tests.test_train import COLOURS, ENVIRONMENT, SMALL, command, heed_ctrl_c, interrupt_at, start

TRAINED = SMALL | dict(train_encoder=True, batchnorm="train", encoder_lr=3e-3, word_loss=1.0)


def make_pictures(folder, n=20, skip=()):
    """n squares of four colours at random places, with two questions each."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(0), ["file,question,answer"]
    for i in range(n):
        name = list(COLOURS)[i % 4]
        array = np.full((32, 32, 3), 245, np.uint8)
        y, x = rng.integers(0, 16, 2)
        array[y : y + 16, x : x + 16] = COLOURS[name]
        Image.fromarray(array).save(folder / f"{i}.png")
        if i not in skip:
            lines += [f"{i}.png,what color is it?,{name}", f"{i}.png,is it red?,{'yes' if name == 'red' else 'no'}"]
    (folder / "captions.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("small") / "pictures")


def recipe_for(pictures, tmp_path, **changes):
    return Folder(**TRAINED | {"data": str(pictures), "out": str(tmp_path / "run")} | changes)


# ---- BatchNorm's statistics


def test_twenty_pictures_are_answered_right_as_saved(pictures, tmp_path):
    """BatchNorm's running averages would still be far off after so few steps."""
    recipe = recipe_for(pictures, tmp_path, steps=120, images_per_step=20, layer="4", n_embd=64)
    out = Run(recipe).train()
    agent, task = Agent.load(str(out)), Run(replace(recipe, out=str(tmp_path / "other"))).task
    samples = task.samples
    answers = agent.answer_all(
        [sample.messages[:-1] for sample in samples], [agent.look(sample.images[0]) for sample in samples], 8
    )
    right = np.mean([answer == sample.answer for answer, sample in zip(answers, samples, strict=True)])
    assert right >= 0.95, right
    last = load_checkpoint(out)[2]["history"][-1]
    assert last["train_right"] >= 0.95 * last["train_asked"] > 0


def test_statistics_are_those_of_the_training_pictures_with_the_saved_weights(pictures, tmp_path):
    run = Run(recipe_for(pictures, tmp_path, steps=6, images_per_step=20))
    model, _, _ = load_checkpoint(run.train())
    encoder, norms = model.vision_encoder, []
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            norms.append((module, module.running_mean.clone(), module.running_var.clone()))
            module.reset_running_stats()
            module.momentum = 1.0
            module.train()
    assert norms
    with torch.no_grad():
        model.see(run.task.vectors.pixels(list(range(len(run.task.rows.images)))))
    for module, mean, var in norms:
        torch.testing.assert_close(mean, module.running_mean, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(var, module.running_var, rtol=1e-3, atol=1e-4)


def test_what_is_saved_is_what_was_validated_whenever_it_is_saved(pictures, tmp_path):
    """Validations and saves in between change nothing, and the statistics of a step do not depend on them."""
    states = []
    for name, settings in (("often", dict(eval_every=1, save_every=2)), ("once", {})):
        recipe = recipe_for(pictures, tmp_path, steps=6, out=str(tmp_path / name), **settings)
        run = Run(recipe)
        run.train()
        model, _, training = load_checkpoint(recipe.out)
        states.append(model.state_dict())
        again = Run(replace(recipe, resume=True))
        again.model.eval()
        with torch.no_grad():
            check = again.task.validate()  # with the statistics as they were saved
        last = [line for line in training["history"] if "aligned" in line][-1]
        assert {name: last[name] for name in check} == check
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_frozen_statistics_and_frozen_encoders_are_left_alone(pictures, tmp_path):
    first = Run(recipe_for(pictures, tmp_path, steps=2)).train()
    before = load_checkpoint(first)[0].vision_encoder.state_dict()
    for name, changes in (("batchnorm", dict(batchnorm="frozen")), ("encoder", dict(train_encoder=False))):
        out = Run(
            recipe_for(pictures, tmp_path, steps=2, start_from=str(first), out=str(tmp_path / name), **changes)
        ).train()
        after = load_checkpoint(out)[0].vision_encoder.state_dict()
        for key, value in before.items():
            if "running" in key or "num_batches" in key:
                assert torch.equal(value, after[key]), key


def test_reward_steps_read_the_statistics_of_the_last_imitation_step(tmp_path):
    folder = make_pictures(tmp_path / "described", 12)
    rows = [f"{i}.png,{text}" for i in range(12) for text in ("a square on white .", f"this is {list(COLOURS)[i % 4]}")]
    (folder / "captions.csv").write_text("\n".join(["file,caption", *rows]))
    settings = dict(steps=4, reward_steps=6, questions_per_image=2, cache=str(tmp_path / "c"))
    whole = Run(recipe_for(folder, tmp_path, **settings)).train()
    recipe = recipe_for(folder, tmp_path, **settings, out=str(tmp_path / "stopped"))
    run = Run(recipe)
    interrupt_at(run, 6)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 7"):
        run.train()
    resumed = Run(replace(recipe, resume=True)).train()
    a, b = (load_checkpoint(folder)[0].state_dict() for folder in (whole, resumed))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    expected, found = load_resume(whole), load_resume(resumed)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


# ---- the folder


def test_two_runs_in_one_folder(pictures, tmp_path):
    """The second is refused at once and the first is not disturbed; a killed one leaves no lock."""
    recipe = recipe_for(pictures, tmp_path, steps=400, save_every=2, encoder_lr=SMALL["encoder_lr"])
    first = start(recipe)
    for resume in ([], ["--resume"]):
        second = subprocess.run(
            [*command(recipe), *resume], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
        )
        *notes, error = second.stderr.splitlines()
        assert second.returncode == 2 and error.startswith(f"error: another process ({first.pid}) is training")
        assert all(note.startswith("note: ") for note in notes) and "decoding" not in second.stdout
    assert first.poll() is None
    first.send_signal(signal.SIGKILL)
    first.communicate()
    step = load_checkpoint(recipe.out)[2]["step"]
    run = Run(replace(recipe, resume=True))
    assert run.step == step > 0


def test_a_link_to_a_folder_is_the_same_folder(pictures, tmp_path):
    recipe = recipe_for(pictures, tmp_path, steps=400, save_every=2)
    first = start(recipe)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    second = replace(recipe, out=str(tmp_path / "link"))
    done = subprocess.run([*command(second), "--resume"], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "is training" in done.stderr
    first.kill()
    first.communicate()


def test_a_finished_or_refused_run_leaves_nothing_beside_its_folder(pictures, tmp_path):
    Run(recipe_for(pictures, tmp_path, steps=1, out=str(tmp_path / "a" / "b" / "run"))).train()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["run"]
    with pytest.raises(UserError, match="unknown layer"):
        Run(recipe_for(pictures, tmp_path, steps=1, layer="p9", out=str(tmp_path / "new" / "deep" / "run")))
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_made_is_refused_before_the_data_are_read(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat.training.run.task_class_of", lambda recipe: pytest.fail("the data were read"))
    (tmp_path / "file").write_text("")
    for out, message in (
        (tmp_path / "file", "exists and is no folder"),
        (tmp_path / "file" / "run", "cannot be written: Not a directory"),
        (tmp_path / ("x" * 300), "cannot be written: File name too long"),
        (Path("/proc/nothing/run"), "cannot be written"),
        (Path("/"), "cannot be"),
    ):
        with pytest.raises((UserError, OSError), match=message) as error:
            Run(recipe_for(pictures, tmp_path, out=str(out)))
        assert "another --out" in str(error.value)


@pytest.mark.skipif(os.getuid() == 0 and not shutil.which("setpriv"), reason="root writes everywhere")
def test_a_folder_that_may_not_be_written_to_is_refused_at_once(pictures, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    as_user = ["setpriv", "--bounding-set=-dac_override"] if os.getuid() == 0 else []
    for out in (closed / "run", closed / "deep" / "run"):
        done = subprocess.run(
            [*as_user, *command(recipe_for(pictures, tmp_path, steps=1, out=str(out)))],
            env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 2 and "cannot be written: Permission denied" in done.stderr, done.stderr
        assert "decoding" not in done.stdout and "step" not in done.stdout


@pytest.mark.skipif(os.getuid() == 0 and not shutil.which("setpriv"), reason="root writes everywhere")
def test_a_cache_that_cannot_be_written_is_refused_before_anything_is_encoded(pictures, tmp_path):
    recipe = recipe_for(
        pictures, tmp_path, steps=1, train_encoder=False, batchnorm="frozen", cache=str(tmp_path / "cache")
    )
    Run(recipe).train()
    (place,) = (tmp_path / "cache" / "features").iterdir()
    for path in place.iterdir():
        path.unlink()
    place.chmod(0o555)
    as_user = ["setpriv", "--bounding-set=-dac_override"] if os.getuid() == 0 else []
    again = replace(recipe, out=str(tmp_path / "again"), encoder_lr=SMALL["encoder_lr"])
    done = subprocess.run(
        [*as_user, *command(again), "--start-from", recipe.out], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "cannot be written: Permission denied: choose another --cache" in done.stderr, (
        done.stderr
    )


def test_an_empty_folder_can_be_trained_in(pictures, tmp_path):
    (tmp_path / "run").mkdir()
    assert Run(recipe_for(pictures, tmp_path, steps=1)).train() == tmp_path / "run"


def test_a_run_killed_between_two_renames_is_not_replaced(pictures, tmp_path):
    out = Run(recipe_for(pictures, tmp_path, steps=1)).train()
    out.rename(out.with_name(".run.old"))
    with pytest.raises(FileExistsError, match="resume the run in it with: nanochat train folder --out"):
        Run(recipe_for(pictures, tmp_path, steps=1))


# ---- the data of a resumed run


def stopped_run(folder, tmp_path, **changes):
    recipe = recipe_for(folder, tmp_path, steps=4, **changes)
    run = Run(recipe)
    interrupt_at(run, 1)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    return replace(recipe, resume=True)


def replace_text(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: make_pictures(folder, skip=(7,)), "conversations then, .* now"),
        (lambda folder: replace_text(folder / "captions.csv", ",blue", ",navy"), "other texts in the"),
        (
            lambda folder: Image.new("RGB", (32, 32)).save(folder / "3.png") or Image.new("RGB", (32, 32)).save(folder / "4.png"),
            "other pictures in the",
        ),
    ],
    ids=["deleted", "changed", "repainted"],
)  # fmt: skip
def test_a_run_is_not_resumed_with_other_data(tmp_path, change, message):
    folder = make_pictures(tmp_path / "pictures")
    recipe = stopped_run(folder, tmp_path)
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        Run(recipe)
    assert "--start-from" in str(error.value)
    make_pictures(folder)
    assert Run(recipe).step == 2


def test_data_may_move(tmp_path):
    folder = make_pictures(tmp_path / "pictures")
    recipe = stopped_run(folder, tmp_path)
    moved = folder.rename(tmp_path / "elsewhere")
    out = Run(replace(recipe, data=str(moved))).train()
    assert load_checkpoint(out)[2]["step"] == 4


def test_deleted_rows_are_named_also_where_they_change_the_length(tmp_path):
    """The number of steps follows from the data, if it is given in epochs."""
    folder = make_pictures(tmp_path / "pictures", 24)
    recipe = recipe_for(folder, tmp_path, epochs=2, min_steps=1)
    Run(recipe).train()
    make_pictures(folder, 24, skip=range(6))
    with pytest.raises(UserError, match="training conversations then"):
        Run(replace(recipe, resume=True))


# ---- signals


def test_a_lost_terminal_saves(pictures, tmp_path):
    """SIGHUP, with a terminal that cannot be written to any more."""
    recipe = recipe_for(pictures, tmp_path, steps=2000, save_every=2000, eval_every=None)
    main, other = pty.openpty()
    process = subprocess.Popen(
        command(recipe), env=ENVIRONMENT, stdin=other, stdout=other, stderr=other, start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )  # fmt: skip
    os.close(other)
    seen, deadline = b"", time.monotonic() + 120
    while b"step     0" not in seen and time.monotonic() < deadline:
        seen += os.read(main, 1000)
    os.close(main)
    process.send_signal(signal.SIGHUP)
    process.wait(60)
    assert 0 < load_checkpoint(recipe.out)[2]["step"] < 2000


def test_several_signals_save_once_and_a_second_ctrl_c_does_not_wait(pictures, tmp_path):
    for name, numbers, saved in (
        ("shutdown", (signal.SIGTERM, signal.SIGTERM), True),
        ("impatient", (signal.SIGINT, signal.SIGINT), False),
    ):
        run = Run(recipe_for(pictures, tmp_path, steps=9, out=str(tmp_path / name)))
        backward = run.task.backward

        def interrupted(step, backward=backward, numbers=numbers):
            if step == 3:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return backward(step)

        run.task.backward = interrupted
        with pytest.raises(KeyboardInterrupt, match="stopped at step 4 of 9" if saved else "stopped at once"):
            run.train()
        assert run.out.exists() is saved


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_signals(lambda number, frame: None):
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_closed_pipe_does_not_stop_the_run(pictures, tmp_path):
    recipe = recipe_for(pictures, tmp_path, steps=20)
    words = shlex.join(command(recipe))
    subprocess.run(f"{words} | head -n 1", shell=True, env=ENVIRONMENT, timeout=120, stdout=subprocess.DEVNULL)
    assert load_checkpoint(recipe.out)[2]["step"] == 20


# ---- memory


def test_the_memory_for_pictures_is_bounded(pictures, tmp_path, capsys):
    kept = []
    for name, memory in (("little", 3 * 32 * 32 * 7 / 1e9), ("much", 1.0)):
        run = Run(recipe_for(pictures, tmp_path, steps=2, picture_memory=memory, out=str(tmp_path / name)))
        run.train()
        vectors = (run.task.vectors, run.task.val_vectors)
        kept.append(sum(len(found.squares) for found in vectors))
    assert kept == [7, 20]
    note = "5 of 18 training pictures fit into --picture-memory"
    output = capsys.readouterr().out
    assert output.count(note) == 1 and "decoded again in every epoch" in output
    a, b = (load_checkpoint(tmp_path / name)[0].state_dict() for name in ("little", "much"))
    assert all(torch.equal(value, b[name]) for name, value in a.items())


# ---- small data


def test_defaults_suit_few_pictures(pictures, tmp_path):
    run = Run(Folder(data=str(pictures), out=str(tmp_path / "run"), device="cpu", image_size=32, layer="2"))
    assert run.steps >= 100 and run.eval_every <= run.steps / 10


@pytest.mark.parametrize("steps", [1, 6, 200])
def test_every_run_has_a_curve(pictures, tmp_path, steps):
    run = Run(recipe_for(pictures, tmp_path, steps=steps, eval_every=None, train_encoder=False))
    run.task.backward = lambda step: replace_result(run, step)
    run.train()
    history = load_checkpoint(run.out)[2]["history"]
    checks = [line["step"] for line in history if "aligned" in line]
    assert checks[0] == 0 and checks[-1] == steps and len(checks) >= min(steps, 10) + 1
    assert len([line for line in history if "loss" in line]) >= min(steps, 10)


def replace_result(run, step):
    return type(run.task).backward(run.task, step)


def test_a_run_ends_with_advice_and_the_next_commands(pictures, tmp_path, capsys):
    out = tmp_path / "my run"
    Run(recipe_for(pictures, tmp_path, steps=1, out=str(out))).train()
    lines = capsys.readouterr().out.splitlines()
    assert any("of 16 answers about training pictures are exactly right: train longer" in line for line in lines), lines
    commands = [shlex.split(line.removeprefix("next: ")) for line in lines if line.startswith("next: ")]
    assert [words[1] for words in commands] == ["ask", "eval"]
    for words in commands:
        done = subprocess.run(
            [sys.executable, "-m", "nanochat", *words[1:]], env=ENVIRONMENT, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_a_run_from_a_checkpoint_names_the_mean_of_both(pictures, tmp_path, capsys):
    first, second = str(tmp_path / "first"), str(tmp_path / "my second")
    Run(recipe_for(pictures, tmp_path, steps=1, out=first)).train()
    assert "average" not in capsys.readouterr().out
    Run(recipe_for(pictures, tmp_path, steps=1, out=second, start_from=first)).train()
    lines = capsys.readouterr().out.splitlines()
    (words,) = [shlex.split(line)[1:] for line in lines if line.startswith("next: nanochat average")]
    assert words == ["nanochat", "average", first, second, "-o", f"{second}-mean"]
    average_checkpoints((first, second), tmp_path / "mean")  # they have one


def test_captions_are_not_expected_word_for_word(tmp_path):
    folder = make_pictures(tmp_path / "captioned")
    lines = [f"{i}.png,a {list(COLOURS)[i % 4]} square" for i in range(20)]
    (folder / "captions.csv").write_text("\n".join(["file,caption", *lines]))
    last = load_checkpoint(Run(recipe_for(folder, tmp_path, steps=1)).train())[2]["history"][-1]
    assert last["train_asked"] == 0 and not any("exactly right" in line for line in advice([last], 1))


def test_advice_tells_more_pictures_from_more_steps():
    def advised(**last):
        return advice([{"step": 0, "aligned": 2.0}, {"step": 100, "aligned": 1.0} | last], 100)

    more_steps = advised(train_right=12, train_asked=20, aligned_accuracy=0.5)
    assert more_steps == [
        "12 of 20 answers about training pictures are exactly right: train longer, for instance with --steps 200."
    ]
    (more_pictures,) = advised(train_right=20, train_asked=20, aligned_accuracy=0.5)
    assert "more pictures will help, more steps will not" in more_pictures
    robots = [advised(aligned=0.3, train=train)[0] for train in (0.1, 0.29)]
    assert "more episodes will help" in robots[0] and "--steps 200" in robots[1]
    (neither,) = advised(train_right=20, train_asked=20, aligned_accuracy=1.0)
    assert "more" not in neither and advised() == []


def test_a_loss_that_rose_is_told_and_more_steps_are_not_advised():
    checks = [{"step": step, "aligned": loss} for step, loss in ((0, 2.84), (20, 2.79), (100, 3.35))]
    for learnt in ({"train_right": 25, "train_asked": 100}, {"train": 1.0}):
        line, *others = advice([*checks[:-1], checks[-1] | learnt], 100)
        assert "2.790 at step 20 and is 3.350 now" in line and "--steps 20)" in line
        assert not any("longer" in other or "--steps" in other for other in others)
    assert advice([*checks[:2], {"step": 100, "aligned": 2.8}], 100) == []


# ---- messages


def test_a_conversation_that_is_too_long_names_its_row(tmp_path):
    folder = make_pictures(tmp_path / "pictures", 4)
    rows = [f"{i}.png,a square" for i in range(4)] + [f"0.png,{'very ' * 60}long"]
    (folder / "captions.csv").write_text("\n".join(["file,caption", *rows]))
    with pytest.raises(
        UserError, match=r"captions.csv:6: the conversation 'Describe.*' \.\.\. 'very very.* tokens"
    ) as error:
        Run(recipe_for(folder, tmp_path))
    assert "--sequence-len" in str(error.value)


def test_a_finished_run_says_how_to_train_on(pictures, tmp_path, capsys):
    recipe = recipe_for(pictures, tmp_path, steps=2)
    Run(recipe).train()
    Run(replace(recipe, resume=True)).train()
    assert "has finished its 2 steps; to train on: nanochat train folder --data" in capsys.readouterr().out
    history = json.loads((tmp_path / "run" / "training.json").read_text())["history"]
    assert [line["step"] for line in history if "aligned" in line] == [0, 2]


@pytest.mark.parametrize(
    "change",
    [{"recipe": None}, {"recipe_name": 3}, {"step": "2"}, {"history": {}}, {"steps": None}]
    + [{"recipe": {"n_layer": "x"}}, {"recipe": {"seed": [1]}}, {"recipe": {"data": None}}, {"recipe": {"resume": 1}}],
    ids=str,
)
def test_a_record_with_wrong_types_is_an_error_of_the_checkpoint(change):
    training = {"recipe_name": "folder", "recipe": {}, "step": 1, "steps": 2, "seconds": 1.0, "history": []}
    check_record(training, Folder(), Path("training.json"))
    with pytest.raises(CheckpointError, match="training.json does not describe a run that can be resumed"):
        check_record(training | change, Folder(), Path("training.json"))
    first_state(training | change)


def test_validations_more_frequent_than_the_log_lose_no_training_loss(pictures, tmp_path):
    run = Run(recipe_for(pictures, tmp_path, steps=60, eval_every=4))
    run.train()
    steps = [line["step"] for line in run.history if "loss" in line]
    assert steps == list(range(4, 61, 4))


def test_the_last_check_cannot_cost_the_model(pictures, tmp_path, monkeypatch):
    run = Run(recipe_for(pictures, tmp_path, steps=3))

    def full():
        raise MemoryError("no memory")

    monkeypatch.setattr(run.task, "check_training", full)
    with pytest.raises(MemoryError):
        run.train()
    assert load_checkpoint(run.out)[2]["step"] == 3


def test_a_line_for_a_terminal_that_is_gone_does_not_end_the_run(monkeypatch):
    """Writing fails before the SIGHUP arrives."""

    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(task.console, "_file", Gone())
    monkeypatch.setattr(task.console, "quiet", False)
    task.say("step 0")
    assert task.console.quiet
    full = Gone()
    full.write = lambda text: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(task.console, "_file", full)
    monkeypatch.setattr(task.console, "quiet", False)
    with pytest.raises(OSError, match="No space left"):
        task.say("step 1")
