"""The fields that recipes share, their help and their checks. A field is a flag: nanochat train easy_vqa --steps 100.

The text below a field is its help. This module imports no torch, so that --help answers at once.
"""

import math
from dataclasses import dataclass
from typing import Literal

from nanochat.errors import UserError

# What the numbers of a recipe may be; None where a field has it as its default.
AT_LEAST = {
    1: (
        "val_images", "vision_tokens", "n_layer", "n_head", "n_embd", "sequence_len", "steps", "min_steps", "images_per_step",
        "questions_per_image", "device_batch_size", "threads", "eval_every", "save_every", "glance_dim", "chunk", "components",
    ),
    0: (
        "seed", "reward_steps", "warmup_steps", "word_loss", "weight_decay", "encoder_decay", "matrix_lr", "projector_lr",
        "embedding_lr", "head_lr", "encoder_lr", "reward_lr", "questions_per_step", "question_loss", "scene_loss", "shift",
        "picture_memory", "state_noise",
    ),
}  # fmt: skip
SHARES = (
    "jitter", "blind_share", "word_dropout", "decoder_gradient", "cooldown", "dropout", "feature_dropout", "label_smoothing",
    "wrong_words", "mixed",
)  # fmt: skip

DType = Literal["float32", "bfloat16"]
BatchNorm = Literal["frozen", "train"]
Flip = Literal["none", "horizontal", "both"]
Fusion = Literal["prefix", "cross"]


def flag(name: str) -> str:
    """The flag of a field: what messages name, since users type it."""
    return "--" + name.replace("_", "-")


@dataclass
class Recipe:
    """Fields of all recipes. The recipes below change defaults where their data needs it."""

    data: str = ""
    "Training data: a path, or a name that the recipe knows."
    start_from: str = ""
    "Checkpoint to start from instead of random weights (none). Its tokenizer and its shape replace the fields for them."

    encoder: str = "yolov9t.yaml"
    "Vision encoder: yolov9t.pt, a .pt path, a .yaml for random weights, efficientnet_lite2, timm:NAME, or a checkpoint with one."
    layer: str = "p3"
    "Map of the encoder that the decoder reads: head, p3, p4, p5, the number of a module, or several joined by +."
    image_size: int = 224
    "Side of the encoder's square input in pixels, a multiple of 32."
    vision_tokens: int = 16
    "Vision tokens per picture."
    train_encoder: bool = False
    "Train the encoder as well."
    train_encoder_from: str = ""
    "First layer of the encoder that is trained (p5, p4, a module's number); those before it stay as they are; default all."
    train_decoder: bool = True
    "Train the decoder. Without it, only the way from the encoder to it learns: projector and cross-attention."
    batchnorm: BatchNorm = "frozen"
    "BatchNorm of a trained encoder: frozen for pretrained weights; train for random ones, estimated before each validation."

    vocab_size: int = 4096
    "Vocabulary: bytes, merges and special tokens together, at most; a small text gives fewer merges."
    tokenizer: str = ""
    "A tokenizer.json to use (from `nanochat tokenizer` or a checkpoint); by default one is trained on the data."
    sequence_len: int = 128
    "Context in tokens, vision tokens included."
    n_layer: int = 4
    "Blocks of the decoder."
    n_head: int = 4
    "Attention heads of each block."
    n_embd: int = 256
    "Width of the decoder, a multiple of 2 * n_head."
    dtype: DType = "float32"
    "Dtype of the activations and the embedding table; bfloat16 is faster where the processor has instructions for it."

    images_per_step: int = 32
    "Pictures per optimiser step."
    device_batch_size: int | None = None
    "Pictures in memory at a time; a step accumulates gradients until it has --images-per-step. Default: all of them."
    gradient_checkpointing: bool = False
    "Recompute the decoder's blocks in the backward pass: less memory, more time."
    blind_share: float = 0.05
    "Share of the training rows whose picture is masked, so that the blind score of a report is the model's best guess."
    decoder_gradient: float = 1.0
    "Share of the decoder's gradient that reaches the encoder. With a loss of the encoder's own, a small share is best."
    dropout: float = 0.0
    "Share of the decoder's activations that are dropped in training; prevents learning small data by heart."

    matrix_lr: float = 0.02
    "Peak learning rate of the decoder's matrices (Muon)."
    projector_lr: float | None = None
    "Peak learning rate of the matrices of projector and cross-attention (Muon); default --matrix-lr."
    embedding_lr: float = 5e-3
    "Peak learning rate of the token embeddings (AdamW)."
    head_lr: float = 5e-3
    "Peak learning rate of output heads and vision-token positions (AdamW)."
    encoder_lr: float = 1e-3
    "Peak learning rate of the encoder (AdamW)."
    weight_decay: float = 0.0
    "Weight decay of the decoder's matrices."
    encoder_decay: float = 0.05
    "Weight decay of the encoder."
    warmup_steps: int = 50
    "Steps in which the learning rates rise from zero."
    cooldown: float = 0.5
    "Share of the run in which the learning rates fall to zero."

    out: str = ""
    "Checkpoint folder; default runs/RECIPE."
    resume: bool = False
    "Resume the run in --out. Flags you omit keep their saved values."
    cache: str = ""
    "Shared cache folder, for what is computed of pictures once; default $NANOCHAT_CACHE, then ~/.cache/nanochat."
    seed: int = 0
    "Seed of the weights, the order of the data and the augmentation."
    device: str = "auto"
    "cpu, cuda, cuda:1, ...; auto is the GPU where there is one."
    threads: int | None = None
    "CPU threads; default one per core. A small model is fastest with 1, above all when other programs run."
    eval_every: int | None = None
    "Steps between validations; default a tenth of the run, 250 at most."
    save_every: int = 250
    "Steps between checkpoints: what a killed run can lose."

    def __post_init__(self):
        if self.start_from == "none":  # as the command line says it, where an empty word is hard to see
            self.start_from = ""

    def check(self) -> None:
        """Raises ValueError for a number out of range."""
        for least, names in AT_LEAST.items():
            for name in names:
                value = getattr(self, name, None)
                if value is not None and not (math.isfinite(value) and value >= least):
                    raise UserError(f"{flag(name)} must be at least {least}, got {value}")
        for name in SHARES:
            if not 0 <= (getattr(self, name, 0) or 0) <= 1:
                raise UserError(f"{flag(name)} is a share and must lie in 0..1, got {getattr(self, name)}")
        if self.train_encoder_from and not self.train_encoder:
            raise UserError(f"--train-encoder-from {self.train_encoder_from} needs --train-encoder")
        if self.n_embd % (2 * self.n_head):
            raise UserError(f"--n-embd must be a multiple of 2 * --n-head, {2 * self.n_head}, got {self.n_embd}")
        if self.image_size < 32 or self.image_size % 32:
            raise UserError(f"--image-size must be a positive multiple of 32, got {self.image_size}")


@dataclass
class PictureData(Recipe):
    """Fields of recipes that learn from a dataset of pictures."""

    data: str = ""
    "Dataset name or path: easy_vqa, captions.csv or its folder, .jsonl, LLaVA .json, .parquet, or hf:owner/name."
    also: tuple[str, ...] = ()
    "Further datasets to train on in the same run, named like --data."
    train_split: str = "fit"
    "Split to train on."
    val_split: str = "val"
    "Split to validate on."
    val_images: int = 400
    "Validation pictures, at most."
    strict: bool = False
    "Refuse data with missing pictures instead of skipping their rows."
    picture_memory: float = 2.0
    "Gigabytes for decoded training pictures of a trained encoder; those that do not fit are decoded again in every epoch."

    def check(self) -> None:
        super().check()
        if math.isqrt(self.vision_tokens) ** 2 != self.vision_tokens:
            raise UserError(f"--vision-tokens must be a square number (1, 4, 9, 16, 25, ...), got {self.vision_tokens}")


@dataclass
class PictureRecipe(PictureData):
    """Questions about pictures, and captions."""

    encoder_device: str | None = None
    "Device of the encoder if it is not --device, to leave memory to the decoder."

    vision_tokens: int = 16
    "Vision tokens per picture: 1 is the mean of the map, a square number is a grid."
    fusion: Fusion = "prefix"
    "How pictures reach the decoder: prefix puts vision tokens in the row; cross lets every block attend to the picture's cells."
    flip: Flip = "none"
    "Random mirroring of training pictures, except where a text has left or right; a frozen encoder can have horizontal."
    jitter: float = 0.0
    "Random shift of training pictures, as a share of their side, and zoom by as much (needs a trained encoder)."
    word_dropout: float = 0.0
    "Share of the text tokens that are replaced in training; prevents learning small texts by heart."
    feature_dropout: float = 0.0
    "Share of the numbers in vision vectors that are dropped in training."
    label_smoothing: float = 0.0
    "Share of the target that is spread over the whole vocabulary."
    word_loss: float = 0.0
    "Weight of an auxiliary loss that predicts answer words from the vision vectors (needs a trained encoder)."

    epochs: float = 10.0
    "Passes over the training pictures."
    min_steps: int = 200
    "Optimiser steps at least, however few pictures there are."
    steps: int | None = None
    "Optimiser steps, instead of --epochs and --min-steps."
    questions_per_image: int = 4
    "Questions (or captions) of one picture per step, drawn at random; they share one encoder pass."
    reward_steps: int = 0
    "Steps at the end in which captions that the model samples are rewarded by BLEU and CIDEr."
    reward_lr: float = 0.05
    "Learning rates of the reward steps, as a share of the peak rates."

    def check(self) -> None:
        super().check()
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise UserError(f"--epochs must be more than 0, got {self.epochs}")
