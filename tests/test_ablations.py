"""The rows of the ablations on 30 small pictures: what is recorded is what was trained, and nothing is done twice."""

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from nanochat.agent import Agent
from nanochat.errors import UserError
from nanochat.training.recipes import Photos
from nanochat.training.run import Run
from nanochat.vision.timm_encoder import TimmEncoder, described

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import ablations
import ablations_report
import latency
from ablations_rows import COMPARISONS, rows_of

SIZE, COLOURS = 64, ("red", "green", "blue")
ROWS = ("cross", "reward", "grid49-minutes")  # and grid49-parameters, which the last one needs


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """22 pictures to train on and 8 to score, each of one colour."""
    folder, rng = tmp_path_factory.mktemp("captions"), np.random.default_rng(0)
    for split, n in (("train", 22), ("dev", 8)):
        lines = []
        for i in range(n):
            name, colour = f"{split}-{i}.png", i % 3
            pixels = rng.integers(0, 60, (SIZE, SIZE, 3), np.uint8)
            pixels[..., colour] += 180
            Image.fromarray(pixels).save(folder / name)
            lines.append(
                {"image": name, "captions": [f"a picture of {COLOURS[colour]} noise", f"all is {COLOURS[colour]}"]}
            )
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.fixture(scope="module")
def small(captions, tmp_path_factory):
    """(arguments, recipe) of rows that take a moment: a small network of timm instead of EfficientNet-Lite2."""
    torch.manual_seed(0)
    encoder, place = TimmEncoder(described("test_byobnet", [0.5] * 3, [0.5] * 3, SIZE)), tmp_path_factory.mktemp("rows")
    torch.save(encoder.net.state_dict(), place / "weights.pth")
    args = ablations.Args(
        data=str(captions), rows=ROWS, epochs=3, reward_steps=2, rounds=2, out=place / "out", docs=place / "docs"
    )
    shape = dict(n_layer=1, n_head=2, n_embd=32, vocab_size=290, sequence_len=96, image_size=SIZE, images_per_step=8)
    recipe = replace(
        ablations.small_recipe(args), encoder=f"timm:test_byobnet={place / 'weights.pth'}", dtype="float32",
        questions_per_image=2, **shape,
    )  # fmt: skip
    return args, recipe


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Without what takes long and is tested elsewhere: loss curves, and the peer whose time stands beside the answers'."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochat.training.run.history_files", lambda *_: {})
        patch.setattr(latency.torchvision.models, "resnet18", torch.nn.Identity)
        yield


@pytest.fixture(scope="module")
def done(small):
    """{row: its record}, after all rows were run."""
    args, recipe = small
    ablations.main(args, recipe)
    return {file.stem: json.loads(file.read_text()) for file in (args.docs / "ablations").iterdir()}


def numbers_in(folder: Path) -> dict[str, int]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).numel() for name in file.keys()}


def test_records_say_what_was_trained(small, done):
    args, _ = small
    assert set(done) == {*ROWS, "grid49-parameters"}
    for name, record in done.items():
        training = json.loads((args.out / name / "training.json").read_text())
        numbers = numbers_in(args.out / name)
        decoder = sum(n for key, n in numbers.items() if not key.startswith("vision_encoder."))
        assert record["trained"] == decoder < record["parameters"]  # the encoder is frozen
        assert 0 < record["minutes"] and record["steps"] == training["steps"]
        assert record["scores"]["n"] == record["scores"]["n_images"] == 8
        assert record["scores"]["bleu4"]["shuffled"] is not None and record["scores"]["cider"]["blind"] is not None
        assert set(record["ms"]) == {"look", "caption", "question", latency.PEER} and min(record["ms"].values()) > 0
        assert record["vectors"][0] == 49
    assert done["cross"]["steps"] == 9  # 3 epochs of 22 pictures, 8 a step


def test_rows_of_equal_cost_have_it(small, done):
    cross, like, fast = done["cross"], done["grid49-parameters"], done["grid49-minutes"]
    args, recipe = small
    wider = replace(recipe, fusion="prefix", n_embd=done["grid49-parameters"]["settings"]["n_embd"] + 4)
    assert abs(like["trained"] / cross["trained"] - 1) < 0.1
    # no other width is closer: a step of width changes the parameters by more than twice what is left
    study = ablations.open_study(args, recipe)
    assert ablations.matched_width(wider, recipe) == like["settings"]["n_embd"]
    assert ablations.matched_width(recipe, recipe) == recipe.n_embd
    assert fast["trained"] == like["trained"]
    assert fast["steps"] == max(1, round(like["steps"] * cross["minutes"] / like["minutes"]))
    assert study.rows["grid49-minutes"].needs == ("grid49-parameters", "cross")


def test_reward_steps_go_on_from_the_row_without_them(small, done):
    args, _ = small
    history = json.loads((args.out / "reward/training.json").read_text())["history"]
    before = json.loads((args.out / "cross/training.json").read_text())["history"]
    losses = [line for line in before if "loss" in line]
    assert losses and [line for line in history if "loss" in line] == losses
    assert (
        done["reward"]["steps"] == done["cross"]["steps"] + 2 and done["reward"]["minutes"] > done["cross"]["minutes"]
    )
    assert any("reward" in line for line in history)


def test_a_row_that_is_done_is_not_repeated(small, done, monkeypatch):
    args, recipe = small
    monkeypatch.setattr(ablations, "Run", None)
    page = args.docs / ablations_report.PAGE
    page.unlink()
    ablations.main(args, recipe)
    assert page.exists()
    with pytest.raises(UserError, match=r"cross.json was made with other settings \(epochs was 3, now 4"):
        ablations.main(replace(args, epochs=4), replace(recipe, epochs=4))


def test_a_stopped_row_goes_on(small, done, tmp_path, monkeypatch):
    args, recipe = small
    args = replace(args, out=tmp_path, rows=("cross",), docs=tmp_path)
    recipe = replace(recipe, tokenizer=str(tmp_path / "tokenizer.json"), save_every=3)
    take_step = Run.take_step

    def stop_at_4(run):
        if run.step == 4:
            raise KeyboardInterrupt
        return take_step(run)

    study = ablations.open_study(args, recipe)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "take_step", stop_at_4)
        ablations.run_row(study, study.rows["cross"])
    assert not (tmp_path / "ablations/cross.json").exists()
    steps = []
    monkeypatch.setattr(Run, "take_step", lambda run: steps.append(run.step) or take_step(run))
    ablations.run_row(study, study.rows["cross"])
    assert steps == [3, 4, 5, 6, 7, 8]
    assert json.loads((tmp_path / "ablations/cross.json").read_text())["scores"] == done["cross"]["scores"]


def test_the_page_shows_every_row_and_its_controls(small, done):
    args, _ = small
    page = (args.docs / ablations_report.PAGE).read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len({line.count("|") for line in rows}) == 1
    for record in done.values():
        score = record["scores"]["bleu4"]
        assert f"| **{score['aligned']:.1f}** | {score['ci95'][0]:.1f} .. {score['ci95'][1]:.1f} | " in page
    assert "Not run: `head`, `pooled`, `grid16`, `grid49`." in page
    assert str(args.out.parent) not in page  # no paths of this machine
    assert Image.open(args.docs / ablations_report.PLOT).size[0] > 1000


def test_the_minutes_are_said_before_the_first_run(small, tmp_path, monkeypatch, capsys):
    args, recipe = small
    args = replace(args, out=tmp_path, rows=("cross",), docs=tmp_path)
    recipe = replace(recipe, tokenizer=str(tmp_path / "tokenizer.json"), images_per_step=2)
    monkeypatch.setattr(ablations, "run_row", lambda study, row: print("the run"))
    monkeypatch.setattr(ablations, "try_row", lambda *_: ablations.Cost(60, 600, 120))
    ablations.main(args, recipe)
    printed = capsys.readouterr().out
    assert re.search(r"together\W+13\b.*the run", printed, re.S)


def test_all_rows_of_the_study_exist():
    rows = rows_of("runs/distill", "yolov9t.yaml", 100)
    assert set(rows) == {name for names in COMPARISONS.values() for name in names}
    assert set(rows) - set(rows_of("", "yolov9t.yaml", 100)) == {"yolo-taught", "yolo-taught-trained"}
    known = list(rows)
    for number, row in enumerate(rows.values()):
        replace(Photos(), **row.changes).check()
        assert set(row.needs) <= set(known[:number])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(data=""), "need the path of your captions: --data PATH"),
        (dict(rows=("crosss",)), "no row 'crosss'; there are cross, head"),
        (dict(rows=("yolo-taught",)), "no row 'yolo-taught' without --taught"),
        (dict(samples=1), "found 1 picture to score, expected 2 or more"),
        (dict(data="QUESTIONS"), "holds questions, expected pictures with captions only"),
    ],
)
def test_wrong_arguments(small, captions, changes, message):
    args, recipe = small
    if changes.get("data"):
        data = captions.with_name("questions") / "questions.csv"
        shutil.copytree(captions, data.parent)
        data.write_text("".join(["file,question,answer\n", *(f"dev-{i}.png,what?,x\n" for i in range(8))]))
        changes = dict(data=str(data))
    with pytest.raises(UserError, match=message):
        ablations.open_study(replace(args, **changes), recipe)


def test_a_row_that_cannot_run_is_named_first(small, tmp_path):
    args, recipe = small
    args = replace(args, out=tmp_path, docs=tmp_path, taught=str(tmp_path / "none"), rows=("yolo-taught",))
    with pytest.raises(UserError, match="the row yolo-taught cannot run: .*none"):
        ablations.main(args, replace(recipe, tokenizer=str(tmp_path / "tokenizer.json")))


def test_a_row_that_goes_on_from_a_checkpoint_elsewhere_is_named_first(small, done, tmp_path):
    """The records may be of another machine."""
    args, recipe = small
    shutil.copytree(args.docs, tmp_path / "docs")
    (tmp_path / "docs/ablations/reward.json").unlink()
    args = replace(args, out=tmp_path / "out", docs=tmp_path / "docs", rows=("reward",))
    with pytest.raises(UserError, match=r"row reward cannot run: it goes on from .*out/cross, .*delete .*cross.json"):
        ablations.main(args, recipe)


def test_latency_times_whole_answers(small, done, captions):
    args, _ = small
    agent = Agent.load(str(args.out / "cross"))
    picture = str(captions / "dev-0.png")
    prompt = latency.Prompt("Describe the image.", 7)
    vectors = agent.look([picture])
    text = "".join(agent.ask("Describe the image.", vectors))
    assert latency.reply(agent, picture, latency.Prompt("Describe the image.")) == text
    counted = []
    generate = latency.Engine.generate
    latency.Engine.generate = lambda *a, **k: counted.append(generate(*a, **k)) or counted[-1]
    try:
        times = latency.measure(agent, [picture], {"caption": prompt}, 3)
    finally:
        latency.Engine.generate = generate
    assert {len(row) for rows in counted for row in rows} == {7} and len(counted) == 3 + latency.WARM_UP
    assert {name: len(values) for name, values in times.items()} == {"look": 3, "caption": 3, latency.PEER: 3}
    assert list(latency.prompts_of(agent, "what?")) == ["caption"]


def test_a_row_whose_minutes_are_lost_says_so(small, done):
    args, recipe = small
    run = ablations.Run(
        replace(
            ablations.recipe_of(ablations.open_study(args, recipe), ablations.rows_of("", "yolov9t.yaml", 2)["cross"]),
            resume=True,
        )
    )
    with pytest.raises(UserError, match="delete it"):
        ablations.processor_minutes(run)
    ablations.release_folder(run.out)
