"""Byte-level BPE with the `tokenizers` library. Decoding restores every string exactly; files are JSON, not pickle.

Special tokens have the ids after the learned vocabulary and are never made from text: the spelling of one in a user's text
is encoded as ordinary text, so a user cannot type an image or another speaker's turn.
"""

import codecs
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from nanochat.errors import UserError
from nanochat.files import atomic_path, json_value, short_repr

SPECIAL_TOKENS = (
    "<|bos|>",
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
    "<|image|>",
)

# Merges do not cross these pieces. As in nanochat: GPT-4's pattern, with numbers split after two digits instead of three.
SPLIT = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)


MAX_PATTERN = 1000  # characters of a regular expression; GPT-4o's has 300

# Code points 0..255 and a few wider ones: a compatible tokenizer must decode these unchanged.
PROBE = "".join(map(chr, range(256))) + "Ωж東\u0301👍🏽 A  a\r\n"


def byte_alphabet() -> dict[str, int]:
    """character -> byte: the printable character that byte-level BPE uses for each byte (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


class Tokenizer:
    """Made by `train`, `load` or `from_json`.

    token_bytes: the bytes of each token id; b"" for special tokens. special_ids: the ids of special tokens.

    Raises ValueError for a tokenizer of the library that is not byte-level, changes text, or lacks a special token.
    """

    def __init__(self, bpe: tokenizers.Tokenizer):
        missing = [name for name in SPECIAL_TOKENS if bpe.token_to_id(name) is None]
        if missing:
            raise UserError(f"this tokenizer lacks the special tokens {', '.join(missing)}")
        bpe.encode_special_tokens = True  # text like "<|image|>" is ordinary text; the JSON does not store this
        self.bpe = bpe
        self.special_ids = frozenset(i for i, token in bpe.get_added_tokens_decoder().items() if token.special)
        alphabet = byte_alphabet()
        self.token_bytes = [b""] * bpe.get_vocab_size()
        try:
            for token, i in bpe.get_vocab().items():
                if i not in self.special_ids:
                    self.token_bytes[i] = bytes(alphabet[c] for c in token)
        except (KeyError, IndexError) as error:
            raise UserError(f"not a byte-level tokenizer with ids from 0: {token!r} is token {i}") from error
        if self.decode(self.encode(PROBE)) != PROBE:
            raise UserError("this tokenizer changes text: expected byte-level BPE with all 256 bytes and no normaliser")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Learn merges from `texts`. vocab_size: the maximum number of bytes, merges and special tokens together; a small text
        gives fewer. Raises ValueError if it is too small for the 256 bytes and the special tokens."""
        least = 256 + len(SPECIAL_TOKENS)
        if vocab_size < least:
            raise UserError(f"a vocabulary has at least {least} tokens (256 bytes, special tokens), got {vocab_size}")
        bpe = tokenizers.Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - len(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL_TOKENS])
        return cls(bpe)

    @classmethod
    def from_json(cls, text: str) -> "Tokenizer":
        """A tokenizer from its JSON, which may come from a stranger. Raises ValueError for other text, for a tokenizer of another
        kind, and for a pattern that could take for ever."""
        check_patterns(json_value(text, "not the JSON of a tokenizer"))
        try:
            bpe = tokenizers.Tokenizer.from_str(text)
            if not isinstance(bpe.model, models.BPE):
                raise UserError(f"this tokenizer is a {type(bpe.model).__name__}, expected byte-level BPE")
            bpe.no_padding()  # to a length that a stranger chose
            bpe.no_truncation()
            bpe.model.dropout = None  # the same text always gets the same tokens
            return cls(bpe)
        except (UserError, KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except (
            BaseException
        ) as error:  # bare Exception for bad JSON; for a bug of the library PanicException, no Exception
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"not the JSON of a tokenizer: {reason}") from error

    def to_json(self) -> str:
        return self.bpe.to_str(pretty=False)

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Read a JSON file. Raises OSError, and ValueError as `from_json`, with the path."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the JSON atomically. Raises OSError."""
        with atomic_path(path) as temporary:
            temporary.write_text(self.to_json(), encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    def special(self, name: str) -> int:
        """The id of a special token. Raises ValueError for an unknown name."""
        i = self.bpe.token_to_id(name)
        if i is None or i not in self.special_ids:
            raise UserError(f"there is no special token {name!r}")
        return i

    def add_special_tokens(self, names: Sequence[str]) -> list[int]:
        """Add special tokens, such as action tokens, at the end of the vocabulary, in the order of `names`; existing ones keep
        their ids. Returns the ids. Raises ValueError for a name that is an ordinary token, since its text would be lost."""
        if isinstance(names, str):
            raise UserError(f"add_special_tokens takes a list of names, got the string {names!r}")
        for name in names:
            if not name or self.bpe.token_to_id(name) not in {None, *self.special_ids}:
                raise UserError(f"{name!r} cannot be a special token: it is empty or a token of ordinary text")
        self.bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        self.__init__(self.bpe)
        return [self.special(name) for name in names]

    def encode(self, text: str) -> list[int]:
        """The token ids of a text. Raises ValueError for a lone surrogate (as from a broken file name): it has no UTF-8 form."""
        try:
            return self.bpe.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise UserError(f"expected text that can be encoded as UTF-8, found {ascii(text)[:80]}") from error

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of a token; b"" for a special one. Raises ValueError for an id outside the vocabulary."""
        if not 0 <= token_id < self.vocab_size:
            raise UserError(f"token id {token_id} is outside the vocabulary 0..{self.vocab_size - 1}")
        return self.token_bytes[token_id]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids. Special tokens are left out, or spelled out with skip_special=False; broken UTF-8 becomes
        U+FFFD. Raises ValueError for ids outside the vocabulary."""
        shown = frozenset() if skip_special else self.special_ids
        parts = (self.bpe.id_to_token(i).encode() if i in shown else self.bytes_of(i) for i in ids)
        return b"".join(parts).decode("utf-8", errors="replace")


def check_patterns(value: object) -> None:
    """Raises UserError for a regular expression anywhere in a tokenizer's JSON whose search could take for ever."""
    if isinstance(value, dict):
        pattern = value.get("Regex")
        if isinstance(pattern, str) and (problem := slow_pattern(pattern)):
            raise UserError(
                f"this tokenizer splits text by the pattern {short_repr(pattern)}, which {problem}: its search could take for "
                "ever; expected one like nanochat's or GPT-4's"
            )
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            if isinstance(inner, (dict, list)):
                check_patterns(inner)


def slow_pattern(pattern: str) -> str:
    """Why a regular expression may need more than quadratic time, or "". Patterns that split text need little: alternatives of
    a few classes of characters, of which one or two are repeated, and no repeated groups."""
    if len(pattern) > MAX_PATTERN:
        return f"has {len(pattern)} characters, the limit is {MAX_PATTERN}"
    if re.search(r"\\[1-9kgKG]|\(\?(?!:|=|!|i:)", pattern):
        return "has references or conditions"
    pieces = re.sub(r"\\[pP]\{[^}]*\}|\\.", "x", pattern, flags=re.DOTALL)  # escapes count as one character
    pieces = re.sub(r"\[\^?\]?(?:\[[^\]]*\]|[^\]\[])*\]", "x", pieces)  # and so do classes
    if "[" in pieces:
        return "has nested classes"
    if re.search(r"[)*+?}][*{]|\)\+", pieces):
        return "repeats a group"
    pieces = re.sub(
        r"([*+?}])[+?]", r"\1", pieces.replace("(?", "(")
    )  # possessive and lazy ones search like the plain ones
    if any(int(count) > 9 for counts in re.findall(r"\{([\d,]*)\}", pieces) for count in re.findall(r"\d+", counts)):
        return "repeats something more than nine times"
    for alternative in alternatives(pieces):
        if len(re.findall(r"[*+]|\{\d*,\d*\}", alternative)) > 2 or alternative.count("?") > 3:
            return "repeats too many things in a row"
    return ""


def alternatives(pattern: str) -> list[str]:
    """The parts of a pattern between the | outside of groups."""
    parts, depth = [""], 0
    for character in pattern:
        depth += (character == "(") - (character == ")")
        if character == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


class StreamDecoder:
    """Decodes a stream of token ids. A character whose bytes are in several tokens is returned with the last of them."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token_id: int) -> str:
        """The text that the next token completes; "" if there is none yet."""
        return self.utf8.decode(self.tokenizer.bytes_of(token_id))

    def flush(self) -> str:
        """The rest at the end of the stream: U+FFFD for an incomplete character, else ""."""
        return self.utf8.decode(b"", final=True)
