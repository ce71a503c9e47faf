"""test_multimodal_gpu.py as a person starts it, and that it can fail."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REAL_WEIGHTS, needs_weights

ROOT = Path(__file__).parents[1]
SCRIPT = str(ROOT / "test_multimodal_gpu.py")
# the script, with an encoder that sees every picture as black
BLIND = f"""
import runpy
from nanochat.vision import pixels
to_pixels = pixels.to_pixels
pixels.to_pixels = lambda *args: to_pixels(*args) * 0
runpy.run_path({SCRIPT!r}, run_name="__main__")
"""


def start(*words, weights: str | None, folder: Path):
    """The process when it has ended; started in another folder, since the script must not depend on where one is."""
    environment = {name: value for name, value in os.environ.items() if name != "NANOCHAT_YOLO_WEIGHTS"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    if weights is not None:
        environment["NANOCHAT_YOLO_WEIGHTS"] = weights
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, encoding="utf-8"
    )


@pytest.mark.parametrize(
    "weights", [None, "", pytest.param(str(REAL_WEIGHTS), marks=needs_weights)], ids=["unset", "", "real"]
)
def test_all_tests_pass(weights, tmp_path):
    done = start(SCRIPT, weights=weights, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    *parts, passed, memory = done.stdout.splitlines()
    assert [line[:4] for line in parts[1:]] == ["✓ 1.", "✓ 2.", "✓ 3.", "✓ 4."]
    assert passed == "✓ ALL TESTS PASSED!" and re.match(r"Final GPU memory: \d+\.\d\d GB", memory)
    assert list(tmp_path.iterdir()) == []


def test_missing_weights_are_one_line_and_a_failure(tmp_path):
    done = start(SCRIPT, weights="no-such.pt", folder=tmp_path)
    assert done.returncode == 1 and "PASSED" not in done.stdout
    assert done.stderr.startswith("✗ FAILED: there is no file no-such.pt") and done.stderr.count("\n") == 1


def test_an_encoder_that_sees_nothing_is_a_failure(tmp_path):
    done = start("-O", "-c", BLIND, weights=None, folder=tmp_path)  # -O: it must not lean on assert statements
    assert done.returncode == 1 and "PASSED" not in done.stdout
    assert done.stderr.startswith("✗ FAILED: another picture, another embedding"), done.stderr
