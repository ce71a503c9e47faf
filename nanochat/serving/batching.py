"""Many clients, one engine: requests join and leave a running batch (continuous batching; Orca, OSDI 2022). No torch.

    batcher = Batcher(agent)
    async for event in batcher.events(Request(prompt, [picture])):   # Piece, Piece, Finished, Done
        ...

A Batcher has two threads. The engine's thread alone touches the engine and the model's decoder: it adds rows, makes one step,
and runs other short work (`call`) between two steps. The encoder's thread opens pictures and looks at them, so that a new picture
does not stop the answers that run. Vectors of pictures are kept by their SHA-256: the second question about a picture waits for
no encoder.

A prompt of more than CHUNK tokens is read in parts, one a step, so that it does not stop the others either (SARATHI, arXiv
2308.16369). The rows of a client that has gone leave before the next step.
"""

import asyncio
import logging
import os
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from typing import Any

from nanochat.agent import DEFAULT_NEW_TOKENS
from nanochat.errors import UserError
from nanochat.serving.answers import AnswerText, likely
from nanochat.serving.prefixes import Prefixes, RememberingEngine, named
from nanochat.serving.requests import Busy, Done, Event, Finished, Line, Piece, Request, Ticket
from nanochat.serving.seen import Seen, key_of
from nanochat.tokenizer import StreamDecoder

logger = logging.getLogger(__name__)
CHUNK = 64  # tokens of a prompt that are read in one step


class Batcher:
    """agent: `nanochat.agent.Agent`, or what has its `model`, `tokenizer`, `stop_ids` and `look`. max_rows: answers that run at a
    time. max_queue: requests that wait for their turn; one more is refused with `Busy`. max_pixels: of a picture."""

    def __init__(self, agent, max_rows: int = 32, max_queue: int = 128, max_pixels: int = 25_000_000):
        self.agent, self.max_rows, self.max_queue = agent, max_rows, max_queue
        self.seen = Seen(agent.look, max_pixels)
        self.place = getattr(agent.model.config, "vision_token_id", None)
        self.engine = RememberingEngine(agent.model, Prefixes())
        self.changed = threading.Condition()  # guards what follows
        self.unseen: deque[Ticket] = deque()  # wait for the encoder
        self.waiting: deque[Ticket] = deque()  # wait for a place in the batch
        self.jobs: deque[tuple[Callable[[], Any], Future]] = deque()
        self.closing = False
        self.running: dict[int, tuple[Ticket, Line]] = {}  # row -> whose it is; the engine's thread only
        self.prompt_tokens = self.cached_tokens = self.new_tokens = 0
        self.seconds_each = 1.0  # a request took about this long lately
        self.threads = [
            threading.Thread(target=work, name=f"nanochat-{work.__name__}", daemon=True)
            for work in (self.run_encoder, self.run_engine)
        ]
        for thread in self.threads:
            thread.start()

    # ---- what the server calls

    @property
    def queued(self) -> int:
        return len(self.unseen) + len(self.waiting)

    async def events(self, request: Request) -> AsyncIterator[Event]:
        """The events of a request, the last of which is Done. Closing the iterator cancels the request.

        Raises Busy, UserError for a request that cannot be answered, and any other exception that made it fail.
        """
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()

        def send(event: Event | BaseException) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(queue.put_nowait, event)

        ticket = self.submit(request, send)
        try:
            while True:
                event = await queue.get()
                if isinstance(event, BaseException):
                    raise event
                yield event
                if isinstance(event, Done):
                    return
        finally:
            ticket.gone = True

    async def look(self, pictures: Sequence[bytes]) -> Any:
        """The vectors (n, N, D) of encoded image files, in the order in which they were asked for. Raises as `events`."""
        loop = asyncio.get_running_loop()
        found = loop.create_future()

        def settle(result: Any) -> None:
            if not found.done():
                (found.set_exception if isinstance(result, BaseException) else found.set_result)(result)

        def send(result: Any) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(settle, result)

        self.submit(Request((), pictures), send, only_look=True)
        return await found

    def submit(self, request: Request, send: Callable[[Any], None], only_look: bool = False) -> Ticket:
        """Put a request into the queue. Raises Busy where that is full."""
        if not 1 <= request.n <= self.max_rows:
            raise UserError(f"n must lie in 1..{self.max_rows}, the answers that run at a time, got {request.n}")
        ticket = Ticket(request, send, only_look, key=key_of(request.pictures))
        if request.pictures and not only_look and (vectors := self.seen.known(ticket.key)) is not None:
            ticket.vectors, ticket.cached = vectors, len(request.pictures)  # it does not queue behind new pictures
        to_look = bool(request.pictures) and ticket.vectors is None
        with self.changed:
            if self.queued >= self.max_queue or self.closing:
                seconds = max(1, round(self.seconds_each * self.queued / self.max_rows))
                raise Busy(f"{self.queued} requests wait already: try again in {seconds} s", seconds)
            (self.unseen if to_look else self.waiting).append(ticket)
            self.changed.notify_all()
        return ticket

    def call(self, function: Callable[[], Any]) -> Future:
        """Run a short function in the engine's thread, between two steps. Raises Busy where too many wait."""
        future: Future = Future()
        with self.changed:
            if len(self.jobs) >= self.max_queue or self.closing:
                raise Busy(f"{len(self.jobs)} requests wait already: try again in 1 s", 1)
            self.jobs.append((function, future))
            self.changed.notify_all()
        return future

    async def run(self, function: Callable[[], Any]) -> Any:
        """As `call`, for a coroutine to wait for."""
        return await asyncio.wrap_future(self.call(function))

    def close(self) -> None:
        """End both threads. Requests that still run fail."""
        with self.changed:
            self.closing = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join(timeout=10)

    # ---- the encoder's thread

    def run_encoder(self) -> None:
        yield_cores()
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.unseen or self.closing)
                if self.closing:
                    return self.refuse(self.unseen)
                ticket = self.unseen[0]  # it leaves when it has been looked at, so that it counts as queued
            try:
                if not (ticket.gone or ticket.late):
                    ticket.vectors, ticket.cached = self.seen.vectors(ticket.key, ticket.request.pictures)
                if ticket.only_look:
                    ticket.ended = True
                    ticket.send(too_late(ticket) if ticket.vectors is None else ticket.vectors)
            except Exception as error:
                ticket.ended = True
                ticket.send(error)
            with self.changed:
                self.unseen.popleft()
                if not ticket.ended:
                    self.waiting.append(ticket)
                self.changed.notify_all()

    def refuse(self, tickets: deque[Ticket]) -> None:
        while tickets:
            tickets.popleft().send(Busy("the server is about to stop", 5))

    # ---- the engine's thread

    def run_engine(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.jobs or self.running or self.closing)
                if self.closing:
                    break
                jobs = [self.jobs.popleft() for _ in range(len(self.jobs))]
            for function, future in jobs:
                run_job(function, future)
            self.leave()
            self.admit()
            if self.running:
                self.step()
        with self.changed:
            self.refuse(self.waiting)
            for _, future in self.jobs:
                future.cancel()
        for ticket in {ticket for ticket, _ in self.running.values()}:
            ticket.send(Busy("the server is about to stop", 5))

    def leave(self) -> None:
        """Drop the rows of clients that have gone or have run out of time."""
        for number, (ticket, line) in list(self.running.items()):
            if ticket.gone or ticket.late:
                self.engine.drop(number)
                self.end(ticket, line, "length")

    def admit(self) -> None:
        """Take requests out of the queue, in order, while there is place for all their answers."""
        while True:
            with self.changed:
                if not self.waiting or len(self.running) + self.waiting[0].request.n > self.max_rows:
                    return
                ticket = self.waiting.popleft()
            if ticket.gone:
                continue
            if ticket.late:
                ticket.send(too_late(ticket))
                continue
            try:
                self.start(ticket)
            except Exception as error:
                self.fail(ticket, error)

    def start(self, ticket: Ticket) -> None:
        request, tokenizer = ticket.request, self.agent.tokenizer
        ticket.looked = time.monotonic()
        self.prompt_tokens += len(request.prompt)
        ticket.named = named(request.prompt, ticket.key, self.place, self.agent.places_per_image)
        room = self.room(request)
        self.engine.check(list(request.prompt), room, 0)  # whole, before a part of it is read
        for index in range(request.n):
            text = AnswerText(StreamDecoder(tokenizer), request.stops)
            constraint = request.constraint() if request.constraint else None
            known, cache = self.engine.prefixes.find(ticket.named, len(request.prompt) + room)
            parts = self.parts(request.prompt[known:])
            if cache is None and len(parts) > 1:
                cache = self.engine.new_cache(1, len(request.prompt) + room)
            line = Line(index, parts, text, constraint, self.unread(ticket, known), cache)
            ticket.lines.append(line)
            self.read_next(ticket, line)
        ticket.cached_tokens = known
        self.cached_tokens += known

    def unread(self, ticket: Ticket, known: int) -> Any:
        """The vectors of the pictures behind the `known` first tokens of the prompt."""
        if ticket.vectors is None or not known:
            return ticket.vectors
        places = list(ticket.request.prompt[:known]).count(self.place)
        rest = ticket.vectors[places // self.agent.places_per_image :]
        return rest if len(rest) else None

    def parts(self, prompt: Sequence[int]) -> list[list[int]]:
        """The prompt, cut every CHUNK tokens. Pictures are in the first part, which ends behind the last of them."""
        pictures_end = max((i + 1 for i, token in enumerate(prompt) if token == self.place), default=0)
        first = max(CHUNK, pictures_end)
        starts = [0, *range(first, len(prompt), CHUNK), len(prompt)]
        return [list(prompt[start:end]) for start, end in zip(starts, starts[1:], strict=False)]

    def read_next(self, ticket: Ticket, line: Line) -> None:
        """Add the next part of a line's prompt to the engine. Before the last one, the token that follows is not used."""
        request, part, vectors = ticket.request, line.parts.pop(0), line.vectors
        last, line.vectors = not line.parts, None
        line.number = self.engine.add(
            part, self.room(request) if last else 1,
            sampling=request.sampling if last else None, sample=line.index, cache=line.cache,
            stop_ids=self.agent.stop_ids if last else (), images=vectors,
        )  # fmt: skip
        if last and ticket.named is not None:
            self.engine.to_keep[line.number] = ticket.named
        line.row = self.engine.rows[line.number]
        self.running[line.number] = ticket, line

    def room(self, request: Request) -> int:
        """The most tokens of an answer: what the client wants, but no more than fit. Where none fit, the engine says so."""
        fits = self.agent.model.config.sequence_len - len(request.prompt)
        return max(1, min(request.max_new_tokens or DEFAULT_NEW_TOKENS, fits))

    def step(self) -> None:
        for ticket, line in self.running.values():
            if line.constraint is not None and not line.parts:
                line.row.sampling = replace(ticket.request.sampling, allowed_ids=tuple(line.constraint.allowed()))
        try:
            said = self.engine.step()
        except Exception as error:
            logger.exception("a step of the engine failed")
            for ticket in {ticket for ticket, _ in self.running.values()}:
                self.fail(ticket, error)
            self.engine = RememberingEngine(self.agent.model, self.engine.prefixes)
            return
        for number, (ticket, line) in list(self.running.items()):
            waits = number in self.engine.rows and number not in said  # this step was for others
            if waits or number not in self.running:  # or its request failed just now
                continue
            try:
                self.heard(ticket, line, said.get(number))
            except Exception as error:
                self.fail(ticket, error)

    def heard(self, ticket: Ticket, line: Line, token: int | None) -> None:
        """What a step gave a line: a token, or None where it ended by a stop id."""
        ended = line.number not in self.engine.rows
        if line.parts:
            del self.running[line.number]
            return self.read_next(ticket, line)
        ticket.first = ticket.first or time.monotonic()
        if token is not None:
            ticket.new_tokens += 1
            self.new_tokens += 1
            if line.constraint is not None:
                line.constraint.accept(token)
            top = ticket.request.top_logprobs
            tokens = () if top is None else (likely(self.engine.logits[line.number], token, top),)
            ticket.send(Piece(line.index, line.text.feed(token), tokens))
        if line.text.stopped:
            self.engine.drop(line.number)
        if ended or line.text.stopped:
            self.end(ticket, line, "stop" if token is None or line.text.stopped else "length")

    def end(self, ticket: Ticket, line: Line, reason: str) -> None:
        """A line has ended; with the last of its lines, the request."""
        del self.running[line.number]
        ticket.lines.remove(line)
        if rest := line.text.flush():
            ticket.send(Piece(line.index, rest))
        ticket.send(Finished(line.index, "stop" if line.text.stopped else reason))
        if ticket.lines or ticket.ended:
            return
        ticket.ended, now = True, time.monotonic()
        first = ticket.first or now
        self.seconds_each += 0.1 * (now - ticket.arrived - self.seconds_each)
        ticket.send(
            Done(
                len(ticket.request.prompt),
                ticket.new_tokens,
                ticket.cached,
                ticket.cached_tokens,
                1e3 * (ticket.looked - ticket.arrived),
                1e3 * (first - ticket.looked),
                1e3 * (now - first),
                ticket.late,
            )  # fmt: skip
        )

    def fail(self, ticket: Ticket, error: Exception) -> None:
        """End all lines of a request with an error."""
        for line in ticket.lines:
            if self.running.pop(line.number, None) is not None:
                self.engine.drop(line.number)
        ticket.lines.clear()
        if not ticket.ended:
            ticket.ended = True
            ticket.send(error)


def yield_cores() -> None:
    """Let other threads of this process have the core first, where the system can do so (Linux)."""
    with suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 5)


def run_job(function: Callable[[], Any], future: Future) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        future.set_exception(error)


def too_late(ticket: Ticket) -> Busy:
    return Busy(f"the request waited for more than {ticket.request.seconds:g} s", 5)
