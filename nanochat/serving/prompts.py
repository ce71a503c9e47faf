"""From the messages of a client to what a model reads: token ids and pictures. No torch."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.errors import UserError
from nanochat.serving.problems import ApiError
from nanochat.serving.schema import ImagePart, Message
from nanochat.serving.sources import Sources

CHARACTERS = 40  # of text for each token of the context: more cannot fit, and is refused before it is encoded


@dataclass(frozen=True)
class Prompt:
    """notes: what was left out of the messages, for the client."""

    ids: list[int]
    pictures: list[bytes]
    notes: list[str]


async def read_prompt(agent, messages: Sequence[Message], sources: Sources, most_pictures: int) -> Prompt:
    """Token ids and pictures of a conversation. A model that learnt single questions only gets the last one, with the pictures
    that were shown last. Raises ApiError and UserError."""
    context = agent.model.config.sequence_len
    length = sum(len(text) for message in messages for text in texts_of(message))
    if length > CHARACTERS * context:
        raise ApiError(
            400, f"the messages have {length:,} characters, which do not fit the context of {context} tokens", "messages",
            "context_length_exceeded",
        )  # fmt: skip
    turns, notes = chosen_turns(agent, messages)
    urls = [part.url for message in turns for part in parts_of(message) if isinstance(part, ImagePart)]
    if len(urls) > most_pictures:
        raise ApiError(
            400, f"{len(urls)} pictures in one request, the limit is {most_pictures}", "messages", "too_many_images"
        )
    if urls and not agent.places_per_image:
        raise ApiError(400, "this is a text model: it cannot look at pictures", "messages", "image_unsupported")
    try:
        agent.check_images(len(urls))
        for message in turns:
            if message.role == "user":
                agent.check_learnt(" ".join(texts_of(message)))
    except UserError as error:
        raise ApiError(400, str(error).split(": `nanochat")[0], "messages", "not_learnt") from error
    pictures = [await picture_at(url, sources, f"messages: picture {i}") for i, url in enumerate(urls, 1)]
    return Prompt(agent.prompt([rendered(message) for message in turns]), pictures, notes)


async def picture_at(url: str, sources: Sources, param: str) -> bytes:
    if sources.is_slow(url):
        return await asyncio.to_thread(sources.load, url, param)
    return sources.load(url, param)


def parts_of(message: Message) -> list:
    return [] if isinstance(message.content, str) else message.content


def texts_of(message: Message) -> list[str]:
    if isinstance(message.content, str):
        return [message.content]
    return [part.text for part in message.content if not isinstance(part, ImagePart)]


def chosen_turns(agent, messages: Sequence[Message]) -> tuple[list[Message], list[str]]:
    """(the messages that the model reads, notes). See `read_prompt`."""
    if agent.multi_turn:
        return list(messages), []
    asked = [message for message in messages if message.role == "user"]
    if not asked or messages[-1].role != "user":
        raise ApiError(400, "the last message must be the user's", "messages")
    last = asked[-1]
    shown = next((found for message in reversed(asked) if (found := images_of(message))), [])
    if shown and not images_of(last):
        last = Message(role="user", content=[*shown, *({"type": "text", "text": text} for text in texts_of(last))])
    notes = []
    if len(messages) > 1:
        notes = ["this model has learnt single questions: it read the last one, and the pictures that were shown last"]
    return [last], notes


def images_of(message: Message) -> list[ImagePart]:
    return [part for part in parts_of(message) if isinstance(part, ImagePart)]


def rendered(message: Message) -> dict:
    """The message as `conversation.render` takes it. Pictures that all follow the text come before it, as models learn it."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return {"role": role, "content": message.content}
    parts = [
        {"type": "image"} if isinstance(part, ImagePart) else {"type": "text", "text": part.text}
        for part in message.content
    ]
    kinds = [part["type"] for part in parts]
    if kinds == sorted(kinds, reverse=True):
        parts = sorted(parts, key=lambda part: part["type"])
    return {"role": role, "content": parts}
