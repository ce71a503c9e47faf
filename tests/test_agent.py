"""Conversations: the kept cache must say what a fresh reading of the whole conversation says."""

import json

import pytest
import torch

from nanochat.assistant import ASSETS, Assistant, Chat, user_message
from nanochat.checkpoint import save_checkpoint
from nanochat.sampling import Sampling
from nanochat.tokenizer import Tokenizer
from tests.conftest import make_model


@pytest.fixture(scope="module")
def single():
    """An assistant whose model reads one question at a time."""
    tokenizer = Tokenizer.train(["what is it? is it red? a red box."] * 3, 300)
    special = tokenizer.special("<|image|>")
    model = make_model(vocab_size=tokenizer.vocab_size, vision_token_id=special, vision_tokens_per_image=4)
    return Assistant(model, tokenizer)


@pytest.fixture(params=[False, True], ids=["single", "multi_turn"])
def assistant(single, request):
    return Assistant(single.model, single.tokenizer, multi_turn=request.param)


@pytest.fixture
def vectors():
    return torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(1))


def uncached(assistant, ids, vectors, n):
    """n greedy tokens after `ids` by plain forwards over everything. A picture is what stands at the start: this model, with
    its random weights, also says <|image|>."""
    answer = []
    while len(answer) < n:
        idx = torch.tensor([ids + answer])
        places = torch.zeros_like(idx, dtype=torch.bool)
        places[:, 2:6] = True
        with torch.inference_mode():
            token = int(assistant.model(idx, vectors.flatten(0, 1)[None], places)[0, -1].argmax())
        if token in assistant.stop_ids:
            break
        answer.append(token)
    return answer


def talk(assistant, vectors, questions, n_new):
    """Have a conversation in which every answer is that of plain forwards over the turns that are remembered. Yields their
    number at each question."""
    chat, turns = Chat(assistant, vectors), []
    start = assistant.prompt([user_message("", 1)])[:6]  # <|bos|> <|user_start|>, one picture of 4
    end = [assistant.tokenizer.special(name) for name in ("<|assistant_end|>", "<|user_start|>")]
    for question in questions:
        said = "".join(chat.say(question, n_new))
        asked = assistant.prompt([user_message(question)])[2:]
        n_remembered = max(0, len(chat.turns) - 1)
        if assistant.multi_turn:  # what fits is not forgotten
            fits = len(start) + sum(map(len, turns)) + len(asked) + n_new <= assistant.model.config.sequence_len
            assert (n_remembered == len(turns)) == fits
        turns = turns[len(turns) - n_remembered :]
        ids = [*start, *(token for turn in turns for token in turn), *asked]
        answer = uncached(assistant, ids, vectors, n_new)
        assert said == assistant.tokenizer.decode(answer)
        turns.append([*asked, *answer, *end])
        yield n_remembered


def test_turns_equal_an_uncached_reading(assistant, vectors):
    remembered = list(talk(assistant, vectors, ["it?", "red?", "it?"], 5))
    assert remembered == ([0, 1, 2] if assistant.multi_turn else [0, 0, 0])


def test_the_first_turn_is_what_the_model_was_trained_on(assistant, vectors):
    ids = assistant.prompt([user_message("is it red?", 1)])
    said = "".join(Chat(assistant, vectors).say("is it red?", 5))
    assert said == assistant.tokenizer.decode(uncached(assistant, ids, vectors, 5))


def test_a_full_context_loses_its_oldest_turns_and_the_talk_goes_on(assistant, vectors):
    questions = ["it?", "red?", "is it red?", "a box?", "what is it?"] * 4
    remembered = list(talk(assistant, vectors, questions, 4))
    if assistant.multi_turn:
        lost = [before + 1 - now for before, now in zip(remembered, remembered[1:], strict=False)]
        assert max(lost) > 1 > min(lost) and min(remembered[1:]) > 0 and len(remembered) == 20
    else:
        assert remembered == [0] * 20


def test_an_answer_has_room_after_any_number_of_turns(assistant, vectors, monkeypatch):
    rooms = []
    stream = assistant.engine.stream
    monkeypatch.setattr(assistant.engine, "stream", lambda ids, n, **more: rooms.append(n) or stream(ids, n, **more))
    for n_turns in range(8):
        chat = Chat(assistant, vectors)
        for _ in range(n_turns):
            list(chat.say("red?", 3))
        list(chat.say("red?"))
        assert rooms[-1] >= assistant.model.config.sequence_len // 4


def test_a_turn_costs_its_own_tokens_and_the_picture_is_read_once(assistant, vectors, monkeypatch):
    read = []
    embed = assistant.model.embed
    monkeypatch.setattr(
        assistant.model, "embed", lambda idx, *seen: read.append((idx.size(1), len(seen))) or embed(idx, *seen)
    )
    chat = Chat(assistant, vectors)
    asked = [assistant.prompt([user_message(question)])[2:] for question in ("it?", "red?", "red?")]
    for question, n_read in (
        ("it?", 6 + len(asked[0])),  # <|bos|> <|user_start|>, one picture of 4
        # a remembered answer's last token has not been through the model yet, and its turn is closed
        ("red?", len(asked[1]) + (3 if assistant.multi_turn else 0)),
        ("red?", len(asked[2]) + 3 if assistant.multi_turn else 1),
    ):
        read.clear()
        assert len("".join(chat.say(question, 5))) > 0
        assert read == [(n_read, int(question == "it?")), *[(1, 0)] * 4]


def test_a_broken_off_answer_leaves_no_trace(assistant, vectors):
    fresh, chat = Chat(assistant, vectors), Chat(assistant, vectors)
    first = "".join(fresh.say("it?", 4))
    interrupted = chat.say("red?", 8)
    next(interrupted), next(interrupted)
    interrupted.close()
    assert "".join(chat.say("it?", 4)) == first
    interrupted = chat.say("box?", 8)
    next(interrupted), next(interrupted)
    interrupted.close()
    assert "".join(chat.say("red?", 4)) == "".join(fresh.say("red?", 4))
    assert chat.turns == fresh.turns


def test_a_question_longer_than_the_context_is_refused_and_the_talk_goes_on(assistant, vectors):
    fresh, chat = Chat(assistant, vectors), Chat(assistant, vectors)
    assert "".join(chat.say("it?", 3)) == "".join(fresh.say("it?", 3))
    with pytest.raises(ValueError, match="do not fit the context"):
        list(chat.say("red? " * 100, 3))
    assert chat.turns == fresh.turns
    assert "".join(chat.say("red?", 3)) == "".join(fresh.say("red?", 3))


def test_no_new_tokens_at_all_is_an_error_and_not_the_default(assistant, vectors):
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        list(assistant.ask("it?", vectors, max_new_tokens=0))


def test_checkpoints_say_whether_they_know_conversations(single, tmp_path):
    for name, training in (("old", {}), ("single", {"multi_turn": False}), ("multi", {"multi_turn": True})):
        save_checkpoint(tmp_path / name, single.model, single.tokenizer, training)
        assert Assistant.load(tmp_path / name).multi_turn is (name == "multi")


@pytest.mark.parametrize("multi_turn", [False, True])
def test_the_shipped_model_talks_for_thirty_turns(multi_turn):
    assistant = Assistant.load("default")
    assert not assistant.multi_turn  # it was trained on single questions
    assistant.multi_turn = multi_turn
    item = json.loads((ASSETS / "pictures" / "questions.json").read_text())[0]
    chat = Chat(assistant, assistant.look(ASSETS / "pictures" / item["image"]))
    for turn in range(30):
        question, truth = item["questions"][turn % len(item["questions"])]
        said = "".join(chat.say(question))
        assert said.strip() == truth or multi_turn


def test_many_at_once_say_what_one_at_a_time_says(single):
    vectors = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(2))
    questions = ["it?", "is it red?", "what is it? a box?"]
    together = single.answer_all([[user_message(q, 1)] for q in questions], list(vectors[:, None]), 6)
    alone = ["".join(single.ask(q, v[None], 6, Sampling())).strip() for q, v in zip(questions, vectors, strict=True)]
    assert together == alone


def test_a_text_model_has_no_eyes(single):
    blind = Assistant(single.model, single.tokenizer)
    blind.tokens_per_image = 0
    with pytest.raises(ValueError, match="without eyes"):
        blind.look("any.png")
