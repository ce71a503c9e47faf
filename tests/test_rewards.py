"""Self-critical training: the reward, the advantages, and that the likelihood of better captions rises."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanochat.conversation import render
from nanochat.data.sample import caption_sample, one_per_reference
from nanochat.tokenizer import Tokenizer
from nanochat.training.batches import Row, make_batch
from nanochat.training.caption_reward import CaptionReward, Cider, sentence_bleu
from nanochat.training.rewards import sample_captions, split_row
from tests.conftest import make_model

CAPTIONS = ("a red square .", "one red box on white .")
words = st.lists(st.sampled_from(["a", "red", "dog", "runs", "on", "grass"]), max_size=9).map(" ".join)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(CAPTIONS, 280)


def captioner(tokenizer, **changes):
    return make_model(
        vocab_size=tokenizer.vocab_size, vision_token_id=tokenizer.special("<|image|>"), sequence_len=96, **changes
    )


def caption_rows(tokenizer, picture: int) -> list[Row]:
    made = []
    for sample in one_per_reference([caption_sample(b"", CAPTIONS)]):
        rendered = render(tokenizer, sample.messages, 1)
        made.append(Row(rendered.ids, rendered.mask, (picture,)))
    return made


def test_the_reward_is_the_smoothed_bleu_of_the_paper():
    # 5 words against the same with one changed: 4/5, (2+1)/(4+1), (0+1)/(3+1), (0+1)/(2+1); no brevity penalty
    expected = (4 / 5 * 3 / 5 * 1 / 4 * 1 / 3) ** 0.25
    assert sentence_bleu("a dog runs on sand", ["a dog leaps on sand"]) == pytest.approx(expected)
    # half as long as the references on average, however short the closest is: all n-grams right, exp(1 - 4 / 2)
    assert sentence_bleu("a dog", ["a dog on wet grass here", "a dog"]) == pytest.approx(math.exp(-1))


@given(words, words)
def test_the_reward_is_a_share_and_full_for_a_reference_itself(said, other):
    assert 0 <= sentence_bleu(said, [other, "a dog"]) <= 1
    if said:
        assert sentence_bleu(said, [said]) == pytest.approx(1)
    assert sentence_bleu("", [other, "a dog"]) == sentence_bleu("cat", ["a dog"]) == 0


references = st.lists(st.lists(words.filter(bool), min_size=1, max_size=3), min_size=2, max_size=5)


@given(references, st.lists(words.filter(bool), min_size=5, max_size=5))
def test_cider_is_that_of_the_library_that_scores(truths, said):
    scorer = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    said = said[: len(truths)]
    _, expected = scorer.compute_score(dict(enumerate(truths)), {i: [text] for i, text in enumerate(said)})
    cider = Cider(truths)  # the statistics of the same captions, as the library takes them
    found = [cider(text, captions) for text, captions in zip(said, truths, strict=True)]
    assert found == pytest.approx(expected.tolist(), abs=1e-9)


def test_the_reward_prefers_what_few_pictures_have():
    many = [["a man in a park .", "a man outside ."]] * 9
    reward = CaptionReward([*many, ["a man rides a horse .", "a man on a brown horse ."]])
    truth = ["a man rides a horse .", "a man on a brown horse ."]
    assert reward("a man rides a horse .", truth) > reward("a man in a park .", truth) + 0.5
    common, rare = reward.cider("a man .", truth), reward.cider("a horse .", truth)
    assert rare > 2 * common


def test_samples_are_rows_of_the_same_picture_and_advantages_compare_them(tokenizer):
    model = captioner(tokenizer)
    groups = [caption_rows(tokenizer, 7), caption_rows(tokenizer, 3)]
    vectors = torch.randn(2, 1, 12, generator=torch.Generator().manual_seed(0))

    def letters(said, references):  # most random captions have the same BLEU, which is 0
        return len(set(said) & set(references[0])) / len(set(references[0]))

    rows, advantages, reward = sample_captions(model, tokenizer, groups, vectors, 4, 1, letters)
    assert [row.images for row in rows] == [(7,)] * 4 + [(3,)] * 4
    prompt = split_row(groups[0][0])[0]
    for row in rows:
        assert row.ids[: len(prompt)] == prompt and split_row(row)[0] == prompt and len(row.ids) == len(row.mask)
    rewards = np.array([letters(tokenizer.decode(split_row(row)[1]), CAPTIONS) for row in rows]).reshape(2, 4)
    assert reward == pytest.approx(rewards.mean()) and (rewards.std(1) > 0.01).all()
    for i in range(4):  # against the mean of the other three
        others = np.delete(rewards, i, axis=1).mean(1)
        np.testing.assert_allclose(advantages.view(2, 4)[:, i], rewards[:, i] - others, atol=1e-6)
    again, _, _ = sample_captions(model, tokenizer, groups, vectors, 4, 2, letters)
    assert [row.ids for row in again] != [row.ids for row in rows]


def test_following_the_reward_raises_it(tokenizer):
    torch.manual_seed(0)
    model = captioner(tokenizer)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    groups, vectors = [caption_rows(tokenizer, i) for i in range(4)], torch.randn(4, 1, 12)
    imitated = make_batch([row for rows in groups for row in rows])
    for _ in range(25):  # until it can half describe: without that there is no reward to follow
        optimizer.zero_grad()
        model(imitated.idx, vectors.repeat_interleave(2, 0), targets=imitated.targets).backward()
        optimizer.step()
    rewards = []
    for seed in range(40):
        rows, advantages, reward = sample_captions(model, tokenizer, groups, vectors, 8, seed, sentence_bleu)
        rewards.append(reward)
        batch = make_batch(rows)
        nats = model(batch.idx, vectors.repeat_interleave(8, 0), targets=batch.targets, loss_reduction="none")
        optimizer.zero_grad()
        (nats.view(batch.idx.shape).sum(1) * advantages).mean().backward()
        optimizer.step()
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.1, rewards
