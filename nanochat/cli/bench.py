"""nanochat bench: how fast everything is, beside what else one would take."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from nanochat.errors import UserError
from nanochat.flags import check_out

Group = Literal["embed", "ask", "decode", "act", "train", "spec", "growth", "all"]


def bench(
    group: Annotated[Positional[Group], arg(metavar="GROUP")] = "all",
    threads: int = 1,
    rounds: int = 15,
    device: str = "cpu",
    weights: str = "yolov9t.yaml",
    checkpoint: str = "photos",
    policy: str = "robot",
    picture: Path | None = None,
    out: Annotated[Path | None, arg(aliases=["-o"], metavar="PAGE.md")] = None,
    json_out: Annotated[Path | None, arg(name="json", metavar="FILE.json")] = None,
) -> None:
    """Time this project beside what else one would take, in turn, each in a process of its own.

    embed, ask, decode, act and train are races: against ultralytics, SmolVLM, transformers and ResNet-18. spec is the table of
    the project's first description. growth is how time and memory grow with what you make larger. Peers that are not installed
    (pip install transformers) are named as not measured. All of it takes about half an hour on two idle cores.

    Args:
        group: embed, ask, decode, act, train, spec, growth, or all.
        threads: CPU threads of each process.
        rounds: Turns that each contestant gets; long ones get fewer.
        device: cpu, or cuda for the races on a GPU, without ONNX Runtime and growth.
        weights: YOLOv9 weights for embed, detect and spec: .pt, or .yaml for random ones. The time is the same.
        checkpoint: Model that is asked.
        policy: Model that acts.
        picture: Picture that it is asked about; default a photograph that comes with matplotlib.
        out: Page that gets a section for each group, such as docs/benchmarks.md; the sections of other groups stay. The plot
            of growth is written beside it.
        json_out: Write all figures to this file.
    """
    import json
    import os
    from tempfile import TemporaryDirectory

    from rich.console import Console

    from nanochat.bench.groups import GROUPS
    from nanochat.bench.machine import described
    from nanochat.bench.ours import EXPORTS
    from nanochat.bench.report import write_section
    from nanochat.devices import pick_device
    from nanochat.files import atomic_path

    if min(threads, rounds) < 1:
        raise UserError(f"--threads and --rounds must be at least 1, got {threads} and {rounds}")
    names = [*GROUPS, "growth"] if group == "all" else [group]
    device = str(pick_device(device))
    if device != "cpu":
        if group == "growth":
            raise UserError("growth is measured on the CPU: leave --device out")
        names = [name for name in names if name != "growth"]
    for path, suffix in ((out, ".md"), (json_out, ".json")):
        if path is not None:
            check_out(path, suffix)
    subjects, found = (weights, checkpoint, policy, str(picture or photograph())), {}
    check_subjects(*subjects)
    with Console(stderr=True).status("") as status, TemporaryDirectory(prefix="nanochat-bench-") as exports:
        os.environ[EXPORTS] = exports
        for name in names:
            title = ", ".join([name, *[f"{threads} threads"] * (threads > 1), *["GPU"] * (device != "cpu")])
            flags = f"--threads {threads}" + f" --device {device}" * (device != "cpu")
            text = f"    nanochat bench {name} {flags}\n\n{described(threads, device)}."
            print(f"## {title}\n\n{text}\n", flush=True)
            if name == "growth":
                parts = growth_parts(threads, out, status.update)
            else:
                parts = race_parts(name, subjects, device, threads, rounds, status.update)
            for part, figures in parts:  # shown and written at once: a run that is stopped leaves what it has
                print(f"{part}\n", flush=True)
                text += f"\n\n{part}"
                found.setdefault(name, {}).update(figures)
                if out is not None:
                    write_section(out, title, text)
                if json_out is not None:
                    with atomic_path(json_out) as new:
                        new.write_text(json.dumps(found, indent=1))
    for path in filter(None, (out, json_out)):
        print(f"written to {path}", file=sys.stderr)


def check_subjects(weights: str, checkpoint: str, policy: str, picture: str) -> None:
    """Raises UserError before anything is timed."""
    from nanochat.checkpoint import is_checkpoint

    if not Path(picture).is_file():
        raise UserError(f"--picture: there is no file {picture}")
    for flag, name in (("--checkpoint", checkpoint), ("--policy", policy)):
        if not is_checkpoint(name):
            raise UserError(f"{flag}: there is no checkpoint {name}")


def race_parts(
    group: str, subjects: tuple, device: str, threads: int, rounds: int, progress: Callable[[str], None]
) -> Iterator[tuple[str, dict]]:
    """(Markdown, figures by name) of each race of a group. subjects: what `GROUPS` takes."""
    from nanochat.bench.groups import GROUPS
    from nanochat.bench.report import race_table, roofline_lines
    from nanochat.bench.runner import on_device, run_race

    results = {}
    for race in GROUPS[group](*subjects):
        race = on_device(race, device)
        results[race.name] = rows = run_race(race, threads, rounds, progress)
        yield race_table(race, rows), {race.name: [asdict(result) for result in rows]}
    if group == "decode":
        machine = measured("machine:roofline", {"device": device}, threads)
        yield roofline_lines(machine, results), {"machine": machine}


def growth_parts(threads: int, out: Path | None, progress: Callable[[str], None]) -> Iterator[tuple[str, dict]]:
    """As `race_parts`; the plot is written beside the page `out`."""
    from nanochat.bench.report import growth_table, plot_growth

    curves, plot = run_growth(threads, progress), plot_path(out)
    text = growth_table(curves)
    if plot is not None:
        plot_growth(curves, plot)
        text += f"\n\n![Time over size, both logarithmic, for each of the rows]({plot.name})"
    yield text, curves


def photograph() -> Path:
    """A photograph that comes with a dependency, so it is always there."""
    from matplotlib import cbook

    return Path(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))


def plot_path(out: Path | None) -> Path | None:
    return None if out is None else out.with_suffix(".png")


def run_growth(threads: int, progress: Callable[[str], None]) -> dict[str, list]:
    from nanochat.bench.growth import CURVES

    found = {}
    for name, curve in CURVES.items():
        progress(f"growth: {curve.name}, {curve.sizes[0]:,} to {curve.sizes[-1]:,} {curve.what}")
        found[name] = measured("growth:grow", {"curve": name, "sizes": curve.sizes}, threads)["rows"]
    return found


def measured(make: str, arguments: dict, threads: int) -> dict:
    """What a contestant that measures at once says, in a process of its own."""
    from nanochat.bench.runner import Contestant, Worker

    worker = Worker(Contestant(make, make, arguments), threads)
    try:
        return worker.make()
    except ChildProcessError as error:
        raise UserError(f"{make} cannot run: {error}") from error
    finally:
        worker.close()
