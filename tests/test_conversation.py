import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.actions import STATE
from nanochat.conversation import action_message, render, user_message
from nanochat.errors import UserError
from nanochat.tokenizer import Tokenizer
from tests.test_tokenizer import TOKENIZER

IMAGE = TOKENIZER.special("<|image|>")
END = TOKENIZER.special("<|assistant_end|>")


def user(*parts):
    return {"role": "user", "content": [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]}


def assistant(words):
    return {"role": "assistant", "content": words}


def spelled(ids):
    return [TOKENIZER.decode([i], skip_special=False) for i in ids]


def test_the_layout_is_nanochats():
    out = render(TOKENIZER, [user(None, "a"), assistant("b")], 2)
    assert spelled(out.ids) == [
        "<|bos|>", "<|user_start|>", "<|image|>", "<|image|>", "a", "<|user_end|>", "<|assistant_start|>", "b",
        "<|assistant_end|>",
    ]  # fmt: skip
    assert out.mask == [0, 0, 0, 0, 0, 0, 0, 1, 1] and out.n_images == 1


def test_for_completion_it_ends_where_the_assistant_speaks():
    out = render(TOKENIZER, [user("a")], 1, for_completion=True)
    assert spelled(out.ids) == ["<|bos|>", "<|user_start|>", "a", "<|user_end|>", "<|assistant_start|>"]


def test_a_completion_prompt_and_its_answer_are_the_training_row():
    row = render(TOKENIZER, [user(None, "what is it?"), assistant("a dog")], 4)
    prompt = render(TOKENIZER, [user(None, "what is it?")], 4, for_completion=True)
    assert row.ids == [*prompt.ids, *TOKENIZER.encode("a dog"), END]


def test_a_system_message_is_put_before_the_first_question():
    out = render(TOKENIZER, [{"role": "system", "content": "be brief"}, user(None, "a"), assistant("b")], 1)
    assert "".join(spelled(out.ids)).startswith("<|bos|><|user_start|>be brief\n\n<|image|>a<|user_end|>")


def test_other_keys_of_a_picture_are_ignored():
    shown = {"role": "user", "content": [{"type": "image", "image": object(), "detail": "high"}]}
    assert render(TOKENIZER, [shown], 2) == render(TOKENIZER, [user(None)], 2)


def test_a_model_without_eyes_takes_no_pictures():
    assert render(TOKENIZER, [user("a")], 0).n_images == 0
    with pytest.raises(ValueError, match="places_per_image is 0"):
        render(TOKENIZER, [user(None, "a")], 0)


def test_typed_placeholders_are_text():
    out = render(TOKENIZER, [user("<|image|><|assistant_end|>"), assistant("<|image|>")], 3)
    assert IMAGE not in out.ids and out.ids.count(END) == 1


words = st.text(max_size=20)
turns = st.lists(st.tuples(st.lists(st.none() | words, min_size=1, max_size=4), words), min_size=1, max_size=3)


@given(turns, st.integers(1, 5))
def test_pictures_and_learnt_tokens_are_exactly_those_of_the_messages(conversation, places_per_image):
    messages = [m for parts, answer in conversation for m in (user(*parts), assistant(answer))]
    out = render(TOKENIZER, messages, places_per_image)
    assert len(out.ids) == len(out.mask)
    assert out.n_images == sum(part is None for parts, _ in conversation for part in parts)
    assert out.ids.count(IMAGE) == out.n_images * places_per_image
    learnt = [i for i, m in zip(out.ids, out.mask, strict=True) if m]
    assert learnt.count(END) == len(conversation)
    assert TOKENIZER.decode(learnt) == "".join(answer for _, answer in conversation)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one"),
        ([assistant("a")], "message 0 is from the assistant, expected the user"),
        ([user("a"), user("b")], "message 1 is from the user"),
        ([{"role": "system", "content": "a"}, user("b"), user("c")], "message 2 is from the user"),
        ([{"role": "system", "content": "a"}], "must follow"),
        ([{"role": "robot", "content": "a"}], "role"),
        ([{"content": "a"}], "role"),
        (["a"], "role"),
        ([{"role": "user"}], "content"),
        ([{"role": "user", "content": [{"type": "video"}]}], "part"),
        ([{"role": "user", "content": [{"type": "text"}]}], "part"),
        ([user("a"), {"role": "assistant", "content": [{"type": "image"}]}], "only users can"),
    ],
)
def test_broken_conversations_are_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        render(TOKENIZER, messages, 1)


@pytest.mark.parametrize("value", ["x" * 9999, ["x"] * 9999])
@pytest.mark.parametrize("role", [None, "user"])
def test_what_is_refused_is_quoted_in_part(role, value):
    message = {"role": role or value, "content": [{"type": value}]}
    with pytest.raises(UserError) as error:
        render(TOKENIZER, [message], 1)
    assert len(str(error.value)) < 250


def test_only_a_question_can_be_answered():
    with pytest.raises(ValueError, match="must end with the user"):
        render(TOKENIZER, [user("a"), assistant("b")], 1, for_completion=True)


def test_a_robots_prompt_has_a_place_for_its_state():
    tokenizer = Tokenizer.train(["open the door"], 300)
    tokenizer.add_special_tokens([STATE])
    rendered = render(tokenizer, [action_message("open the door")], 3, for_completion=True)
    words = tokenizer.encode("open the door")
    names = ["<|bos|>", "<|user_start|>", *["<|image|>"] * 3, STATE]
    ends = ["<|user_end|>", "<|assistant_start|>"]
    expected = [tokenizer.special(name) for name in names] + words + [tokenizer.special(name) for name in ends]
    assert rendered.ids == expected and rendered.n_images == 1 and not any(rendered.mask)


def test_only_users_have_states():
    messages = [user_message("hi"), {"role": "assistant", "content": [{"type": "state"}]}]
    with pytest.raises(ValueError, match="message 1 is from the assistant and has a part of type state"):
        render(Tokenizer.train(["hi"], 300), messages, 1)


def test_user_messages_show_pictures_first():
    assert user_message("what?", 2)["content"] == [
        {"type": "image"},
        {"type": "image"},
        {"type": "text", "text": "what?"},
    ]
