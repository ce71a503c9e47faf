"""Conversations in the forms in which data sets write them -> `Sample.messages`.

Turns are {"role", "content"} or LLaVA's {"from", "value"}. Images stand as parts of the content or as "<image>" in a text; if a
row does not say where its images stand, they come before the first question, as in TRL and ms-swift.
"""

from collections.abc import Sequence

from nanochat.data.sample import check_text
from nanochat.files import DataError, short_repr

IMAGE_TAG = "<image>"
ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
NOT_READ = ("video", "audio", "video_url", "input_audio", "audio_url")


class LeftOut(Exception):
    """A row that is valid but cannot be used; the message is the reason."""


def left_out(kind: str) -> LeftOut:
    """What to raise for a row with a "video" or an "audio"."""
    advice = ": extract frames and list them as 'images'" if kind == "video" else ""
    return LeftOut(f"they have {'an' if kind == 'audio' else 'a'} {kind}, which is not read{advice}")


def normal_messages(
    raw: object, n_images: int, where: str, embedded: list | None = None, anywhere: bool = True
) -> tuple[dict, ...]:
    """Messages in the form of `Sample.messages`. raw: turns, see the text above.

    n_images: of the row. embedded: receives the images that parts of the content hold themselves, which count as well.
    anywhere: images that the messages do not place come first; otherwise they are an error.

    Raises:
        DataError: the roles are not [system], user, assistant, ..., user, assistant; a message is empty; an image is not in
            a user message; the number of image parts is not the number of images.
        LeftOut: there is a video or a sound.
    """
    if not isinstance(raw, (list, tuple)):
        raise DataError(f"{where}: messages must be a list, found {short_repr(raw)}")
    found: list = []
    messages = tuple(_normal_message(message, where, found) for message in raw)
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise DataError(
            f"{where}: the roles must be [system], user, assistant, ... and end with the assistant, "
            f"found {', '.join(roles[:12]) or 'no messages'}"
        )
    if any(message["role"] != "user" for message in messages if not isinstance(message["content"], str)):
        raise DataError(f"{where}: only user messages can have images")
    if found and n_images:
        raise DataError(f"{where}: found pictures both in the messages and in a field of the row: keep one of them")
    if embedded is not None:
        embedded += found
    expected, n_parts = n_images + len(found), count_images(messages)
    if n_parts == 0 and expected and anywhere:
        return images_first(messages, expected)
    if n_parts != expected:
        raise DataError(f"{where}: the messages have {n_parts} image parts, but the row has {expected} images")
    return messages


def count_images(messages: Sequence[dict]) -> int:
    return sum(
        part["type"] == "image"
        for message in messages
        if not isinstance(message["content"], str)
        for part in message["content"]
    )


def images_first(messages: Sequence[dict], n_images: int) -> tuple[dict, ...]:
    """The messages with all images before the first question."""
    first = next(i for i, message in enumerate(messages) if message["role"] == "user")
    question = {"type": "text", "text": messages[first]["content"]}
    placed = {"role": "user", "content": [{"type": "image"}] * n_images + [question]}
    return (*messages[:first], placed, *messages[first + 1 :])


def _normal_message(message: object, where: str, embedded: list) -> dict:
    if not isinstance(message, dict):
        raise DataError(f"{where}: a message must be an object with 'role' and 'content', found {short_repr(message)}")
    llava = message.get("role") is None and message.get("from") is not None
    name, key = ("from", "value") if llava else ("role", "content")
    role, content = message.get(name), message.get(key)
    if not isinstance(role, str) or role not in ROLES:
        raise DataError(
            f"{where}: a message must have the role system, user or assistant ({name!r}: {', '.join(ROLES)}), found "
            f"{short_repr(message)}"
        )
    role = ROLES[role]
    if isinstance(content, str):
        check_text(content, key, where)
        parts = _tagged(content)
    elif isinstance(content, (list, tuple)):
        parts = [_normal_part(part, where, embedded) for part in content]
    else:
        raise DataError(
            f"{where}: the content of a message must be text or a list of parts, found {short_repr(content)}"
        )
    return _joined(role, parts, where)


def _joined(role: str, raw: list[dict], where: str) -> dict:
    """A message of these parts, neighbouring texts joined."""
    parts: list[dict] = []
    for part in raw:
        if part["type"] == "text":
            text = check_text(part["text"], role, where)
            if parts and parts[-1]["type"] == "text":
                text = f"{parts.pop()['text']}\n{text}"
            part = {"type": "text", "text": text}
        parts.append(part)
    if not parts:
        raise DataError(f"{where}: a message of role {role} has no content")
    return {"role": role, "content": parts[0]["text"] if [part["type"] for part in parts] == ["text"] else parts}


def _tagged(value: str) -> list[dict]:
    """The parts of a text: "<image>\\nWhat?" becomes [{"type": "image"}, {"type": "text", "text": "\\nWhat?"}]."""
    pieces = value.split(IMAGE_TAG)
    parts: list[dict] = []
    for i, piece in enumerate(pieces):
        if piece.strip():
            parts.append({"type": "text", "text": piece})
        if i < len(pieces) - 1:
            parts.append({"type": "image"})
    return parts


def _normal_part(part: object, where: str, embedded: list) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return {"type": "text", "text": part.get("text")}
    if kind in ("image", "image_url"):
        source = next((part[name] for name in ("image", "image_url", "url", "path", "bytes") if part.get(name)), None)
        if isinstance(source, dict) and "url" in source:
            source = source["url"]
        if source is not None:
            embedded.append(source)
        return {"type": "image"}
    if isinstance(kind, str) and kind in NOT_READ:
        raise left_out("video" if "video" in kind else "audio")
    raise DataError(f"{where}: a part must be of type image or text, found {short_repr(part)}")
