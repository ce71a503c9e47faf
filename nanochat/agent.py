"""Pictures and text in, text and actions out: a checkpoint behind one small interface.

agent = Agent.load("robot")
seen = agent.look("frame.png")                        # encode once,
"".join(agent.ask("is the gripper open?", seen))      # ask often
agent.act([frame], [state], ["open the door"])        # (1, chunk, action_dim)
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from nanochat.checkpoint import load_checkpoint
from nanochat.conversation import action_message, render, user_message
from nanochat.data.sample import CAPTION_PROMPT
from nanochat.engine import Engine, KVCache
from nanochat.errors import UserError
from nanochat.sampling import Sampling
from nanochat.tokenizer import StreamDecoder

DEFAULT_NEW_TOKENS = 64
LEARNT = ("questions", "captions", "actions")


class Agent:
    """training: training.json of the checkpoint, how the model was made."""

    def __init__(self, model, tokenizer, training: dict | None = None):
        self.model, self.tokenizer, self.training = model, tokenizer, training or {}
        self.stop_ids = (tokenizer.special("<|assistant_end|>"), tokenizer.special("<|bos|>"))
        self.tokens_per_image = getattr(model.config, "vision_tokens_per_image", 0)

    @classmethod
    def load(cls, name: str = "default", device: str | torch.device = "cpu") -> "Agent":
        """A checkpoint folder, a model that ships ("default", "robot") or a hub name. Raises CheckpointError if it is damaged,
        missing or of a newer format."""
        return cls(*load_checkpoint(name, device))

    @property
    def multi_turn(self) -> bool:
        """Whether the model was trained on conversations of several turns."""
        return self.training.get("multi_turn", False)

    @property
    def learnt(self) -> dict[str, bool]:
        """What the model was trained for: "questions" about pictures, "captions" (answers to `CAPTION_PROMPT`), "actions"."""
        return learnt_by(self.training)

    def check_learnt(self, question: str) -> None:
        """Raises UserError for a question of a kind that the model was never trained to answer: what it says would be noise."""
        caption = question.strip() == CAPTION_PROMPT
        wanted, other = ("captions", "questions") if caption else ("questions", "captions")
        if self.learnt[wanted]:
            return
        does = {"questions": 'answers questions (nanochat ask IMAGE "QUESTION")', "captions": "describes pictures (nanochat "
                "caption IMAGE)", "actions": "acts (nanochat rollout, nanochat policy-server)"}  # fmt: skip
        can = [text for name, text in does.items() if self.learnt[name]]
        lacks = "to describe pictures" if caption else "to answer questions about pictures"
        shipped = "robot" if caption or self.learnt[other] else "default"
        raise UserError(
            f"this model was not trained {lacks}; it {' and '.join(can) or 'has learnt nothing yet'}: choose another "
            f"--checkpoint, such as {shipped}, or train one with nanochat train folder"
        )

    def look(self, images) -> torch.Tensor:
        """One picture or a list of n -> (n, N, D) float32 vision vectors. Raises ValueError for a text model, ImageError for
        what is not a picture."""
        if not self.tokens_per_image:
            raise UserError("this checkpoint is a text model: it cannot look at pictures")
        return self.model.look(images)

    # ---- answers

    def ask(
        self,
        question: str,
        vectors: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
    ) -> Iterator[str]:
        """Stream the answer to one question about the pictures behind `vectors` (n, N, D), in whole characters.

        Raises ValueError for a question that does not fit the context, and for one of a kind that the model never learnt to
        answer (see `learnt`).
        """
        self.check_learnt(question)
        ids = self.prompt([user_message(question, 0 if vectors is None else len(vectors))])
        return self.answer(ids, vectors, max_new_tokens, sampling)

    def prompt(self, messages: Sequence[dict]) -> list[int]:
        return render(self.tokenizer, messages, self.tokens_per_image, for_completion=True).ids

    def answer(
        self,
        ids: list[int],
        vectors=None,
        max_new_tokens: int | None = None,
        sampling=None,
        cache: KVCache | None = None,
    ) -> Iterator[str]:
        """Stream the text that follows the tokens `ids`. cache: holds what comes before them."""
        if max_new_tokens is None:  # as many as fit; where none does, the engine says why
            left = self.model.config.sequence_len - len(ids) - (cache.longest if cache is not None else 0)
            max_new_tokens = max(1, min(DEFAULT_NEW_TOKENS, left))
        images = None if vectors is None or not len(vectors) else [vectors]
        steps = Engine(self.model).stream(
            [ids], max_new_tokens, sampling=sampling, stop_ids=self.stop_ids, images=images, cache=cache
        )
        return self.text(said[0] for said in steps)

    def text(self, tokens: Iterator[int]) -> Iterator[str]:
        decoder = StreamDecoder(self.tokenizer)
        for token in tokens:
            yield decoder.feed(token)
        yield decoder.flush()

    def answer_all(
        self, conversations: Sequence[Sequence[dict]], vectors: Sequence[torch.Tensor], max_new_tokens: int
    ) -> list[str]:
        """Greedy answers to many conversations at once. vectors: (n_i, N, D) for each, with 0 pictures (0, N, D)."""
        prompts = [self.prompt(messages) for messages in conversations]
        images = [seen if len(seen) else None for seen in vectors]
        rows = Engine(self.model).generate(prompts, max_new_tokens, images=images, stop_ids=self.stop_ids)
        return [self.tokenizer.decode(row).strip() for row in rows]

    # ---- actions

    def check_can_act(self) -> None:
        """Raises ValueError for a model without an action head."""
        if not hasattr(self.model, "action_head"):
            raise UserError(
                f"this checkpoint is a {type(self.model).__name__} without an action head, so it cannot act: "
                "train a policy with nanochat train robot"
            )

    @property
    def metadata(self) -> dict:
        """What clients of a policy need to know."""
        self.check_can_act()
        config = self.model.config
        return {
            "action_head": config.action_head,
            "chunk": config.chunk,
            "action_dim": config.action_dim,
            "state_dim": config.state_dim,  # 0: the policy reads no state
            "state_range": self.state_range,  # low and high of each number in the training data
            "targets": config.targets,  # relative or absolute
            "image_size": config.vision_image_size,
        }

    @property
    def state_range(self) -> tuple[list[float], list[float]]:
        """The range of each number of the state in the training data, in physical units; empty lists for a policy without one.
        States far outside are refused, see `actions.check_states`."""
        self.check_can_act()
        trained = self.model.trained_states
        return ([], []) if trained is None else (trained.low, trained.high)

    @property
    def action_range(self) -> tuple[list[float], list[float]]:
        """The 1st and the 99th percentile of each action dimension in the training data, in physical units."""
        self.check_can_act()
        return self.model.action_scale.low, self.model.action_scale.high

    @torch.inference_mode()
    def act(self, images: Sequence, states: np.ndarray | None, instructions: Sequence[str]) -> np.ndarray:
        """B pictures, (B, state_dim) states, B instructions -> (B, chunk, action_dim) float32, all in physical units. states is
        None for a policy that reads no state (state_dim 0).

        None instead of a picture masks it, as training masks some. Nothing is clipped: send actions through
        `safety.SafeActions` before anything moves. Raises ValueError for numbers or shapes that do not match, for states far
        outside of the training data's range (another unit), and for a model that cannot act; ImageError for what is not a
        picture.
        """
        self.check_can_act()
        config, shown = self.model.config, [i for i, image in enumerate(images) if image is not None]
        vectors = torch.zeros(len(images), config.vision_tokens_per_image, config.vision_embedding_dim)
        vectors = vectors.to(self.model.device)
        if shown:
            vectors[shown] = self.look([images[i] for i in shown]).to(vectors.device)
        return self.model.act([self.prompt([action_message(text)]) for text in instructions], vectors, states)


class Chat:
    """A conversation of many turns about the same pictures.

    A model that was trained on conversations (`Agent.multi_turn`) reads the earlier turns with each question; where they leave
    too little of the context, the older half of them is dropped. A model that was trained on single questions gets each
    question as if it were the first: earlier turns would only mislead it.

    Either way the key/value cache is kept and rewound to where the new prompt differs from it: a turn costs its own tokens, and
    the pictures are read once.
    """

    def __init__(self, agent: Agent, vectors: torch.Tensor | None = None):
        self.agent, self.cache = agent, Engine(agent.model).new_cache()
        self.vectors = vectors if vectors is not None and len(vectors) else None
        self.turns: list[tuple[str, str]] = []  # (question, answer), those that are remembered
        self.read: list[int] = []  # begins with the tokens that the cache holds

    def say(self, question: str, max_new_tokens: int | None = None, sampling: Sampling | None = None) -> Iterator[str]:
        """Stream the answer to the next turn. An interrupted answer (Ctrl-C) is not remembered. Raises ValueError for a question
        that does not fit the context even alone."""
        agent, turns = self.agent, self.turns
        agent.check_learnt(question)
        ids = self.prompt(turns, question)
        # an answer of unknown length gets at least a quarter of the context
        context = agent.model.config.sequence_len
        wanted = min(DEFAULT_NEW_TOKENS, context // 4) if max_new_tokens is None else max_new_tokens
        while turns and len(ids) + wanted > context:
            turns = turns[(len(turns) + 1) // 2 :]  # half, so that the next turns need not be read again
            ids = self.prompt(turns, question)
        # the last token is always read, since the answer follows from its logits
        kept = n_common(self.read[: self.cache.lengths[0]], ids[:-1])
        self.cache.rewind([kept])
        self.read, answer = ids, []
        # every prompt starts with the pictures, so they are in the cache as soon as anything is
        for piece in agent.answer(ids[kept:], None if kept else self.vectors, max_new_tokens, sampling, self.cache):
            answer.append(piece)
            yield piece
        if agent.multi_turn:
            self.turns = [*turns, (question, "".join(answer))]

    def prompt(self, turns: list[tuple[str, str]], question: str) -> list[int]:
        messages, n_images = [], 0 if self.vectors is None else len(self.vectors)
        for asked, answered in turns:
            messages += [user_message(asked), {"role": "assistant", "content": answered}]
        messages.append(user_message(question))
        messages[0]["content"] = [{"type": "image"}] * n_images + messages[0]["content"]
        return self.agent.prompt(messages)


def learnt_by(training: dict) -> dict[str, bool]:
    """What training.json says that the model learnt: {"questions", "captions", "actions"} -> bool. Older ones do not say it: then
    it follows from the recipes of the run and of those before it; a recipe that can be either counts as both."""
    if training.get("learnt"):
        return {name: bool(training["learnt"].get(name)) for name in LEARNT}
    recipe = training.get("recipe") or {}
    asked = bool(recipe.get("questions_per_step", 1) and recipe.get("question_loss", 1))
    by_recipe = {
        "easy_vqa": {"questions"}, "daquar": {"questions"}, "flickr8k": {"captions"}, "upstream": {"questions"},
        "robot": {"actions", "questions", "captions"} if asked else {"actions"},
    }  # fmt: skip
    runs = [training, *training.get("earlier", [])]
    found = [by_recipe.get(str(run.get("recipe_name")), set(LEARNT)) for run in runs]
    return {name: any(name in learnt for learnt in found) for name in LEARNT}


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix of two token rows."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
