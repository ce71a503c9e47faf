"""Read karpathy/nanochat's checkpoints of October 2025 (d20, d32, ...) into this project's folder format.

    model_NNNNNN.pt    tensors only, read with weights_only=True
    meta_NNNNNN.json   {"model_config": {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"}, ...}
    tokenizer.pkl      a pickled tiktoken.Encoding: read only with trust_pickle=True

Later upstream models have other parts (value embeddings, smear, per-layer scalars, windows); they are refused.
"""

import pickle
import re
from dataclasses import fields
from pathlib import Path

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from nanochat.checkpoint import save_checkpoint
from nanochat.errors import UserError, install
from nanochat.files import json_object
from nanochat.gpt import GPT, GPTConfig
from nanochat.meta import on_meta
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer, byte_alphabet

# what a converted tokenizer must encode as the original does
SAMPLE = "Héllo, wörld! it's 1234567 o'clock, DON'T\r\n\n  日本語 👩‍🚀\tⅷ² ſ\u00a0\u0301 <|bos|> def f(x): return x**2 - 3.14  "
# what torch and pickle raise for a broken file depends on where it breaks
BROKEN_FILE = (RuntimeError, EOFError, pickle.UnpicklingError, LookupError, TypeError, ValueError, AttributeError)
PREFIX = "_orig_mod."  # what torch.compile puts before parameter names


class UpstreamError(UserError):
    """An upstream folder that cannot be imported."""


def import_upstream(
    source_dir: str | Path,
    target_dir: str | Path,
    *,
    step: int | None = None,
    tokenizer_path: str | Path | None = None,
    trust_pickle: bool = False,
) -> Path:
    """Write the checkpoint of `step` (default: the last) as a text model into `target_dir`; returns that folder.

    Raises UpstreamError for missing files, another architecture, shapes that do not fit, or a tokenizer that may not
    be read. Nothing is written then.
    """
    source = Path(source_dir)
    if Path(target_dir).exists():
        raise UpstreamError(f"{target_dir} exists: choose another target")
    step = last_step(source) if step is None else step
    config, meta = read_meta(source / f"meta_{step:06d}.json")
    state = read_weights(source / f"model_{step:06d}.pt", config)
    tokenizer = read_tokenizer(Path(tokenizer_path or source / "tokenizer.pkl"), trust_pickle)
    if tokenizer.vocab_size > config.vocab_size + 1:  # + 1: <|image|>, which upstream does not have
        raise UpstreamError(f"the tokenizer has {tokenizer.vocab_size} ids, the model only {config.vocab_size}")
    model = GPT(config)
    model.load_state_dict(state)
    training = {"recipe_name": "upstream", "step": step, "seconds": 0.0, "upstream_meta": meta, "history": []}
    training["multi_turn"] = True  # upstream's chat models are trained on conversations
    save_checkpoint(target_dir, model, tokenizer, training)
    return Path(target_dir)


def last_step(source: Path) -> int:
    steps = [int(m[1]) for path in source.glob("model_*.pt") if (m := re.fullmatch(r"model_(\d{6})\.pt", path.name))]
    if not steps:
        raise UpstreamError(f"there is no model_NNNNNN.pt in {source}")
    return max(steps)


def read_meta(path: Path) -> tuple[GPTConfig, dict]:
    if not path.is_file():
        raise UpstreamError(f"there is no {path}, which holds the model's shape")
    meta = json_object(path.read_bytes(), path)
    given = meta.get("model_config")
    if not isinstance(given, dict):
        raise UpstreamError(f'{path} holds no JSON object with "model_config"')
    known = {field.name for field in fields(GPTConfig)}
    if unknown := sorted(set(given) - known):
        raise later_architecture(f"{path.name} has the settings {', '.join(unknown)}")
    if missing := sorted(known - set(given) - {"n_hidden"}):  # upstream's MLPs are always four times as wide
        raise UpstreamError(f"{path}: model_config lacks {', '.join(missing)}")
    return GPTConfig(**given), meta


def later_architecture(found: str) -> UpstreamError:
    return UpstreamError(
        f"{found}: this is not the architecture of nanochat in October 2025, the only one that can be imported (rotary, QK "
        "norm, ReLU² MLP, untied head and nothing else)"
    )


def read_weights(path: Path, config: GPTConfig) -> dict[str, torch.Tensor]:
    """The file's tensors (bfloat16 or float32), all names and shapes checked before a model of that size is built."""
    if not path.is_file():
        raise UpstreamError(f"there is no {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except BROKEN_FILE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UpstreamError(f"{path} is damaged, or holds more than tensors: {reason}") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor) and tensor.is_floating_point()
        for name, tensor in state.items()
    ):
        raise UpstreamError(
            f"{path} must hold named floating-point tensors and nothing else: is it the file of a model?"
        )
    state = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
    with on_meta():
        expected = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    if unknown := sorted(set(state) - set(expected)):
        raise later_architecture(
            f"{path.name} has the tensors {', '.join(unknown[:4])}" + (" ..." if unknown[4:] else "")
        )
    if missing := sorted(set(expected) - set(state)):
        raise UpstreamError(f"{path} lacks the tensors {', '.join(missing[:4])}" + (" ..." if missing[4:] else ""))
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise UpstreamError(
                f"{path}: {name} has the shape {tuple(state[name].shape)}, the meta file says {tuple(shape)}"
            )
    return state


def read_tokenizer(path: Path, trust_pickle: bool) -> Tokenizer:
    if not path.is_file():
        raise UpstreamError(f"there is no {path}: give the path of upstream's tokenizer.pkl (--tokenizer-path)")
    if not trust_pickle:
        raise UpstreamError(
            f"{path} is a pickle, and loading a pickle can run any code. If you trust its source, pass trust_pickle=True "
            "(--trust-pickle)"
        )
    try:
        import tiktoken
    except ImportError as error:
        raise ImportError(f"upstream's tokenizer is a tiktoken one: {install('upstream')}") from error
    try:
        with open(path, "rb") as file:
            encoding = pickle.load(file)
    except BROKEN_FILE as error:
        raise UpstreamError(f"{path} is damaged: {error}") from error
    if not isinstance(encoding, tiktoken.Encoding):
        raise UpstreamError(f"{path} holds a {type(encoding).__name__}, expected a tiktoken.Encoding")
    return from_tiktoken(encoding)


def from_tiktoken(encoding) -> Tokenizer:
    """The same vocabulary and splits on the `tokenizers` library. tiktoken keeps ranks only; the pair behind a token is what
    merging its bytes by lower ranks alone leaves."""
    ranks: dict[bytes, int] = encoding._mergeable_ranks
    characters = {byte: character for character, byte in byte_alphabet().items()}

    def spelled(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    merges = [tuple(spelled(part) for part in pair_behind(token, ranks)) for token in by_rank(ranks) if len(token) > 1]
    vocabulary = {spelled(token): rank for token, rank in ranks.items()}
    bpe = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(encoding._pat_str), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    special = sorted(encoding._special_tokens, key=encoding._special_tokens.get)
    names = [*special, *(name for name in SPECIAL_TOKENS if name not in special)]
    bpe.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    for name, token_id in encoding._special_tokens.items():
        if bpe.token_to_id(name) != token_id:
            raise UpstreamError(f"special token {name} would get the id {bpe.token_to_id(name)} instead of {token_id}")
    tokenizer = Tokenizer(bpe)
    if tokenizer.encode(SAMPLE) != encoding.encode_ordinary(SAMPLE):
        raise UpstreamError(f"the tokenizer {encoding.name!r} cannot be converted: a sample text gets other ids")
    return tokenizer


def by_rank(ranks: dict[bytes, int]) -> list[bytes]:
    return sorted(ranks, key=ranks.get)


def pair_behind(token: bytes, ranks: dict[bytes, int]) -> list[bytes]:
    parts = [bytes([byte]) for byte in token]
    while len(parts) > 2:
        joined = [ranks.get(a + b, len(ranks)) for a, b in zip(parts, parts[1:], strict=False)]
        at = min(range(len(joined)), key=joined.__getitem__)
        if joined[at] >= ranks[token]:
            raise UpstreamError(f"the tokenizer's token {token!r} is not made by merging two others")
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts
