"""Runs on several datasets at once: what is seen how often, mirrored features, label smoothing, rewards beside questions."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from nanochat.cache import cache_folder
from nanochat.data import CAPTION_PROMPT
from nanochat.errors import UserError
from nanochat.training.batches import EncodedVectors, make_batch
from nanochat.training.features import cached_features
from nanochat.training.out_folder import release_folder
from nanochat.training.pictures import drop_features
from nanochat.training.recipes import Folder
from nanochat.training.resuming import check_settings
from nanochat.training.rewards import split_row
from nanochat.training.run import Run, started_recipe
from nanochat.training.task import set_training
from tests.test_stages import no_zeros
from tests.test_train import SMALL, randomize_zeros


def write(folder, n, texts, first=0):
    """n pictures with half of them dark, each with the given (question or None, answer) rows; a .csv of its own."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(first)
    lines = ["file,question,answer" if texts[0][0] else "file,caption"]
    for i in range(first, first + n):
        array = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        array[:, :16] //= 4  # left and right differ
        Image.fromarray(array).save(folder / f"{i}.png")
        lines += [",".join(filter(None, (f"{i}.png", question, answer.format(i)))) for question, answer in texts]
    (folder / "captions.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    return write(
        tmp_path_factory.mktemp("data") / "captions", 12, [(None, "a grey square {}"), (None, "some noise {}")]
    )


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write(
        tmp_path_factory.mktemp("data") / "questions", 8, [("what is it?", "noise"), ("which number?", "{}")], 100
    )


def recipe_for(data, tmp_path, **changes):
    where = {"data": str(data), "out": str(tmp_path / "run"), "cache": str(tmp_path / "c")}
    return Folder(**SMALL | {"blind_share": 0.0, "encoder_lr": 0.0} | where | changes)


# ---- several datasets


def seen_in_an_epoch(run):
    rows = run.task.rows
    steps = range(len(rows.groups) // 4)
    return Counter(len(group) for step in steps for group in rows.step(step, 4, None, 0)), rows


def test_datasets_named_with_also_are_learnt_together(captions, questions, tmp_path):
    alone = Run(recipe_for(captions, tmp_path, val_split="fit"))
    both = Run(recipe_for(captions, tmp_path, also=(str(questions),), val_split="fit", out=str(tmp_path / "both")))
    assert both.task.learnt() == {"questions": True, "captions": True, "actions": False}
    n_alone, n_both = len(alone.task.rows.groups), len(both.task.rows.groups)
    n_questions = len(Run(recipe_for(questions, tmp_path, out=str(tmp_path / "q"))).task.rows.groups)
    assert n_both == n_alone + n_questions and n_questions > 0
    # each has its share of the validation, however large the other one is
    assert {row.caption for group in both.task.val_rows.groups for row in group} == {True, False}
    texts = [both.tokenizer.decode(row.ids) for group in both.task.rows.groups for row in group]
    assert any("which number?" in text for text in texts) and any("grey square" in text for text in texts)


def test_a_dataset_named_twice_is_seen_twice_in_an_epoch(captions, questions, tmp_path):
    recipe = recipe_for(captions, tmp_path, also=(str(questions), str(questions)))
    task = Run(recipe).task
    seen = Counter(row.images for group in task.rows.groups for row in group[:1])
    captioned = {row.images for group in task.rows.groups for row in group if row.caption}
    assert {seen[images] for images in captioned} == {1} and {seen[images] for images in seen.keys() - captioned} == {2}
    assert len(task.rows.images) == len(seen)  # each picture is kept, and encoded, once
    once = Run(replace(recipe, also=(str(questions),), out=str(tmp_path / "once"))).task
    assert len(task.val_rows.groups) == len(once.val_rows.groups)  # to validate on it twice would tell nothing new
    epoch = [row.images for group in task.rows.step(0, len(task.rows.groups), 1, seed=0) for row in group]
    assert Counter(epoch) == seen


def test_the_record_keeps_the_datasets_and_a_run_resumes_with_them(captions, questions, tmp_path):
    recipe = recipe_for(captions, tmp_path, also=(str(questions),), steps=4)
    run = Run(recipe)
    run.take_step()
    run.save()
    release_folder(run.out)
    saved = json.loads((tmp_path / "run/training.json").read_text())
    assert saved["recipe"]["also"] == [str(questions)] and saved["images"] == 1
    started = started_recipe(replace(recipe, resume=True))
    assert started.also == (str(questions),) and type(started.also) is tuple
    check_settings(recipe, started)
    resumed = Run(started)
    resumed.take_step()
    assert resumed.step == 2
    release_folder(resumed.out)
    for also in ((), (str(questions), str(questions)), (str(captions),)):
        with pytest.raises(UserError, match="the data differ from those of the run"):
            Run(replace(started, also=also))
    with pytest.raises(UserError, match=r"dropout was 0.0, now 0.3"):
        Run(replace(started, dropout=0.3))


def line(question, answer, *images):
    content = [*[{"type": "image"}] * len(images), {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    return {"images": list(images), "messages": messages}


@pytest.mark.parametrize("first", ["caption", "question"])
def test_captions_and_questions_of_one_source_about_one_picture_are_rewarded_apart(tmp_path, first):
    folder = write(tmp_path / "both", 8, [("how many are there?", "two")])
    (folder / "captions.csv").unlink()
    texts = {
        "caption": [(CAPTION_PROMPT, "a dog runs on grass"), (CAPTION_PROMPT, "a brown dog")],
        "question": [("how many?", "two")],
    }
    order = texts[first] + [text for kind, own in texts.items() if kind != first for text in own]
    lines = [line(question, answer, f"{i}.png") for i in range(8) for question, answer in order]
    lines.append(line(CAPTION_PROMPT, "a caption of nothing"))
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    task = Run(recipe_for(folder / "data.jsonl", tmp_path, train_split="all", val_split="all", reward_steps=1)).task
    groups = task.rows.groups
    assert [len(rows) for rows in groups if rows[0].caption] == [2] * 8
    assert all(row.caption == rows[0].caption for rows in groups for row in rows)
    for rows in groups:
        answers = {task.tokenizer.decode(split_row(row)[1]) for row in rows}
        assert ("two" in "".join(answers)) != rows[0].caption or "nothing" in "".join(answers)


def test_reward_steps_without_captions_of_single_pictures_are_refused(questions, tmp_path):
    with pytest.raises(UserError, match="--reward-steps need captions of single pictures, but .* holds questions"):
        Run(recipe_for(questions, tmp_path, reward_steps=1))


# ---- mirror images


SIDED = [("what is it?", "noise"), ("where is the dark half?", "on the left")]


@pytest.fixture(scope="module")
def sided(tmp_path_factory):
    """Pictures 0..5 may be mirrored; 6..11 have a text with left; 12 and 13 are asked about together, as 14 and 15 are, of which
    one has a text with left."""
    folder = write(tmp_path_factory.mktemp("data") / "sided", 16, [("what is it?", "noise")])
    rows = [{"image": f"{i}.png", "question": "what is it?", "answer": "noise"} for i in range(12)]
    rows += [{"image": f"{i}.png", "question": "is the Left half dark?", "answer": "yes"} for i in range(6, 9)]
    rows += [{"image": f"{i}.png", "question": "which half is dark?", "answer": "the left one"} for i in range(9, 12)]
    rows += [{"images": ["12.png", "13.png"], "question": "which is darker?", "answer": "the first"}]
    rows += [{"images": ["14.png", "15.png"], "question": "which is darker?", "answer": "the first"}]
    rows += [{"image": "15.png", "question": "is the left half dark?", "answer": "yes"}]
    (folder / "captions.csv").unlink()
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


def run_sided(sided, tmp_path, **changes):
    return Run(recipe_for(sided, tmp_path, train_split="all", val_split="all", flip="horizontal", **changes))


def number_of(rows):
    return {str(image).rsplit("/", 1)[-1].removesuffix(".png"): number for number, image in enumerate(rows.images)}


def test_pictures_of_texts_with_sides_are_not_mirrored_and_those_with_them_neither(sided, tmp_path):
    rows = run_sided(sided, tmp_path).task.rows
    numbers = number_of(rows)
    mirrorable = [bool(rows.mirrorable[numbers[str(i)], 0]) for i in range(16)]
    assert mirrorable == [True] * 6 + [False] * 6 + [True] * 2 + [False] * 2


def test_pictures_of_texts_that_say_up_or_down_are_not_put_upside_down(tmp_path):
    texts = {
        0: "is it above the line?",
        1: "is it Left of it?",
        2: "does it turn clockwise?",
        3: "is it a cup?",
        4: "is it upright?",
        5: "the ball falls: which came first?",
    }
    folder = write(tmp_path / "up", 6, [("what?", "it")])
    (folder / "captions.csv").unlink()
    rows = [{"image": f"{i}.png", "question": text, "answer": "yes"} for i, text in texts.items()]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipe_for(
        folder / "data.jsonl", tmp_path, train_split="all", val_split="all", flip="both", train_encoder=True
    )
    task = Run(recipe).task
    names = number_of(task.rows)
    numbers = [names[str(i)] for i in range(6)]
    plain, seen = task.vectors.pixels(numbers), [set() for _ in range(6)]
    for seed in range(40):
        for picture, (found, own) in enumerate(
            zip(task.vectors.pixels(numbers, np.random.default_rng(seed)), plain, strict=True)
        ):
            for name, dims in (("plain", ()), ("mirrored", (-1,)), ("upside down", (-2,)), ("turned", (-1, -2))):
                if torch.allclose(found, own.flip(dims), atol=1e-4):
                    seen[picture].add(name)
    everything = {"plain", "mirrored", "upside down", "turned"}
    assert seen == [
        {"plain", "mirrored"},
        {"plain", "upside down"},
        {"plain"},
        everything,
        *[{"plain", "mirrored"}] * 2,
    ]


def test_mirrored_features_are_those_of_mirrored_pictures(sided, tmp_path):
    task = run_sided(sided, tmp_path).task
    rows, vectors, model = task.rows, task.vectors, task.model
    plain = model.look(rows.images).numpy()
    mirrored = model.look([np.asarray(Image.open(image))[:, ::-1] for image in rows.images]).numpy()
    apart = np.abs(plain - mirrored).max((1, 2))  # of each picture
    assert (apart > 1e-2 * np.abs(plain).max()).all()
    numbers, seen, name = list(range(len(rows.images))), Counter(), number_of(rows)
    for seed in range(40):
        found = vectors(numbers, np.random.default_rng(seed)).numpy()
        for number in numbers:
            is_plain, is_mirrored = (
                np.abs(found[number] - of[number]).max() < 0.01 * apart[number] for of in (plain, mirrored)
            )
            assert is_plain != is_mirrored
            seen[number] += is_mirrored
        assert seen[name["12"]] == seen[name["13"]]  # compared with each other
    assert all(seen[number] == 0 for number in numbers if not rows.mirrorable[number, 0])
    assert all(8 <= seen[number] <= 32 for number in numbers if rows.mirrorable[number, 0])
    np.testing.assert_allclose(vectors(numbers).numpy(), plain, atol=1e-6)  # without an rng, as to validate, none is
    assert task.val_vectors.mirrored is None


def test_the_encoder_runs_once_for_mirror_images_too(sided, tmp_path, monkeypatch):
    run = run_sided(sided, tmp_path)
    rows, place = run.task.rows, cache_folder("features", tmp_path / "c")
    calls = []
    monkeypatch.setattr(run.model, "look", lambda images: calls.append(images))
    images = [rows.images[number] for number in np.flatnonzero(rows.mirrorable[:, 0])]
    cached_features(run.model, images, place, mirrored=True)
    cached_features(run.model, rows.images, place)
    assert not calls


def test_trained_encoders_see_the_same_pictures_mirrored(sided, tmp_path):
    task = run_sided(sided, tmp_path, train_encoder=True).task
    vectors, rows = task.vectors, task.rows
    assert isinstance(vectors, EncodedVectors)
    numbers, seen, name = list(range(len(rows.images))), Counter(), number_of(rows)
    plain = vectors.pixels(numbers)
    for seed in range(20):
        found = vectors.pixels(numbers, np.random.default_rng(seed))
        for number in numbers:
            is_plain, is_mirrored = (
                torch.allclose(found[number], of, atol=1e-4) for of in (plain[number], plain[number].flip(-1))
            )
            assert is_plain != is_mirrored
            seen[number] += is_mirrored
        assert seen[name["12"]] == seen[name["13"]]
    assert all((seen[number] > 0) == rows.mirrorable[number, 0] for number in numbers)


# ---- the loss


def test_label_smoothing_and_feature_dropout_reach_the_loss(questions, tmp_path):
    run = Run(recipe_for(questions, tmp_path, label_smoothing=0.2))
    no_zeros(run.model)
    set_training(run.model, run.recipe)
    batch = make_batch([row for group in run.task.rows.groups for row in group])
    rng = np.random.default_rng(0)
    found = run.task.losses(batch, rng)[0]
    shown = batch.in_rows(run.task.vectors(batch.numbers))
    places = batch.idx == run.model.config.vision_token_id
    logits = run.model(batch.idx, shown.flatten(0, 1).split(batch.counts), places)
    expected = F.cross_entropy(
        logits.flatten(0, 1).float(), batch.targets.flatten(), ignore_index=-1, label_smoothing=0.2, reduction="sum"
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    run.task.recipe = replace(run.recipe, feature_dropout=0.5)
    assert abs(run.task.losses(batch, rng)[0] - expected) > 1e-2 * expected


def test_pictures_that_a_row_shows_together_lose_the_same_features():
    groups = ["a", "b", "a", "c", "a", "b"]
    vectors = drop_features(torch.ones(6, 50, 8), groups, 0.5)
    assert set(vectors.unique().tolist()) == {0.0, 2.0} and 0.4 < (vectors == 0).float().mean() < 0.6
    for a in range(6):
        for b in range(6):
            assert torch.equal(vectors[a], vectors[b]) == (groups[a] == groups[b])


# ---- rewards beside questions


@pytest.fixture
def rewarded(captions, questions, tmp_path):
    recipe = recipe_for(
        captions, tmp_path, also=(str(questions),), steps=1, reward_steps=2, reward_lr=0.5, train_encoder=True,
        batchnorm="train", encoder_lr=0.1, questions_per_image=2,
    )  # fmt: skip
    run = Run(recipe)
    randomize_zeros(run.model)
    run.take_step()
    return run


def test_in_reward_steps_captions_follow_the_reward_and_questions_are_still_learnt(rewarded, monkeypatch):
    task, given = rewarded.task, {}
    for name in ("imitation_gradients", "reward_gradients"):
        plain = getattr(task, name)

        def recorded(chunks, *rest, name=name, plain=plain, **more):
            given[name] = [row for chunk in chunks for rows in chunk for row in rows]
            return plain(chunks, *rest, **more)

        monkeypatch.setattr(task, name, recorded)
    set_training(rewarded.model, rewarded.recipe)
    result = task.backward(1)
    assert task.measure(1) == "reward" and 0 <= result.value <= 1
    assert given["imitation_gradients"] and not any(row.caption for row in given["imitation_gradients"])
    assert given["reward_gradients"] and all(row.caption for row in given["reward_gradients"])
    both = rewarded.model.lm_head.weight.grad.clone()
    rewarded.model.zero_grad()
    monkeypatch.setattr(task, "imitation_gradients", lambda *args, **kwargs: None)
    set_training(rewarded.model, rewarded.recipe)
    task.backward(1)
    assert not torch.equal(rewarded.model.lm_head.weight.grad, both)  # questions have a gradient of their own


def test_questions_of_reward_steps_leave_the_encoder_alone(rewarded):
    rewarded.update_statistics()
    before = {name: value.clone() for name, value in rewarded.model.state_dict().items()}
    rewarded.take_step()
    moved = {name for name, value in rewarded.model.state_dict().items() if not torch.equal(value, before[name])}
    assert "lm_head.weight" in moved
    assert not [name for name in moved if name.startswith("vision_encoder.")]
