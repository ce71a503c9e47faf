"""Pictures and strings in, strings out: the model, its tokenizer and the engine behind one small interface.

assistant = Assistant.load("default")
seen = assistant.look("robot.jpg")              # encode once,
"".join(assistant.ask("what is this?", seen))   # ask many
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

import torch

from nanochat.checkpoint import load_checkpoint
from nanochat.conversation import render
from nanochat.engine import Engine
from nanochat.sampling import Sampling
from nanochat.tokenizer import StreamDecoder

ASSETS = Path(__file__).parent / "assets"
SHIPPED = {"default": ASSETS / "easy_vqa", "robot": ASSETS / "robot"}
DEFAULT_NEW_TOKENS = 64


def resolve_checkpoint(name: str) -> str:
    """ "default" and "robot" are the models that ship in the package; all else is a folder or a hub name."""
    return str(SHIPPED.get(name, name))


def user_message(question: str, n_images: int = 0) -> dict:
    """Pictures first, then the words."""
    return {"role": "user", "content": [{"type": "image"}] * n_images + [{"type": "text", "text": question}]}


class Assistant:
    """multi_turn: whether the model was trained on conversations of several turns, and so may be shown earlier ones."""

    def __init__(self, model, tokenizer, multi_turn: bool = False):
        self.model, self.tokenizer, self.engine = model, tokenizer, Engine(model)
        self.multi_turn = multi_turn
        self.stop_ids = (tokenizer.special("<|assistant_end|>"), tokenizer.special("<|bos|>"))
        self.tokens_per_image = getattr(model.config, "vision_tokens_per_image", 0)

    @classmethod
    def load(cls, name: str = "default", device: str | torch.device = "cpu") -> "Assistant":
        """A checkpoint folder, "default", "robot" or a hub name. Raises CheckpointError if it is damaged, missing or too new."""
        model, tokenizer, training = load_checkpoint(resolve_checkpoint(name), device)
        return cls(model, tokenizer, training.get("multi_turn", False))

    def look(self, images) -> torch.Tensor:
        """One picture or a list of n -> (n, N, D) vision vectors."""
        if not self.tokens_per_image:
            raise ValueError("this checkpoint is a text model without eyes: it cannot look at pictures")
        return self.model.encode_images(images)

    def prompt(self, messages: Sequence[dict]) -> list[int]:
        return render(self.tokenizer, messages, self.tokens_per_image, for_completion=True).ids

    def room(self, prompt: Sequence[int], wanted: int | None) -> int:
        """How many tokens may follow the prompt. The engine refuses a prompt that leaves none, and says why."""
        left = self.model.config.sequence_len - len(prompt)
        return max(1, min(DEFAULT_NEW_TOKENS, left)) if wanted is None else wanted

    def ask(
        self,
        question: str,
        vectors: torch.Tensor | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
    ) -> Iterator[str]:
        """Stream the answer to one question about the pictures behind `vectors` (n, N, D), in whole characters."""
        chat = Chat(self, vectors)
        return chat.say(question, max_new_tokens, sampling)

    def answer_all(
        self, conversations: Sequence[Sequence[dict]], vectors: Sequence[torch.Tensor], max_new_tokens: int
    ) -> list[str]:
        """Greedy answers to many conversations at once. vectors: (n_i, N, D) for each, with 0 pictures (0, N, D)."""
        prompts = [self.prompt(messages) for messages in conversations]
        flat = [v.flatten(0, 1) for v in vectors] if any(len(v) for v in vectors) else None
        rows = self.engine.generate(prompts, max_new_tokens, vision_embeddings=flat, stop_ids=self.stop_ids)
        return [self.tokenizer.decode(row).strip() for row in rows]


class Chat:
    """A conversation of many turns about the same pictures, as long as one likes.

    A model that knows conversations (`Assistant.multi_turn`) reads the earlier turns with each question; where they leave too
    little of the context, the older half of them is forgotten. One that was trained on single questions is asked each as if
    it were the first: earlier turns would only mislead it.

    Either way the key/value cache is kept and taken back to where the new row differs from what it holds: a turn costs its
    own tokens, and the pictures are read once.
    """

    def __init__(self, assistant: Assistant, vectors: torch.Tensor | None = None):
        self.assistant, self.cache = assistant, assistant.engine.new_cache()
        self.vectors = vectors if vectors is not None and len(vectors) else None
        n_images = 0 if self.vectors is None else len(self.vectors)
        self.start = assistant.prompt([user_message("", n_images)])[:-2]  # <|bos|> <|user_start|>, pictures
        self.turns: list[list[int]] = []  # what is remembered: each from the question to the next <|user_start|>
        self.read: list[int] = []  # begins with the tokens that the cache holds

    def say(self, question: str, max_new_tokens: int | None = None, sampling: Sampling | None = None) -> Iterator[str]:
        """Stream the answer to the next turn. One that is broken off (Ctrl-C) is not remembered; one that does not fit the
        context even alone is refused (ValueError)."""
        assistant, tokenizer = self.assistant, self.assistant.tokenizer
        asked = assistant.prompt([user_message(question)])[2:]  # behind <|bos|> <|user_start|>
        turns = self.turns_beside(len(asked), max_new_tokens)
        ids = [*self.start, *chain(*turns), *asked]
        # the last token is always read, since the answer follows from its logits
        kept = n_common(self.read[: self.cache.lengths[0]], ids[:-1])
        self.cache.rewind([kept])
        self.read, n_prompt, decoder = ids, len(ids), StreamDecoder(tokenizer)
        steps = assistant.engine.stream(
            [ids[kept:]],
            assistant.room(ids, max_new_tokens),
            sampling=sampling,
            stop_ids=assistant.stop_ids,
            # every row starts alike, so the pictures are in the cache as soon as anything is
            vision_embeddings=None if kept or self.vectors is None else [self.vectors.flatten(0, 1)],
            cache=self.cache,
        )
        for step in steps:
            ids.append(step[0])
            yield decoder.feed(step[0])
        if assistant.multi_turn:
            end = [tokenizer.special("<|assistant_end|>"), tokenizer.special("<|user_start|>")]
            self.turns = [*turns, [*asked, *ids[n_prompt:], *end]]
        yield decoder.flush()

    def turns_beside(self, n_asked: int, max_new_tokens: int | None) -> list[list[int]]:
        """The latest turns that leave room for a question of so many tokens and its answer."""
        context, turns = self.assistant.model.config.sequence_len, self.turns
        # an answer of unknown length gets at least a quarter of the context
        n_answer = min(DEFAULT_NEW_TOKENS, context // 4) if max_new_tokens is None else max_new_tokens
        while turns and len(self.start) + sum(map(len, turns)) + n_asked + n_answer > context:
            turns = turns[(len(turns) + 1) // 2 :]  # half, so that the next turns need not be read anew
        return turns


def n_common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two rows have in common before they part."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
