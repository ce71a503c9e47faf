"""The three ways of asking, and the scores beside each other."""

import numpy as np
import pytest

from nanochat.data.sample import Dataset, Sample, caption_sample, vqa_sample
from nanochat.evaluate import Answers, another_image, score, table


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


def test_the_table_shows_every_row_beside_the_answer(capsys):
    from rich.console import Console

    said = {"aligned": ["red"] * 4, "shuffled": ["no"] * 4, "blind": ["no"] * 4}
    console = Console(width=120)
    console.print(table(score(Answers(Dataset("toy", "vqa", samples()), said))))
    text = capsys.readouterr().out
    assert all(word in text for word in ("aligned", "shuffled", "blind", "majority", "95 % interval", "25.0%"))


def test_samples_of_no_picture_are_refused():
    from nanochat.evaluate import answer_dataset

    sample = Sample((), ({"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}))
    with pytest.raises(ValueError, match="one picture a sample"):
        answer_dataset(None, Dataset("toy", "vqa", [sample]))


def test_ties_do_not_depend_on_order():
    rng = np.random.default_rng(0)
    said = {"aligned": ["a"] * 4, "shuffled": ["a"] * 4, "blind": ["a"] * 4}
    rows = samples()
    rng.shuffle(rows)
    assert score(Answers(Dataset("toy", "vqa", rows), said))["accuracy"]["majority"] == 0.25
