"""POST /v1/chat/completions, as OpenAI documents it, with llama-server's `timings`. No torch."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse

from nanochat.sampling import Sampling
from nanochat.serving.answers import Likely
from nanochat.serving.models import Limits, Models, Served
from nanochat.serving.problems import ApiError, as_api_error, error_body
from nanochat.serving.prompts import read_prompt
from nanochat.serving.requests import Done, Event, Finished, Piece
from nanochat.serving.requests import Request as Asked
from nanochat.serving.schema import ChatRequest
from nanochat.serving.sources import Sources
from nanochat.serving.structured import constraint_for

SSE = "text/event-stream"


def chat_router(models: Models, sources: Sources, limits: Limits) -> APIRouter:
    router = APIRouter(tags=["answers"])

    @router.post("/v1/chat/completions", summary="Ask a model, with pictures")
    async def chat_completions(body: ChatRequest, request: Request):
        served = models.find(body.model)
        asked, notes = await read_request(body, served, sources, limits)
        answer = ChatAnswer(served, body, notes)
        first, events = await started(served.batcher.events(asked), request)
        if body.stream:
            return StreamingResponse(
                sse(answer.chunks(first, events)), media_type=SSE, headers={"Cache-Control": "no-store"}
            )
        return JSONResponse(await unless_gone(answer.whole(first, events), request))

    return router


async def read_request(body: ChatRequest, served: Served, sources: Sources, limits: Limits) -> tuple[Asked, list[str]]:
    """(what the batcher gets, notes for the client). Raises ApiError and UserError."""
    prompt = await read_prompt(served.agent, body.messages, sources, limits.max_pictures)
    seed = secrets.randbits(32) if body.seed is None else body.seed % 2**64
    sampling = Sampling(
        temperature=body.temperature or 0.0, top_p=body.top_p, top_k=body.top_k, min_p=body.min_p, seed=seed,
        repetition_penalty=body.repetition_penalty or 1.0,
    )  # fmt: skip
    stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
    constraint = await constraint_for(served.agent, body.response_format)
    asked = Asked(
        prompt.ids, prompt.pictures, body.max_completion_tokens or body.max_tokens, body.n or 1, sampling, stops,
        (body.top_logprobs or 0) if body.logprobs else None, constraint, limits.max_seconds,
    )  # fmt: skip
    return asked, prompt.notes


async def started(events: AsyncIterator[Event], request: Request) -> tuple[Event, AsyncIterator[Event]]:
    """(the first event, the iterator of the others): an error that comes before any text can still have its status."""
    try:
        return await unless_gone(anext(events), request), events
    except BaseException:
        await events.aclose()
        raise


async def unless_gone(answer, request: Request):
    """The result of a coroutine, which is cancelled when the client closes the connection."""
    task, gone = asyncio.ensure_future(answer), asyncio.ensure_future(until_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ApiError(499, "the client closed the connection")
    finally:
        for each in (task, gone):
            each.cancel()


async def until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def sse(chunks: AsyncIterator[dict]) -> AsyncIterator[str]:
    """Server-sent events. An error in the middle is the last event."""
    try:
        async with aclosing(chunks):
            async for chunk in chunks:
                yield f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
    except Exception as error:
        yield f"data: {json.dumps(error_body(as_api_error(error)))}\n\n"
    yield "data: [DONE]\n\n"


@dataclass
class ChatAnswer:
    """An answer to a ChatRequest in OpenAI's words."""

    served: Served
    body: ChatRequest
    notes: list[str]

    def __post_init__(self):
        kind = "chat.completion.chunk" if self.body.stream else "chat.completion"
        self.head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}", "object": kind, "created": int(time.time()), "model": self.served.name,
            "system_fingerprint": None,
        }  # fmt: skip

    async def chunks(self, first: Event, events: AsyncIterator[Event]) -> AsyncIterator[dict]:
        with_usage = bool(self.body.stream_options and self.body.stream_options.include_usage)
        usage = {"usage": None} if with_usage else {}
        for index in range(self.body.n or 1):
            yield self.chunk(index, {"role": "assistant", "content": ""}) | usage
        async for event in chained(first, events):
            if isinstance(event, Piece) and (event.text or event.tokens):
                yield self.chunk(event.index, {"content": event.text}, logprobs=self.logprobs(event.tokens)) | usage
            elif isinstance(event, Finished):
                yield self.chunk(event.index, {}, event.reason) | usage
            elif isinstance(event, Done) and with_usage:
                yield self.head | {"choices": []} | self.tail(event)

    def chunk(self, index: int, delta: dict, reason: str | None = None, logprobs: dict | None = None) -> dict:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return self.head | {"choices": [choice]}

    async def whole(self, first: Event, events: AsyncIterator[Event]) -> dict:
        texts, tokens, reasons, tail = {}, {}, {}, {}
        async for event in chained(first, events):
            if isinstance(event, Piece):
                texts[event.index] = texts.get(event.index, "") + event.text
                tokens.setdefault(event.index, []).extend(event.tokens)
            elif isinstance(event, Finished):
                reasons[event.index] = event.reason
            else:
                tail = self.tail(event)
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": texts.get(index, ""), "refusal": None},
                "logprobs": self.logprobs(tokens.get(index, ())),
                "finish_reason": reasons[index],
            }
            for index in sorted(reasons)
        ]
        return self.head | {"choices": choices} | tail

    def tail(self, done: Done) -> dict:
        notes = [*self.notes, *(["the time of this request was over"] if done.timed_out else [])]
        return {"usage": usage_of(done), "timings": timings_of(done)} | ({"notes": notes} if notes else {})

    def logprobs(self, tokens: "list[Likely] | tuple[Likely, ...]") -> dict | None:
        if not self.body.logprobs:
            return None
        tokenizer = self.served.agent.tokenizer

        def named(token: int, logprob: float) -> dict:
            text, spelled = tokenizer.bytes_of(token), tokenizer.decode([token], skip_special=False)
            return {"token": spelled, "logprob": logprob, "bytes": list(text)}

        return {
            "content": [
                named(each.token, each.logprob) | {"top_logprobs": [named(*other) for other in each.top]}
                for each in tokens
            ],
            "refusal": None,
        }


async def chained(first: Event, events: AsyncIterator[Event]) -> AsyncIterator[Event]:
    async with aclosing(events):
        yield first
        async for event in events:
            yield event


def usage_of(done: Done) -> dict:
    return {
        "prompt_tokens": done.prompt_tokens,
        "completion_tokens": done.new_tokens,
        "total_tokens": done.prompt_tokens + done.new_tokens,
        "prompt_tokens_details": {"cached_tokens": done.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
    }


def timings_of(done: Done) -> dict:
    """As llama-server's, in ms, and what comes before: look_ms for opening and encoding the pictures."""
    read, said = done.prompt_tokens - done.cached_tokens, done.new_tokens
    return {
        "look_ms": round(done.look_ms, 3), "cached_pictures": done.cached_pictures,
        "cache_n": done.cached_tokens, "prompt_n": read, "prompt_ms": round(done.prompt_ms, 3),
        "prompt_per_token_ms": round(done.prompt_ms / max(1, read), 3),
        "prompt_per_second": round(1e3 * read / max(1e-3, done.prompt_ms), 3),
        "predicted_n": said, "predicted_ms": round(done.answer_ms, 3),
        "predicted_per_token_ms": round(done.answer_ms / max(1, said), 3),
        "predicted_per_second": round(1e3 * said / max(1e-3, done.answer_ms), 3),
    }  # fmt: skip
