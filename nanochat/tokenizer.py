"""Byte-level BPE with the `tokenizers` library. Decoding restores every string exactly; files are JSON, not pickle.

Special tokens have the ids after the learned vocabulary and are never made from text: the spelling of one in a user's text
is encoded as ordinary text, so a user cannot type an image or another speaker's turn.
"""

import codecs
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers

from nanochat.errors import UserError
from nanochat.files import atomic_path

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
            raise UserError(f"vocab_size must be at least {least} (256 bytes, special tokens), got {vocab_size}")
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
        """A tokenizer from its JSON. Raises ValueError for other text, or for a tokenizer of another kind."""
        try:
            bpe = tokenizers.Tokenizer.from_str(text)
        except Exception as error:  # the library raises bare Exception for bad JSON
            raise UserError(f"not the JSON of a tokenizer: {error}") from error
        return cls(bpe)

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
            return self.bpe.encode(text).ids
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
