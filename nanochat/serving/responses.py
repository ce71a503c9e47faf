"""POST /v1/responses: OpenAI's newer API in the same words, whole or as named events. Nothing is stored. No torch."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse

from nanochat.sampling import Sampling
from nanochat.serving.chat import SSE, chained, started, timings_of, unless_gone
from nanochat.serving.models import Limits, Models
from nanochat.serving.problems import as_api_error
from nanochat.serving.prompts import read_prompt
from nanochat.serving.requests import Done, Event, Finished, Piece
from nanochat.serving.requests import Request as Asked
from nanochat.serving.schema import Message, ResponsesRequest
from nanochat.serving.sources import Sources
from nanochat.serving.structured import constraint_for


def responses_router(models: Models, sources: Sources, limits: Limits) -> APIRouter:
    router = APIRouter(tags=["answers"])

    @router.post("/v1/responses", summary="Ask a model, with pictures (OpenAI's newer API)")
    async def responses(body: ResponsesRequest, request: Request):
        served = models.find(body.model)
        messages = [Message(role="user", content=body.input)] if isinstance(body.input, str) else list(body.input)
        if body.instructions:
            messages.insert(0, Message(role="system", content=body.instructions))
        prompt = await read_prompt(served.agent, messages, sources, limits.max_pictures)
        constraint = await constraint_for(served.agent, body.text.format if body.text else None)
        sampling = Sampling(temperature=body.temperature or 0.0, top_p=body.top_p, seed=secrets.randbits(32))
        asked = Asked(
            prompt.ids, prompt.pictures, body.max_output_tokens, sampling=sampling, constraint=constraint,
            seconds=limits.max_seconds,
        )  # fmt: skip
        first, events = await started(served.batcher.events(asked), request)
        response = Response(served.name, body, prompt.notes)
        if body.stream:
            stream = named_events(response.events(first, events))
            return StreamingResponse(stream, media_type=SSE, headers={"Cache-Control": "no-store"})
        return JSONResponse(await unless_gone(response.whole(first, events), request))

    return router


async def named_events(events: AsyncIterator[dict]) -> AsyncIterator[str]:
    number = 0
    try:
        async with aclosing(events):
            async for event in events:
                yield f"event: {event['type']}\ndata: {json.dumps(event | {'sequence_number': number}, ensure_ascii=False)}\n\n"
                number += 1
    except Exception as error:
        told = as_api_error(error)
        event = {
            "type": "error",
            "code": told.code,
            "message": str(told),
            "param": told.param,
            "sequence_number": number,
        }
        yield f"event: error\ndata: {json.dumps(event)}\n\n"


class Response:
    """One response in OpenAI's words: a list with one message, whose only part is text."""

    def __init__(self, model: str, body: ResponsesRequest, notes: list[str]):
        self.item = f"msg_{secrets.token_hex(12)}"
        self.notes = notes
        wanted = body.text.format if body.text else None
        self.head = {
            "id": f"resp_{secrets.token_hex(12)}", "object": "response", "created_at": int(time.time()), "model": model,
            "instructions": body.instructions, "max_output_tokens": body.max_output_tokens, "metadata": body.metadata or {},
            "parallel_tool_calls": False, "previous_response_id": None, "store": False, "temperature": body.temperature or 0.0,
            "tool_choice": "none", "tools": [], "top_p": body.top_p or 1.0, "truncation": "disabled", "user": body.user,
            "text": {"format": wanted.model_dump(by_alias=True) if wanted else {"type": "text"}},
        }  # fmt: skip

    def response(self, status: str, output: list, done: Done | None = None, incomplete: bool = False) -> dict:
        usage = None
        if done is not None:
            usage = {
                "input_tokens": done.prompt_tokens,
                "input_tokens_details": {"cached_tokens": done.cached_tokens},
                "output_tokens": done.new_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": done.prompt_tokens + done.new_tokens,
            }
        details = {"reason": "max_output_tokens"} if incomplete else None
        ends = {"timings": timings_of(done)} if done is not None else {}
        return self.head | {
            "status": status, "output": output, "usage": usage, "incomplete_details": details, "error": None,
            **ends, **({"notes": self.notes} if self.notes and done is not None else {}),
        }  # fmt: skip

    def message(self, status: str, parts: list) -> dict:
        return {"type": "message", "id": self.item, "status": status, "role": "assistant", "content": parts}

    def part(self, text: str) -> dict:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    async def whole(self, first: Event, events: AsyncIterator[Event]) -> dict:
        async with aclosing(self.events(first, events)) as found:
            async for event in found:
                last = event
        return last["response"]

    async def events(self, first: Event, events: AsyncIterator[Event]) -> AsyncIterator[dict]:
        where, text, reason = {"item_id": self.item, "output_index": 0, "content_index": 0}, "", "stop"
        yield {"type": "response.created", "response": self.response("in_progress", [])}
        yield {"type": "response.in_progress", "response": self.response("in_progress", [])}
        yield {"type": "response.output_item.added", "output_index": 0, "item": self.message("in_progress", [])}
        yield {"type": "response.content_part.added", "part": self.part("")} | where
        async for event in chained(first, events):
            if isinstance(event, Piece) and event.text:
                text += event.text
                yield {"type": "response.output_text.delta", "delta": event.text, "logprobs": []} | where
            elif isinstance(event, Finished):
                reason = event.reason
            elif isinstance(event, Done):
                done = event
        status = "completed" if reason == "stop" else "incomplete"
        item = self.message(status, [self.part(text)])
        yield {"type": "response.output_text.done", "text": text, "logprobs": []} | where
        yield {"type": "response.content_part.done", "part": self.part(text)} | where
        yield {"type": "response.output_item.done", "output_index": 0, "item": item}
        yield {"type": f"response.{status}", "response": self.response(status, [item], done, status == "incomplete")}
