"""run_multimodal.sh with a stand-in for the virtual environment: what it installs and what it starts."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAND_IN = '#!/bin/sh\necho "$(basename "$0") $*" >> log\n'
INSTALL = "python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e "


@pytest.fixture
def run(tmp_path):
    """A function that runs the script and returns the commands that it started."""
    for name in ("run_multimodal.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    for name in ("python", "nanochat"):
        (tmp_path / ".venv/bin" / name).write_text(STAND_IN)
        (tmp_path / ".venv/bin" / name).chmod(0o755)

    def start(*words):
        (tmp_path / "log").write_text("")
        script = [shutil.which("bash"), tmp_path / "run_multimodal.sh", *words]
        done = subprocess.run(script, check=True, env=os.environ | {"PYTHON": sys.executable}, capture_output=True)
        assert done.stderr == b""
        return [line for line in (tmp_path / "log").read_text().splitlines() if "pip --version" not in line]

    return start


def test_the_demo_is_the_default_and_is_installed_once(run):
    assert run() == [INSTALL + ".[torch,robot]", "nanochat demo"]
    assert run("demo", "--seed", "2") == ["nanochat demo --seed 2"]


@pytest.mark.parametrize(
    ("command", "extras"),
    [
        ("record", "[torch,robot]"), ("demos", "[torch,robot]"), ("rollout", "[torch,robot]"), ("inspect", "[robot]"),
        ("policy-server", "[torch,serve]"), ("serve", "[torch,serve]"), ("train", "[torch,train,eval,photos]"),
        ("eval", "[torch,train,eval,robot]"), ("import-upstream", "[torch,upstream]"), ("ask", "[torch]"), ("pack", "[torch]"),
        ("export", "[torch]"), ("chat", "[torch]"), ("models", ""), ("cache", ""),
    ],
)  # fmt: skip
def test_a_command_installs_what_it_needs(run, command, extras):
    assert run(command, "a b") == [f"{INSTALL}.{extras}", f"nanochat {command} a b"]


@pytest.mark.parametrize(
    ("words", "extras"),
    [
        (["clip.mp4", "what?"], "[torch,video]"),
        (["a.jpg", "what?"], "[torch]"),
        (["x", "?", "--frames", "8"], "[torch,video]"),
    ],
)
def test_questions_about_videos_install_a_reader_of_videos(run, words, extras):
    assert run("ask", *words)[0] == f"{INSTALL}.{extras}"


def test_training_a_robot_installs_what_reads_its_data(run):
    assert run("train", "robot", "--data", "d")[0] == f"{INSTALL}.[torch,train,eval,photos,robot]"


@pytest.mark.parametrize(("command", "extras"), [("ask", ""), ("policy-server", "[serve]")])
def test_an_exported_model_needs_no_torch(run, tmp_path, command, extras):
    (tmp_path / "small").mkdir()
    (tmp_path / "small/manifest.json").write_text(json.dumps({"format": "nanochat-onnx"}, indent=1))
    assert run(command, "small")[0] == f"{INSTALL}.{extras}"


def test_uv_takes_torch_by_default():
    """`uv run` installs the dependency group dev."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["dependency-groups"]["dev"] == project["project"]["optional-dependencies"]["torch"]
    assert not any("torch" in one for one in project["project"]["dependencies"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "-n auto"),
        (["tests/test_gpt.py", "-x"], "-n auto tests/test_gpt.py -x"),
        (["-n", "2"], "-n 2"),
        (["-n0"], "-n0"),
        (["--numprocesses=3"], "--numprocesses=3"),
        (["--pdb"], "--pdb"),
    ],
)
def test_tests_run_in_parallel_unless_the_user_decides(run, words, expected):
    *installs, tests = run("test", *words)
    assert installs[0] == INSTALL + ".[dev]" and "openpi-client" in installs[1]
    assert tests == f"python -m pytest {expected}".strip()
