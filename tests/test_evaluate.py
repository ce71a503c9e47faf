"""The three ways of asking, and the scores beside each other."""

import numpy as np
import pytest
import torch

from nanochat.assistant import Assistant
from nanochat.data.sample import Dataset, Sample, caption_sample, vqa_sample
from nanochat.evaluation.pictures import Answers, another_image, answer_dataset, batches, score, table
from nanochat.tokenizer import Tokenizer
from tests.conftest import make_model


def samples():
    return [vqa_sample(f"{i // 2}.png", f"q{i}", answer) for i, answer in enumerate(["red", "yes", "blue", "no"])]


def test_another_image_is_never_the_same_and_none_twice():
    names = [f"{i}.png" for i in range(50)]
    other = another_image(names)
    assert sorted(other) == sorted(names) and all(a != b for a, b in zip(names, other, strict=True))
    assert other == another_image(names)


def test_vqa_scores_by_hand():
    said = {"aligned": ["Red.", "yes", "blue", "yes"], "shuffled": ["red", "no", "red", "yes"], "blind": ["no"] * 4}
    result = score(Answers(Dataset("toy", "vqa", samples(), skipped=3), said))
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
    assert result["bleu2"].keys() == result["cider"].keys() == {"aligned", "shuffled", "blind", "ci95"}
    for name in ("bleu1", "bleu2", "bleu3", "bleu4", "cider"):
        assert result[name]["ci95"][0] <= result[name]["aligned"] + 1e-6 and result[name]["ci95"][1] > 90


@pytest.fixture
def assistant():
    """Eyes that see numbers: a picture "7.png" is a vector of sevens. It never stops to speak."""
    tokenizer = Tokenizer.train(["is it red?"], 270)
    special = tokenizer.special("<|image|>")
    assistant = Assistant(make_model(vocab_size=tokenizer.vocab_size, vision_token_id=special), tokenizer)
    assistant.stop_ids = ()
    assistant.look = lambda names: torch.stack([torch.full((1, 12), float(name[:-4])) for name in names])
    return assistant


def test_questions_that_fill_the_context_are_wrong_and_counted(assistant):
    """Long ones get what room there is. What the others are told does not depend on them."""
    shapes = {"5.png": "a" * 10, "6.png": "b" * 50, "7.png": "c" * 100, "8.png": "d"}
    data = Dataset("toy", "vqa", [vqa_sample(name, question, "no") for name, question in shapes.items()])
    room = 64 - len(assistant.prompt(data.samples[1].messages[:-1]))
    assert 0 < room < 24
    answers = answer_dataset(assistant, data, batch_size=2)
    assert answers.too_long == 1 and [said[2] for said in answers.said.values()] == ["", "", ""]
    for i, wanted in ((0, 24), (1, room), (3, 24)):
        seen = assistant.look(data.samples[i].images)
        assert answers.said["aligned"][i] == assistant.answer_all([data.samples[i].messages[:-1]], [seen], wanted)[0]
    result = score(answers)
    assert result["too_long"] == 1 and result["n"] == 4 and result["accuracy"]["aligned"] == 0


def test_batches_hold_rows_of_equal_room():
    assert list(batches([24, 3, 24, 0, 24, -2, 3], 2)) == [(24, [0, 2]), (24, [4]), (3, [1, 6])]


def test_there_is_no_other_picture_than_a_single_one(assistant):
    data = Dataset("toy", "vqa", [vqa_sample("5.png", "a", "x"), vqa_sample("5.png", "b", "y")])
    answers = answer_dataset(assistant, data)
    assert answers.said.keys() == {"aligned", "blind"}
    result = score(answers)
    assert result["accuracy"]["shuffled"] is None and "too_long" not in result
    cells = {column.header: list(column.cells) for column in table(result).columns}
    assert cells["shuffled"] == [""] and cells["blind"] == ["0.0%"]


def test_the_table_shows_every_row_beside_the_answer(capsys):
    from rich.console import Console

    said = {"aligned": ["red"] * 4, "shuffled": ["no"] * 4, "blind": ["no"] * 4}
    console = Console(width=120)
    console.print(table(score(Answers(Dataset("data/p[a]", "vqa", samples()), said))))
    text = capsys.readouterr().out
    assert "data/p[a]: 4 samples" in text and "so flattered" in text
    assert all(word in text for word in ("aligned", "shuffled", "blind", "majority", "95 % interval", "25.0%"))


def test_samples_of_no_picture_are_refused():
    sample = Sample((), ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}))
    with pytest.raises(ValueError, match="one picture a sample"):
        answer_dataset(None, Dataset("toy", "vqa", [sample]))


def test_ties_do_not_depend_on_order():
    rng = np.random.default_rng(0)
    said = {"aligned": ["a"] * 4, "shuffled": ["a"] * 4, "blind": ["a"] * 4}
    rows = samples()
    rng.shuffle(rows)
    assert score(Answers(Dataset("toy", "vqa", rows), said))["accuracy"]["majority"] == 0.25
