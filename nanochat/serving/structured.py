"""Answers that are JSON and fit a schema: llguidance says which tokens may come next (https://github.com/guidance-ai/llguidance)."""

import asyncio
import json
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from nanochat.serving.problems import ApiError
from nanochat.serving.schema import JsonSchemaFormat

MAX_SCHEMA = 20_000  # characters


def schema_of(wanted) -> dict | None:
    """The JSON schema that a format asks for, None for text. wanted: of chat/completions or responses."""
    if wanted is None or wanted.type == "text":
        return None
    named = wanted.json_schema if isinstance(wanted, JsonSchemaFormat) else wanted
    return getattr(named, "schema_", None) or {"type": "object"}


async def constraint_for(agent, wanted) -> "Callable[[], JsonAnswer] | None":
    """The constraint of a format, see `constraint`; None for text. wanted: as for `schema_of`."""
    schema = schema_of(wanted)
    return None if schema is None else await asyncio.to_thread(constraint, agent, schema)


def constraint(agent, schema: dict) -> "Callable[[], JsonAnswer]":
    """A function that gives each answer a constraint of its own. Raises ApiError for a schema that cannot be followed, and where
    llguidance is not installed."""
    try:
        import llguidance
    except ImportError as error:
        raise ApiError(
            501, "response_format needs llguidance, which this server lacks: pip install llguidance", "response_format"
        ) from error
    try:
        text = json.dumps(schema)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"this schema cannot be read: {error}", "response_format") from error
    if len(text) > MAX_SCHEMA:
        raise ApiError(400, f"the schema has {len(text):,} characters, the limit is {MAX_SCHEMA:,}", "response_format")
    try:
        # without free whitespace: a small model may repeat it for ever
        grammar = llguidance.LLMatcher.grammar_from_json_schema(
            schema, defaults={"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
        )
        matcher = llguidance.LLMatcher(vocabulary(agent.tokenizer, agent.stop_ids), grammar)
        problem = matcher.get_error() if matcher.is_error() else ""
    except Exception as error:
        problem = str(error) or type(error).__name__
    if problem:
        line = " ".join(problem.split())[:300]
        raise ApiError(400, f"this schema cannot be followed: {line}", "response_format", "invalid_json_schema")
    return lambda: JsonAnswer(matcher.deep_copy(), agent.stop_ids)


class JsonAnswer:
    """Where one answer is in its schema."""

    def __init__(self, matcher, stop_ids: Sequence[int]):
        self.matcher, self.stop_ids = matcher, tuple(stop_ids)

    def allowed(self) -> Sequence[int]:
        """The tokens that may come next; those that end the answer once it is whole."""
        if self.matcher.is_stopped():
            return self.stop_ids
        bits = np.unpackbits(np.frombuffer(self.matcher.compute_bitmask(), np.uint8), bitorder="little")
        found = np.flatnonzero(bits)
        return found.tolist() or self.stop_ids

    def accept(self, token: int) -> None:
        self.matcher.consume_token(token)


@lru_cache(maxsize=8)
def vocabulary(tokenizer, stop_ids: tuple[int, ...]):
    """The tokenizer as llguidance reads it; made once."""
    import llguidance

    class Words:
        eos_token_id, bos_token_id = stop_ids[0], None
        tokens = [tokenizer.bytes_of(i) or f"<|{i}|>".encode() for i in range(tokenizer.vocab_size)]
        special_token_ids = sorted(tokenizer.special_ids)

        def __call__(self, text: str) -> list[int]:
            return tokenizer.encode(text)

    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Words()))
