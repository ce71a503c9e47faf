"""The documentation is true of the code: Python blocks run, commands parse, links lead somewhere, the tree is complete.

Blocks of one file run in order in one namespace, in a folder with picture.png, frame.png and scene.jpg. A block that cannot
run has a line `<!-- not run: REASON -->` directly above it.
"""

import ast
import contextlib
import functools
import io
import json
import re
import shlex
import shutil
import sys
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import tyro
from matplotlib import cbook

from nanochat.action_heads import HEADS
from nanochat.checkpoint import ASSETS
from nanochat.cli import main as cli
from nanochat.training.recipes import RECIPES
from tests.test_clips import write_clip

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
PROSE = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
WITH_PYTHON = [
    README,
    *(ROOT / "docs" / name for name in ("EXTENDING.md", "MULTIMODAL.md", "ROBOT.md", "RUNTIME.md", "SERVE.md")),
]
NOT_HERE = ("EXTENDING.md", "RUNTIME.md", "SERVE.md")  # the first and the last are run by other tests
NOT_RUN = re.compile(r"<!-- not run: (.*) -->")
MOST_NOT_RUN = 3
DEPRECATED_FLAGS = {"--record"}  # of rollout; argparse still accepts it
SHAPE = re.compile(r"^(\w+) = .*  # (\([\d, ]+\))", re.M)
PATH = re.compile(r"(?<![\w./-])[\w./-]*\w(?:\.py|\.md|/)(?=[\s,;:)]|$)")


def names(paths):
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.name)


# ---- Python blocks


@dataclass
class Block:
    line: int  # of its first line of code
    code: str
    not_run: str | None  # the reason


def python_blocks(text: str) -> list[Block]:
    """Raises ValueError for a reason without a block, and for a block in no known form."""
    lines, found, reason = text.splitlines(), [], None
    number = 0
    while number < len(lines):
        line = lines[number]
        if line.startswith("```"):
            end = lines.index("```", number + 1)
            if line == "```python":
                found.append(Block(number + 2, "\n".join(lines[number + 1 : end]), reason))
            elif reason is not None or "py" in line:
                raise ValueError(f"line {number + 1}: expected ```python, found {line}")
            number, reason = end, None
        elif reason is not None:
            raise ValueError(f"line {number}: a reason must stand directly above a ```python block")
        elif match := NOT_RUN.fullmatch(line):
            reason = match[1]
        number += 1
    return found


def run_blocks(path: Path, folder: Path) -> dict:
    """Run the blocks of a page, and compare shapes in comments with what was computed; returns their namespace."""
    namespace = {"__name__": path.stem}
    shutil.copy(ASSETS / "pictures" / "0.png", folder / "picture.png")
    shutil.copy(ASSETS / "pictures" / "0.png", folder / "scene.jpg")  # formats are recognised by content
    shutil.copy(ASSETS / "demo" / "frame.png", folder / "frame.png")
    for block in python_blocks(path.read_text(encoding="utf-8")):
        if block.not_run is None:
            code = "\n" * (block.line - 1) + block.code  # so that a traceback has the line of the page
            exec(compile(code, str(path), "exec"), namespace)
            for name, shape in SHAPE.findall(block.code):
                assert tuple(namespace[name].shape) == ast.literal_eval(shape), f"{path.name}: shape of {name}"
    return namespace


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOCHAT_YOLO_WEIGHTS", "yolov9t.yaml")  # random weights; the default would be downloaded
    with mock.patch.dict(HEADS):
        yield tmp_path


@names([path for path in WITH_PYTHON if path.name not in NOT_HERE])
def test_python_blocks_run(path, folder):
    namespace = run_blocks(path, folder)
    assert SHAPE.findall(path.read_text(encoding="utf-8")) and "agent" in namespace


def test_sketches_run_and_the_endpoint_answers(folder):
    server = run_blocks(ROOT / "docs" / "EXTENDING.md", folder)["server"]
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def post(message: dict) -> dict:
        address = f"http://127.0.0.1:{server.server_port}"
        with urllib.request.urlopen(urllib.request.Request(address, json.dumps(message).encode())) as answer:
            return json.loads(answer.read())

    observation = {"image": [[[0, 0, 0]] * 32] * 32, "state": [0.0, 0.6, 0.2, 1.0], "prompt": "open the door"}
    try:
        actions = post(observation)["actions"]
        assert len(actions) == 5 and all(len(action) == 4 and max(map(abs, action)) <= 1 for action in actions)
        for wrong in ({}, observation | {"state": [1]}, observation | {"image": [[[300, 0, 0]]]}):
            with pytest.raises(urllib.error.HTTPError, match="400"):
                post(wrong)
    finally:
        server.shutdown()
        server.server_close()


def test_all_pages_with_python_are_run_but_for_few_blocks():
    blocks = {path: python_blocks(path.read_text(encoding="utf-8")) for path in PROSE}
    assert [path for path, found in blocks.items() if found] == WITH_PYTHON
    reasons = [block.not_run for found in blocks.values() for block in found if block.not_run is not None]
    assert len(reasons) <= MOST_NOT_RUN
    assert all(reason.startswith("needs ") for reason in reasons)


def test_a_wrong_block_is_found(folder):
    page = folder / "page.md"
    page.write_text("# Page\n\n```python\nx = 1\n```\n\n<!-- not run: needs luck -->\n```python\n1 / 0\n```\n")
    assert run_blocks(page, folder)["x"] == 1
    page.write_text("```python\nx = 1\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run_blocks(page, folder)
    assert caught.traceback[-1].lineno + 1 == 6
    page.write_text("```python\nimport numpy as np\nx = np.ones((2, 3))  # (2, 4): wrong\n```\n")
    with pytest.raises(AssertionError, match="shape of x"):
        run_blocks(page, folder)
    for text in ("<!-- not run: needs luck -->\n\n```python\n```\n", "```py\nx = 1\n```\n"):
        with pytest.raises(ValueError, match="line"):
            python_blocks(text)


# ---- commands


def commands(text: str) -> list[list[str]]:
    """The words of every line of a block, fenced or indented, that starts with `nanochat `. Lines that end in a backslash
    continue."""
    text = text.replace("\\\n", " ")
    indented = re.findall(r"^ {4}(nanochat .*)$", text, re.M)
    fenced = re.findall(r"^(nanochat .*)$", "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)), re.M)
    return [shlex.split(line, comments=True) for line in indented + fenced]


def mentioned(text: str) -> list[list[str]]:
    """The words of `nanochat ...` in the middle of a text; such a command may lack arguments."""
    return [shlex.split(found) for found in re.findall(r"`(nanochat [^`]+)`", text)]


@functools.cache
def flags(*command: str) -> set[str]:
    """The flags in the help of ("rollout",) or ("train", "folder")."""
    shown = io.StringIO()
    arguments = mock.patch.object(sys, "argv", ["nanochat", *command, "--help"])
    with arguments, contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        cli.main()
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", shown.getvalue())) - DEPRECATED_FLAGS


def unknown(words: list[str]) -> str | None:
    """What the command line does not know in a command: its name, its recipe, or a flag."""
    _, *rest = words
    command = [word for word in rest[:2] if not word.startswith("-")][: 2 if rest[0] == "train" else 1]
    if command and command[0] not in cli.COMMANDS:
        return f"no command {command[0]}"
    if command[:1] == ["train"] and command[1:] and command[1] not in (*RECIPES, "RECIPE"):
        return f"no recipe {command[1]}"
    known = flags(*[word for word in command if word != "RECIPE"])
    wrong = [word for word in rest if word.startswith("--") and word.split("=")[0] not in known]
    return f"no flag {wrong[0]} of {' '.join(command)}" if wrong else None


def parse_error(words: list[str]) -> str | None:
    """The error of a complete command: missing arguments, wrong values. Nothing is executed."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown), contextlib.redirect_stdout(shown):
            if words[1] == "train":
                cli.parse_recipe(words[2:], {name: kind() for name, kind in RECIPES.items()}).check()
            else:
                stubs = {name: functools.wraps(command)(lambda *a, **k: None) for name, command in cli.COMMANDS.items()}
                tyro.extras.subcommand_cli_from_dict(stubs, prog="nanochat", args=words[1:])
    except SystemExit as stop:
        return shown.getvalue() if stop.code else None  # 0 is --help
    except ValueError as error:
        return str(error)
    return None


@names([*PAGES, ROOT / "CONTRIBUTING.md"])
def test_commands_parse(path):
    text = path.read_text(encoding="utf-8")
    wrong = [(words, problem) for words in commands(text) + mentioned(text) if (problem := unknown(words))]
    wrong += [(words, problem) for words in commands(text) if (problem := parse_error(words))]
    assert not wrong


def test_the_readme_has_commands():
    found = {words[1] for words in commands(README.read_text(encoding="utf-8"))}
    assert found >= {"ask", "chat", "train", "eval", "record", "rollout", "policy-server", "--help"}


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("nanochat rollouts robot", "no command rollouts"),
        ("nanochat demos --out demos/mt10", "no command demos"),
        ("nanochat train coco --data x", "no recipe coco"),
        ("nanochat train folder --data x --glance-dim 3", "no flag --glance-dim of train folder"),
        ("nanochat demo --tasks door-open", "no flag --tasks of demo"),
        ("nanochat rollout robot --record films", "no flag --record of rollout"),
    ],
)
def test_an_unknown_name_is_found(command, problem):
    page = f"# Page\n\n```sh\n{command}  # comment\n```\n\nText about `{command}`, and `nanochat/cli/main.py`.\n\n    {command}\n"
    assert commands(page) == [command.split()] * 2 and mentioned(page) == [command.split()]
    assert unknown(command.split()) == problem


@pytest.mark.parametrize(
    ("command", "problem"),
    [
        ("nanochat rollout robot --drivers nobody", "nobody"),
        ("nanochat rollout", "CHECKPOINT"),
        ("nanochat train folder --steps many", "many"),
        ("nanochat train folder --steps 0", "steps must be at least 1"),
        ("nanochat pack shapes", "--out"),
    ],
)
def test_a_command_that_does_not_parse_is_found(command, problem):
    assert unknown(command.split()) is None and problem in parse_error(command.split())


def test_cheap_commands_of_the_docs_run(folder, monkeypatch, capsys):
    text = "".join(path.read_text(encoding="utf-8") for path in PAGES)
    shutil.copy(ASSETS / "pictures" / "0.png", folder / "picture.png")
    shutil.copy(ASSETS / "demo" / "frame.png", folder / "frame.png")
    shutil.copy(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False), folder / "photo.jpg")
    write_clip(folder / "clip.mp4", 20)
    run = {shlex.join(words): words for words in commands(text) if words[1] in ("ask", "caption", "--help")}
    run = {
        command: words for command, words in run.items() if "photos-onnx" not in words
    }  # tests/test_export.py makes one
    printed = {}
    for command, words in run.items():
        monkeypatch.setattr(sys, "argv", [*words, *([] if "--help" in words else ["--device", "cpu"])])
        with contextlib.suppress(SystemExit):
            cli.main()
        printed[command] = capsys.readouterr().out.strip()
    assert "usage: nanochat" in printed.pop("nanochat --help")
    assert len(printed.pop("nanochat caption photo.jpg --beams 3").split()) > 3
    (asked,) = [command for command in printed if "clip.mp4" in command]
    assert len(printed.pop(asked).splitlines()) == 8  # one answer for each frame
    assert printed == {
        "nanochat ask photo.jpg 'is there a dog?'": "no",
        "nanochat ask picture.png 'what color is the shape?' --checkpoint shapes": "red",
        "nanochat ask frame.png 'is the gripper open?' --checkpoint robot": "yes",
        "nanochat caption frame.png --checkpoint robot": "the drawer handle in row 5 column 5, the gripper open; "
        "the robot should open the green drawer",
    }


# ---- links, and the tree of the README


def broken_links(path: Path) -> list[str]:
    """Relative links of a page to files, or headings of pages, that do not exist."""
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        target, _, heading = link.partition("#")
        place = (path.parent / target) if target else path
        if "://" in link:
            continue
        if not place.exists() or (heading and heading not in headings(place)):
            broken.append(link)
    return broken


def headings(path: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@names(PROSE)
def test_links_lead_somewhere(path):
    assert not broken_links(path)


def test_a_broken_link_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page, with: signs\n[a](page.md#a-page-with-signs) [b](#b) [c](c.md) [d](https://c.org/c.md)\n")
    assert broken_links(page) == ["#b", "c.md"]


def tree_problems(readme: str, root: Path) -> list[str]:
    """Paths in the tree that do not exist, and files and folders of the package that are not in it."""
    tree = readme.split("## Where everything is")[1].split("\n## ")[0]
    problems, listed, current = [], set(), root
    for line in tree.splitlines():
        indent = len(line) - len(line.lstrip())
        if indent == 4:
            current = root / "nanochat" if line.strip() == "nanochat/" else root
        if indent == 6:
            first = re.split(r" {2,}", line.strip())[0].split()
            listed |= set(first)
            current = root / "nanochat" / (first[-1] if first[-1].endswith("/") else "")
        for name in PATH.findall(line):
            if not any((place / name).exists() for place in (current, root / "nanochat", root)):
                problems.append(f"not there: {name}")
    present = {f"{path.name}/" if path.is_dir() else path.name for path in (root / "nanochat").iterdir()}
    return problems + [
        f"not in the tree: {name}" for name in sorted(present - listed - {"__init__.py", "__pycache__/"})
    ]


def test_the_tree_is_true_and_complete():
    assert not tree_problems(README.read_text(encoding="utf-8"), ROOT)


def test_a_wrong_tree_is_found():
    text = README.read_text(encoding="utf-8")
    for old, new, problem in (
        ("      gpt.py  ", "      gtp.py  ", ["not there: gtp.py", "not in the tree: gpt.py"]),
        ("letterbox.py, pixels.py", "pictures.py, pixels.py", ["not there: pictures.py"]),
        ("      serving/  ", "      servers/  ", ["not there: servers/", "not in the tree: serving/"]),
        ("tests/  benchmarks/", "tests/  exercises/", ["not there: exercises/"]),
    ):
        assert old in text and tree_problems(text.replace(old, new), ROOT) == problem


def test_the_readme_is_short_and_in_order():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 200
    parts = ["(docs/demo.png)", "## Two commands", "## What it can do", "## Python API", "## How it works",
             "## Where everything is", "## Limits", "## Licences"]  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
