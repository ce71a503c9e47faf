"""What int8 and pruning cost and bring: size, processor's time and scores of exported models, beside the same in float32.

    python benchmarks/quantized.py [shapes photos robot] [--pruned shapes=FOLDER ...] [--photos DATA] [--page docs/RUNTIME.md]

Scores: easy-VQA for shapes; captions and questions from captions for photos; Meta-World's MT10 for robot, with the jerk of the
motions (see `rollout_figures.jerk`). Encoders are calibrated on pictures that are not scored. A loss of answers is that of the
same samples, with its 95 % interval. Re-run the command to resume: rows of the same exported files are not repeated.
"""

import json
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from PIL import Image

from nanochat.bench.report import number, write_section
from nanochat.files import atomic_path, sha256

CALIBRATION = 100  # pictures
SECTION = "What int8 and pruning cost"
FORMS = {"float32": False, "int8": True, "pruned, int8": True}


@dataclass
class Args:
    models: tyro.conf.Positional[tuple[str, ...]] = ("shapes", "photos", "robot")
    pruned: tuple[str, ...] = ()
    "A model and the checkpoint of the pruned one, such as photos=runs/photos-pruned."
    photos: str = "flickr8k"
    "Pictures with captions, with the splits train and dev."
    samples: int = 300
    "Of each data set."
    episodes: int = 20
    "Of each of the ten tasks."
    processes: int = 1
    out: Path = Path("out/quantized")
    page: Path | None = None
    "Page that gets the table, such as docs/RUNTIME.md."


def main(args: Args) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "rows.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    tables = {}
    for name in args.models:
        for form, source in sources(name, args.pruned):
            folder = exported(name, form, source, args)
            amount = args.episodes if name == "robot" else args.samples
            key = json.dumps([name, form, sha256(folder / "manifest.json"), amount])
            if key not in done:
                print(f"{name}, {form}", flush=True)
                done[key] = measured(name, folder, args)
                with atomic_path(path) as new:
                    new.write_text(json.dumps(done, indent=1))
            tables.setdefault(name, {})[form] = done[key]
    text = "\n\n".join(table(name, rows) for name, rows in tables.items())
    print(text)
    if args.page is not None:
        words = " ".join(["python benchmarks/quantized.py", *(["--pruned", *args.pruned] if args.pruned else [])])
        write_section(args.page, SECTION, f"{about(args)}\n\n    {words} --episodes {args.episodes}\n\n{text}")


def sources(name: str, pruned: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(form, checkpoint)."""
    smaller = dict(pair.split("=", 1) for pair in pruned)
    for form in FORMS:
        if not form.startswith("pruned"):
            yield form, name
        elif name in smaller:
            yield form, smaller[name]


# ---- exports, and what they are calibrated on


def exported(name: str, form: str, source: str, args: Args) -> Path:
    from nanochat.checkpoint import locate
    from nanochat.export import export
    from nanochat.onnx.folder import is_export

    folder = args.out / f"{name}-{form.replace(', ', '-')}-{sha256(locate(source) / 'manifest.json')[:8]}"
    if not is_export(folder):
        calibrate = pictures_for(name, args) if FORMS[form] else None
        export(source, folder, int8=FORMS[form], calibrate=calibrate)
    return folder


def pictures_for(name: str, args: Args) -> Path:
    """A folder of CALIBRATION pictures such as the model sees, none of which is scored."""
    folder = args.out / f"calibration-{name}"
    if not folder.is_dir():
        new = folder.with_name(f"{folder.name}-new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        for n, picture in enumerate(frames() if name == "robot" else training_pictures(name, args)):
            picture.save(new / f"{n:03}.png")
        new.rename(folder)
    return folder


def training_pictures(name: str, args: Args) -> Iterator[Image.Image]:
    from nanochat.data import load_dataset
    from nanochat.vision.images import open_image

    samples = load_dataset("easy_vqa" if name == "shapes" else args.photos, "train").samples
    for sample in samples[:: len(samples) // CALIBRATION][:CALIBRATION]:
        yield open_image(sample.images[0])


def frames() -> Iterator[Image.Image]:
    """Of the simulator's experts at work in layouts of training, of all tasks alike."""
    from nanochat.metaworld.instructions import INSTRUCTIONS
    from nanochat.metaworld.simulator import Arm

    tasks = sorted(INSTRUCTIONS)
    for n in range(CALIBRATION):
        arm = Arm(tasks[n % len(tasks)])
        arm.reset(1_000_000 + n)
        for _ in range(7 * n % 90):  # steps
            arm.step(arm.expert_action())
        yield Image.fromarray(arm.image())
        arm.close()


# ---- one row


def measured(name: str, folder: Path, args: Args) -> dict:
    """{"MB", "ms": {what: processor's time}, "scores": {measure: {"value", "each" or "low" and "high"}}}"""
    from nanochat.runtime import load

    agent = load(str(folder))
    row = {"MB": sum(path.stat().st_size for path in folder.iterdir()) / 1e6}
    if name == "robot":
        return row | {"ms": times_of_policy(agent), "scores": rollouts(folder, args)}
    data = {"easy-VQA": ("easy_vqa", "test")}
    if name == "photos":
        data = {"captions": (args.photos, "dev"), "questions": (f"captions-questions:{args.photos}", "dev")}
    scores = {}
    for title, (source, split) in data.items():
        scores |= answers(agent, title, source, split, args.samples)
    return row | {"ms": times(agent, name, args), "scores": scores}


def answers(agent, title: str, source: str, split: str, n: int) -> dict:
    """Greedy answers to n samples of a data set."""
    from nanochat.data import limit, load_dataset
    from nanochat.evaluation import metrics
    from nanochat.evaluation.pictures import NEW_TOKENS, look

    data = load_dataset(source, split)
    samples, found = limit(data.samples, n), []
    for start in range(0, len(samples), 16):
        part = samples[start : start + 16]
        vectors = [look(agent, [(image, sample.where) for image in sample.images]) for sample in part]
        found += agent.answer_all([sample.messages[:-1] for sample in part], vectors, NEW_TOKENS[data.task])
        print(f"\r{title}: {len(found)} of {len(samples)}", end="", flush=True)
    print()
    references = [sample.references for sample in samples]
    if data.task == "vqa":
        hits = [100.0 * metrics.exact_match(*pair) for pair in zip(found, references, strict=True)]
        return {f"{title}, %": {"value": statistics.mean(hits), "each": hits}}
    each = (100 * metrics.cider(found, references)).tolist()
    return {
        f"{title}, BLEU-4": {"value": 100 * metrics.bleu(found, references)[3]},
        f"{title}, CIDEr": {"value": statistics.mean(each), "each": each},
    }


def rollouts(folder: Path, args: Args) -> dict:
    from nanochat.evaluation.rollout import Settings, run_rollouts
    from nanochat.metaworld.instructions import task_list

    wanted = {"episodes": args.episodes, "processes": args.processes}
    found = run_rollouts(str(folder), task_list(["mt10"]), Settings(), **wanted)["drivers"]["policy"]
    low, high = found["pooled_ci95"]
    success = {"value": 100 * found["pooled"], "low": 100 * low, "high": 100 * high}
    return {f"MT10, {10 * args.episodes} episodes, %": success, "jerk, mm/step³": {"value": found["jerk"]}}


def times(agent, name: str, args: Args) -> dict:
    from nanochat.engine import Engine

    picture = np.asarray(Image.open(sorted(pictures_for(name, args).iterdir())[0]).convert("RGB"))
    vectors, n = agent.look(picture), 24
    prompt = agent.prompt([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it?"}]}])

    def generate(n: int) -> float:
        return processor_ms(lambda: Engine(agent.model).generate([prompt], n, images=[vectors]))

    return {"picture": processor_ms(lambda: agent.look(picture)), "token": (generate(n + 1) - generate(1)) / n}


def times_of_policy(agent) -> dict:
    picture, state = np.zeros((128, 128, 3), np.uint8), [[0.0, 0.6, 0.2, 1.0]]
    return {"frame to chunk": processor_ms(lambda: agent.act([picture], state, ["open the drawer"]))}


def processor_ms(call: Callable, n: int = 31) -> float:
    """The median of n calls, after three that do not count: milliseconds of the processor, which other load disturbs less."""
    found = []
    for _ in range(n + 3):
        since = time.process_time()
        call()
        found.append(1e3 * (time.process_time() - since))
    return statistics.median(found[3:])


# ---- the page


def about(args: Args) -> str:
    return (
        "Exported models, ONNX Runtime on one thread; times are milliseconds of the processor, medians of 31. "
        f"{args.samples} samples of each data set, greedy. Encoders are calibrated on {CALIBRATION} pictures that are not "
        "scored: training pictures, and frames of the simulator's experts in layouts of training. In brackets: what is lost "
        "against float32 on the same samples, with its 95 % interval; for MT10 the interval of the rate itself."
    )


def table(name: str, rows: dict[str, dict]) -> str:
    first = next(iter(rows.values()))
    columns = [*(f"{what}, ms" for what in first["ms"]), *first["scores"]]
    lines = [f"| `{name}` | MB | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    for form, row in rows.items():
        cells = [number(value) for value in row["ms"].values()]
        cells += [score_cell(measure, first["scores"][title]) for title, measure in row["scores"].items()]
        lines.append(f"| {form} | {row['MB']:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def score_cell(measure: dict, first: dict) -> str:
    from nanochat.evaluation import metrics

    text = number(measure["value"])
    if "low" in measure:
        return f"{text} ({number(measure['low'])} .. {number(measure['high'])})"
    if measure is first:
        return text
    loss = first["value"] - measure["value"]
    if "each" not in measure:
        return f"{text} ({loss:+.2f})"
    lost = np.subtract(first["each"], measure["each"])
    interval = metrics.accuracy(lost, range(len(lost)))
    return f"{text} ({loss:+.2f}: {interval.low:+.2f} .. {interval.high:+.2f})"


if __name__ == "__main__":
    main(tyro.cli(Args))
