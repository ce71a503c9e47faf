"""Imports only go down. LAYERS is the only list of the layers; every import statement of the package is checked against it,
also those inside functions."""

import ast
import shutil
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nanochat"

# From low to high, names within `nanochat`. A module imports modules of lower layers only. "folder.*" is a folder whose modules
# may also import each other, without a cycle; its __init__ is written as the folder's name.
LAYERS = (
    ("__init__", "errors", "shipped"),
    ("files", "devices", "hub", "kv_cache", "meta", "sampling", "actions", "previous_actions", "safety", "workers"),
    ("tokenizer", "verify", "cache", "cameras", "chunk_player", "engine"),
    ("conversation", "beams"),
    ("vision.*",),
    ("vision",),
    ("config",),
    ("gpt",),
    ("cross_attention", "fusion"),
    ("acting", "attention_weights", "onnx", "onnx.cache"),
    ("onnx.model",),
    ("onnx.folder",),
    ("action_heads",),
    ("multimodal_gpt",),
    ("robot_gpt",),
    ("attention",),
    ("data.*",),
    ("data",),
    ("checkpoint",),
    ("upstream", "packing"),
    ("pruning",),
    ("metaworld", "metaworld.*"),
    ("agent",),
    ("runtime", "export.*"),
    ("export",),
    ("evaluation", "evaluation.*"),
    ("training", "training.*"),
    ("serving", "serving.*"),
    ("bench", "bench.*"),
    ("flags", "inputs", "heatmaps"),
    ("demo_photos",),
    ("demo",),
    ("cli", "cli.*"),
    ("__main__",),
    ("assistant", "robot", "robot.policy"),  # deprecated names
)
# Who may import what, by pattern of the importer
ONLY = {
    "nanochat.serving": ("serving", "serving.*", "cli.robot", "cli.serve", "demo", "robot.policy"),
    "ultralytics": ("vision.yolov9*", "bench.peers"),
    "metaworld": ("metaworld.simulator",),
    "mujoco": ("metaworld.simulator",),
}
# What these may import of the project
NOTHING_BUT = {
    "gpt": ("config", "kv_cache"),
    "vision": ("vision", "vision.*", "errors", "files", "devices", "meta"),
    "vision.*": ("vision", "vision.*", "errors", "files", "devices", "meta"),
}


def modules_in(package: Path) -> dict[str, Path]:
    """Module name within the package -> file. A folder's __init__ has the folder's name."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


def imports_of(path: Path, name: str, modules: dict[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, imported module) of every import in a file, by its full name."""
    package = f"nanochat.{name}".split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])
            base = base if node.level else node.module
            for alias in node.names:  # a module, or a name in one
                whole = f"{base}.{alias.name}"
                yield node.lineno, whole if whole.removeprefix("nanochat.") in modules else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__", "find_spec") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def matches(name: str, patterns) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def layer_of(name: str) -> int | None:
    exact = next((i for i, layer in enumerate(LAYERS) if name in layer), None)
    return exact if exact is not None else next((i for i, layer in enumerate(LAYERS) if matches(name, layer)), None)


def violations(package: Path) -> list[str]:
    """One line for every rule that a file breaks."""
    modules = modules_in(package)
    found = [f"{path}: the module {name} is in no layer" for name, path in modules.items() if layer_of(name) is None]
    siblings: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for line, whole in dict.fromkeys(imports_of(path, name, modules)):
            where = f"{path.relative_to(package.parent)}:{line}"
            for target, allowed in ONLY.items():
                if (whole == target or whole.startswith(f"{target}.")) and not matches(name, allowed):
                    found.append(f"{where} imports {whole}, which only {', '.join(allowed)} may import")
            if whole.split(".")[0] != "nanochat":
                continue
            imported = whole.removeprefix("nanochat.") if whole != "nanochat" else "__init__"
            for pattern, allowed in NOTHING_BUT.items():
                if fnmatchcase(name, pattern) and not matches(imported, allowed):
                    found.append(f"{where} imports {imported}: it may import only {', '.join(allowed) or 'nothing'}")
            if imported == name:
                continue
            mine, other = layer_of(name), layer_of(imported)
            if mine is None or other is None or other < mine:
                continue
            same_folder = other == mine and any("*" in pattern for pattern in LAYERS[mine])
            if not same_folder:
                found.append(f"{where} imports {imported} {'upwards' if other > mine else 'of its own layer'}")
            else:
                siblings[name].add(imported)
    return found + [f"a cycle of imports: {' -> '.join(cycle)}" for cycle in cycles(siblings)]


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The cycle that each module of one is first found in."""
    found, finished = [], set()

    def visit(name: str, way: list[str]) -> None:
        if name in way:
            found.append([*way[way.index(name) :], name])
        elif name not in finished:
            for following in sorted(graph.get(name, ())):
                visit(following, [*way, name])
            finished.add(name)

    for name in graph:
        visit(name, [])
    return found


def test_imports_only_go_down():
    found = violations(PACKAGE)
    assert not found, "\n".join(found)


def test_every_listed_module_exists():
    modules = modules_in(PACKAGE)
    listed = [pattern for layer in LAYERS for pattern in layer]
    missing = [pattern for pattern in listed if not any(fnmatchcase(name, pattern) for name in modules)]
    assert not missing, f"not in nanochat/: {', '.join(missing)}"


@pytest.mark.parametrize(
    ("module", "line", "message"),
    [
        ("engine", "from nanochat.agent import Agent", "engine.py:1 imports agent upwards"),
        ("engine", "from nanochat import agent", "engine.py:1 imports agent upwards"),
        ("engine", "import nanochat.agent", "engine.py:1 imports agent upwards"),
        ("engine", "def f():\n    from nanochat.agent import Agent", "engine.py:2 imports agent upwards"),
        ("engine", "from .agent import Agent", "engine.py:1 imports agent upwards"),
        ("data.folder", "from ..agent import Agent", "data/folder.py:1 imports agent upwards"),
        ("data", "from ..agent import Agent", "data/__init__.py:1 imports agent upwards"),
        ("engine", 'importlib.import_module("nanochat.agent")', "engine.py:1 imports agent upwards"),
        ("engine", "from nanochat.cameras import x", "engine.py:1 imports cameras of its own layer"),
        ("data.sample", "from nanochat.data import folder", "a cycle of imports: data."),
        ("gpt", "from nanochat.files import x", "gpt.py:1 imports files"),
        ("vision.images", "from nanochat.tokenizer import x", "vision/images.py:1 imports tokenizer: it may"),
        ("evaluation.rollout", "from nanochat.serving import openpi", "imports nanochat.serving.openpi, which only"),
        ("vision.images", "import ultralytics.nn", "imports ultralytics.nn, which only"),
        ("metaworld.record", "def f():\n    import mujoco", "imports mujoco, which only"),
        ("metaworld.record", "from metaworld.policies import x", "imports metaworld.policies, which only"),
        ("brand_new", "import os", "the module brand_new is in no layer"),
    ],
)
def test_a_wrong_import_is_found(tmp_path, module, line, message):
    package = tmp_path / "nanochat"
    shutil.copytree(PACKAGE, package, ignore=lambda folder, names: [n for n in names if n in ("assets", "__pycache__")])
    path = package.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    path.write_text(f"{line}\n{path.read_text() if path.exists() else ''}")
    assert [found for found in violations(package) if message in found]
