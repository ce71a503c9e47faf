"""What goes into a Batcher and what comes out of it. No torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from nanochat.sampling import Sampling
from nanochat.serving.answers import Likely


class Busy(Exception):
    """The queue is full. retry_after: seconds until it is worth asking again."""

    def __init__(self, message: str, retry_after: int):
        super().__init__(message)
        self.retry_after = retry_after


class Constraint(Protocol):
    """What an answer may say next, such as JSON that fits a schema (`structured.py`)."""

    def allowed(self) -> Sequence[int]: ...
    def accept(self, token: int) -> None: ...


@dataclass(frozen=True)
class Request:
    """What a client asks. prompt: token ids. pictures: encoded image files, in reading order. max_new_tokens: fewer where they do
    not fit the context. n: answers, told apart by `sample` of `Engine.add`. stops: texts that end an answer. top_logprobs: None
    for no log probabilities. constraint: makes one for each answer. seconds: an answer that takes longer ends as it is."""

    prompt: Sequence[int]
    pictures: Sequence[bytes] = ()
    max_new_tokens: int | None = None
    n: int = 1
    sampling: Sampling = Sampling()
    stops: Sequence[str] = ()
    top_logprobs: int | None = None
    constraint: Callable[[], Constraint] | None = None
    seconds: float = 60.0


@dataclass(frozen=True)
class Piece:
    """New text of answer number `index`, perhaps none, and the tokens it came from."""

    index: int
    text: str
    tokens: tuple[Likely, ...] = ()


@dataclass(frozen=True)
class Finished:
    """Answer number `index` has ended: "stop" by itself or by a stop string, "length" by a limit of tokens or seconds."""

    index: int
    reason: str


@dataclass(frozen=True)
class Done:
    """All answers have ended. cached_tokens: of the prompt, whose keys and values were known. Times are in ms: from the arrival
    until the batch has place and the pictures are encoded, from there to the first token, and from it to the last one."""

    prompt_tokens: int
    new_tokens: int
    cached_pictures: int
    cached_tokens: int
    look_ms: float
    prompt_ms: float
    answer_ms: float
    timed_out: bool


Event = Piece | Finished | Done
