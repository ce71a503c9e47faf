"""What to train, on what, and how: one dataclass a recipe. Every field is a flag: nanochat train easy_vqa --steps 100."""

import math
from dataclasses import dataclass
from typing import Literal

# What the numbers of a recipe may be; None where a field has it as its default.
AT_LEAST = {
    1: (
        "val_images", "vision_tokens", "n_layer", "n_head", "n_embd", "sequence_len", "steps", "images_per_step",
        "questions_per_image", "device_batch_size", "threads", "eval_every", "save_every", "glance_dim", "chunk",
    ),
    0: (
        "seed", "reward_steps", "warmup_steps", "word_loss", "weight_decay", "encoder_decay", "matrix_lr", "embedding_lr",
        "head_lr", "encoder_lr", "reward_lr", "questions_per_step", "question_loss", "scene_loss", "shift",
    ),
}  # fmt: skip
SHARES = ("jitter", "blind_share", "word_dropout", "decoder_gradient", "cooldown")


@dataclass
class Recipe:
    """What all recipes have. Those below change the defaults where their data asks for it."""

    data: str = ""
    "What to learn from: a path, or a name that the recipe knows."
    start_from: str = ""
    "A checkpoint to go on from with other data: its weights, words and shape (the fields of eyes and words then come from it)."

    # eyes
    encoder: str = "yolov9t.yaml"
    "Official name, .pt path, .yaml for random weights, or a checkpoint folder, whose encoder is taken."
    layer: str = "p3"
    "Map of the encoder that the words see: head, p3, p4, p5, an index, or several joined by +."
    image_size: int = 224
    "Square input of the encoder in pixels, a multiple of 32."
    vision_tokens: int = 16
    "Vectors per picture."
    train_encoder: bool = False
    "Train the encoder too."
    batchnorm: Literal["frozen", "train"] = "frozen"
    "Statistics of the encoder's BatchNorm while it trains: frozen for pretrained weights, train for random ones."

    # words
    vocab_size: int = 4096
    "Bytes, merges and the words of a conversation, at most; a small text has fewer merges. Of robots, bins come on top."
    tokenizer: str = ""
    "A tokenizer.json (`nanochat tokenizer`, or of a checkpoint) instead of one that is learnt from the data."
    sequence_len: int = 128
    "Context in tokens, vision tokens included."
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 256
    dtype: Literal["float32", "bfloat16"] = "float32"
    "Of the decoder's activations; bfloat16 is faster where the processor has instructions for it."

    # steps
    images_per_step: int = 32
    gradient_checkpointing: bool = False
    "Recompute the decoder's blocks in the backward pass: less memory, more time."
    blind_share: float = 0.05
    "Share of training rows whose picture is hidden, so that the blind row of a table is the model's honest guess."
    decoder_gradient: float = 1.0
    "Share of the decoder's gradient that reaches the encoder: beside a loss of its own most of it is noise."

    # optimisers: Muon on matrices, AdamW on the rest
    matrix_lr: float = 0.02
    embedding_lr: float = 5e-3
    head_lr: float = 5e-3
    "Of the output table and the positions of vision tokens."
    encoder_lr: float = 1e-3
    weight_decay: float = 0.0
    "Of the matrices."
    encoder_decay: float = 0.05
    "The same of the encoder."
    warmup_steps: int = 50
    cooldown: float = 0.5
    "Share of the run in which the learning rates fall to zero."

    # run
    out: str = ""
    "Checkpoint folder; default runs/RECIPE."
    resume: bool = False
    "Go on with the run in `out`."
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    "Of the CPU; None: as many as it has cores. A small model is fastest with 1, above all beside other work."
    eval_every: int = 250
    "Steps between validations."
    save_every: int = 250
    "Steps between checkpoints: what a kill can lose."

    def check(self) -> None:
        """Raises ValueError for a number out of range."""
        for least, names in AT_LEAST.items():
            for name in names:
                value = getattr(self, name, None)
                if value is not None and not (math.isfinite(value) and value >= least):
                    raise ValueError(f"{name} must be at least {least}, got {value}")
        for name in SHARES:
            if not 0 <= getattr(self, name, 0) <= 1:
                raise ValueError(f"{name} is a share and must lie in 0..1, got {getattr(self, name)}")


@dataclass
class PictureRecipe(Recipe):
    """Questions about pictures, and captions. `vision_tokens`: 1 is the mean of the map, a square number is a grid."""

    data: str = ""
    "Dataset name or path: easy_vqa, captions.csv or its folder, .jsonl, LLaVA .json, .parquet, or hf:owner/name."
    train_split: str = "fit"
    val_split: str = "val"
    val_images: int = 400
    "Validation pictures, at most."
    strict: bool = False
    "Refuse data with missing pictures instead of leaving their rows out."
    cache: str = ""
    "Folder where an encoder's features are kept that is not trained; default OUT/../features."
    encoder_device: str | None = None
    "Another device for the encoder, to leave memory to the decoder."

    flip: Literal["none", "horizontal", "both"] = "none"
    "Random mirroring of training pictures (a trained encoder only)."
    jitter: float = 0.0
    "Random shift of training pictures, as a share of their side, and zoom by as much (a trained encoder only)."
    word_dropout: float = 0.0
    "Share of the words, of questions and answers, that are hidden in training: against learning small texts by heart."
    word_loss: float = 0.0
    "Weight of the loss that teaches the encoder answer words directly (see words.py); a trained encoder only."

    epochs: float = 10.0
    steps: int | None = None
    "Instead of epochs."
    questions_per_image: int = 4
    "Questions (or captions) of one picture in a step, drawn at random; they share one encoder pass."
    device_batch_size: int | None = None
    "Pictures in memory at a time; a step accumulates gradients until it has images_per_step."
    reward_steps: int = 0
    "Steps after the others in which the model learns from the score of its own captions (see rewards.py)."
    reward_lr: float = 0.05
    "Learning rates of these steps, as a share of the peak rates."

    def check(self) -> None:
        super().check()
        if not (math.isfinite(self.epochs) and self.epochs > 0):
            raise ValueError(f"epochs must be more than 0, got {self.epochs}")


@dataclass
class EasyVQA(PictureRecipe):
    """Questions about coloured shapes, trained end to end from random weights: the model that ships."""

    data: str = "easy_vqa"
    layer: str = "4"
    image_size: int = 64
    train_encoder: bool = True
    batchnorm: Literal["frozen", "train"] = "train"
    flip: Literal["none", "horizontal", "both"] = "both"
    vocab_size: int = 320
    sequence_len: int = 64
    n_layer: int = 2
    n_embd: int = 128
    epochs: float = 18
    images_per_step: int = 64
    questions_per_image: int = 2
    encoder_lr: float = 3e-3
    threads: int | None = 1
    word_loss: float = 1.0
    decoder_gradient: float = 0.05


@dataclass
class Flickr8k(PictureRecipe):
    """Captions of photographs. Needs a folder with train.jsonl, dev.jsonl and images: --data DIR."""

    train_split: str = "train"
    val_split: str = "dev"
    encoder: str = ""
    layer: str = "p5+p4+p3+8"
    train_encoder: bool = True
    flip: Literal["none", "horizontal", "both"] = "horizontal"
    jitter: float = 0.1
    sequence_len: int = 96
    n_layer: int = 3
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    epochs: float = 10
    images_per_step: int = 24
    questions_per_image: int = 3
    word_loss: float = 1.0
    decoder_gradient: float = 0.1
    reward_steps: int = 600
    embedding_lr: float = 0.1
    weight_decay: float = 0.05


@dataclass
class Daquar(PictureRecipe):
    """Questions about indoor photographs. Needs a folder with train.jsonl and images: --data DIR.

    Few pictures: best with the encoder of a model that has seen others, --encoder runs/flickr8k."""

    encoder: str = ""
    layer: str = "p5+p4+p3+8"
    vocab_size: int = 2048
    n_layer: int = 2
    n_embd: int = 128
    epochs: float = 10
    images_per_step: int = 8
    questions_per_image: int = 4
    word_dropout: float = 0.1
    embedding_lr: float = 0.05
    weight_decay: float = 0.1
    matrix_lr: float = 0.01


@dataclass
class Folder(PictureRecipe):
    """Your own pictures: a folder with captions.csv, a .jsonl, LLaVA .json, .parquet, or hf:owner/name: --data PATH.

    The whole model learns from nothing, so that no download is needed. With weights at hand, --encoder WEIGHTS.pt
    --batchnorm frozen --layer p5+p4+p3 starts from what they know."""

    layer: str = "6"
    train_encoder: bool = True
    batchnorm: Literal["frozen", "train"] = "train"
    encoder_lr: float = 3e-3
    word_loss: float = 1.0
    decoder_gradient: float = 0.05


@dataclass
class Robot(Recipe):
    """A robot policy that also answers questions, from demonstrations in the LeRobot layout: --data DIR.

    `nanochat demos` makes some; see nanochat/robot/train.py."""

    data: str = ""
    "Folder of a LeRobot dataset, v2.1 or v3.0, or of BridgeData frames (frames.jsonl)."
    camera: str = ""
    "Its name, such as observation.images.front; default the first of the data."
    encoder: str = "yolov9t.yaml"
    layer: str = "4"
    image_size: int = 128
    vision_tokens: int = 12
    train_encoder: bool = True
    batchnorm: Literal["frozen", "train"] = "train"
    vocab_size: int = 1024
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 128
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    images_per_step: int = 64
    encoder_lr: float = 2e-3
    decoder_gradient: float = 0.05
    blind_share: float = 0.03
    steps: int = 4500
    eval_every: int = 300
    save_every: int = 300
    threads: int | None = 1

    action_head: Literal["continuous", "bins"] = "continuous"
    "A chunk of numbers at once, or a token for each number."
    glance_dim: int = 64
    "Numbers of each of the vision_tokens."
    chunk: int = 10
    "Actions that are given at once."
    questions_per_step: int = 16
    "Frames that are asked about in a step, beside the images_per_step that are acted on (a simulator's data only)."
    question_loss: float = 0.3
    "Weight of the answers beside the actions (a simulator's data only)."
    shift: int = 4
    "Random shift of training pictures, in pixels."
    scene_loss: float = 1.0
    "Weight of the loss that teaches the encoder where things are, where the data tells it (a simulator's)."


RECIPES = {"easy_vqa": EasyVQA, "flickr8k": Flickr8k, "daquar": Daquar, "folder": Folder, "robot": Robot}
