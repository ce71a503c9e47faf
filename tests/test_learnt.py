"""A model answers what it was trained to answer, and says so where it was not."""

import pytest

from nanochat.agent import Agent, Chat, learnt_by
from nanochat.checkpoint import ASSETS, load_checkpoint, save_checkpoint
from nanochat.data import CAPTION_PROMPT
from nanochat.errors import UserError
from nanochat.evaluation.held_out import sources_of
from nanochat.training.resuming import first_state

PICTURE = ASSETS / "pictures" / "0.png"
QUESTION = "what color is the shape?"


@pytest.fixture(scope="module")
def default():
    return load_checkpoint("shapes")


@pytest.mark.parametrize(
    ("training", "learnt"),
    [
        ({}, "qca"),
        ({"recipe_name": "easy_vqa"}, "q"),
        ({"recipe_name": "daquar"}, "q"),
        ({"recipe_name": "flickr8k"}, "c"),
        ({"recipe_name": "flickr8k", "earlier": [{"recipe_name": "daquar"}]}, "qc"),
        ({"recipe_name": "folder", "recipe": {}}, "qca"),
        ({"recipe_name": "upstream"}, "q"),
        ({"recipe_name": "robot"}, "qca"),
        ({"recipe_name": "robot", "recipe": {"questions_per_step": 8, "question_loss": 0.3}}, "qca"),
        ({"recipe_name": "robot", "recipe": {"questions_per_step": 0, "question_loss": 0.3}}, "a"),
        ({"recipe_name": "robot", "recipe": {"questions_per_step": 8, "question_loss": 0}}, "a"),
        ({"recipe_name": "robot", "learnt": {"questions": False, "captions": False, "actions": True}}, "a"),
        ({"recipe_name": "folder", "learnt": {"captions": True}}, "c"),
        ({"recipe_name": 3, "recipe": {}, "learnt": {}}, "qca"),
    ],
)
def test_what_a_checkpoint_learnt(training, learnt):
    assert "".join(name[0] for name, found in learnt_by(training).items() if found) == learnt


def agent_that_learnt(default, *names):
    model, tokenizer, training = default
    return Agent(
        model, tokenizer, training | {"learnt": {name: name in names for name in ("questions", "captions", "actions")}}
    )


def test_a_policy_without_questions_refuses_them(default):
    agent = agent_that_learnt(default, "actions")
    seen = agent.look(PICTURE)
    with pytest.raises(
        UserError, match="not trained to answer questions about pictures; it acts: choose another model$"
    ):
        agent.ask(QUESTION, seen)
    with pytest.raises(UserError, match="not trained to describe pictures; it acts"):
        agent.ask(CAPTION_PROMPT, seen)
    with pytest.raises(UserError, match="not trained to answer questions"):
        list(Chat(agent, seen).say(QUESTION))


def test_a_model_of_captions_describes_and_answers_nothing(default):
    agent = agent_that_learnt(default, "captions")
    seen = agent.look(PICTURE)
    assert isinstance("".join(agent.ask(CAPTION_PROMPT, seen)), str)
    with pytest.raises(UserError, match="it describes pictures: choose another"):
        agent.ask(QUESTION, seen)


def test_the_shipped_models_do_what_they_learnt(nanochat):
    agent = Agent.load("shapes")
    assert "".join(agent.ask(QUESTION, agent.look(PICTURE))) == "red"
    with pytest.raises(
        UserError, match="not trained to describe pictures; it answers questions: choose another model$"
    ):
        agent.ask(CAPTION_PROMPT, agent.look(PICTURE))
    assert (
        "another model with --checkpoint, such as photos"
        in nanochat("caption", PICTURE, "--checkpoint", "shapes", code=2).err
    )
    robot = Agent.load("robot")
    assert all(robot.learnt.values())
    assert "".join(robot.ask(CAPTION_PROMPT, robot.look(ASSETS / "demo" / "frame.png")))


def test_what_was_learnt_is_saved_and_loaded(default, tmp_path):
    learnt = {"questions": False, "captions": True, "actions": False}
    save_checkpoint(tmp_path / "m", default[0], default[1], {"learnt": learnt})
    assert Agent.load(str(tmp_path / "m")).learnt == learnt


def test_the_record_of_an_earlier_run_names_all_of_its_data():
    recipe = {"data": "a", "also": ["b", "c"], "seed": 1, "train_split": "fit", "val_split": "val", "n_layer": 2}
    (run,) = first_state({"recipe_name": "robot", "recipe": recipe, "step": 5, "seconds": 1.0})["earlier"]
    assert [run[key] for key in ("data", "also", "seed", "step")] == ["a", ["b", "c"], 1, 5] and "n_layer" not in run
    assert sources_of(run) == ["a", "b", "c"]
