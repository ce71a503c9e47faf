"""Answering a dataset under the control conditions, and the scores next to each other."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from nanochat.data import load_dataset
from nanochat.data.sample import Dataset, Sample, caption_sample, vqa_sample
from nanochat.errors import UserError
from nanochat.evaluation.held_out import HELD_OUT, default_split, training_overlap
from nanochat.evaluation.pictures import Answers, answer_dataset, batches, evaluate_dataset, notes_of, score, table
from nanochat.files import DataError
from nanochat.vision.images import open_image
from tests.data_files import png, write_lines, write_pictures

CONTEXT = 64


def samples():
    return [vqa_sample(f"{i // 2}.png", f"q{i}", answer) for i, answer in enumerate(["red", "yes", "blue", "no"])]


class NumberAgent:
    """Sees the number in the name of a picture: "7.png" is a vector of sevens. It answers with the number that it sees and
    the number of tokens that it may use. A question takes a token per letter."""

    model = SimpleNamespace(config=SimpleNamespace(sequence_len=CONTEXT))

    def prompt(self, messages):
        return list(messages[-1]["content"][-1]["text"])

    def look(self, names):
        return torch.stack([torch.full((1, 3), float(name.removesuffix(".png"))) for name in names])

    def answer_all(self, conversations, vectors, max_new_tokens, beams=1):
        assert len(conversations) == len(vectors) and all(v.shape[1:] == (1, 3) for v in vectors)
        return [f"{'+'.join(f'{picture.unique().item():.0f}' for picture in v)} {max_new_tokens}" for v in vectors]


def test_vqa_scores_by_hand():
    by_condition = {
        "aligned": ["Red.", "yes", "blue", "yes"],
        "shuffled": ["red", "no", "red", "yes"],
        "blind": ["no"] * 4,
    }
    result = score(Answers(Dataset("toy", "vqa", samples(), skipped=3), by_condition))
    row = result["accuracy"]
    assert (row["aligned"], row["shuffled"], row["blind"], row["majority"]) == (0.75, 0.25, 0.25, 0.25)
    assert row["ci95"][0] <= 0.75 <= row["ci95"][1]
    assert (result["n"], result["n_images"], result["skipped"]) == (4, 2, 3)


def test_caption_scores():
    pytest.importorskip("pycocoevalcap")
    captions = [["a dog runs on the beach"], ["two men ride their bikes"], ["a red car on the street"]]
    data = Dataset("toy", "caption", [caption_sample(f"{i}.png", c) for i, c in enumerate(captions)])
    right = [c[0] for c in captions]
    result = score(
        Answers(data, {"aligned": right, "shuffled": right[1:] + right[:1], "blind": ["nothing at all"] * 3})
    )
    assert result["bleu4"]["aligned"] == pytest.approx(100, abs=0.1)
    assert result["bleu4"]["shuffled"] < 20 and result["bleu1"]["blind"] < 1
    assert result["cider"]["aligned"] > 500 > 100 > result["cider"]["shuffled"]
    assert result["bleu2"].keys() == result["cider"].keys() == {"aligned", "shuffled", "blind", "majority", "ci95"}
    row = result["exact_match"]
    assert (row["aligned"], row["shuffled"], row["majority"]) == (1, 0, pytest.approx(1 / 3))
    for name in ("bleu1", "bleu2", "bleu3", "bleu4", "cider"):
        assert result[name]["ci95"][0] <= result[name]["aligned"] + 1e-6 and result[name]["ci95"][1] > 90


def numbers(answers, condition):
    return [answer.split()[0] for answer in answers.by_condition[condition]]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_what_the_model_sees_under_each_condition(batch_size):
    """Two questions about each of six pictures: both see the same other picture, and every picture is used."""
    data = Dataset("toy", "vqa", [vqa_sample(f"{1 + i % 6}.png", f"q{i}", "no") for i in range(12)])
    answers = answer_dataset(NumberAgent(), data, batch_size)
    own = [str(1 + i % 6) for i in range(12)]
    assert numbers(answers, "aligned") == own
    assert numbers(answers, "blind") == ["0"] * 12
    shuffled = numbers(answers, "shuffled")
    assert all(a != b for a, b in zip(own, shuffled, strict=True))
    assert shuffled[:6] == shuffled[6:] and sorted(shuffled[:6]) == own[:6]
    assert answers.by_condition == answer_dataset(NumberAgent(), data, 5).by_condition


def test_single_shows_one_of_several_pictures():
    def pair(i, n):
        content = [{"type": "image"}] * n + [{"type": "text", "text": f"q{i}"}]
        messages = ({"role": "user", "content": content}, {"role": "assistant", "content": "no"})
        return Sample(tuple(f"{10 * i + k}.png" for k in range(1, n + 1)), messages)

    answers = answer_dataset(NumberAgent(), Dataset("toy", "vqa", [pair(i, 2) for i in range(20)]), 3)
    found = [tuple(map(int, shown.split("+"))) for shown in numbers(answers, "single")]
    assert all(shown in ((10 * i + 1, 0), (0, 10 * i + 2)) for i, shown in enumerate(found))
    assert {first > 0 for first, _ in found} == {True, False}  # sometimes the first, sometimes the second
    assert numbers(answers, "single") == numbers(
        answer_dataset(NumberAgent(), Dataset("toy", "vqa", [pair(i, 2) for i in range(20)]), 7), "single"
    )
    assert {"single", "shuffled"} < score(answers)["accuracy"].keys()
    assert any("single shows one of them" in note for note in notes_of(answers))
    mixed = answer_dataset(NumberAgent(), Dataset("toy", "vqa", [pair(0, 2), pair(1, 1)]), 3)
    assert "single" not in mixed.by_condition


def test_scores_by_kind_of_question():
    kinds = ["color", "yes/no", "color", "yes/no"]
    data = Dataset("toy", "vqa", [replace(s, kind=k) for s, k in zip(samples(), kinds, strict=True)])
    by_condition = {"aligned": ["red", "yes", "blue", "yes"], "blind": ["red", "no", "red", "no"]}
    result = score(Answers(data, by_condition))
    color, yes_no = result["kinds"]["color"], result["kinds"]["yes/no"]
    assert (color["n"], color["aligned"], color["blind"], color["majority"]) == (2, 1, 0.5, 0.5)
    assert (yes_no["n"], yes_no["aligned"], yes_no["blind"], yes_no["majority"]) == (2, 0.5, 0.5, 0.5)
    assert result["accuracy"]["aligned"] == 0.75
    shown = Console(width=200)
    with shown.capture() as text:
        shown.print(table(result))
    assert [line.split()[3] for line in text.get().splitlines() if "yes/no" in line] == ["50.0%"]
    assert "kinds" not in score(Answers(Dataset("toy", "vqa", samples()), by_condition))


def test_questions_that_fill_the_context_are_wrong_and_counted():
    """Long questions leave less room for the answer. They do not change the room of the others."""
    questions = {"5.png": "a" * 10, "6.png": "b" * 50, "7.png": "c" * 100, "8.png": "d"}
    data = Dataset("toy", "vqa", [vqa_sample(name, question, "no") for name, question in questions.items()])
    answers = answer_dataset(NumberAgent(), data, batch_size=2)
    assert answers.by_condition["aligned"] == ["5 24", f"6 {CONTEXT - 50}", "", "8 24"]
    assert answers.too_long == 1 and all(found[2] == "" for found in answers.by_condition.values())
    result = score(answers)
    assert result["too_long"] == 1 and result["n"] == 4 and result["accuracy"]["aligned"] == 0


def test_progress_ends_at_its_total():
    data = Dataset("toy", "vqa", samples())
    seen = []
    answer_dataset(NumberAgent(), data, 3, lambda done, total: seen.append((done, total)))
    assert seen == [(n, 7) for n in range(1, 8)]  # 1 batch of pictures, and 2 of questions under each of 3 conditions


def test_batches_hold_rows_of_equal_room():
    assert list(batches([24, 3, 24, 0, 24, -2, 3], 2)) == [(24, [0, 2]), (24, [4]), (3, [1, 6])]


def test_one_picture_has_no_shuffled_condition():
    data = Dataset("toy", "vqa", [vqa_sample("5.png", "a", "x"), vqa_sample("5.png", "b", "y")])
    answers = answer_dataset(NumberAgent(), data)
    assert answers.by_condition.keys() == {"aligned", "blind"}
    result = score(answers)
    assert result["accuracy"]["shuffled"] is None and "too_long" not in result
    cells = {column.header: list(column.cells) for column in table(result).columns}
    assert cells["shuffled"] == [""] and cells["blind"] == ["0.0%"]


def test_the_table_shows_every_control(capsys):
    by_condition = {"aligned": ["red"] * 4, "shuffled": ["no"] * 4, "blind": ["no"] * 4}
    console = Console(width=120)
    console.print(table(score(Answers(Dataset("data/p[a]", "vqa", samples()), by_condition))))
    text = " ".join(capsys.readouterr().out.split())
    assert "data/p[a]: 4 samples" in text and "computed on the test answers, so optimistic" in text
    assert all(word in text for word in ("aligned", "shuffled", "blind", "majority", "95 % interval", "25.0%"))


def test_samples_without_a_picture_are_refused():
    sample = Sample((), ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}))
    with pytest.raises(UserError, match="none of the 1 samples has a picture"):
        answer_dataset(NumberAgent(), Dataset("toy", "vqa", [sample]))


def pair(*names):
    content = [*[{"type": "image"}] * len(names), {"type": "text", "text": "q"}]
    return Sample(names, ({"role": "user", "content": content}, {"role": "assistant", "content": "x"}))


def test_samples_without_and_with_several_pictures():
    """Samples without a picture are counted; pictures that are shown together are not exchanged with each other."""
    text = Sample((), ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}))
    rows = [text, pair("1.png", "2.png"), pair("2.png", "1.png"), pair("3.png"), pair("4.png", "5.png"), text]
    answers = answer_dataset(NumberAgent(), Dataset("toy", "vqa", rows), batch_size=2)
    assert numbers(answers, "aligned") == ["1+2", "2+1", "3", "4+5"]
    assert numbers(answers, "blind") == ["0+0", "0+0", "0", "0+0"]
    group = {"1": "a", "2": "a", "3": "b", "4": "c", "5": "c"}
    for own, other in zip(numbers(answers, "aligned"), numbers(answers, "shuffled"), strict=True):
        assert own.count("+") == other.count("+")
        assert not {group[n] for n in own.split("+")} & {group[n] for n in other.split("+")}
    result = score(answers)
    assert (result["n"], result["n_images"], result["without_picture"]) == (4, 5, 2)
    assert [note.split(":")[0] for note in notes_of(answers)] == [
        "2 of 6 samples have no picture",
        "3 samples have several pictures",
    ]


def test_one_group_of_pictures_has_no_shuffled_condition():
    answers = answer_dataset(NumberAgent(), Dataset("toy", "vqa", [pair("1.png", "2.png"), pair("2.png")]))
    assert answers.by_condition.keys() == {"aligned", "blind"}


def test_short_captions_have_an_exact_match_and_a_note():
    pytest.importorskip("pycocoevalcap")
    rows = [caption_sample(f"{i}.png", [c]) for i, c in enumerate(["a red circle", "a red circle", "a blue square"])]
    right = [sample.answer for sample in rows]
    answers = Answers(Dataset("toy", "caption", rows), {"aligned": right, "blind": right[:1] * 3})
    result = score(answers)
    assert result["exact_match"]["aligned"] == 1 and result["bleu4"]["aligned"] < 10
    assert result["exact_match"]["majority"] == pytest.approx(2 / 3) and result["bleu1"]["majority"] > 50
    assert "3 samples have no caption of 4 words: BLEU-4" in notes_of(answers)[0]
    cells = {column.header: list(column.cells) for column in table(result).columns}
    assert cells["aligned"][0] == "100.0%" and cells["majority"][0] == "66.7%"


def test_a_damaged_picture_is_named_by_its_row(tmp_path):
    class Looking(NumberAgent):
        def look(self, pictures):
            return torch.stack([torch.full((1, 3), float(open_image(picture).width)) for picture in pictures])

    rows = [
        replace(vqa_sample(png(), "q", "a"), where="x.jsonl:1"),
        replace(vqa_sample(b"no", "q", "a"), where="x.jsonl:7"),
    ]
    with pytest.raises(DataError, match="x.jsonl:7: the image bytes"):
        answer_dataset(Looking(), Dataset("toy", "vqa", rows))


# ---- which part is evaluated


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    write_pictures(folder)
    (folder / "captions.csv").write_text("file,caption\n" + "".join(f"images/{i}.png,a{i}\n" for i in range(20)))
    return folder


def test_the_held_out_part_of_the_own_data_is_the_default(photos, tmp_path, monkeypatch):
    own = {"data": str(photos), "train_split": "fit", "val_split": "val"}
    for name in (str(photos), f"{photos}/", str(photos / "captions.csv"), str(photos / "../photos")):
        assert default_split(name, own) == ("val", HELD_OUT)
        assert default_split(name, own | {"data": str(photos / "captions.csv")}) == ("val", HELD_OUT)
    monkeypatch.chdir(tmp_path)
    for data in ("photos", "./photos", "photos/captions.csv"):
        assert default_split(str(photos), own | {"data": data})[0] == "val"
        assert default_split("photos", own | {"data": data})[0] == "val"
    monkeypatch.chdir("/")
    assert default_split(str(photos), own | {"data": "photos"})[0] == "val"  # trained in another working folder
    assert (
        default_split(str(photos), {"data": "/gone/photos"}) == ("all", "all of it") == default_split(str(photos), {})
    )


def test_the_default_of_other_data(photos):
    assert default_split("easy_vqa", {"data": "easy_vqa"})[0] == "test"
    row = {"image": "images/0.png", "question": "q", "answer": "a"}
    for names, expected in ((("train",), "train"), (("train", "dev"), "dev"), (("train", "val", "test"), "test")):
        for name in names:
            write_lines(photos / f"{name}.jsonl", row)
        assert default_split(str(photos), {})[0] == expected
    write_lines(photos / "one.jsonl", row)
    assert default_split(str(photos / "one.jsonl"), {})[0] == "all"


def test_pictures_that_were_trained_on_are_counted(photos, monkeypatch):
    own = {"data": str(photos), "train_split": "fit"}
    monkeypatch.chdir(photos)
    for source in (str(photos), "captions.csv"):
        counts = [training_overlap(load_dataset(source, split).samples, own).trained_on for split in ("all", "val")]
        assert counts == [18, 0]
    assert "18 of these 20 pictures are training pictures" in training_overlap(load_dataset(photos).samples, own).note
    gone = training_overlap(load_dataset(photos).samples, {"data": "/gone"})
    assert gone.trained_on is None and "was not checked" in gone.note
    half = own | {"also": ["/gone"]}  # of what is still here, none is shown
    assert training_overlap(load_dataset(photos, "val").samples, half).trained_on is None
    earlier = [
        {"data": str(photos), "train_split": "fit", "val_split": "val"}
    ]  # of a model that another run started from
    other = {"data": "easy_vqa", "train_split": "val"}
    assert "18 of these 20" in training_overlap(load_dataset(photos).samples, other, earlier).note
    assert default_split(str(photos), other, earlier) == ("val", HELD_OUT)
    assert training_overlap([], {}).note == ""


def test_all_sources_of_a_run_count(photos):
    """Questions made from captions are about the same pictures."""
    questions = f"captions-questions:{photos}"
    for run in ({"data": "/gone", "also": [str(photos)]}, {"data": "/gone", "also": ["/gone", questions]}):
        run |= {"train_split": "fit", "val_split": "val"}
        assert training_overlap(load_dataset(photos).samples, run).trained_on == 18
        assert default_split(str(photos), run) == default_split(questions, run) == ("val", HELD_OUT)
    assert default_split(questions, {})[0] == "all"


def test_eval_says_what_it_evaluates(photos, tmp_path, monkeypatch, capsys):
    """The whole command, with an agent that knows the numbers of pictures."""
    pytest.importorskip("pycocoevalcap")

    class Pictures(NumberAgent):
        training = {"recipe": {"data": str(photos), "train_split": "fit", "val_split": "val"}}

        def look(self, paths):
            return super().look([path.name for path in paths])

    monkeypatch.setattr("nanochat.evaluation.pictures.Agent.load", lambda *_: Pictures())

    def run(split):
        found = evaluate_dataset("x", str(photos), split, json_out=tmp_path / "r.json", batch_size=8)
        assert json.loads((tmp_path / "r.json").read_text()) == found
        return found, " ".join(capsys.readouterr().out.split())

    result, text = run(None)
    assert (result["n"], result["split"], result["training_pictures"]) == (2, "val", 0)
    assert f"split val, {HELD_OUT}" in text and "fields read: file, caption" in text and "training pictures" not in text
    result, text = run("all")
    assert result["training_pictures"] == 18 and "18 of these 20 pictures are training pictures" in text
    assert "was not trained on" not in text
    learnt = {"questions": True, "captions": False, "actions": False}
    monkeypatch.setattr(Pictures, "training", Pictures.training | {"learnt": learnt})
    assert "x was not trained on captions: expect nothing of it" in run("val")[1]
    with pytest.raises(DataError, match="no split 'vall'; it has: all, and fit and val"):
        run("vall")


def test_majority_counts_answers_that_differ_only_in_case_and_punctuation_together():
    rows = samples()
    rows[1] = vqa_sample("0.png", "q1", "Blue.")
    result = score(Answers(Dataset("toy", "vqa", rows), {"aligned": ["a"] * 4, "blind": ["a"] * 4}))
    assert result["accuracy"]["majority"] == 0.5
