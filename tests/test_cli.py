"""The command line from outside: real files and models, and one line for every error."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nanochat.agent import Agent
from nanochat.checkpoint import SHIPPED
from nanochat.cli import main as cli
from nanochat.cli import pictures
from nanochat.engine import Engine
from nanochat.metaworld.simulator import SimulatorError
from nanochat.sampling import Sampling
from nanochat.training.recipes import RECIPES
from nanochat.vision import YOLOv9Plus
from tests.test_images import animated, claims, encoded
from tests.test_simulator import needs_simulator
from tests.test_yolov9 import NAMES, detector
from tests.test_yolov9 import PICTURE as SCENE

ROOT = Path(__file__).parents[1]
PICTURE = str(ROOT / "nanochat/assets/pictures/0.png")
QUESTION = "what color is the shape?"
SHAPES = ("--checkpoint", "shapes")  # the model that can answer it


def test_ask(nanochat):
    questions = json.loads((ROOT / "nanochat/assets/pictures/questions.json").read_text())[0]["questions"]
    for question, truth in questions:
        assert nanochat("ask", *SHAPES, PICTURE, question).out.strip() == truth


def picture(number):
    return str(ROOT / f"nanochat/assets/pictures/{number}.png")


def test_ask_answers_for_each_of_several_pictures(nanochat):
    pictures = [picture(0), picture(1), picture(0)]
    out = nanochat("ask", *SHAPES, *pictures, QUESTION, "--each").out.splitlines()
    assert out == [f"{name}: {colour}" for name, colour in zip(pictures, ("red", "black", "red"), strict=True)]


def test_caption_describes_the_picture(nanochat):
    folder = ROOT / "nanochat/assets/demo"
    truth = json.loads((folder / "questions.json").read_text())["description"]
    assert nanochat("caption", folder / "frame.png", "--checkpoint", "robot").out == f"{truth}\n"
    other = nanochat("caption", PICTURE, "--checkpoint", "robot", "--max-new-tokens", "5").out.strip()
    assert other and len(other) < len(truth) and not truth.startswith(other)


def test_chat_answers_every_turn_like_ask(nanochat, monkeypatch):
    questions = [QUESTION, "what shape is present?", "is a circle present?", QUESTION]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*questions, "", "never asked"])))
    out = nanochat("chat", *SHAPES, "--image", picture(1)).out.splitlines()
    assert out == [nanochat("ask", *SHAPES, picture(1), question).out.strip() for question in questions]
    assert out[0] == "black" and len(set(out)) == 3


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_question_that_is_too_long_ends_only_a_chat_without_a_terminal(nanochat, monkeypatch):
    lines = f"{'why ' * 300}\n{QUESTION}\n\n"
    monkeypatch.setattr(sys, "stdin", Terminal(lines))
    printed = nanochat("chat", *SHAPES, "--image", PICTURE)
    assert "do not fit" in printed.err and printed.err.count("\n") == 1 and "red" in printed.out
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    printed = nanochat("chat", *SHAPES, "--image", PICTURE, code=2)
    assert "do not fit" in printed.err and "red" not in printed.out


def test_sampling_is_reproducible_by_seed(nanochat):
    words = ("ask", *SHAPES, PICTURE, QUESTION, "--temperature", "3.0", "--max-new-tokens", "12")
    said = [nanochat(*words, "--seed", seed).out for seed in (1, 1, 2, 3)]
    assert said[0] == said[1] and len(set(said)) > 1


def test_settings_of_the_sampling_reach_the_engine(nanochat, monkeypatch):
    asked, add = [], Engine.add
    monkeypatch.setattr(
        Engine, "add", lambda *args, **options: (asked.append(options["sampling"]), add(*args, **options))[1]
    )
    settings = {"temperature": 0.7, "top_p": 0.6, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.3, "seed": 9}
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]
    nanochat("ask", *SHAPES, PICTURE, QUESTION, *flags)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{QUESTION}\n\n"))
    nanochat("chat", *SHAPES, "--image", PICTURE, *flags)
    assert asked == [Sampling(**settings)] * 2


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A detector with random weights that gives high scores."""
    torch.manual_seed(4)
    path = tmp_path_factory.mktemp("weights") / "random.pt"
    torch.save({"model": detector(NAMES), "ema": None}, path)
    return path


def test_embed_in_batches(nanochat, tmp_path, weights, monkeypatch):
    monkeypatch.setattr(pictures, "EMBED_BATCH", 2)
    names = [str(ROOT / f"nanochat/assets/pictures/{i}.png") for i in (0, 1, 2, 0, 1)]
    out, options = (
        tmp_path / "e.npz",
        ("--layer", "p4", "--weights", weights, "--image-size", "64", "--dtype", "float32"),
    )
    assert "5 x 96 embeddings" in nanochat("embed", *names, "-o", out, *options).out
    expected = YOLOv9Plus(weights, image_size=64).get_image_embeddings(names, layer="p4")
    assert expected[:3].std(0).max() > 0.01  # three different pictures
    with np.load(out) as saved:
        torch.testing.assert_close(torch.from_numpy(saved["embeddings"]), expected, rtol=1e-3, atol=1e-4)
        assert saved["files"].tolist() == names
    out.unlink()
    assert "no file gone.png" in nanochat("embed", *names, "gone.png", "-o", out, *options, code=2).err
    assert list(tmp_path.iterdir()) == []


def test_detect(nanochat, tmp_path, weights):
    SCENE.save(tmp_path / "scene.png")
    words, options = ("detect", tmp_path / "scene.png", "-o"), ("--weights", weights, "--image-size", "96")
    expected = YOLOv9Plus(weights, image_size=96).detect(SCENE)
    lines = nanochat(*words, tmp_path / "d.json", *options).out.splitlines()
    found = json.loads((tmp_path / "d.json").read_text())
    assert len(found) == len(expected) == len(lines) - 1 > 0
    for row, line, detection in zip(found, lines, expected, strict=False):
        assert row["box"] == pytest.approx(detection.box, abs=1e-3) and row["class_name"] in NAMES.values()
        assert line.split("  ")[0].strip() == row["class_name"]
    nanochat(*words, tmp_path / "d.png", *options)
    drawn = np.asarray(Image.open(tmp_path / "d.png"))
    assert drawn.shape == (60, 90, 3) and (drawn != np.asarray(SCENE)).any()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.json", "d.png", "scene.png"]


def test_embed_with_the_encoder_of_a_checkpoint(nanochat, tmp_path):
    """Of the map that its decoder reads, where no other one is named."""
    for name, words in (("e.npz", ("shapes", "--layer", "4")), ("f.npz", (SHIPPED["shapes"],)), ("g.npz", ("shapes",))):
        nanochat("embed", PICTURE, "-o", tmp_path / name, "--dtype", "float32", "--weights", *words)
    vectors = [np.load(tmp_path / name)["embeddings"] for name in ("e.npz", "f.npz", "g.npz")]
    seen = Agent.load("shapes").model.vision_encoder.get_image_embeddings(PICTURE, layer=4)
    assert (vectors[0] == vectors[1]).all() and (vectors[0] == vectors[2]).all()
    assert vectors[0] == pytest.approx(seen.numpy(), abs=1e-5)
    for words in (["embed", "--layer", "head", "-o", "h.npz"], ["detect", "-o", "h.png"]):
        error = nanochat(*words[:-1], tmp_path / words[-1], PICTURE, "--weights", "shapes", code=2).err
        assert "no detection head" in error and "0..4" in error and error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["e.npz", "f.npz", "g.npz"]


def test_a_missing_device_is_named():
    for device in ("cuda:99", "tpu"):
        with pytest.raises(ValueError, match=f"the device {device} cannot be used .*: use cpu") as caught:
            YOLOv9Plus("yolov9t.yaml", device=device)
        assert "\n" not in str(caught.value)


def test_tokenizer(nanochat, tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox\n" * 5)
    nanochat("tokenizer", tmp_path / "a.txt", "-o", tmp_path / "t.json", "--vocab-size", "280")
    from nanochat.tokenizer import Tokenizer

    assert Tokenizer.load(tmp_path / "t.json").decode([*Tokenizer.load(tmp_path / "t.json").encode("fox é")]) == "fox é"


def test_a_packed_checkpoint_has_no_paths(nanochat, tmp_path):
    from nanochat.checkpoint import load_checkpoint, save_checkpoint

    model, vocabulary, training = load_checkpoint(SHIPPED["shapes"])
    secret = tmp_path / "secret"
    training["recipe"] |= {"data": f"{secret}/photos", "encoder": f"{secret}/a.pt", "tokenizer": f"{secret}/t.json"}
    training["earlier"] = [{"recipe_name": "folder", "data": f"{secret}/first"}]
    save_checkpoint(tmp_path / "mine", model, vocabulary, training, resume={"x": torch.zeros(3)})
    assert (tmp_path / "mine/resume.safetensors").exists()
    nanochat("pack", tmp_path / "mine", "-o", tmp_path / "out")
    packed = (tmp_path / "out/training.json").read_text()
    assert "secret" not in packed and not (tmp_path / "out/resume.safetensors").exists()
    recipe, earlier = json.loads(packed)["recipe"], json.loads(packed)["earlier"]
    assert (recipe["data"], recipe["encoder"], earlier[0]["data"]) == ("photos", "a.pt", "first")


def test_a_packed_checkpoint_is_half_the_size_and_answers_the_same(nanochat, tmp_path):
    nanochat("pack", "shapes", "-o", tmp_path / "full", "--no-half")
    nanochat("pack", tmp_path / "full", "-o", tmp_path / "half")
    assert json.loads((tmp_path / "half/training.json").read_text())["recipe"]["data"] == "easy_vqa"
    full, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("full", "half"))
    assert half < 0.6 * full
    answers = [nanochat("ask", PICTURE, QUESTION, "--checkpoint", tmp_path / name).out for name in ("full", "half")]
    assert answers == ["red\n", "red\n"]
    assert "exists" in nanochat("pack", "shapes", "-o", tmp_path / "half", code=2).err


def test_old_names_of_commands_work_and_say_so(nanochat, tmp_path):
    lines = nanochat("demos", "--episodes", "0", "-o", tmp_path / "x", code=2).err.splitlines()
    assert len(lines) == 2 and lines[0].endswith("use `nanochat record`") and "episodes" in lines[1]


def test_eval_writes_the_promised_json(nanochat, tmp_path):
    pytest.importorskip("easy_vqa")
    nanochat("eval", "shapes", "easy_vqa", "--split", "test", "--limit", "60", "--json", tmp_path / "r.json")
    result = json.loads((tmp_path / "r.json").read_text())
    row = result["accuracy"]
    assert result["n"] == 60 and set(row) == {"aligned", "shuffled", "blind", "majority", "ci95"}
    low, high = row["ci95"]
    assert 0 <= low <= row["aligned"] <= high <= 1
    assert row["aligned"] > 0.9 > row["shuffled"] and row["majority"] < 0.6


def test_eval_of_captions(nanochat, tmp_path):
    """References are the model's own captions, so aligned pictures score 100 % and other pictures less; and the reverse."""
    pytest.importorskip("pycocoevalcap")
    images = {"0.png": ROOT / "nanochat/assets/demo/frame.png", "1.png": PICTURE}
    captions = [nanochat("caption", image, "--checkpoint", "robot").out.strip() for image in images.values()]
    for name, image in images.items():
        Image.open(image).save(tmp_path / name)

    def bleu_and_cider(captions):
        rows = [{"image": name, "captions": [text]} for name, text in zip(images, captions, strict=True)]
        (tmp_path / "dev.jsonl").write_text("\n".join(map(json.dumps, rows)))
        nanochat("eval", "robot", tmp_path, "--split", "dev", "--json", tmp_path / "r.json")
        result = json.loads((tmp_path / "r.json").read_text())
        assert {"aligned", "shuffled", "blind", "majority", "ci95"} == set(result["bleu4"]) == set(result["cider"])
        return result["bleu4"], result["cider"]

    for row in bleu_and_cider(captions):
        assert row["aligned"] > 1.5 * max(row["shuffled"], row["blind"])
    for row in bleu_and_cider(captions[::-1]):
        assert row["shuffled"] > 1.5 * row["aligned"]


def check_demo(printed, out):
    sheet, gif = Image.open(out), Image.open(out.with_suffix(".gif"))
    assert sheet.width > 800 and len(np.unique(np.asarray(sheet.convert("L")))) > 100
    assert gif.n_frames > 5
    about = json.loads((ROOT / "nanochat/assets/demo/questions.json").read_text())
    of_robot = " ".join(printed[printed.index("robot:") :].split())
    assert of_robot.count(" correct ") == 1 + len(about["questions"])


@needs_simulator
def test_demo_controls_the_arm(nanochat, tmp_path):
    printed = nanochat("demo", "-o", tmp_path / "new" / "sheet.png", "--device", "cpu").out
    check_demo(printed, tmp_path / "new" / "sheet.png")
    assert "success after" in printed and "no success" not in printed


def test_demo_without_a_simulator_shows_a_recorded_episode(nanochat, tmp_path, monkeypatch):
    def missing():
        raise SimulatorError("the simulator cannot draw here: apt-get install libegl1")

    monkeypatch.setattr("nanochat.metaworld.simulator.import_metaworld", missing)
    printed = nanochat("demo", "-o", tmp_path / "sheet.png").out
    check_demo(printed, tmp_path / "sheet.png")
    assert "apt-get install libegl1" in printed and "a recorded episode" in printed


def odd_pictures():
    """Valid pictures that are not 8-bit RGB."""
    picture = Image.open(PICTURE).convert("RGB")
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    return {
        "cmyk": (picture.convert("CMYK"), "JPEG", {"quality": 95}),
        "16-bit": (Image.fromarray(deep), "PNG", {}),
        "palette": (picture.convert("P", palette=Image.Palette.ADAPTIVE), "PNG", {}),
        "grey": (picture.convert("L"), "PNG", {}),
        "alpha": (picture.convert("RGBA"), "PNG", {}),
        "exif": (picture, "PNG", {"exif": exif}),
    }


@pytest.mark.parametrize(("name", "picture"), odd_pictures().items())
def test_odd_pictures_work(nanochat, tmp_path, name, picture):
    image, format, options = picture
    (tmp_path / name).write_bytes(encoded(image, format, **options))
    if name in ("16-bit", "grey"):  # they have no colour
        assert nanochat("ask", *SHAPES, tmp_path / name, "what shape is present?").out.strip() == "circle"
    else:
        assert nanochat("ask", *SHAPES, tmp_path / name, QUESTION).out.strip() == "red"


BROKEN = {
    "empty": (b"", "is empty"),
    "truncated": (Path(PICTURE).read_bytes()[:-40], "damaged or truncated"),
    "animated": (animated("GIF"), "animated"),
    "1x1": (encoded(Image.new("RGB", (1, 1))), "1 x 1 pixels"),
    "bomb": (claims(20_000, 20_000), "larger than the limit"),
}


@pytest.mark.parametrize(("name", "content"), BROKEN.items())
def test_broken_pictures_are_one_line(nanochat, tmp_path, name, content):
    (tmp_path / name).write_bytes(content[0])
    printed = nanochat("ask", *SHAPES, PICTURE, tmp_path / name, QUESTION, "--each", code=2)
    assert printed.err.startswith(f"error: {tmp_path / name} ") and content[1] in printed.err
    assert printed.out == "" and printed.err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == [name]


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "words.txt").write_text("no picture")
    return tmp_path / "words.txt"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ask", "no/such.png", QUESTION], "there is no file no/such.png"),
        (["ask", "TEXT", QUESTION], "is not an image"),
        (["ask", "FOLDER", QUESTION], "is a folder"),
        (["ask", PICTURE], "ask needs at least one picture, then a question"),
        (["ask", PICTURE, " "], "the question is empty"),
        (["ask", PICTURE, QUESTION, "--checkpoint", "FOLDER"], "no manifest.json"),
        (["ask", PICTURE, QUESTION, "--temperature", "-1"], "temperature"),
        (["ask", PICTURE, QUESTION, "--max-new-tokens", "5000"], "do not fit the context"),
        (["ask", PICTURE, QUESTION, "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["ask", PICTURE, "why " * 300], "do not fit the context"),
        (["embed", PICTURE, "-o", "FOLDER/e.txt", "--weights", "yolov9t.yaml"], ".npz"),
        (["embed", PICTURE, "-o", "FOLDER/none/e.npz"], "write FOLDER/none/e.npz: there is no folder FOLDER/none"),
        (["detect", PICTURE, "-o", "FOLDER/none/d.png"], "write FOLDER/none/d.png: there is no folder FOLDER/none"),
        (["detect", PICTURE, "-o", "FOLDER/d.png", "--weights", "FOLDER"], "no manifest.json"),
        (["demo", "-o", "FOLDER"], "should end in .png"),
        (["demo", "--task", "fly"], "fly"),
        (["record", "--tasks", "fly", "-o", "FOLDER/x"], "fly"),
        (["record", "--noise", "-1", "-o", "FOLDER/x"], "noise"),
        (["record", "--noise", "0.1", "--policy", "robot", "-o", "FOLDER/x"], "give one of --policy and --noise"),
        (["record", "--policy", "robot", "--cameras", "topview", "-o", "FOLDER/x"], "looks through corner2"),
        (["record", "--image-size", "100", "-o", "FOLDER/x"], "--image-size must be a positive multiple of 32"),
        (["record", "--episodes", "0", "-o", "FOLDER/x"], "episodes"),
        (["record", "-o", "FOLDER"], "exists"),
        (["rollout", "shapes"], "cannot act"),
        (["rollout", "robot", "--execute", "11"], "execute"),
        (["rollout", "robot", "--episodes", "0"], "episodes"),
        (["rollout", "robot", "--execute", "11", "--record", "FOLDER/gifs"], "execute"),
        (["rollout", "robot", "--device", "tpu"], "device must be auto, cpu, cuda"),
        (["demo", "-o", "FOLDER/x.png", "--device", "tpu"], "device must be auto, cpu, cuda"),
        (["demo", "-o", "FOLDER/x.png", "--task", "mt10"], "use nanochat rollout for several"),
        (["policy-server", "robot", "--device", "tpu"], "device must be auto, cpu, cuda"),
        (["policy-server", "robot", "--execute", "11"], "execute must lie in 1..10"),
        (["policy-server", "shapes"], "cannot act"),
        (["train", "robot"], "--data"),
        (["train", "robot", "--data", "FOLDER", "--out", "FOLDER/run"], "FOLDER"),
        (["detect", PICTURE, "-o", "FOLDER/d.png", "--weights", "no.pt"], "there is no file no.pt"),
        (["detect", PICTURE, "-o", "FOLDER/d.png", "--weights", "yolov9t.yaml", "--conf", "3"], "conf"),
        (["detect", "TEXT", "-o", "FOLDER/d.png", "--weights", "yolov9t.yaml"], "is not an image"),
        (["eval", "shapes", "no_such_data"], "cannot read the dataset"),
        (["eval", "nowhere", "easy_vqa"], "no such folder"),
        (["eval", "shapes", "TEXT", "--json", "FOLDER/none/r.json"], "write FOLDER/none/r.json: there is no folder"),
        (["eval", "shapes", "TEXT", "--json", "FOLDER"], "FOLDER is a folder, expected the name of a file"),
        (["eval", "shapes", "TEXT", "--batch-size", "0"], "batch size must be at least 1, got 0"),
        (["push", "nowhere", "me/model"], "no such folder"),
        (["ask", PICTURE, "what?", "--checkpoint", "TEXT"], "it is a file"),
        (["caption", PICTURE, "what is it?"], "a question is for nanochat ask"),
        (["cache", "--cache", "TEXT"], "is a file, expected the cache folder"),
        (["eval", "shapes", "easy_vqa", "--limit", "0"], "--limit must be at least 1, got 0"),
        (["train", "folder", "--data", "FOLDER", "--out", "FOLDER/run"], "cannot read the dataset"),
        (["train", "folder", "--out", "FOLDER/run"], "--data"),
        (["import-upstream", "FOLDER", "-o", "FOLDER/up"], "no model_NNNNNN.pt"),
        (["tokenizer", "TEXT", "-o", "FOLDER/t.json", "--vocab-size", "3"], "at least 266"),
        (["tokenizer", "TEXT", "-o", "FOLDER/none/t.json"], "write FOLDER/none/t.json: there is no folder"),
    ],
)
def test_wrong_input_is_one_line_exit_code_2_and_nothing_written(nanochat, text_file, words, message):
    folder = text_file.parent / "empty"
    folder.mkdir()
    *words, message = [str(w).replace("TEXT", str(text_file)).replace("FOLDER", str(folder)) for w in (*words, message)]
    error = nanochat(*words, code=2).err
    error = "".join(line for line in error.splitlines(keepends=True) if "weights: they are random" not in line)
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert list(folder.iterdir()) == []


def test_eval_refuses_or_counts_missing_pictures(nanochat, tmp_path):
    rows = [
        {"image": "0.png", "question": QUESTION, "answer": "red"},
        {"image": "gone.png", "question": "a", "answer": "b"},
    ]
    Image.open(PICTURE).save(tmp_path / "0.png")
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "1 row left out" in nanochat("eval", "shapes", tmp_path).out
    assert "gone.png" in nanochat("eval", "shapes", tmp_path, "--strict", code=2).err


def test_push(nanochat, monkeypatch):
    pushed = []
    monkeypatch.setattr(
        "nanochat.packing.push_checkpoint", lambda *words, private: pushed.append((*words, private)) or "URL"
    )
    assert nanochat("push", "shapes", "me/model").out == "URL\n"
    nanochat("push", "runs/mine", "me/model", "--public")
    assert pushed == [("shapes", "me/model", True), ("runs/mine", "me/model", False)]


def test_help_lists_every_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["nanochat", "--help"])
    with pytest.raises(SystemExit):
        cli.main()
    words = set(re.findall(r"[\w-]+", capsys.readouterr().out))
    assert {"train", *RECIPES, *cli.COMMANDS} <= words
    assert not words & set(cli.OLD_NAMES)


def test_an_error_without_a_message_is_named_by_its_type(nanochat, monkeypatch):
    def fails(*args):
        raise MemoryError

    monkeypatch.setattr("nanochat.checkpoint.load_checkpoint", fails)
    monkeypatch.setattr("nanochat.checkpoint.load_checkpoint", fails)
    assert nanochat("ask", *SHAPES, PICTURE, QUESTION, code=2).err == "error: MemoryError\n"


def test_a_closed_pipe_is_not_an_error():
    """As in `nanochat ask ... | true`."""
    reader, writer = os.pipe()
    os.close(reader)
    for words in (["ask", PICTURE, QUESTION], ["push", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "nanochat", *words],
            stdout=writer, stderr=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert done.stderr == ""
    os.close(writer)


def help_of_flags(text):
    """[(flag, its help without defaults)] of a --help text."""
    lines = [line.strip("│").rstrip() for line in text.splitlines() if line.startswith("│")]
    entries, found = [], []
    for line in lines:
        if re.match(r" (-|[A-Z]{3,})", line):
            entries.append([line])
        elif entries and line.startswith("     "):
            entries[-1].append(line)
    for first, *others in entries:
        flag, _, text = first.strip().partition("  ")
        found.append((flag, re.sub(r"\((default|required)[^)]*\)?", "", " ".join([text, *others])).strip()))
    return found


@pytest.mark.parametrize(
    "words", [["train"], *(["train", name] for name in RECIPES), *([name] for name in cli.COMMANDS if name != "train")]
)
def test_every_flag_has_a_help_line(words):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "80"}
    command = [sys.executable, "-m", "nanochat", *words, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "usage: nanochat" in done.stdout
    flags = help_of_flags(done.stdout)
    assert len(flags) >= {"train": 1, "models": 2}.get(words[-1], 3)
    assert [flag for flag, text in flags if len(text.split()) < 2 and not flag.startswith("-h")] == []


def test_a_flag_without_help_is_found():
    text = (
        "│ --n-layer INT      (default: 3)    │\n│ --steps INT   The number of steps. │\n│ --very-long-name INT   │\n"
    )
    text += "│                    (default: 4)    │\n"
    assert [text for _, text in help_of_flags(text)] == ["", "The number of steps.", ""]


def test_a_gpu_is_the_default_where_there_is_one():
    import inspect

    for command in (cli.demo, cli.rollout, cli.policy_server, cli.evaluate):
        assert inspect.signature(command).parameters["device"].default == "auto"


def test_unknown_commands_exit_with_2():
    done = subprocess.run(
        [sys.executable, "-m", "nanochat", "fly"],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_a_bug_is_not_reported_as_a_users_mistake(monkeypatch, capsys):
    """A plain ValueError from below is no message for users: exit 1, one line, and the traceback on request."""

    def broken(*args, **kwargs):
        raise ValueError("shapes (2,3) and (4,) are not aligned")

    monkeypatch.setattr("nanochat.packing.pack_checkpoint", broken)
    monkeypatch.setattr("sys.argv", ["nanochat", "pack", "shapes", "-o", "x"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and len(lines) == 1
    assert lines[0].startswith("bug in nanochat: ValueError: shapes (2,3)") and "NANOCHAT_DEBUG=1" in lines[0]
    monkeypatch.setenv("NANOCHAT_DEBUG", "1")
    with pytest.raises(ValueError, match="not aligned"):
        cli.main()
