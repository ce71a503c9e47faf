"""POST /attention: what the words of an answer looked at, as numbers for the page. See nanochat/attention.py."""

import asyncio

from fastapi import APIRouter

from nanochat.attention import attention_of_words
from nanochat.errors import UserError
from nanochat.serving.models import Limits, Models
from nanochat.serving.problems import ApiError
from nanochat.serving.prompts import read_prompt
from nanochat.serving.schema import AttentionRequest
from nanochat.serving.seen import opened
from nanochat.serving.sources import Sources
from nanochat.vision.letterbox import letterbox


def attention_router(models: Models, sources: Sources, limits: Limits) -> APIRouter:
    router = APIRouter(tags=["pictures"])

    @router.post("/attention", summary="Where the words of an answer looked")
    async def attention(body: AttentionRequest):
        served = models.find(body.model)
        prompt = await read_prompt(served.agent, body.messages, sources, limits.max_pictures)
        if not prompt.pictures:
            raise ApiError(400, "there is no picture in the messages", "messages")
        vectors = await served.batcher.look(prompt.pictures)
        words = await served.batcher.run(lambda: weights_of_words(served.agent, prompt.ids, body.answer, vectors))
        size = served.agent.model.config.vision_image_size
        boxes = await asyncio.to_thread(
            lambda: [box_in_square(data, size, limits.max_pixels) for data in prompt.pictures]
        )
        side = round(len(words[0]["pictures"][0]) ** 0.5) if words else 0
        return {"model": served.name, "side": side, "words": words, "boxes": boxes}

    return router


def weights_of_words(agent, prompt: list[int], answer: str, vectors) -> list[dict]:
    """[{"text": word, "pictures": [the weights of a picture's cells, row by row]}], the mean over layers and heads."""
    room = agent.model.config.sequence_len - len(prompt)
    if len(agent.tokenizer.encode(answer)) > room:
        raise UserError(f"the answer and its prompt do not fit the context of {agent.model.config.sequence_len} tokens")
    words = attention_of_words(agent.model, agent.tokenizer, prompt, answer, vectors)
    return [
        {"text": word.text, "pictures": [[round(float(w), 6) for w in cells] for cells in word.mean]} for word in words
    ]


def box_in_square(data: bytes, size: int, max_pixels: int) -> list[float]:
    """Where the picture is in the encoder's square, whose sides are 1: left, top, right, bottom."""
    fit = letterbox(opened(data, "the picture", max_pixels), size)[1]
    width, height = fit.fitted
    return [fit.pad_x / size, fit.pad_y / size, (fit.pad_x + width) / size, (fit.pad_y + height) / size]
