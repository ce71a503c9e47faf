"""Kill a training run with SIGKILL at random moments, resume it each time, and compare the result with that of an unbroken run.

    python benchmarks/kill.py --kills 20

Both files that training continues from must be equal to the bit: weights, BatchNorm's statistics, optimiser
state. The run is small (12 pictures of 32 pixels), saves every second step, and each process is killed at a random time after
its start: while it imports, reads, steps or saves. About five seconds a kill on one core.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

SETTINGS = (
    "--encoder yolov9t.yaml --layer 2 --image-size 32 --vision-tokens 1 --vocab-size 280 --n-layer 1 --n-head 2 --n-embd 32 "
    "--sequence-len 48 --images-per-step 8 --warmup-steps 5 --eval-every 7 --save-every 2 --device cpu --threads 1"
).split()


def make_pictures(folder: Path) -> None:
    rng, lines = np.random.default_rng(0), ["file,question,answer"]
    folder.mkdir()
    for number in range(12):
        colour = number % 3
        picture = rng.integers(0, 60, (32, 32, 3), dtype=np.uint8)
        picture[..., colour] += 180
        Image.fromarray(picture).save(folder / f"{number}.png")
        lines.append(f"{number}.png,what color is it?,{('red', 'green', 'blue')[colour]}")
    (folder / "captions.csv").write_text("\n".join(lines))


def command(folder: Path, out: Path, steps: int) -> list[str]:
    words = [sys.executable, "-m", "nanochat", "train", "folder", "--data", str(folder), "--out", str(out)]
    return [*words, "--steps", str(steps), *SETTINGS, *(["--resume"] if has_checkpoint(out) else [])]


def has_checkpoint(out: Path) -> bool:
    """A kill between the two renames of a save leaves the checkpoint next to the folder; --resume finds it there."""
    return any((folder / "manifest.json").is_file() for folder in (out, out.with_name(f".{out.name}.old")))


def run(words: list[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\nended with {done.returncode}: {done.stderr}")


def differences(a: Path, b: Path) -> list[str]:
    found = []
    for name in ("model.safetensors", "resume.safetensors"):
        ours, theirs = load_file(a / name), load_file(b / name)
        found += [f"{name}: {key}" for key in ours.keys() | theirs.keys() if not equal(ours.get(key), theirs.get(key))]
    return found


def equal(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is not None and b is not None and torch.equal(a, b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="how many processes are killed")
    parser.add_argument("--steps", type=int, default=400, help="length of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    moments = random.Random(options.seed)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory(prefix="nanochat-kill-") as folder:
        pictures, whole, broken = (Path(folder) / name for name in ("pictures", "whole", "broken"))
        make_pictures(pictures)
        started = time.monotonic()
        run(command(pictures, whole, options.steps))
        print(f"unbroken run: {time.monotonic() - started:.0f} s", flush=True)
        kills = 0
        while kills < options.kills:
            process = subprocess.Popen(command(pictures, broken, options.steps), stdout=subprocess.DEVNULL)
            seconds = wait_for_a_moment(process, broken, moments)
            if process.poll() is not None:
                print("the run ended before it was killed often enough: use more --steps", flush=True)
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            print(f"kill {kills}: after {seconds:.2f} s", flush=True)
        if not (has_checkpoint(broken) and process.returncode == 0):
            run(command(pictures, broken, options.steps))
        found = differences(whole, broken)
        left = sorted(path.name for path in Path(folder).iterdir() if path not in (pictures, whole, broken))
        print(
            f"{kills} kills: {'equal to the bit' if not found else f'different: {found[:5]}'}; left next to it: {left}"
        )
        sys.exit(bool(found or left))


def wait_for_a_moment(process: subprocess.Popen, out: Path, moments: random.Random) -> float:
    """One kill in four comes while the process starts; the others within a second of its first save."""
    started = time.monotonic()
    if moments.random() < 0.25:
        time.sleep(moments.uniform(0.1, 4.0))
        return time.monotonic() - started
    before = saved_at(out)
    while process.poll() is None and saved_at(out) == before:
        time.sleep(0.005)
    time.sleep(moments.uniform(0.0, 1.0))
    return time.monotonic() - started


def saved_at(out: Path) -> int | None:
    try:
        return (out / "manifest.json").stat().st_mtime_ns
    except OSError:
        return None


if __name__ == "__main__":
    main()
