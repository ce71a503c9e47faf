"""Messages -> token ids, and which of them are learnt. The only place that knows the prompt format. Plain Python.

<|bos|> <|user_start|> <|image|>*N what is this? <|user_end|> <|assistant_start|> a cup <|assistant_end|> ...
<|bos|> <|user_start|> <|image|>*N <|state|> open the door <|user_end|> <|assistant_start|> and an action head's tokens
"""

from collections.abc import Sequence
from dataclasses import dataclass

from nanochat.actions import STATE
from nanochat.errors import UserError
from nanochat.files import short_repr

IMAGE = "<|image|>"
CAPTION_PROMPT = "Describe the image."


def user_message(question: str, n_images: int = 0) -> dict:
    """Pictures first, then the question."""
    return {"role": "user", "content": [{"type": "image"}] * n_images + [{"type": "text", "text": question}]}


def action_message(instruction: str, n_images: int = 1) -> dict:
    """What a policy is asked: a picture of each camera, the robot's state and an instruction."""
    shown = [{"type": "image"}] * n_images
    return {"role": "user", "content": [*shown, {"type": "state"}, {"type": "text", "text": instruction}]}


@dataclass
class Rendered:
    """ids and mask have one entry a token; mask is 1 where the token is learnt: the assistant's text and the end of its turn.
    Each picture takes places_per_image ids."""

    ids: list[int]
    mask: list[int]
    n_images: int


def render(tokenizer, messages: Sequence[dict], places_per_image: int, for_completion: bool = False) -> Rendered:
    """Token ids of a conversation.

    messages: {"role": "system" | "user" | "assistant", "content": str or a list of parts}, a part being {"type": "image"},
        {"type": "state"} (of a robot) or {"type": "text", "text": ...}. A system message comes first, if at all, and is put
        before the first user message, as nanochat does. User and assistant take turns; only users show pictures and states.
    for_completion: the last message is the user's, and the row ends where the assistant's answer begins.

    Raises ValueError naming the message that breaks these rules.
    """
    turns = checked_turns(messages, for_completion)
    out = Rendered([], [], 0)

    def add(ids: list[int], learnt: int) -> None:
        out.ids.extend(ids)
        out.mask.extend([learnt] * len(ids))

    add([tokenizer.special("<|bos|>")], 0)
    for role, parts in turns:
        learnt = int(role == "assistant")
        add([tokenizer.special(f"<|{role}_start|>")], 0)
        for kind, text in parts:
            if kind == "image":
                if places_per_image < 1:
                    raise UserError(
                        f"this is a text model and cannot read pictures: places_per_image is {places_per_image}"
                    )
                out.n_images += 1
                add([tokenizer.special(IMAGE)] * places_per_image, 0)
            elif kind == "state":
                add([tokenizer.special(STATE)], 0)
            else:
                add(tokenizer.encode(text), learnt)
        add([tokenizer.special(f"<|{role}_end|>")], learnt)
    if for_completion:
        add([tokenizer.special("<|assistant_start|>")], 0)
    return out


def checked_turns(messages: Sequence[dict], for_completion: bool) -> list[tuple[str, list[tuple[str, str]]]]:
    """(role, [("image", ""), ("state", "") or ("text", text), ...]) of each turn, the system message merged into the first."""
    if not messages:
        raise UserError("a conversation needs at least one message, got none")
    turns = [(message_role(i, message), message_parts(i, message)) for i, message in enumerate(messages)]
    shift = 0
    if turns[0][0] == "system":
        if len(turns) < 2 or turns[1][0] != "user":
            raise UserError("message 0 is a system message: a user message must follow it")
        turns = [("user", [*turns[0][1], ("text", "\n\n"), *turns[1][1]]), *turns[2:]]
        shift = 1
    for i, (role, _) in enumerate(turns):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise UserError(f"message {i + shift} is from the {role}, expected the {expected}: the two take turns")
    last = turns[-1][0]
    if for_completion and last != "user":
        raise UserError(f"to be answered, a conversation must end with the user's message; it ends with the {last}'s")
    return turns


def message_role(i: int, message: dict) -> str:
    role = message.get("role") if isinstance(message, dict) else None
    if role not in ("system", "user", "assistant"):
        raise UserError(f'message {i} needs a "role" of system, user or assistant, got {short_repr(role)}')
    return role


def message_parts(i: int, message: dict) -> list[tuple[str, str]]:
    content = message.get("content")
    if isinstance(content, str):
        return [("text", content)]
    if not isinstance(content, (list, tuple)):
        raise UserError(f'message {i} needs a "content" of text or a list of parts, got {type(content).__name__}')
    parts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image", "state") and message["role"] == "user":
            parts.append((kind, ""))
        elif kind in ("image", "state"):
            raise UserError(f"message {i} is from the {message['role']} and has a part of type {kind}: only users can")
        elif kind == "text" and isinstance(part.get("text"), str):
            parts.append(("text", part["text"]))
        else:
            raise UserError(
                f'message {i} has a part {short_repr(part)}, expected {{"type": "image"}}, {{"type": "state"}} or '
                f'{{"type": "text", "text": ...}}'
            )
    return parts
