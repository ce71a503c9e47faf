"""benchmarks/curves.py: learning curves of runs."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from nanochat.errors import UserError

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import curves


def write(folder, lines):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_curves_of_answers_and_of_losses(tmp_path, capsys):
    answers = [{"step": step, "aligned": 1.0, "aligned_accuracy": step / 20, "blind_accuracy": 0.1} for step in (0, 10)]
    losses = [{"step": 0, "aligned": 0.9, "shuffled": 0.9}, {"step": 5, "loss": 1.0}, {"step": 7, "aligned": 0.25}]
    runs = f"a={write(tmp_path / 'a', answers)}", f"b={write(tmp_path / 'b', losses)}"
    curves.main(curves.Args(runs, tmp_path / "c.png"))
    said = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["aligned", "0:", "0", "10:", "50"] in said and ["blind", "0:", "10", "10:", "10"] in said
    assert ["aligned", "0:", "0.9", "7:", "0.25"] in said and ["shuffled", "0:", "0.9"] in said
    assert Image.open(tmp_path / "c.png").width > 600


def test_what_is_no_run_is_refused(tmp_path):
    one = write(tmp_path / "one", [{"step": 0, "aligned": 1.0}])
    for run, message in ((f"x={tmp_path}", "metrics.jsonl"), (str(one), "LABEL=FOLDER"), (f"x={one}", "1 validations")):
        with pytest.raises(UserError, match=message):
            curves.checks_of(run)
