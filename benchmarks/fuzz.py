"""Thousands of damaged inputs: each must be accepted, or refused with an error of one line that a user can read.

    python benchmarks/fuzz.py [--cases 10000] [--seed 0] [--kinds messages pictures data checkpoints]
    python benchmarks/fuzz.py --case checkpoints:17     # one case, in this process, with its traceback

A case is a valid input with one to three changes (fuzz_kinds.py); seed, kind and number determine it. Cases run in a worker
process. One that computes for 2 s (or waits for 20 s) is a hang: the worker is killed, and the next one goes on. Memory is
the peak of the worker. The exit code is 1 if a case is a traceback, a hang, or an error whose message is empty, long or has
several lines, or if a worker needed more than 1.5 GB.
"""

import faulthandler
import multiprocessing
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}  # before torch is imported

import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import nanochat
from nanochat.errors import UserError

CPU_S = 2.0  # of computing: more is a hang
WALL_S = 20.0  # of waiting; much more than CPU_S, since other programs may keep the processors busy
SETUP_S = 300.0  # for imports and the valid inputs
MAX_MB = 1500
RESERVED_MB = 6000  # a case that wants so much more than its worker has gets a MemoryError
MAX_MESSAGE = 1000  # characters of an error
PACKAGE = str(Path(nanochat.__file__).parent)
PRELOAD = ["nanochat.agent", "nanochat.packing", "nanochat.data", "nanochat.data.demonstrations",
           "nanochat.serving.policy", "nanochat.vision.yolov9_weights"]  # fmt: skip


@dataclass
class Args:
    cases: int = 10_000
    "Number of cases, divided equally between the kinds."
    seed: int = 0
    kinds: tuple[str, ...] = ("messages", "pictures", "data", "checkpoints")
    case: str = ""
    "KIND:N runs only this case, in this process, and shows its traceback."
    show: int = 20
    "How many failures to print; failures of one cause are printed once."


@dataclass
class Result:
    """outcome: accepted, refused, traceback, message (unreadable), hang or memory. cause: equal for failures of one cause.
    ms: of computing. mb: peak memory of the worker until then."""

    outcome: str
    cause: str = ""
    message: str = ""
    ms: float = 0.0
    mb: float = 0.0


def rng_of(kind: str, number: int, seed: int) -> random.Random:
    return random.Random(zlib.crc32(f"{seed}:{kind}:{number}".encode()))


def peak_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


# ---- one case


def judge(run) -> Result:
    """Call run() and judge how it ends."""
    since = time.process_time()
    try:
        run()
        result = Result("accepted")
    except (UserError, OSError, ImportError) as error:
        result = judge_message(error)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of a Rust library is no Exception
        result = Result("traceback", cause_of(error), short(error))
    result.ms, result.mb = 1e3 * (time.process_time() - since), peak_mb()
    return result


def judge_message(error: Exception) -> Result:
    text = str(error)
    if not text.strip() or len(text) > MAX_MESSAGE or (len(text.splitlines()) > 1 and isinstance(error, UserError)):
        return Result(
            "message", cause_of(error), f"{len(text)} characters, {len(text.splitlines())} lines: {short(error)}"
        )
    return Result("refused", message=text)


def short(error: BaseException) -> str:
    try:
        return ascii(" ".join(str(error).split()))[1:-1][:160]
    except Exception:
        return "(no text)"


def cause_of(error: BaseException) -> str:
    """The type of an exception and the line of the package that it passed last."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    lines = [line for _, line in traceback.walk_tb(error.__traceback__)]
    inside = [i for i, frame in enumerate(frames) if frame.f_code.co_filename.startswith(PACKAGE)]
    at = inside[-1] if inside else -1
    return f"{type(error).__name__} at {os.path.relpath(frames[at].f_code.co_filename)}:{lines[at]}"


# ---- a worker process


def work(kind_class, name: str, seed: int, limit_s: float, folder: str, connection) -> None:
    """Answers case numbers with what the case is, then with its Result, until it is killed or the connection closes."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):  # libraries print, and Rust's panics do
        os.dup2(quiet, output)
    os.environ |= {"YOLO_CONFIG_DIR": folder, "NANOCHAT_CACHE": folder}
    try:
        kind = kind_class(Path(folder))
        reserve_memory()
    except Exception:
        connection.send(traceback.format_exc())
        return
    connection.send("ready")
    with suppress(EOFError):
        while (number := connection.recv()) is not None:
            what, run = kind.case(rng_of(name, number, seed))
            connection.send(what)
            signal.setitimer(signal.ITIMER_PROF, limit_s)  # SIGPROF ends the process, also inside a library
            result = judge(run)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.send(result)


def reserve_memory() -> None:
    limit = int((peak_mb() + RESERVED_MB) * 2**20)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.getrlimit(resource.RLIMIT_DATA)[1]))


class Worker:
    """A worker process, started again after a case that it did not survive."""

    def __init__(self, kind_class, name: str, seed: int, limit_s: float):
        self.arguments, self.limit_s, self.process = (kind_class, name, seed, limit_s), limit_s, None
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOAD)

    def run(self, number: int) -> tuple[str, Result]:
        """(what the case is, its Result)"""
        if self.process is None:
            self.start()
        what = "not known: it ended while the case was made"
        try:
            self.connection.send(number)
            what = self.receive(SETUP_S)
            result = self.receive(max(WALL_S, 10 * self.limit_s))
        except (EOFError, ConnectionError, TimeoutError) as error:
            self.stop(kill=isinstance(error, TimeoutError))
            code = self.process_code
            hang = isinstance(error, TimeoutError) or code == -signal.SIGPROF
            cause = "over the limit of time" if hang else f"the worker ended with code {code}"
            return what, Result("hang" if hang else "traceback", cause, ms=1e3 * self.limit_s if hang else 0)
        if result.mb > MAX_MB:
            self.stop(kill=True)  # a peak never falls: the next case gets a new worker
            result = Result("memory", f"more than {MAX_MB} MB", result.message, result.ms, result.mb)
        return what, result

    def start(self) -> None:
        self.connection, theirs = self.context.Pipe()
        self.folder = tempfile.TemporaryDirectory(
            prefix="nanochat-fuzz-"
        )  # here, since a killed worker removes nothing
        self.process = self.context.Process(target=work, args=(*self.arguments, self.folder.name, theirs), daemon=True)
        self.process.start()
        theirs.close()
        state = self.receive(SETUP_S)
        if state != "ready":
            raise RuntimeError(f"the valid inputs of {self.arguments[1]} do not work:\n{state}")

    def receive(self, seconds: float):
        if not self.connection.poll(seconds):
            raise TimeoutError
        return self.connection.recv()

    def stop(self, kill: bool = False) -> None:
        if self.process is None:
            return
        if kill:
            self.process.kill()
        else:
            with suppress(OSError):
                self.connection.send(None)
        self.process.join()
        self.connection.close()
        self.folder.cleanup()
        self.process_code, self.process = self.process.exitcode, None


# ---- the run


@dataclass
class Failure:
    case: str
    what: str
    result: Result
    count: int = 1


class Score:
    """What became of the cases of one kind. failures: cause -> the first case of this cause."""

    def __init__(self, name: str):
        self.name, self.outcomes, self.failures = name, dict.fromkeys(OUTCOMES, 0), {}
        self.slowest = self.peak = 0.0

    def add(self, number: int, what: str, result: Result) -> None:
        self.outcomes[result.outcome] += 1
        self.slowest, self.peak = max(self.slowest, result.ms), max(self.peak, result.mb)
        if result.outcome in ("accepted", "refused"):
            return
        group = what.split(":")[0] if result.outcome == "hang" else ""
        failure = Failure(f"{self.name}:{number}", what, result, 0)
        self.failures.setdefault((result.outcome, result.cause, group), failure).count += 1

    def row(self) -> Iterator[str]:
        yield self.name
        yield str(sum(self.outcomes.values()))
        yield from map(str, self.outcomes.values())
        yield f"{self.slowest:.0f}"
        yield f"{self.peak:.0f}"


OUTCOMES = ("accepted", "refused", "traceback", "message", "hang", "memory")
HEADS = ("kind", "cases", "accepted", "refused", "tracebacks", "messages", "hangs", "memory", "slowest ms", "peak MB")


def fuzz(kinds: dict, cases: int, seed: int, limit_s: float = CPU_S) -> list[Score]:
    """Run cases / len(kinds) cases of each kind. kinds: name -> class, see fuzz_kinds. limit_s: of computing, for each case."""
    scores = []
    with Progress(console=Console(stderr=True)) as progress:
        for name, kind_class in kinds.items():
            scores.append(Score(name))
            worker = Worker(kind_class, name, seed, limit_s)
            try:
                for number in progress.track(range(cases // len(kinds)), description=name):
                    scores[-1].add(number, *worker.run(number))
            finally:
                worker.stop()
    return scores


def report(scores: list[Score], show: int) -> bool:
    """Print the table and the first failures. Returns whether there are none."""
    console, table = Console(width=120), Table(*HEADS)
    for score in scores:
        table.add_row(*score.row())
    console.print(table)
    failures = [failure for score in scores for failure in score.failures.values()]
    for failure in failures[:show]:
        line = f"{failure.count} x {failure.result.outcome}: {failure.result.cause}: {failure.result.message}"
        console.print(
            f"{line}\n    --case {failure.case}  {failure.what}", markup=False, highlight=False, soft_wrap=True
        )
    if len(failures) > show:
        console.print(f"and {len(failures) - show} more causes: --show {len(failures)}")
    return not failures


def run_one(kinds: dict, case: str, seed: int) -> None:
    name, _, number = case.partition(":")
    with tempfile.TemporaryDirectory(prefix="nanochat-fuzz-") as folder:
        what, run = kinds[name](Path(folder)).case(rng_of(name, int(number), seed))
        print(what)
        faulthandler.dump_traceback_later(CPU_S, file=sys.__stderr__)
        try:
            run()
            print("accepted")
        except (UserError, OSError, ImportError) as error:
            print(f"{type(error).__name__}: {error}")
            if judge_message(error).outcome != "refused":
                raise
        finally:
            faulthandler.cancel_dump_traceback_later()
            print(f"peak {peak_mb():.0f} MB")


def main(args: Args) -> None:
    from fuzz_kinds import KINDS

    if args.case:
        run_one(KINDS, args.case, args.seed)
        return
    kinds = {name: KINDS[name] for name in args.kinds}
    since = time.perf_counter()
    good = report(fuzz(kinds, args.cases, args.seed), args.show)
    print(f"{time.perf_counter() - since:.0f} s")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
