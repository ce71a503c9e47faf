"""Times from a picture to the text that a model says about it, for ablations.py. `nanochat bench ask` times the model that ships.

Float32 on the CPU. In each round the model and a peer take turns, so that other load on the machine affects both: torchvision's
ResNet-18 with random weights, which only encodes 224 x 224 pixels.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torchvision
import tyro

from nanochat.agent import Agent, question_message
from nanochat.data import CAPTION_PROMPT
from nanochat.engine import Engine
from nanochat.errors import UserError

PEER = "ResNet-18 alone"
WARM_UP = 3  # rounds that do not count


class Prompt(NamedTuple):
    """n_tokens: the exact length of the answer, to compare models; None for as long as the model makes it."""

    question: str
    n_tokens: int | None = None


def reply(agent: Agent, picture, prompt: Prompt) -> str:
    """The greedy answer to one question about one picture, from the picture on."""
    vectors = agent.look([picture])
    ids = agent.prompt([question_message(prompt.question, 1)])
    stop_ids = agent.stop_ids if prompt.n_tokens is None else ()
    room = agent.room(len(ids), prompt.n_tokens)
    return agent.tokenizer.decode(Engine(agent.model).generate([ids], room, stop_ids=stop_ids, images=[vectors])[0])


def prompts_of(agent: Agent, question: str) -> dict[str, Prompt]:
    """What the model can be asked."""
    prompts = {"captions": Prompt(CAPTION_PROMPT), "questions": Prompt(question)}
    return {kind.rstrip("s"): prompt for kind, prompt in prompts.items() if agent.learnt[kind]}


def measure(agent: Agent, pictures: Sequence, prompts: dict[str, Prompt], rounds: int) -> dict[str, np.ndarray]:
    """{"look", the names of the prompts, PEER}: (rounds,) milliseconds each. look: the picture's vectors alone."""
    peer, pixels = torchvision.models.resnet18().eval(), torch.rand(1, 3, 224, 224)
    times: dict[str, list[float]] = {name: [] for name in ("look", *prompts, PEER)}
    for number in range(WARM_UP + rounds):
        picture = pictures[number % len(pictures)]
        times["look"].append(timed(lambda: agent.look([picture])))  # noqa: B023
        for name, prompt in prompts.items():
            times[name].append(timed(lambda: reply(agent, picture, prompt)))  # noqa: B023
        times[PEER].append(timed(lambda: peer(pixels)))
    return {name: np.array(values[WARM_UP:]) for name, values in times.items()}


@torch.inference_mode()
def timed(call: Callable) -> float:
    """Milliseconds of a call."""
    since = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - since)


def command(function: Callable, arguments: type) -> None:
    """Run a benchmark as a command. What the user can mend is one line and exit code 2; the rest is a bug with its traceback."""
    try:
        function(tyro.cli(arguments))
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError, ImportError, MemoryError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
