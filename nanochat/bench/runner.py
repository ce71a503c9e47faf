"""Races: contestants do the same work in turn, A B A B, each in a process of its own.

So other load on the machine affects all alike, and the thread pools of two runtimes do not disturb each other.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace

from nanochat.errors import UserError

WARM_UP = 3  # calls that do not count


@dataclass(frozen=True)
class Contestant:
    """make: "module:function" of this package, called with `arguments`; returns a function to time and a dict about it. Raises
    ImportError where what it needs is not installed: it is then left out, and that is said. only: "cpu" or "cuda" for one that
    runs there alone."""

    label: str
    make: str
    arguments: dict = field(default_factory=dict)
    only: str = ""


@dataclass(frozen=True)
class Race:
    """One row: contestants that do the same work; the first is ours. times: what a call does so often, such as tokens; the
    figures are divided by it. rounds: at most so many, for long calls."""

    name: str
    contestants: tuple[Contestant, ...]
    times: int = 1
    unit: str = "ms"
    rounds: int = 1000


@dataclass(frozen=True)
class Result:
    """Milliseconds a unit of work, medians over the rounds. missing: why it did not run, else empty."""

    label: str
    wall: float = 0.0
    low: float = 0.0
    high: float = 0.0
    own: float = 0.0  # of the processor, all threads
    peak: int = 0  # bytes
    about: dict = field(default_factory=dict)
    missing: str = ""


def on_device(race: Race, device: str) -> Race:
    """The race on a device, with the contestants that run there."""
    kind = device.split(":")[0]
    able = [one for one in race.contestants if one.only in ("", kind)]
    if kind != "cpu":
        able = [replace(one, arguments=one.arguments | {"device": device}) for one in able]
    return replace(race, contestants=tuple(able))


class Worker:
    """A process that runs one contestant, see worker.py."""

    def __init__(self, contestant: Contestant, threads: int):
        environment = os.environ | {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        words = [sys.executable, "-P", "-m", "nanochat.bench.worker"]
        self.contestant, self.wall, self.own, self.peak = contestant, [], [], 0
        self.process = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.tell(json.dumps({"make": contestant.make, "arguments": contestant.arguments}))

    def tell(self, line: str) -> None:
        with suppress(BrokenPipeError):  # then there is no answer either
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()

    def answer(self) -> dict:
        """Raises ChildProcessError with the last line that the process wrote if it has ended."""
        answer = self.process.stdout.readline()
        if not answer:
            errors = self.process.stderr.read().strip().splitlines() or ["it ended without a message"]
            raise ChildProcessError(errors[-1])
        return json.loads(answer)

    def make(self) -> dict:
        """Wait until it is ready; returns what the contestant says about itself. Raises as `answer`."""
        self.about = self.answer()["about"]
        return self.about

    def run(self, n: int, counts: bool = True) -> None:
        self.tell(str(n))
        found = self.answer()
        self.peak = found["peak"]
        if counts:
            self.wall += found["wall"]
            self.own += found["own"]

    def close(self) -> None:
        """Let it end, so that it deletes what it wrote."""
        try:
            self.process.communicate("", timeout=10)
        except (subprocess.TimeoutExpired, OSError, ValueError):
            self.process.kill()
            self.process.wait()


def run_race(
    race: Race, threads: int, rounds: int, progress: Callable[[str], None] = lambda text: None
) -> list[Result]:
    """A result for each contestant, in their order. Raises UserError if ours cannot run."""
    results: dict[str, Result] = {}
    with ExitStack() as stack:
        started, workers = [], []
        for contestant in race.contestants:  # all at once: loading takes far longer than what is timed
            started.append(Worker(contestant, threads))
            stack.callback(started[-1].close)
        for worker in started:
            label = worker.contestant.label
            progress(f"{race.name}: {label} starts")
            try:
                worker.make()
                worker.run(WARM_UP, counts=False)
                workers.append(worker)
            except ChildProcessError as error:
                if worker is started[0]:
                    raise UserError(f"{race.name}: {label} cannot run: {error}") from error
                results[label] = Result(label, missing=str(error))
        n = min(rounds, race.rounds)
        for number in range(n):
            progress(f"{race.name}: round {number + 1} of {n}")
            for worker in workers:
                worker.run(1)
    for worker in workers:
        results[worker.contestant.label] = summary(worker, race.times)
    return [results[contestant.label] for contestant in race.contestants]


def summary(worker: Worker, times: int) -> Result:
    wall, own = ([1e3 * seconds / times for seconds in values] for values in (worker.wall, worker.own))
    low, middle, high = statistics.quantiles(wall, n=4, method="inclusive") if len(wall) > 1 else wall * 3
    return Result(worker.contestant.label, middle, low, high, statistics.median(own), worker.peak, worker.about)
