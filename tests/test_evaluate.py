"""Answering a dataset under the control conditions, and the scores next to each other."""

from types import SimpleNamespace

import pytest
import torch

from nanochat.data.sample import Dataset, Sample, caption_sample, vqa_sample
from nanochat.evaluation.pictures import Answers, answer_dataset, batches, score, table

CONTEXT = 64


def samples():
    return [vqa_sample(f"{i // 2}.png", f"q{i}", answer) for i, answer in enumerate(["red", "yes", "blue", "no"])]


class NumberAgent:
    """Sees the number in the name of a picture: "7.png" is a vector of sevens. It answers with the number that it sees and
    the number of tokens that it may use. A question takes a token per letter."""

    model = SimpleNamespace(config=SimpleNamespace(sequence_len=CONTEXT))

    def prompt(self, messages):
        return list(messages[-1]["content"][1]["text"])

    def look(self, names):
        return torch.stack([torch.full((1, 3), float(name.removesuffix(".png"))) for name in names])

    def answer_all(self, conversations, vectors, max_new_tokens):
        assert len(conversations) == len(vectors) and all(v.shape == (1, 1, 3) for v in vectors)
        return [f"{v.unique().item():.0f} {max_new_tokens}" for v in vectors]


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
    assert result["bleu2"].keys() == result["cider"].keys() == {"aligned", "shuffled", "blind", "ci95"}
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
    from rich.console import Console

    by_condition = {"aligned": ["red"] * 4, "shuffled": ["no"] * 4, "blind": ["no"] * 4}
    console = Console(width=120)
    console.print(table(score(Answers(Dataset("data/p[a]", "vqa", samples()), by_condition))))
    text = " ".join(capsys.readouterr().out.split())
    assert "data/p[a]: 4 samples" in text and "computed on the test answers, so optimistic" in text
    assert all(word in text for word in ("aligned", "shuffled", "blind", "majority", "95 % interval", "25.0%"))


def test_samples_without_a_picture_are_refused():
    sample = Sample((), ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}))
    with pytest.raises(ValueError, match="exactly one picture per sample, found 0"):
        answer_dataset(NumberAgent(), Dataset("toy", "vqa", [sample]))


def test_majority_counts_answers_that_differ_only_in_case_and_punctuation_together():
    rows = samples()
    rows[1] = vqa_sample("0.png", "q1", "Blue.")
    result = score(Answers(Dataset("toy", "vqa", rows), {"aligned": ["a"] * 4, "blind": ["a"] * 4}))
    assert result["accuracy"]["majority"] == 0.5
