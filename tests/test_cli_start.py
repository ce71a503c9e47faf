"""How the program starts: version, help, the list of models, completion, home folders, and values that are no default."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from safetensors import safe_open

from nanochat import __version__
from nanochat.checkpoint import SHIPPED, load_checkpoint
from nanochat.cli import main as cli
from nanochat.cli import serve
from tests.test_cli import PICTURE, QUESTION, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def program(*words, **options):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    command = [sys.executable, "-m", "nanochat", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


def test_python_m_nanochat_shows_the_version():
    done = program("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"nanochat-vision {__version__}\n", "")


def test_nanochat_alone_shows_the_help():
    alone, helped = program(), program("--help")
    assert alone.returncode == helped.returncode == 0 and alone.stdout == helped.stdout
    assert "usage: nanochat" in alone.stdout and alone.stderr == ""
    assert all(f"• {command} " in alone.stdout for command in cli.COMMANDS)
    assert (
        "Ask a question about a picture" in alone.stdout and "a.jpg b.jpg" not in alone.stdout
    )  # first paragraphs only


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_shells_can_complete_commands(shell):
    done = program("--tyro-print-completion", shell)
    assert done.returncode == 0 and done.stderr == ""
    assert all(command in done.stdout for command in cli.COMMANDS)


@pytest.mark.parametrize(("command", "extras"), [("train", "torch,train"), ("ask", "torch")])
def test_a_missing_package_is_installed_from_the_folder_of_the_project(nanochat, monkeypatch, command, extras):
    def fails(*args: str):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(cli, "train", fails)
    monkeypatch.setitem(cli.COMMANDS, "ask", fails)
    assert f'pip install ".[{extras}]" in the folder of the project' in nanochat(command, code=2).err


def test_no_text_has_pip_look_for_the_project_on_an_index():
    texts = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("nanochat/**/*.py"), *ROOT.glob("examples/*")]
    wrong = re.compile(r"(install|upgrade)\s+(-\S+\s+)*[\"']?nanochat")
    assert not [path for path in texts if wrong.search(path.read_text(encoding="utf-8"))]


def stored_names(folder):
    """Those of the tensors in a checkpoint: it may be older than a part of its model."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_models_lists_those_that_ship(nanochat):
    rows = [json.loads(line) for line in nanochat("models", "--json").out.splitlines()]
    assert [row["name"] for row in rows] == list(SHIPPED)
    printed = nanochat("models").out
    for row in rows:
        parameters, stored = load_checkpoint(row["name"])[0].named_parameters(), stored_names(SHIPPED[row["name"]])
        assert row["parameters"] == sum(p.numel() for name, p in parameters if name in stored)
        assert row["bytes"] == sum(path.stat().st_size for path in SHIPPED[row["name"]].iterdir())
        assert row["purpose"] in printed and all(
            figure in printed for figures in row["figures"] for figure in figures[:2]
        )
        for _, score, controls in row["figures"]:  # as in the table of the README, one row for each
            numbers = [score, *(part.split(" ", 2)[-1] for part in controls.split(", "))]
            assert any(all(number in line for number in numbers) for line in README.splitlines()), numbers


def test_home_folders_are_found_behind_an_equals_sign(nanochat, tmp_path, monkeypatch):
    """A shell leaves the ~ in --out=~/x as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copy(PICTURE, tmp_path / "p.png")
    (tmp_path / "t.txt").write_text("the quick brown fox\n" * 5)
    nanochat("pack", "shapes", "--out=~/packed")
    nanochat("tokenizer", "~/t.txt", "--out=~/t.json", "--vocab-size", "280")
    encoder = ("--weights=~/packed", "--layer", "4")
    nanochat("embed", "~/p.png", "--out=~/x.npz", *encoder)
    nanochat("embed", "p.png", "--json=~/x.json", *encoder)
    assert nanochat("ask", "~/p.png", QUESTION, "--checkpoint=~/packed").out == "red\n"
    assert {path.name for path in tmp_path.iterdir()} == {"p.png", "t.txt", "packed", "t.json", "x.npz", "x.json"}
    assert not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["demo", "--out=~/x.png"], ["demo", "--out=HOME/x.png"]),
        (["rollout", "--record=~/f", "--json=~/r.json"], ["rollout", "--record=HOME/f", "--json=HOME/r.json"]),
        (["train", "robot", "--data=~/d", "--out", "~/r"], ["train", "robot", "--data=HOME/d", "--out", "HOME/r"]),
        (["detect", "~/a.png", "-o=~/b.png"], ["detect", "HOME/a.png", "-o=HOME/b.png"]),
        (["ask", "./~", "a ~/b?"], ["ask", "./~", "a ~/b?"]),
        (["ask", "~nobody-of-that-name/a.png", "~5 cars?"], ["ask", "CWD/~nobody-of-that-name/a.png", "~5 cars?"]),
        (["ask", "a.png", "q", "--json"], ["ask", "a.png", "q", "--json", "-"]),
        (["ask", "--json", "a.png", "q"], ["ask", "--json", "-", "a.png", "q"]),
        (["ask", "--json", "a.JSONL", "q"], ["ask", "--json", "a.JSONL", "q"]),
        (["ask", "--json", "--camera", "0", "q"], ["ask", "--json", "-", "--camera", "0", "q"]),
        (["eval", "--json", "r.txt"], ["eval", "--json", "r.txt"]),
    ],
)
def test_words_of_the_command_line(monkeypatch, words, expected):
    monkeypatch.setenv("HOME", "/somewhere")
    assert cli.plain_words(words) == [
        word.replace("HOME", "/somewhere").replace("CWD", os.getcwd()) for word in expected
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["record", "--processes", "0", "-o", "FOLDER/x"], "--processes must be at least 1, got 0"),
        (["rollout", "robot", "--processes", "0"], "--processes must be at least 1, got 0"),
        (["rollout", "robot", "--processes", "-2"], "--processes must be at least 1, got -2"),
        (["rollout", "robot", "--max-steps", "0"], "--max-steps must be in 1.."),
        (["eval", "shapes", "easy_vqa", "--limit", "0"], "--limit must be at least 1, got 0"),
        (["policy-server", "robot", "--port", "99999"], "port must lie in 0..65535"),
        (["policy-server", "robot", "--port", "-1"], "port must lie in 0..65535"),
        (["policy-server", "robot", "--host", ""], "the host is empty"),
        (["policy-server", "robot", "--max-clients", "0"], "--max-clients must be at least 1"),
        (["policy-server", "robot", "--token", ""], "--token is empty"),
        (["policy-server", "robot", "--token", "  "], "--token is empty"),
        (["policy-server", "robot", "--execute", "0"], "execute"),
        (["policy-server", "robot", "--max-change", "0"], "--max-change must"),
        (["policy-server", "robot", "--max-change", "nan"], "--max-change must"),
        (["ask", PICTURE, QUESTION, "--checkpoint", ""], "--checkpoint is empty"),
        (["embed", PICTURE, "-o", "FOLDER/x.npz", "--weights", ""], "--weights is empty"),
        (
            ["embed", PICTURE, "-o", "FOLDER/x.npz", "--weights", "yolov9t.yaml", "--image-size", "0"],
            "--image-size must",
        ),
        (["ask", PICTURE, QUESTION, "--checkpoint", "~nobody-of-that-name"], "no such folder"),
        (["ask", PICTURE, QUESTION, "--device", "cuda:999999999999999999999"], "device must be"),
        (["demo", "-o", "FOLDER/d.png", "--seed", "-1"], "--seed must be at least 0"),
        (["tokenizer", PICTURE, "-o", "FOLDER/t.json"], "is not UTF-8 text"),
        (["tokenizer", __file__, "-o", "FOLDER/t.json", "--vocab-size", "9" * 30], "--vocab-size must be at most"),
        (["ask", PICTURE, QUESTION, "--top-k", "0"], "--top-k must be at least 1"),
        (["ask", PICTURE, QUESTION, "--seed", "-1", "--temperature", "1"], "seed"),
        (["train", "folder", "--data", "FOLDER", "--steps", "0"], "steps must be at least 1"),
        (["train", "folder", "--data", "FOLDER", "--threads", "0"], "--threads must be at least 1"),
        (["train", "folder", "--data", "FOLDER", "--vision-tokens", "5"], "--vision-tokens must be a square number"),
        (["train", "folder", "--data", "FOLDER", "--n-embd", "100"], "--n-embd must be a multiple of 2 * --n-head, 8"),
        (["train", "robot", "--data", "FOLDER", "--image-size", "0"], "--image-size must be a positive multiple of 32"),
    ],
)
def test_zero_and_empty_are_not_the_default(nanochat, tmp_path, words, message):
    lines = nanochat(*[word.replace("FOLDER", str(tmp_path)) for word in words], code=2).err.splitlines()
    (error,) = [line for line in lines if not line.startswith("note: ")]
    assert error.startswith("error: ") and message in error
    assert list(tmp_path.iterdir()) == []


def test_an_empty_token_in_the_environment_is_refused(nanochat, monkeypatch):
    monkeypatch.setenv("NANOCHAT_TOKEN", "")
    assert "$NANOCHAT_TOKEN is empty" in nanochat("policy-server", "robot", code=2).err
    assert serve.read_key("sesame") == "sesame"
    monkeypatch.setenv("NANOCHAT_TOKEN", "open")
    assert serve.read_key(None) == "open"
    monkeypatch.delenv("NANOCHAT_TOKEN")
    assert serve.read_key(None) is None


def test_output_that_the_terminal_cannot_show_is_no_bug(tmp_path):
    shutil.copy(PICTURE, tmp_path / "é.png")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "nanochat", "ask", "é.png", PICTURE, QUESTION, "--each", "--checkpoint", "shapes"],
        capture_output=True, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.startswith(b"\\xe9.png: red")


def test_the_texts_of_models_name_their_folders():
    texts = json.loads((ROOT / "nanochat/assets/models.json").read_text())
    assert {name: about["folder"] for name, about in texts.items()} == {
        name: path.name for name, path in SHIPPED.items()
    }


def test_an_unknown_flag_names_the_help_of_its_command(nanochat):
    assert "run nanochat detect --help" in nanochat("detect", "--boxes", code=2)[1]
