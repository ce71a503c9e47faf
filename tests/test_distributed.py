"""Two processes make the steps that one process makes, which accumulates the same parts: to the bit, since two sums in either
order are the same. Those of three parts differ by rounding."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nanochat.checkpoint import load_checkpoint, load_resume
from nanochat.data.lerobot_writer import write_dataset
from nanochat.errors import UserError
from nanochat.training import distributed, task
from nanochat.training.recipe import Recipe
from nanochat.training.run import Run
from nanochat.vision.timm_encoder import TimmEncoder, described
from tests.test_distill import SIZE as STUDENT_SIZE
from tests.test_robot_train import SIZE, toy_episode
from tests.test_train import ENVIRONMENT, ROOT, interrupt_at
from tests.test_training_runs import make_pictures
from tests.two_processes import UNEVEN, gradients, recipe_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data for all recipes."""
    folder = tmp_path_factory.mktemp("shared")
    make_pictures(folder / "pictures", 24)
    names = [f"{folder / 'pictures' / str(i)}.png" for i in range(7)]
    (folder / "captions").mkdir()
    for i, name in enumerate(names):
        os.link(name, folder / "captions" / f"{i}.png")
    rows = [f"{i}.png,{text}" for i in range(7) for text in ("a square .", f"a square of colour {i % 4} on white")]
    (folder / "captions" / "captions.csv").write_text("\n".join(["file,caption", *rows]))
    write_dataset(folder / "demos", (toy_episode(n) for n in range(6)), 10, "toy", (SIZE, SIZE, 3))
    torch.manual_seed(0)
    teacher = TimmEncoder(described("test_byobnet", [0.5] * 3, [0.5] * 3, STUDENT_SIZE))
    torch.save(teacher.net.state_dict(), folder / "weights.pth")
    return folder


def run_two(work: str, folder: Path, **environment: str) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of two processes, started as torchrun does it, but without its report."""
    store = torch.distributed.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )  # torchrun keeps it as well
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    shared |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} | environment
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.two_processes", work, str(folder)], cwd=ROOT, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env=ENVIRONMENT | shared | {"RANK": str(number), "LOCAL_RANK": str(number)},
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(processes, said, strict=True)]


def test_gradients_are_those_of_one_process_that_accumulates_the_same_parts(folder):
    ends = run_two("gradients", folder)
    assert [code for code, *_ in ends] == [0, 0], ends[0][2] + ends[1][2]
    for kind in ("questions", UNEVEN, "reward", "robot", "distill"):
        expected = gradients(recipe_of(kind, folder))
        first, second = (load_file(folder / f"{kind}-{number}") for number in range(2))
        assert expected.keys() == first.keys() == second.keys(), kind
        assert any(name.startswith("vision_encoder") for name in expected) is (kind != "reward")
        assert expected["result"][2] > 0 and any(tensor.abs().sum() > 0 for tensor in expected.values())
        for name, tensor in expected.items():
            assert torch.equal(first[name], second[name]), (kind, name)  # or the weights would drift apart
            if kind == UNEVEN:
                torch.testing.assert_close(first[name], tensor, rtol=1e-3, atol=1e-6)
            else:
                assert torch.equal(first[name], tensor), (kind, name)


def test_runs_resume_under_another_number_of_processes_to_the_same_weights(folder, tmp_path):
    whole = recipe_of("questions", folder, out=str(folder / "whole"))
    Run(whole).train()
    begun = Run(replace(whole, out=str(folder / "one-two")))
    interrupt_at(begun, 2)
    with pytest.raises(KeyboardInterrupt):
        begun.train()
    ends = run_two("resume", folder)
    assert [code for code, *_ in ends] == [0, 0], ends[0][2] + ends[1][2]
    assert all("stopped at step 4 of 6 and saved" in said for _, said, _ in ends)
    assert "next: nanochat" in ends[0][1] and "next:" not in ends[1][1]
    Run(replace(whole, out=str(folder / "two-one"), resume=True)).train()
    model, _, training = load_checkpoint(whole.out)
    for name in ("one-two", "two-one"):
        resumed, _, again = load_checkpoint(folder / name)
        checks, losses = [[{k: v for k, v in line.items() if k in ("step", "loss", "aligned")} for line in t["history"]]
                          for t in (training, again)]  # fmt: skip
        assert again["step"] == 6 and checks == losses
        for key, tensor in model.state_dict().items():
            assert torch.equal(resumed.state_dict()[key], tensor), (name, key)
        for key, tensor in load_resume(whole.out).items():
            assert torch.equal(load_resume(folder / name)[key], tensor), (name, key)


@pytest.mark.parametrize("killed", [0, 1])
def test_one_processs_death_ends_all_with_one_line(folder, killed):
    ends = run_two("die", folder, KILLED=str(killed), OUT=f"dead-{killed}")
    assert ends[killed][0] == -9 and ends[1 - killed][0] == 2
    lines = [line for _, _, error in ends for line in error.splitlines()]
    assert len(lines) == 1 and lines[0].startswith("error: another process of this run has ended"), lines
    assert f"resume with: nanochat train distill --out {folder}/dead-{killed} --resume" in lines[0]
    assert load_checkpoint(folder / f"dead-{killed}")[2]["step"] == 2


def test_under_torchrun_one_process_speaks(folder, tmp_path):
    words = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "nanochat",
        "train",
        "folder",
    ]
    ran = subprocess.run(
        [sys.executable, *words, "--data", str(folder / "nowhere"), "--start-from", "none"], cwd=tmp_path, env=ENVIRONMENT,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert ran.returncode == 1 and ran.stderr.count("error: ") == ran.stderr.count("nowhere") == 1, ran.stderr
    assert not list(tmp_path.iterdir())


# ---- without other processes


def among(monkeypatch, count, number=0):
    monkeypatch.setattr(distributed, "count", lambda: count)
    monkeypatch.setattr(distributed, "number", lambda: number)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_part_is_computed_once_with_the_same_random_numbers(monkeypatch, count):
    def drawn(count, number):
        among(monkeypatch, count, number)
        parts = task.Task(Recipe(seed=3)).own_parts(7, 5, purpose=2)
        return {part: (rng.random(), torch.rand(1).item()) for part, rng in parts}

    shares = [drawn(count, number) for number in range(count)]
    assert Counter(part for share in shares for part in share) == Counter(range(5))
    together = {part: numbers for share in shares for part, numbers in share.items()}
    assert together == drawn(1, 0) and len(set(together.values())) == 5


def test_the_first_part_of_a_step_draws_what_a_step_of_one_part_always_drew():
    """So runs of earlier versions resume."""
    ((_, rng),) = task.Task(Recipe(seed=3)).own_parts(7, 1, purpose=2)
    assert rng.random() == np.random.default_rng([3, 7, 2]).random()
    assert torch.initial_seed() == int(np.random.SeedSequence([3, 7, 4]).generate_state(1)[0])


def test_parts_are_as_many_as_processes_at_least(monkeypatch):
    assert distributed.part_size(9, None) is None and distributed.part_size(9, 4) == 4
    among(monkeypatch, 2)
    assert distributed.part_size(9, None) == 5 and distributed.part_size(9, 3) == 3
    with pytest.raises(
        UserError, match="2 processes share the 9 pictures of a step in parts of 9: lower --device-batch-size to 4"
    ):
        distributed.part_size(9, 9)
    with pytest.raises(UserError, match="2 processes need --images-per-step 2 at least, got 1"):
        distributed.part_size(1, None)


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert distributed.own_device(gpu) == gpu
    among(monkeypatch, 2, 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert distributed.own_device(cpu) == cpu
    with pytest.raises(UserError, match="2 processes cannot share cuda:0: use --device cuda"):
        distributed.own_device(torch.device("cuda:0"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes need a GPU each, but there are 1 here"):
        distributed.own_device(gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: None)
    assert distributed.own_device(gpu) == torch.device("cuda:1")


def test_a_run_of_one_process_exchanges_nothing():
    parameter = torch.nn.Parameter(torch.ones(2))
    distributed.sum_gradients([parameter])
    assert (
        parameter.grad is None
        and distributed.sum_numbers(1, 2.5) == [1, 2.5]
        and distributed.any_process(False) is False
    )
    assert distributed.is_first() and not json.loads(json.dumps(distributed.started_by_torchrun()))


def test_a_full_gpu_is_not_told_as_a_lost_process():
    with pytest.raises(torch.OutOfMemoryError), distributed.peers():
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(distributed.LostProcess), distributed.peers():
        raise RuntimeError("Connection closed by peer")
