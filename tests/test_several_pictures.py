"""One question about several pictures: where they stand, how many a model has learnt, what fits, and beams."""

import json
import shutil
import sys

import pytest
import torch

from nanochat.agent import Agent, Chat, question_message
from nanochat.beams import beam_search
from nanochat.checkpoint import load_checkpoint, save_checkpoint
from nanochat.data import CAPTION_PROMPT
from nanochat.data.sample import Dataset, caption_sample
from nanochat.errors import UserError
from nanochat.evaluation.pictures import answer_dataset
from nanochat.sampling import Sampling
from nanochat.tokenizer import Tokenizer
from tests.conftest import make_model
from tests.test_cli import PICTURE, QUESTION, Terminal, picture

N = 4  # vectors of a picture


@pytest.fixture(scope="module", params=["prefix", "cross"])
def agent(request):
    """Knows conversations about up to three pictures."""
    tokenizer = Tokenizer.train(["what is it? is it red? a red box."] * 3, 300)
    model = make_model(
        vocab_size=tokenizer.vocab_size, vision_token_id=tokenizer.special("<|image|>"), vision_tokens_per_image=N,
        fusion=request.param,
    )  # fmt: skip
    return Agent(model, tokenizer, {"images": 3, "multi_turn": True})


@pytest.fixture
def vectors():
    return torch.randn(3, N, 12, generator=torch.Generator().manual_seed(1))


def uncached(agent, ids, vectors, n):
    """n greedy tokens after the prompt `ids`, by plain forwards over everything."""
    prompt, answer = torch.tensor([ids]), []
    while len(answer) < n:
        idx = torch.tensor([ids + answer])
        places = torch.zeros_like(idx, dtype=torch.bool)  # the model also says <|image|>, which is no picture
        places[:, : len(ids)] = prompt == agent.model.config.vision_token_id
        with torch.inference_mode():
            token = int(agent.model(idx, vectors.flatten(0, 1)[None], places)[0, -1].argmax())
        if token in agent.stop_ids:
            break
        answer.append(token)
    return agent.tokenizer.decode(answer)


def image_places(agent, ids):
    """The prompt as text, with <i> for each picture."""
    special, places = agent.tokenizer.special("<|image|>"), agent.places_per_image
    runs = [-1 if token == special else token for token in ids]
    text, held = "", []
    i = 0
    while i < len(runs):
        if runs[i] == -1:
            assert runs[i : i + places] == [-1] * places
            text, held, i = text + agent.tokenizer.decode(held) + "<i>", [], i + places
        else:
            held.append(runs[i])
            i += 1
    return text + agent.tokenizer.decode(held)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("is it red?", "<i><i>is it red?"),
        ("<image><image> is it red?", "<i><i>is it red?"),
        ("is <image> a <|image|>?", "is<i>a<i>?"),
        ("it: <image>\n<image>", "it:<i><i>"),
    ],
)
def test_where_the_pictures_stand(agent, vectors, question, expected):
    ids = agent.prompt([question_message(question, 2)])
    assert expected in image_places(agent, ids)
    assert "".join(agent.ask(question, vectors[:2], 6)) == uncached(agent, ids, vectors[:2], 6)


def test_each_picture_and_its_place_matter(agent, vectors):
    def answers(*pictures, question="is <image> a <image>?"):
        return "".join(agent.ask(question, torch.stack(pictures), 12))

    first, second, third = vectors * 3
    asked = [(first, second), (second, first), (first, third), (third, second)]
    assert len({answers(*pictures) for pictures in asked}) > 1 and answers(first, second) == answers(first, second)
    assert (
        len({answers(first, second, question=q) for q in ("is <image> a <image>?", "is a <image><image>?", "is a?")})
        > 1
    )


@pytest.mark.parametrize(("question", "n"), [("<image> it?", 2), ("is <image> or <image> it?", 1), ("<image>?", 0)])
def test_another_number_of_places_than_pictures_is_an_error(agent, vectors, question, n):
    with pytest.raises(
        UserError, match=rf"the question has {question.count('<image>')} x <image>, and there are {n} pict"
    ):
        agent.ask(question, vectors[:n] if n else None)


@pytest.mark.parametrize(
    ("training", "most"), [({}, 1), ({"images": 3}, 3), ({"images": "many"}, 1), ({"images": 0}, 1)]
)
def test_more_pictures_than_it_learnt(agent, vectors, training, most):
    learner = Agent(agent.model, agent.tokenizer, training)
    assert learner.images_learnt == most
    learner.check_images(most)
    many = vectors[[0] * 9]
    only = "one picture" if most == 1 else "up to 3 pictures"
    for ask in (lambda: learner.ask("it?", many), lambda: Chat(learner, many), lambda: learner.check_images(9)):
        with pytest.raises(
            UserError, match=f"9 pictures in one question, but .* about {only} only: .*each of them alone"
        ):
            ask()


def test_what_does_not_fit_says_how_many_tokens_there_are(agent, vectors):
    question = "red? " * 30
    ids, each = agent.prompt([question_message(question, 3)]), agent.places_per_image
    with pytest.raises(
        UserError, match=f"3 pictures of {each} tokens each, {len(ids) - 3 * each} tokens of text and 1 of.*64"
    ):
        agent.ask(question, vectors)
    with pytest.raises(UserError, match="and 60 of the answer do not fit the context of 64 tokens"):
        agent.ask("it?", vectors, max_new_tokens=60)


def test_a_chat_about_several_pictures_equals_plain_forwards(agent, vectors):
    """Also where the pictures stand between words, so that the kept cache may hold none or some of them."""
    questions = ["is <image> a <image> or <image>?", "it?", "red?", "is it a box?", "it?"]
    chat, turns = Chat(agent, vectors), []
    for question in questions:
        said = "".join(chat.say(question, 5))
        turns = turns[len(turns) - max(0, len(chat.turns) - 1) :]
        messages = []
        for asked, answered in turns:
            messages += [question_message(asked, 0 if messages else 3), {"role": "assistant", "content": answered}]
        messages.append(question_message(question, 0 if messages else 3))
        assert said == uncached(agent, agent.prompt(messages), vectors, 5)
        turns.append((question, said))
    single = Agent(agent.model, agent.tokenizer, {"images": 3})  # every question is the first
    chat = Chat(single, vectors)
    for question in (
        "is <image> a <image> or <image>?",
        "is <image> a <image><image>?",
        "it?",
        "<image><image><image> it?",
    ):
        said = "".join(chat.say(question, 5))
        assert said == uncached(agent, agent.prompt([question_message(question, 3)]), vectors, 5)


def test_pictures_are_shown_once_in_a_conversation(agent, vectors):
    chat = Chat(agent, vectors[:1])
    "".join(chat.say("it?", 2))
    with pytest.raises(UserError, match="1 x <image>, and there are 0 pictures"):
        "".join(chat.say("is <image> it?", 2))


# ---- beams


def test_ask_with_beams(agent, vectors):
    ids = agent.prompt([question_message("it?", 2)])
    expected = beam_search(agent.model, ids, 9, beams=3, stop_ids=agent.stop_ids, images=vectors[:2])
    assert "".join(agent.ask("it?", vectors[:2], 9, beams=3)) == agent.tokenizer.decode(expected)
    assert "".join(agent.ask("it?", vectors[:2], 9, beams=1)) == uncached(agent, ids, vectors[:2], 9)
    assert len("".join(agent.ask("it?", vectors[:2], beams=2))) > 0  # as many tokens as fit
    conversations, seen = [[question_message(q, 1)] for q in ("it?", "is it red?")], [vectors[:1], vectors[1:2]]
    together = agent.answer_all(conversations, seen, 6, beams=3)
    alone = ["".join(agent.ask(q, v, 6, beams=3)).strip() for q, v in zip(("it?", "is it red?"), seen, strict=True)]
    assert together == alone
    for wrong in (Sampling(temperature=0.5), Sampling(repetition_penalty=2.0)):
        with pytest.raises(UserError, match="has no temperature and no repetition penalty"):
            agent.ask("it?", vectors[:1], 6, wrong, beams=3)
    for beams in (0, 65):
        with pytest.raises(UserError, match="number of beams must be in 1..64"):
            agent.ask("it?", vectors[:1], 6, beams=beams)


def test_eval_with_beams(agent, vectors):
    class Drawer(Agent):
        def look(self, images):
            return vectors[[int(image) for image in images]]

    drawer = Drawer(agent.model, agent.tokenizer, agent.training)
    data = Dataset("toy", "caption", [caption_sample(str(i), ["a red box"]) for i in range(3)])
    answers = answer_dataset(drawer, data, 2, beams=4)
    ids = drawer.prompt([question_message(CAPTION_PROMPT, 1)])
    room = min(32, agent.model.config.sequence_len - len(ids))
    expected = [
        beam_search(agent.model, ids, room, beams=4, stop_ids=agent.stop_ids, images=vectors[i : i + 1])
        for i in range(3)
    ]
    assert answers.by_condition["aligned"] == [agent.tokenizer.decode(row).strip() for row in expected]


# ---- at the command line


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The shipped model, said to have learnt up to two pictures. What it answers about two is not its trade."""
    model, tokenizer, training = load_checkpoint("shapes")
    folder = tmp_path_factory.mktemp("pairs") / "m"
    save_checkpoint(folder, model, tokenizer, training | {"images": 2})
    return str(folder)


def test_ask_about_two_pictures(nanochat, pairs, tmp_path):
    agent, names = Agent.load(pairs), [picture(0), picture(1)]
    expected = "".join(agent.ask(QUESTION, agent.look(names)))
    printed = nanochat("ask", *names, QUESTION, "--checkpoint", pairs)
    assert printed.out == f"{expected}\n" and printed.err == ""
    row = json.loads(nanochat("ask", *names, QUESTION, "--checkpoint", pairs, "--json").out)
    assert row == {"files": names, "question": QUESTION, "answer": expected.strip()}
    placed = "what color is <image> and <image>?"
    printed = nanochat("ask", *names, placed, "--checkpoint", pairs)
    assert printed.out == "".join(agent.ask(placed, agent.look(names))) + "\n"
    lines = nanochat("ask", *names, QUESTION, "--checkpoint", pairs, "--each").out.splitlines()
    assert lines == [f"{names[0]}: red", f"{names[1]}: black"]
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n")
    printed = nanochat("ask", PICTURE, tmp_path, QUESTION, "--checkpoint", pairs, "--json")  # one of the two is broken
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert "x.png" in rows[0]["error"] and rows[1] == {"file": PICTURE, "question": QUESTION, "answer": "red"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["P", "P", "P", QUESTION],
            "3 pictures in one question, but this model has learnt questions about up to 2 pictures",
        ),
        (["P", "P", "is <image> it?"], "the question has 1 x <image>, and there are 2 pictures"),
        (["P", "P", "why " * 400], "2 pictures of"),
        (["P", "gone.png", QUESTION], "there is no file gone.png"),
    ],
)
def test_what_ask_refuses(nanochat, pairs, words, message):
    words = [PICTURE if word == "P" else word for word in words]
    printed = nanochat("ask", *words, "--checkpoint", pairs, code=2)
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""


def test_chat_about_two_pictures(nanochat, pairs, monkeypatch):
    agent, names = Agent.load(pairs), [picture(0), picture(1)]
    both = "".join(agent.ask(QUESTION, agent.look(names))).strip()
    two, three = f"/image '{names[0]}' {names[1]}", f"/image {names[0]} {names[0]} {names[0]}"
    lines = [QUESTION, f"/image {names[1]}", QUESTION, two, QUESTION, three, "/quit"]
    monkeypatch.setattr(sys, "stdin", Terminal("".join(f"{line}\n" for line in lines)))
    printed = nanochat("chat", "--image", names[0], "--image", names[1], "--checkpoint", pairs)
    said = [line.removeprefix("> ").strip() for line in printed.out.splitlines()][1:6]
    assert said == [both, f"looking at {names[1]}", "black", f"looking at {', '.join(names)}", both]
    assert "3 pictures in one question" in printed.err and printed.err.count("\n") == 1


def test_captions_with_beams(nanochat):
    frame = PICTURE.replace("pictures/0.png", "demo/frame.png")
    agent = Agent.load("robot")
    expected = "".join(agent.ask(CAPTION_PROMPT, agent.look(frame), beams=3))
    assert nanochat("caption", frame, "--checkpoint", "robot", "--beams", "3").out == f"{expected}\n"
    error = nanochat("caption", frame, "--checkpoint", "robot", "--beams", "3", "--temperature", "1", code=2).err
    assert "no temperature" in error and error.count("\n") == 1
    assert "1..64" in nanochat("caption", frame, "--checkpoint", "robot", "--beams", "0", code=2).err


def test_eval_takes_beams(nanochat, tmp_path):
    pytest.importorskip("pycocoevalcap")
    for number in range(2):
        shutil.copy(picture(number), tmp_path / f"{number}.png")
    (tmp_path / "captions.csv").write_text("image,caption\n0.png,a red shape\n1.png,a black shape\n")
    out = tmp_path / "r.json"
    nanochat("eval", "robot", tmp_path / "captions.csv", "--beams", "3", "--json", out)
    result = json.loads(out.read_text())
    assert result["beams"] == 3 and result["n"] == 2 and "bleu4" in result
    assert "1..64" in nanochat("eval", "robot", tmp_path / "captions.csv", "--beams", "0", code=2).err
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").write_text("{}")
    assert "--beams is for captions" in nanochat("eval", "robot", tmp_path, "--beams", "3", code=2).err
