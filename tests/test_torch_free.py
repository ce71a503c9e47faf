"""What a small computer needs loads no torch: each module is imported in a process in which torch cannot be imported."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BLOCK = """
import importlib, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "torchvision", "ultralytics"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
"""
BLOCKED = f"{BLOCK}for name in sys.argv[1:]: importlib.import_module(name)"
COMMAND = f"{BLOCK}sys.argv[0] = 'nanochat'\nfrom nanochat.cli.main import main\nmain()"
DATA = sorted(f"nanochat.data.{path.stem}" for path in (ROOT / "nanochat/data").glob("[!_]*.py"))
MODULES = [
    "nanochat.files", "nanochat.sampling", "nanochat.tokenizer", "nanochat.actions", "nanochat.conversation",
    "nanochat.engine", "nanochat.beams", "nanochat.agent", "nanochat.config", "nanochat.acting",
    "nanochat.attention", "nanochat.runtime", "nanochat.onnx.cache", "nanochat.onnx.model", "nanochat.onnx.folder",
    "nanochat.safety", "nanochat.cameras", "nanochat.vision", "nanochat.vision.images",
    "nanochat.vision.letterbox", "nanochat.vision.detections",
    "nanochat.chunk_player", "nanochat.data", *DATA,
    "nanochat.metaworld.instructions", "nanochat.metaworld.scene", "nanochat.serving.policy", "nanochat.serving.openpi",
    "nanochat.serving.client", "nanochat.serving.app", "nanochat.cli.serve",
    "nanochat.flags", "nanochat.training.recipes", "nanochat.cli.main",
]  # fmt: skip


def run_blocked(*words):
    return subprocess.run([sys.executable, "-c", BLOCKED, *words], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("module", MODULES)
def test_imports_without_torch(module):
    if module == "nanochat.serving.app":
        pytest.importorskip("fastapi")
    if module in ("nanochat.serving.openpi", "nanochat.serving.client"):
        pytest.importorskip("websockets")
    done = run_blocked(module)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["torch", "torch.nn", "nanochat.gpt"])
def test_the_block_works(module):
    done = run_blocked(module)
    assert done.returncode == 1 and "is blocked" in done.stderr


@pytest.mark.parametrize("words", [["--help"], ["ask", "--help"], ["train", "--help"], ["train", "robot", "--help"]])
def test_help_loads_no_torch(words):
    done = subprocess.run([sys.executable, "-c", COMMAND, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "usage: nanochat" in done.stdout, done.stderr
