"""The curl lines and the Python of docs/SERVE.md run against a server."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("openai")
from tests.serving import make_agent, png, running

TEXT = (Path(__file__).parents[1] / "docs/SERVE.md").read_text(encoding="utf-8")
CURLS = re.findall(r"^    (curl (?:.*\\\n|.*\n(?=      ))*.*)$", TEXT, re.M)
pytestmark = pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")


@pytest.fixture(scope="module")
def address():
    with running({"tiny": make_agent(128)}) as found:
        yield found


@pytest.mark.parametrize("number", range(6))
def test_curl_lines(address, tmp_path, number):
    (tmp_path / "picture.png").write_bytes(png())
    command = CURLS[number].replace("http://127.0.0.1:8000", address)
    done = subprocess.run(
        ["bash", "-c", f"{command} --fail-with-body"], cwd=tmp_path, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0 and done.stdout, done.stdout + done.stderr
    kind = ("list", "chat.completion", "chat.completion.chunk", "response", "embedding", "nanochat_requests_total")[
        number
    ]
    assert kind in done.stdout


def test_all_curl_lines_are_run():
    assert len(CURLS) == 6 == TEXT.count("    curl -s")


def test_the_python(address, tmp_path, monkeypatch, capsys):
    pytest.importorskip("llguidance")
    (tmp_path / "picture.png").write_bytes(png())
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", TEXT, re.S)[1]
    exec(compile(code.replace("http://127.0.0.1:8000", address), "SERVE.md", "exec"), {})
    assert capsys.readouterr().out.strip() in ('{"dog": true}', '{"dog": false}')
