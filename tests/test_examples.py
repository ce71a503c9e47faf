"""examples/photos.ipynb runs from top to bottom, and teaches the model what it says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "examples" / "photos.ipynb"
nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")


def printed(cell) -> str:
    """What a cell wrote, without colours."""
    text = "".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_the_notebook_has_no_outputs_in_git():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert NOTEBOOK.stat().st_size < 20_000


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    asked, looked, _, trained, told, scored = code[1:]
    assert printed(asked).count("is there a dog?") == 3
    assert looked.outputs[0].data["image/png"]
    assert "starting from the checkpoint photos" in printed(trained)
    assert re.search(r"grace_hopper\.jpg \| Grace Hopper in uniform", printed(told)), printed(told)
    row = next(line for line in printed(scored).splitlines() if "exact_match" in line)
    aligned, _, _, shuffled, blind, _ = (float(number) for number in re.findall(r"([\d.]+)%", row))
    assert aligned >= 75 > max(shuffled, blind), row
    assert {path.name for path in tmp_path.iterdir()} >= {"looked.png", "my_pictures", "mine"}
