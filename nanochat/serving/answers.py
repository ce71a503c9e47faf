"""From the tokens of one answer to the text that a client gets: whole characters, stop strings, log probabilities. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from nanochat.tokenizer import StreamDecoder


@dataclass(frozen=True)
class Likely:
    """A token and its log probability, before any temperature or filter. top: the likeliest ones, with theirs."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def likely(logits: np.ndarray, token: int, top: int) -> Likely:
    """logits: (V,) float32, those that the token was chosen from. top: how many alternatives to name."""
    shifted = logits.astype(np.float64) - logits.max()
    logprobs = shifted - np.log(np.exp(shifted).sum())
    best = np.argsort(-logprobs, kind="stable")[:top]
    return Likely(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in best))


@dataclass
class AnswerText:
    """Text that grows token by token and ends before the first of the stop strings, which is never shown.

    A tail that may be the start of a stop string is held back until the next token decides.
    """

    decoder: StreamDecoder
    stops: Sequence[str] = ()
    held: str = ""
    stopped: bool = field(default=False, init=False)

    def feed(self, token: int) -> str:
        """The text that can be shown after one more token. `stopped` is True once a stop string is complete."""
        return self.cut(self.decoder.feed(token))

    def flush(self) -> str:
        """The rest, when the answer has ended."""
        shown = self.cut(self.decoder.flush())
        rest, self.held = self.held, ""
        return shown if self.stopped else shown + rest

    def cut(self, piece: str) -> str:
        text = self.held + piece
        ends = [at for stop in self.stops if (at := text.find(stop)) >= 0]
        if ends:
            self.stopped, self.held = True, ""
            return text[: min(ends)]
        kept = max((overlap(text, stop) for stop in self.stops), default=0)
        self.held = text[len(text) - kept :]
        return text[: len(text) - kept]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a start of `stop`, shorter than all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
