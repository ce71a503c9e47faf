"""Conversations: the kept cache must say what a fresh reading of the whole conversation says."""

import pytest
import torch

from nanochat.assistant import Assistant, Chat, user_message
from nanochat.sampling import Sampling
from nanochat.tokenizer import Tokenizer
from tests.conftest import make_model


@pytest.fixture(scope="module")
def assistant():
    tokenizer = Tokenizer.train(["what is it? is it red? a red box."] * 3, 300)
    special = tokenizer.special("<|image|>")
    model = make_model(vocab_size=tokenizer.vocab_size, vision_token_id=special, vision_tokens_per_image=4)
    return Assistant(model, tokenizer)


@pytest.fixture
def vectors():
    return torch.randn(1, 4, 12, generator=torch.Generator().manual_seed(1))


def test_turns_equal_an_uncached_reading_of_the_whole_conversation(assistant, vectors):
    chat, before = Chat(assistant, vectors), []
    for turn, question in enumerate(["it?", "red?"]):
        said = "".join(chat.say(question, 5))
        prompt = assistant.prompt([user_message(question, 1 if turn == 0 else 0)])
        ids = [*before, *(prompt[1:] if before else prompt)]  # one <|bos|> for all turns
        # plain forwards over everything, no cache
        answer = []
        for _ in range(5):
            with torch.inference_mode():
                logits = assistant.model(torch.tensor([ids + answer]), vectors.flatten(0, 1)[None])
            token = int(logits[0, -1].argmax())
            if token in assistant.stop_ids:
                break
            answer.append(token)
        assert said == assistant.tokenizer.decode(answer)
        before = [*ids, *answer, assistant.tokenizer.special("<|assistant_end|>")]


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


def test_a_turn_that_does_not_fit_is_refused_and_the_talk_goes_on(assistant, vectors):
    fresh, chat = Chat(assistant, vectors), Chat(assistant, vectors)
    assert "".join(chat.say("it?", 3)) == "".join(fresh.say("it?", 3))
    with pytest.raises(ValueError, match="do not fit the context"):
        list(chat.say("red? " * 100, 3))
    assert "".join(chat.say("red?", 3)) == "".join(fresh.say("red?", 3))


def test_many_at_once_say_what_one_at_a_time_says(assistant):
    vectors = torch.randn(3, 4, 12, generator=torch.Generator().manual_seed(2))
    questions = ["it?", "is it red?", "what is it? a box?"]
    together = assistant.answer_all([[user_message(q, 1)] for q in questions], list(vectors[:, None]), 6)
    alone = ["".join(assistant.ask(q, v[None], 6, Sampling())).strip() for q, v in zip(questions, vectors, strict=True)]
    assert together == alone


def test_a_text_model_has_no_eyes(assistant):
    blind = Assistant(assistant.model, assistant.tokenizer)
    blind.tokens_per_image = 0
    with pytest.raises(ValueError, match="without eyes"):
        blind.look("any.png")
