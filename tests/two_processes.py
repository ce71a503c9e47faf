"""What each of two processes does in test_distributed.py: python -m tests.two_processes WORK FOLDER"""

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from nanochat.cli import main as cli
from nanochat.training import distributed
from nanochat.training.recipes import Distill, Folder, Robot
from nanochat.training.run import Run
from tests.test_distill import SMALL as TINY_STUDENT
from tests.test_robot_train import TINY as TINY_ROBOT
from tests.test_train import interrupt_at, randomize_zeros
from tests.test_training_runs import TRAINED

# everything that is drawn at random, and a BatchNorm that trains
RANDOM = dict(
    dropout=0.2, feature_dropout=0.2, word_dropout=0.3, blind_share=0.3, jitter=0.2, flip="horizontal", questions_per_image=2
)  # fmt: skip
UNEVEN = "thirds"  # three parts for two processes


def recipe_of(kind: str, folder: Path, **changes):
    """A recipe whose steps have two parts, or three."""
    pictures = {"data": str(folder / "pictures"), "cache": str(folder / "cache")} | TRAINED | RANDOM
    settings = {"out": str(folder / f"{kind}-{os.getpid()}"), "steps": 6, "device_batch_size": 4} | changes
    if kind == "robot":
        return Robot(
            **TINY_ROBOT | dict(data=str(folder / "demos"), images_per_step=8, shift=2, blind_share=0.3) | settings
        )
    if kind == "distill":
        teacher = {"teacher": f"timm:test_byobnet={folder / 'weights.pth'}", "data": str(folder / "pictures")}
        return Distill(**TINY_STUDENT | teacher | settings)
    if kind == "reward":
        settings |= dict(also=(str(folder / "captions"),), steps=1, reward_steps=2, sequence_len=64)
    if kind == UNEVEN:
        settings |= dict(images_per_step=11)
    return Folder(**pictures | settings)


def gradients(recipe) -> dict[str, torch.Tensor]:
    """Those of a step, by name, and what the step says of itself: value, tokens and pictures."""
    run = Run(recipe)
    randomize_zeros(run.model)
    if run.task.reward_steps:
        run.step = 1
        run.update_statistics()
    result = run.accumulate()
    learnt = [
        *run.model.named_parameters(),
        *(run.task.auxiliary or torch.nn.Module()).named_parameters(prefix="helper"),
    ]
    found = {name: parameter.grad for name, parameter in learnt if parameter.grad is not None}
    return found | {"result": torch.tensor([result.value, result.tokens, result.images], dtype=torch.float64)}


def all_gradients(folder: Path) -> None:
    distributed.LARGE = 1000  # some gradients are messages of their own, others share one
    for kind in ("questions", UNEVEN, "reward", "robot", "distill"):
        found = gradients(recipe_of(kind, folder))
        save_file(
            {name: tensor.contiguous() for name, tensor in found.items()}, folder / f"{kind}-{distributed.number()}"
        )


def stop_and_go_on(folder: Path) -> None:
    """Finish a run that one process began, and begin one: a signal reaches one of the two."""
    begun = recipe_of("questions", folder, out=str(folder / "one-two"), resume=True)
    Run(begun).train()
    run = Run(replace(begun, out=str(folder / "two-one"), resume=False))
    if not distributed.is_first():
        interrupt_at(run, 3)
    try:
        run.train()
    except KeyboardInterrupt as stop:
        print(stop)
    distributed.leave()


def die(folder: Path) -> None:
    """The command line, in which one process is killed in the middle of a step."""
    killed, start = os.environ["KILLED"] == os.environ["RANK"], Run.accumulate

    def accumulate(run):
        if run.step == 2 and killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return start(run)

    Run.accumulate = accumulate
    words = [
        "train",
        "distill",
        "--data",
        str(folder / "pictures"),
        "--teacher",
        f"timm:test_byobnet={folder / 'weights.pth'}",
    ]
    settings = {name.replace("_", "-"): value for name, value in (TINY_STUDENT | {"save_every": 1}).items()}
    sys.argv = ["nanochat", *words, "--out", str(folder / os.environ["OUT"])]
    sys.argv += [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    cli.main()


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"gradients": all_gradients, "resume": stop_and_go_on, "die": die}[sys.argv[1]](Path(sys.argv[2]))
