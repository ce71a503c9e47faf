"""benchmarks/quantized.py: its rows, what it says is lost, and that it resumes."""

import pytest

from benchmarks import quantized


@pytest.fixture
def rows(monkeypatch, tmp_path):
    """Measures nothing. The folders of the rows that were asked for."""
    asked = []

    def exported(name, form, source, args):
        folder = tmp_path / f"{name}-{form}-{source}".replace(", ", "-")
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text(folder.name)
        return folder

    def measured(name, folder, args):
        asked.append(folder.name)
        lost = "int8" in folder.name
        each = [100.0, 100.0, 100.0 - 100 * lost, 0.0]
        scores = {"right, %": {"value": sum(each) / 4, "each": each}, "BLEU-4": {"value": 20.0 + lost}}
        scores["MT10, %"] = {"value": 80.0, "low": 70.0, "high": 90.0}
        return {"MB": 10.0 - 7 * lost, "ms": {"token": 2.0 - lost}, "scores": scores}

    monkeypatch.setattr(quantized, "exported", exported)
    monkeypatch.setattr(quantized, "measured", measured)
    return asked


def test_each_form_is_measured_once_beside_float32(rows, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("# Page\n\n## int8\n\nkept\n")
    args = quantized.Args(models=("shapes", "robot"), pruned=("shapes=small",), out=tmp_path / "out", page=page)
    quantized.main(args)
    wanted = ["shapes-float32-shapes", "shapes-int8-shapes", "shapes-pruned-int8-small", "robot-float32-robot"]
    assert rows == [*wanted, "robot-int8-robot"]
    quantized.main(args)
    assert len(rows) == 5
    lines = page.read_text().splitlines()
    assert "kept" in lines and lines.count("## What int8 and pruning cost") == 1
    assert "| float32 | 10.0 | 2.00 | 75.0 | 20.0 | 80.0 (70.0 .. 90.0) |" in lines
    first, *others = [line for line in lines if line.startswith("| int8 |")]
    assert (
        first.startswith("| int8 | 3.0 | 1.00 | 50.0 (+25.00: ") and "| 21.0 (-1.00) |" in first and others == [first]
    )
