"""Conversations: answers with the kept cache equal answers after reading the whole conversation again."""

import json

import pytest
import torch

from nanochat.agent import Agent, Chat
from nanochat.checkpoint import ASSETS, save_checkpoint
from nanochat.conversation import user_message
from nanochat.gpt import GPT, GPTConfig
from nanochat.sampling import Sampling
from nanochat.tokenizer import Tokenizer
from tests.conftest import make_model


@pytest.fixture(scope="module")
def single():
    """An agent whose model reads one question at a time."""
    tokenizer = Tokenizer.train(["what is it? is it red? a red box."] * 3, 300)
    special = tokenizer.special("<|image|>")
    model = make_model(vocab_size=tokenizer.vocab_size, vision_token_id=special, vision_tokens_per_image=4)
    return Agent(model, tokenizer)


@pytest.fixture(params=[False, True], ids=["single", "multi_turn"])
def agent(single, request):
    return Agent(single.model, single.tokenizer, {"multi_turn": request.param})


@pytest.fixture
def vectors():
    return torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(1))


def uncached(agent, ids, vectors, n):
    """n greedy tokens after `ids` by plain forwards over everything. The picture stands at the start: this model, with
    its random weights, also says <|image|>."""
    answer = []
    while len(answer) < n:
        idx = torch.tensor([ids + answer])
        places = torch.zeros_like(idx, dtype=torch.bool)
        places[:, 2:6] = True
        with torch.inference_mode():
            token = int(agent.model(idx, vectors.flatten(0, 1)[None], places)[0, -1].argmax())
        if token in agent.stop_ids:
            break
        answer.append(token)
    return answer


def messages_of(turns, question):
    """A picture, the remembered (question, answer) turns, and the next question."""
    messages = []
    for asked, answered in turns:
        messages += [user_message(asked), {"role": "assistant", "content": answered}]
    messages.append(user_message(question))
    messages[0] = {"role": "user", "content": [{"type": "image"}, *messages[0]["content"]]}
    return messages


def talk(agent, vectors, questions, n_new):
    """Have a conversation in which every answer is that of plain forwards over the turns that are remembered. Yields their
    number at each question."""
    chat, turns = Chat(agent, vectors), []
    for question in questions:
        said = "".join(chat.say(question, n_new))
        n_remembered = max(0, len(chat.turns) - 1)
        if agent.multi_turn:  # what fits is remembered
            fits = len(agent.prompt(messages_of(turns, question))) + n_new <= agent.model.config.sequence_len
            assert (n_remembered == len(turns)) == fits
        turns = turns[len(turns) - n_remembered :]
        ids = agent.prompt(messages_of(turns, question))
        assert said == agent.tokenizer.decode(uncached(agent, ids, vectors, n_new))
        turns.append((question, said))
        yield n_remembered


def test_turns_equal_an_uncached_reading(agent, vectors):
    remembered = list(talk(agent, vectors, ["it?", "red?", "it?"], 5))
    assert remembered == ([0, 1, 2] if agent.multi_turn else [0, 0, 0])


def test_the_first_turn_is_what_the_model_was_trained_on(agent, vectors):
    ids = agent.prompt([user_message("is it red?", 1)])
    said = "".join(Chat(agent, vectors).say("is it red?", 5))
    assert said == agent.tokenizer.decode(uncached(agent, ids, vectors, 5))


def test_a_full_context_loses_its_oldest_turns_and_the_chat_continues(agent, vectors):
    questions = ["it?", "red?", "is it red?", "a box?", "what is it?"] * 4
    remembered = list(talk(agent, vectors, questions, 4))
    if agent.multi_turn:
        lost = [before + 1 - now for before, now in zip(remembered, remembered[1:], strict=False)]
        assert max(lost) > 1 > min(lost) and min(remembered[1:]) > 0 and len(remembered) == 20
    else:
        assert remembered == [0] * 20


def test_an_answer_has_room_after_any_number_of_turns(agent, vectors):
    context = agent.model.config.sequence_len
    for n_turns in range(8):
        chat = Chat(agent, vectors)
        for _ in range(n_turns):
            list(chat.say("red?", 3))
        list(chat.say("red?"))
        prompt = agent.prompt(messages_of(chat.turns[:-1] if agent.multi_turn else [], "red?"))
        assert context - len(prompt) >= context // 4


def test_a_turn_costs_its_own_tokens_and_the_picture_is_read_once(agent, vectors):
    read, pictures = [], []
    hooks = [
        agent.model.transformer.wte.register_forward_hook(lambda module, args, out: read.append(args[0].size(1))),
        agent.model.vision_projector.register_forward_hook(lambda module, args, out: pictures.append(len(args[0]))),
    ]
    chat, turns = Chat(agent, vectors), []
    for question in ("it?", "red?", "red?"):
        prompt = len(agent.prompt(messages_of(turns, question)))
        read.clear()
        said = "".join(chat.say(question, 5))
        assert said and read[1:] == [1] * 4
        new_text = agent.tokenizer.encode(question) + agent.tokenizer.encode(turns[-1][1] if turns else "")
        # besides the new text at most its three markers; the first turn also has <|bos|>, <|user_start|> and the picture
        assert 0 < read[0] <= (prompt if question == "it?" else len(new_text) + 4)
        if agent.multi_turn:
            turns.append((question, said))
    assert pictures == [4]
    for hook in hooks:
        hook.remove()


def test_a_broken_off_answer_leaves_no_trace(agent, vectors):
    fresh, chat = Chat(agent, vectors), Chat(agent, vectors)
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


def test_a_question_longer_than_the_context_is_refused_and_the_talk_goes_on(agent, vectors):
    fresh, chat = Chat(agent, vectors), Chat(agent, vectors)
    assert "".join(chat.say("it?", 3)) == "".join(fresh.say("it?", 3))
    with pytest.raises(ValueError, match="do not fit the context"):
        list(chat.say("red? " * 100, 3))
    assert chat.turns == fresh.turns
    assert "".join(chat.say("red?", 3)) == "".join(fresh.say("red?", 3))


def test_no_new_tokens_at_all_is_an_error_and_not_the_default(agent, vectors):
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        list(agent.ask("it?", vectors, max_new_tokens=0))


def test_checkpoints_say_whether_they_know_conversations(single, tmp_path):
    for name, training in (("old", {}), ("single", {"multi_turn": False}), ("multi", {"multi_turn": True})):
        save_checkpoint(tmp_path / name, single.model, single.tokenizer, training)
        assert Agent.load(tmp_path / name).multi_turn is (name == "multi")


@pytest.mark.parametrize("multi_turn", [False, True])
def test_the_shipped_model_talks_for_thirty_turns(multi_turn):
    agent = Agent.load("shapes")
    assert not agent.multi_turn  # it was trained on single questions
    agent.training["multi_turn"] = multi_turn
    item = json.loads((ASSETS / "pictures" / "questions.json").read_text())[0]
    chat = Chat(agent, agent.look(ASSETS / "pictures" / item["image"]))
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


def test_a_text_model_cannot_look(single):
    text_model = GPT(
        GPTConfig(sequence_len=32, vocab_size=single.tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=16)
    )
    text_model.init_weights()
    agent = Agent(text_model, single.tokenizer)
    with pytest.raises(ValueError, match="cannot look at pictures"):
        agent.look("any.png")
    with pytest.raises(ValueError, match="cannot act"):
        agent.act([None], [[0.0]], ["open"])
    assert isinstance("".join(agent.ask("it?", max_new_tokens=3)), str)


def test_the_random_answer_of_a_seed_is_the_same_again(single, vectors):
    warm = Sampling(temperature=1.0, seed=3)
    first, again = ("".join(single.ask("it?", vectors, 8, warm)) for _ in range(2))
    other = "".join(single.ask("it?", vectors, 8, Sampling(temperature=1.0, seed=4)))
    assert first == again != other
