"""Runs the steps of the Dockerfile in a clean folder, where there is no Docker: COPY copies, RUN pip installs into a new virtual
environment, CMD starts the server, and HEALTHCHECK must succeed. USER and EXPOSE are only read.

    nanochat export photos exported/photos
    python dev/check_dockerfile.py exported/photos
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
START_S = 120


def steps(text: str) -> list[tuple[str, str]]:
    """("COPY", "README.md ./"), ... of a Dockerfile, with continued lines joined."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1]) for line in lines if line and not line.startswith("#")]


def copy(words: list[str], app: Path, place: dict[str, Path]) -> None:
    *sources, target = words
    for source in sources:
        to = place.get(target, app / target)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, to, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, to)


def check(model: str, folder: Path) -> None:
    app, environment = folder / "app", folder / "venv"
    app.mkdir()
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    # as in the image: no variables of this machine's Python
    variables = {"PATH": f"{environment}/bin:/usr/bin:/bin", "HOME": str(folder)} | {
        name: value
        for name, value in os.environ.items()
        if name.startswith(("PIP_", "SSL_", "HTTP", "http", "no_proxy"))
    }
    seen = steps((ROOT / "Dockerfile").read_text())
    assert dict(seen)["USER"] != "root", "the server would run as root"
    for kind, rest in seen:
        if kind == "COPY":
            copy(rest.replace("${MODEL}", model).split(), app, {"/model": folder / "model"})
        elif kind == "RUN" and rest.startswith("pip "):
            subprocess.run(
                ["python", "-m", *shlex.split(rest)], cwd=app, env=variables, check=True, stdout=subprocess.DEVNULL
            )
    lacks = subprocess.run(["python", "-c", "import torch"], env=variables, capture_output=True).returncode
    assert lacks, "torch was installed, and the image is meant to do without"
    command = [str(folder / "model") if word == "/model" else word for word in json.loads(dict(seen)["CMD"])]
    command[command.index("0.0.0.0")] = "127.0.0.1"
    (folder / "empty").mkdir()
    with subprocess.Popen(command, cwd=folder / "empty", env=variables) as server:
        try:
            healthy = dict(seen)["HEALTHCHECK"].partition("CMD ")[2]
            end = time.monotonic() + START_S
            while subprocess.run(json.loads(healthy), env=variables, capture_output=True).returncode:
                assert server.poll() is None and time.monotonic() < end, "the server did not become healthy"
                time.sleep(1)
            with urllib.request.urlopen("http://127.0.0.1:8000/v1/models") as answer:
                print(json.load(answer)["data"][0])
        finally:
            server.terminate()
        assert server.wait(30) == 0, "the server did not stop as it should"
    size = sum(path.stat().st_size for path in environment.rglob("*") if path.is_file() and not path.is_symlink())
    print(f"every step works; the environment has {size / 1e6:.0f} MB, without torch")


if __name__ == "__main__":
    model = sys.argv[1] if len(sys.argv) > 1 else "exported/photos"
    if not (ROOT / model).is_dir():
        sys.exit(f"error: the project has no folder {model}: make it with nanochat export photos {model}")
    with tempfile.TemporaryDirectory() as made:
        check(model, Path(made))
