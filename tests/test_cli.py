"""The command line as a person meets it: real processes, real files, one line for what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nanochat import cli

ROOT = Path(__file__).parents[1]
PICTURE = str(ROOT / "nanochat/assets/demo/0.png")
QUESTION = "what color is the shape?"


def call(monkeypatch, capsys, *words, code=0):
    """Run a command in this process. Returns (stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["nanochat", *map(str, words)])
    if code:
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == code
    else:
        cli.main()
    return capsys.readouterr()


@pytest.fixture
def nanochat(monkeypatch, capsys):
    return lambda *words, **options: call(monkeypatch, capsys, *words, **options)


def test_ask(nanochat):
    questions = json.loads((ROOT / "nanochat/assets/demo/questions.json").read_text())[0]["questions"]
    for question, truth in questions:
        assert nanochat("ask", PICTURE, question).out.strip() == truth


def test_ask_several_pictures_names_each(nanochat):
    out = nanochat("ask", PICTURE, PICTURE, QUESTION).out.splitlines()
    assert len(out) == 2 and out[0] == out[1] and out[0].startswith(f"{PICTURE}: ")


def test_caption_speaks(nanochat):
    assert nanochat("caption", PICTURE).out.strip()


def test_chat_keeps_its_cache_between_turns(nanochat, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n{QUESTION}\n\n"))
    out = nanochat("chat", "--image", PICTURE).out.splitlines()
    assert len(out) == 2 and out[0] == nanochat("ask", PICTURE, QUESTION).out.strip()


def test_sampling_is_reproducible_by_seed(nanochat):
    words = ("ask", PICTURE, QUESTION, "--temperature", "3.0", "--max-new-tokens", "12")
    said = [nanochat(*words, "--seed", seed).out for seed in (1, 1, 2, 3)]
    assert said[0] == said[1] and len(set(said)) > 1


def test_embed_and_detect(nanochat, tmp_path):
    weights = ("--weights", "yolov9t.yaml", "--image-size", "64")
    nanochat("embed", PICTURE, PICTURE, "-o", tmp_path / "e.npz", "--layer", "p4", *weights)
    with np.load(tmp_path / "e.npz") as saved:
        assert saved["embeddings"].shape == (2, 96) and saved["files"].tolist() == [PICTURE] * 2
    nanochat("detect", PICTURE, "-o", tmp_path / "d.png", *weights)
    assert Image.open(tmp_path / "d.png").size == Image.open(PICTURE).size
    nanochat("detect", PICTURE, "-o", tmp_path / "d.json", *weights)
    assert isinstance(json.loads((tmp_path / "d.json").read_text()), list)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.json", "d.png", "e.npz"]


def test_tokenizer(nanochat, tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox\n" * 5)
    nanochat("tokenizer", tmp_path / "a.txt", "-o", tmp_path / "t.json", "--vocab-size", "280")
    from nanochat.tokenizer import Tokenizer

    assert Tokenizer.load(tmp_path / "t.json").decode([*Tokenizer.load(tmp_path / "t.json").encode("fox é")]) == "fox é"


def test_export_is_half_the_size_and_says_the_same(nanochat, tmp_path):
    nanochat("export", "default", "-o", tmp_path / "full", "--no-half")
    nanochat("export", tmp_path / "full", "-o", tmp_path / "half")
    full, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half"))
    assert half < 0.6 * full
    answers = [nanochat("ask", PICTURE, QUESTION, "--checkpoint", tmp_path / name).out for name in ("full", "half")]
    assert answers[0] == answers[1]
    assert "exists" in nanochat("export", "default", "-o", tmp_path / "half", code=2).err


def test_eval_writes_the_promised_json(nanochat, tmp_path):
    pytest.importorskip("easy_vqa")
    nanochat("eval", "default", "easy_vqa", "--split", "test", "--limit", "60", "--json", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    row = result["accuracy"]
    assert result["n"] == 60 and set(row) == {"aligned", "shuffled", "blind", "majority", "ci95"}
    low, high = row["ci95"]
    assert 0 <= low <= row["aligned"] <= high <= 1
    assert row["aligned"] > 0.9 > row["shuffled"] and row["majority"] < 0.6


def test_eval_of_captions(nanochat, tmp_path):
    pytest.importorskip("pycocoevalcap")
    rows = [
        {"image": "0.png", "captions": ["a dog runs", "the dog"]},
        {"image": "1.png", "captions": ["two cats sit here"]},
    ]
    for row in rows:
        Image.open(PICTURE).save(tmp_path / row["image"])
    (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
    nanochat("eval", "default", tmp_path, "--split", "dev", "--json", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    assert {"aligned", "shuffled", "blind", "ci95"} == set(result["bleu4"]) == set(result["cider"])


def test_demo(nanochat, tmp_path):
    out = nanochat("demo", "-o", tmp_path / "new" / "sheet.png").out
    sheet = Image.open(tmp_path / "new" / "sheet.png")
    assert sheet.width > 800 and len(np.unique(np.asarray(sheet.convert("L")))) > 100
    n = sum(len(item["questions"]) for item in json.loads((ROOT / "nanochat/assets/demo/questions.json").read_text()))
    assert f"{n} of {n} right" in " ".join(out.split())


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "words.txt").write_text("no picture")
    return tmp_path / "words.txt"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ask", "no/such.png", QUESTION], "there is no file no/such.png"),
        (["ask", "TEXT", QUESTION], "no picture"),
        (["ask", "FOLDER", QUESTION], "is a folder"),
        (["ask", PICTURE], "ask takes pictures and, last, a question"),
        (["ask", PICTURE, QUESTION, "--checkpoint", "FOLDER"], "no manifest.json"),
        (["ask", PICTURE, QUESTION, "--temperature", "-1"], "temperature"),
        (["ask", PICTURE, QUESTION, "--max-new-tokens", "5000"], "do not fit the context"),
        (["ask", PICTURE, "why " * 300], "do not fit the context"),
        (["embed", PICTURE, "-o", "FOLDER/e.txt", "--weights", "yolov9t.yaml"], ".npz"),
        (["detect", PICTURE, "-o", "FOLDER/d.png", "--weights", "no.pt"], "there is no file no.pt"),
        (["detect", PICTURE, "-o", "FOLDER/d.png", "--weights", "yolov9t.yaml", "--conf", "3"], "conf"),
        (["detect", "TEXT", "-o", "FOLDER/d.png", "--weights", "yolov9t.yaml"], "no picture"),
        (["eval", "default", "no_such_data"], "cannot read the dataset"),
        (["eval", "nowhere", "easy_vqa"], "no such folder"),
        (["eval", "default", "easy_vqa", "--limit", "0"], "at least 1"),
        (["train", "folder", "--data", "FOLDER", "--out", "FOLDER/run"], "cannot read the dataset"),
        (["train", "folder", "--out", "FOLDER/run"], "--data"),
        (["import-upstream", "FOLDER", "-o", "FOLDER/up"], "no model_NNNNNN.pt"),
        (["tokenizer", "TEXT", "-o", "FOLDER/t.json", "--vocab-size", "3"], "at least 266"),
    ],
)
def test_wrong_input_is_one_line_exit_code_2_and_nothing_written(nanochat, text_file, words, message):
    folder = text_file.parent / "empty"
    folder.mkdir()
    words = [str(w).replace("TEXT", str(text_file)).replace("FOLDER", str(folder)) for w in words]
    error = nanochat(*words, code=2).err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert list(folder.iterdir()) == []


def test_eval_refuses_or_counts_missing_pictures(nanochat, tmp_path):
    rows = [
        {"image": "0.png", "question": QUESTION, "answer": "red"},
        {"image": "gone.png", "question": "a", "answer": "b"},
    ]
    Image.open(PICTURE).save(tmp_path / "0.png")
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "1 rows left out" in nanochat("eval", "default", tmp_path).out
    assert "gone.png" in nanochat("eval", "default", tmp_path, "--strict", code=2).err


@pytest.mark.parametrize("words", [[], ["train"], ["train", "easy_vqa"], *([c] for c in cli.COMMANDS)])
def test_help_teaches(words):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "nanochat.cli", *words, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "usage: nanochat" in done.stdout and len(done.stdout) > 200


def test_unknown_commands_exit_with_2():
    done = subprocess.run(
        [sys.executable, "-m", "nanochat.cli", "fly"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
