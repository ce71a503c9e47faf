"""Pictures and strings in, strings out: the model, its tokenizer and the engine behind one small interface.

assistant = Assistant.load("default")
seen = assistant.look("robot.jpg")              # encode once,
"".join(assistant.ask("what is this?", seen))   # ask many
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from nanochat.checkpoint import load_checkpoint
from nanochat.conversation import render
from nanochat.engine import Engine
from nanochat.sampling import Sampling
from nanochat.tokenizer import StreamDecoder

SHIPPED = Path(__file__).parent / "assets" / "easy_vqa"
DEFAULT_NEW_TOKENS = 64


def resolve_checkpoint(name: str) -> str:
    """ "default" is the model that ships in the package; all else is a folder or a hub name."""
    return str(SHIPPED) if name == "default" else name


def user_message(question: str, n_images: int = 0) -> dict:
    """Pictures first, then the words."""
    return {"role": "user", "content": [{"type": "image"}] * n_images + [{"type": "text", "text": question}]}


class Assistant:
    def __init__(self, model, tokenizer):
        self.model, self.tokenizer, self.engine = model, tokenizer, Engine(model)
        self.stop_ids = (tokenizer.special("<|assistant_end|>"), tokenizer.special("<|bos|>"))
        self.tokens_per_image = getattr(model.config, "vision_tokens_per_image", 0)

    @classmethod
    def load(cls, name: str = "default", device: str | torch.device = "cpu") -> "Assistant":
        """A checkpoint folder, "default" or a hub name. Raises CheckpointError if it is damaged, missing or too new."""
        model, tokenizer, _ = load_checkpoint(resolve_checkpoint(name), device)
        return cls(model, tokenizer)

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
        return wanted or max(1, min(DEFAULT_NEW_TOKENS, left))

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
    """A conversation of many turns about the same pictures. The key/value cache is kept: a turn costs its own tokens."""

    def __init__(self, assistant: Assistant, vectors: torch.Tensor | None = None):
        self.assistant, self.vectors = assistant, vectors
        self.cache = assistant.engine.new_cache()
        self.ids: list[int] = []  # the whole conversation so far; the cache holds a prefix of it

    def say(self, question: str, max_new_tokens: int | None = None, sampling: Sampling | None = None) -> Iterator[str]:
        """Stream the answer to the next turn. A turn that does not fit the context is refused and leaves no trace."""
        assistant, first = self.assistant, not self.ids
        n_images = len(self.vectors) if first and self.vectors is not None else 0
        turn = assistant.prompt([user_message(question, n_images)])
        # later turns go on after the last answer: no second <|bos|>
        ids = turn if first else [*self.ids, *turn[1:]]
        # an answer that was broken off (Ctrl-C) left tokens that are no part of the conversation
        self.cache.rewind([min(self.cache.lengths[0], len(self.ids))])
        new_tokens = assistant.room(ids, max_new_tokens)
        decoder = StreamDecoder(assistant.tokenizer)
        steps = assistant.engine.stream(
            [ids[self.cache.lengths[0] :]],
            new_tokens,
            sampling=sampling,
            stop_ids=assistant.stop_ids,
            vision_embeddings=[self.vectors.flatten(0, 1)] if n_images else None,
            cache=self.cache,
        )
        for step in steps:
            ids.append(step[0])
            yield decoder.feed(step[0])
        yield decoder.flush()
        ids.append(assistant.tokenizer.special("<|assistant_end|>"))
        self.ids = ids
