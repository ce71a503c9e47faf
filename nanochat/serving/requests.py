"""What goes into a Batcher, what it knows of it meanwhile, and what comes out. No torch."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from nanochat.sampling import Sampling
from nanochat.serving.answers import AnswerText, Likely
from nanochat.serving.prefixes import Named
from nanochat.serving.seen import Key


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


@dataclass(eq=False)
class Line:
    """One answer in the making. parts: of the prompt, still to be read. number: of its row in the engine."""

    index: int
    parts: list[list[int]]
    text: AnswerText
    constraint: Constraint | None
    vectors: Any = None  # of the pictures in the first part
    cache: Any = None  # of a prompt whose beginning is known, or that has several parts
    number: int | None = None
    row: Any = None


@dataclass(eq=False)
class Ticket:
    """A request on its way. send: called with each event, and with an exception instead of the last one, from any thread."""

    request: Request
    send: Callable[[Any], None]
    only_look: bool = False  # the vectors are all that is wanted; they are sent
    arrived: float = field(default_factory=time.monotonic)
    gone: bool = False  # the client does not wait any more
    ended: bool = False
    key: Key = ()  # of the pictures
    named: Named | None = None  # the prompt, see `prefixes.named`
    vectors: Any = None
    cached: int = 0  # pictures whose vectors were known
    cached_tokens: int = 0  # of the prompt, whose keys and values were known
    lines: list[Line] = field(default_factory=list)
    looked: float = 0.0
    first: float = 0.0
    new_tokens: int = 0

    @property
    def late(self) -> bool:
        return time.monotonic() - self.arrived > self.request.seconds
