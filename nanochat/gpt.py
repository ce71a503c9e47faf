"""The text decoder: a GPT as karpathy/nanochat had it in October 2025. Parameter names and maths are kept, so its
checkpoints load.

    Inputs ── embed ──> (B, T, C) ── blocks ──> hidden (B, T, C) ── logits ──> (B, T, vocab_size)

`hidden` is the only forward pass of the project: training, validation, generation and both action heads call it. A model
that also reads pictures or robot states overrides `embed`; one whose layers look at pictures beside the row also `context`
and `layer`. `hidden` compiles and exports: it checks no values. `forward` is the checked entry point for callers from outside.

Rotary positions (half-split, base 10,000), norm on queries and keys, RMSNorm without parameters (also after the embedding
and before the head), ReLU² MLP four times as wide, no biases, untied head, grouped-query attention, soft-capped logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanochat.config import GPTConfig
from nanochat.kv_cache import KVCache

LOGIT_CAP = 15.0
ROTARY_BASE = 10_000.0
IGNORE_INDEX = -1  # a target that is not trained on


@dataclass
class Inputs:
    """What one forward pass reads. The text model uses `idx` only.

    idx: (B, T) int64 token ids. places: (B, T) bool, where vision vectors replace token embeddings, or from where on
    cross-attention sees a picture. images: (M, D) the vectors of whole pictures, in the reading order of the S pictures of the
    rows. shown: (S,) int64 where pictures come more than once, so that each is projected once: which of those in `images`
    each one is. states: (R, state_dim) normalised robot states, in reading order. committed: (A, n,
    action_dim + 1) what a robot did before and carries out anyway, see `acting.known_rows`.
    """

    idx: torch.Tensor
    places: torch.Tensor | None = None
    images: torch.Tensor | None = None
    states: torch.Tensor | None = None
    shown: torch.Tensor | None = None
    committed: torch.Tensor | None = None


def pad_rows(rows: Sequence[Sequence[int]], pad_id: int) -> torch.Tensor:
    """(B, T) int64, padded on the right: attention is causal, so nothing attends to what is behind a row's end."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[pad_id] * (longest - len(row))] for row in rows])


def norm(x: torch.Tensor) -> torch.Tensor:
    """RMSNorm over the last axis, no learnt scale."""
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(length: int, head_dim: int, device=None) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin tables, each (length, head_dim) float32, laid out for `apply_rotary` (RoFormer, arXiv 2104.09864)."""
    frequency = ROTARY_BASE ** -(torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequency  # (length, head_dim / 2)
    return torch.cat([angle.cos(), angle.cos()], -1), torch.cat([angle.sin(), -angle.sin()], -1)


def apply_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate channels i and i + D/2 of x (B, T, H, D) by the angle of their position, clockwise as in nanochat."""
    return torch.addcmul(x * cos, x.roll(x.size(-1) // 2, -1), sin)


class Linear(nn.Linear):
    """No bias; the master weight is used in the activations' dtype, so fp32 weights run under bf16 activations."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__(n_in, n_out, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.n_head, self.n_kv_head, self.head_dim = config.n_head, config.n_kv_head, config.head_dim
        self.c_q = Linear(config.n_embd, self.n_head * self.head_dim)
        self.c_k = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_v = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def queries_and_keys(self, x, cos, sin):
        """(B, T, H, D) and (B, T, H_kv, D): rotated to their positions, then normed."""
        B, T, _ = x.shape
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        return norm(apply_rotary(q, cos, sin)), norm(apply_rotary(k, cos, sin))

    def forward(self, x, cos, sin, mask, cache):
        B, T, C = x.shape
        q, k = (t.transpose(1, 2) for t in self.queries_and_keys(x, cos, sin))  # (B, H, T, D)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim).transpose(1, 2)
        if cache is not None:
            k, v = cache.insert(self.layer, k, v)  # (B, H_kv, T_seen, D)
        # No mask: either whole rows from position 0 (causal), or one token that may attend to all cached ones.
        causal = True if mask is None and T > 1 else False  # not the comparison itself: compiled, that is no bool
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=self.n_head != self.n_kv_head
        )
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, config.mlp_width)
        self.c_proj = Linear(config.mlp_width, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = CausalSelfAttention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, mask, cache, dropout):
        x = x + F.dropout(self.attn(norm(x), cos, sin, mask, cache), dropout)
        return x + F.dropout(self.mlp(norm(x)), dropout)


class GPT(nn.Module):
    """Decoder-only transformer. Call `init_weights()` after building one to train."""

    kind = "gpt"  # as config.json of a checkpoint names it
    config_class = GPTConfig
    continues_many = True  # see `engine.Model`
    later_weights = ()  # names of weights that older checkpoints lack: their layers start without an effect

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "h": nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
            }
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.gradient_checkpointing = False  # recompute blocks in the backward pass: less memory, about 1/3 more time
        self.dropout = 0.0  # on the embeddings and the outputs of every branch, in training mode only
        cos, sin = rotary_tables(config.sequence_len, config.head_dim)
        # persistent=False: derived from the config, so not part of a checkpoint
        self.register_buffer("cos", cos[:, None, :], persistent=False)  # (sequence_len, 1, D)
        self.register_buffer("sin", sin[:, None, :], persistent=False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """nanochat's initialisation: matrices scaled by fan-in and fan-out, embeddings N(0, 1), zero head and zero residual
        outputs, so that a new model is the identity and all its logits are equal."""
        for module in self.modules():
            if isinstance(module, Linear):
                fan_out, fan_in = module.weight.shape
                module.weight.normal_(0.0, min(1.0, (fan_out / fan_in) ** 0.5) / fan_in**0.5)
        for block in self.transformer.h:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        self.lm_head.weight.zero_()
        self.transformer.wte.weight.normal_(0.0, 1.0)
        self.set_compute_dtype(default_compute_dtype(self.device))

    @property
    def device(self) -> torch.device:
        return self.transformer.wte.weight.device

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the activations. It is the embedding table's; the other weights are cast where they are used."""
        return self.transformer.wte.weight.dtype

    def set_compute_dtype(self, dtype: torch.dtype) -> None:
        self.transformer.wte.to(dtype=dtype)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def param_groups(self) -> dict[str, list[nn.Parameter]]:
        """Trainable parameters by the optimiser settings that suit them, in the order of `named_parameters`:
        "matrices" between hidden states and "projector", those on the way from an encoder to the decoder (Muon); "embeddings",
        "outputs" (heads and tables) and "encoder" (AdamW)."""
        names = ("matrices", "projector", "embeddings", "outputs", "encoder")
        groups: dict[str, list[nn.Parameter]] = {name: [] for name in names}
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                groups[self.param_group(name, parameter)].append(parameter)
        return groups

    def param_group(self, name: str, parameter: nn.Parameter) -> str:
        """The group of one parameter. A model with further parts overrides this for their names."""
        if name.startswith("transformer.wte."):
            return "embeddings"
        return "outputs" if name.startswith("lm_head.") or parameter.dim() != 2 else "matrices"

    # ---- the forward pass

    def embed(self, inputs: Inputs) -> torch.Tensor:
        """(B, T) ids -> (B, T, C) in the compute dtype."""
        return self.transformer.wte(inputs.idx)

    def context(self, inputs: Inputs, positions, cache):
        """What the layers read beside the row, made once a pass: nothing here. positions: of the row's tokens, a slice or
        (B, T) int64."""
        return None

    def layer(self, number: int, x: torch.Tensor, context, *rest) -> torch.Tensor:
        """One layer of the decoder, (B, T, C) to (B, T, C). rest: the further arguments of `Block.forward`."""
        return self.transformer.h[number](x, *rest)

    def hidden(self, inputs: Inputs, cache=None) -> torch.Tensor:
        """Final hidden states (B, T, C), normed. cache: a `KVCache`; the inputs then continue what it holds.

        Raises ValueError for rows longer than `sequence_len`. Values are not checked here, see `forward`.
        """
        x = self.embed(inputs)
        T = x.size(1)
        # `positions` is a slice when all rows have the same length so far, else (B, T)
        positions, mask = (slice(0, T), None) if cache is None else cache.plan(T)
        end = T if cache is None else cache.longest + T
        if end > self.config.sequence_len:
            raise ValueError(
                f"{end} tokens do not fit the context of {self.config.sequence_len} (sequence_len): "
                "shorten the prompt, use fewer images or vision tokens, or ask for fewer new tokens"
            )
        cos, sin = self.cos[positions].to(x.dtype), self.sin[positions].to(x.dtype)  # (T, 1, D) or (B, T, 1, D)
        dropout = self.dropout if self.training else 0.0
        context = self.context(inputs, positions, cache)
        x = F.dropout(norm(x), dropout)
        for number in range(self.config.n_layer):
            arguments = (number, x, context, cos, sin, mask, cache, dropout)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(self.layer, *arguments, use_reentrant=False)
            else:
                x = self.layer(*arguments)
        if cache is not None:
            cache.advance(T)
        return norm(x)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., vocab_size) float32 in (-15, 15)."""
        return LOGIT_CAP * torch.tanh(self.lm_head(hidden).float() / LOGIT_CAP)

    def loss(
        self, hidden: torch.Tensor, targets: torch.Tensor, reduction: str = "mean", label_smoothing: float = 0.0
    ) -> torch.Tensor:
        """Cross-entropy in nats of (B, T) targets, already shifted, given hidden states (B, T, C).

        Targets of -1 are not learnt. reduction: "mean" or "sum" is a scalar, "none" is (B * T,) with 0 where the target is -1;
        anything else is a ValueError. label_smoothing: this share of a target's probability is spread evenly over the
        vocabulary (Szegedy et al. 2016, arXiv 1512.00567).
        """
        if reduction not in ("mean", "sum", "none"):
            raise ValueError(f'loss_reduction must be "mean", "sum" or "none", got {reduction!r}')
        # Most positions of a question-and-answer row are not learnt: the vocabulary-wide product is done for the rest alone.
        targets = targets.reshape(-1)
        learnt = targets != IGNORE_INDEX
        losses = F.cross_entropy(
            self.logits(hidden.flatten(0, 1)[learnt]),
            targets[learnt],
            reduction="none",
            label_smoothing=label_smoothing,
        )
        if reduction == "none":
            return losses.new_zeros(targets.shape).masked_scatter(learnt, losses)
        total = losses.sum()  # nothing to learn: 0 with a graph, not the NaN of an empty mean
        return total if reduction == "sum" else total / max(1, losses.numel())

    # ---- what `engine.Engine` needs

    def new_cache(self, batch_size: int = 1, max_len: int | None = None) -> KVCache:
        """A cache of empty rows; by default with room for the whole context."""
        return KVCache(self.config, batch_size, max_len or self.config.sequence_len, self.device, self.compute_dtype)

    @torch.inference_mode()
    def read(self, rows: Sequence, cache: KVCache) -> np.ndarray:
        """Read what is unread of the rows of the cache, each an `engine.Unread`, and put it there. Returns the logits after the
        last token of each row, (B, vocab_size) float32."""
        n_tokens = [len(row.tokens) for row in rows]
        lengths = [held + n for held, n in zip(cache.lengths, n_tokens, strict=True)]
        hidden = self.hidden(self.inputs_of(rows), cache)
        cache.rewind(lengths)  # padding lies behind a row's end
        # only one position a row goes through the vocabulary-wide head
        if min(n_tokens) == max(n_tokens):
            hidden = hidden[:, -1]
        else:
            hidden = hidden[torch.arange(len(rows)), torch.tensor(n_tokens) - 1]
        return self.logits(hidden).cpu().numpy()

    def inputs_of(self, rows: Sequence) -> Inputs:
        """What is unread of the rows, padded on the right. A model that reads more than text adds it."""
        return Inputs(pad_rows([row.tokens for row in rows], 0).to(self.device))

    # ---- the checked entry point

    def forward(self, idx, targets=None, kv_cache=None, loss_reduction="mean"):
        """Next-token logits, or the loss.

        idx: (B, T) int64 token ids. targets: (B, T) int64, already shifted (targets[:, t] is the token after idx[:, t]),
        -1 where nothing is to be learnt. Returns (B, T, vocab_size) float32 logits without targets, else `loss`.
        kv_cache: a `KVCache`; idx then continues what it holds.
        Raises ValueError for ids and targets outside the vocabulary and for rows longer than `sequence_len`.
        """
        self.check_ids(idx)
        if targets is None:
            return self.logits(self.hidden(Inputs(idx), kv_cache))
        self.check_targets(targets, idx.shape)
        return self.loss(self.hidden(Inputs(idx), kv_cache), targets, loss_reduction)

    def check_ids(self, idx: torch.Tensor) -> None:
        if idx.dim() != 2 or idx.numel() == 0:
            raise ValueError(f"token ids must be a non-empty (B, T) tensor, got shape {tuple(idx.shape)}")
        low, high = (int(v) for v in idx.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise ValueError(
                f"token ids must lie in 0..{self.config.vocab_size - 1}, got {low}..{high}: "
                "were they made with another tokenizer?"
            )

    def check_targets(self, targets: torch.Tensor, shape: tuple[int, int]) -> None:
        if targets.shape != shape:
            raise ValueError(f"targets must have the shape of the tokens {tuple(shape)}, got {tuple(targets.shape)}")
        low, high = (int(v) for v in targets.aminmax())
        if low < IGNORE_INDEX or high >= self.config.vocab_size:
            raise ValueError(
                f"targets must lie in 0..{self.config.vocab_size - 1}, or be {IGNORE_INDEX} where nothing is to be learnt; "
                f"got {low}..{high}"
            )


def default_compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that supports it, else float32. A training recipe sets its own (`set_compute_dtype`)."""
    return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
