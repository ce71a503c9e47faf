"""What to train, on what, and how: one dataclass per recipe, with the defaults that its data need."""

from dataclasses import dataclass
from typing import Literal

from nanochat.training.recipe import BatchNorm, DType, Flip, Fusion, PictureData, PictureRecipe, Recipe

ActionHead = Literal["continuous", "bins"]
Targets = Literal["auto", "relative", "absolute"]
Predict = Literal["auto", "absolute", "delta", "last"]


@dataclass
class EasyVQA(PictureRecipe):
    """Questions about coloured shapes, trained end to end from random weights: the model that ships as `shapes`."""

    data: str = "easy_vqa"
    layer: str = "4"
    image_size: int = 64
    train_encoder: bool = True
    batchnorm: BatchNorm = "train"
    flip: Flip = "both"
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
    flip: Flip = "horizontal"
    jitter: float = 0.1
    sequence_len: int = 96
    n_layer: int = 3
    dtype: DType = "bfloat16"
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

    The data has few pictures: best with the encoder of a model that was trained on more, --encoder runs/flickr8k."""

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
class Photos(PictureRecipe):
    """Captions of photographs and questions about them, one model for all: the one that ships as `photos`.

    The encoder is EfficientNet-Lite2 with ImageNet weights (extra "photos"), frozen, so its maps are computed once. The data of
    the model that ships: --data flickr8k --also captions-questions:flickr8k daquar daquar pairs"""

    encoder: str = "efficientnet_lite2"
    layer: str = "features"
    vision_tokens: int = 49
    fusion: Fusion = "cross"
    dtype: DType = "bfloat16"
    flip: Flip = "horizontal"
    vocab_size: int = 3072
    sequence_len: int = 128
    n_layer: int = 3
    n_head: int = 5
    n_embd: int = 320
    epochs: float = 8
    questions_per_image: int = 5
    dropout: float = 0.3
    feature_dropout: float = 0.2
    label_smoothing: float = 0.1
    matrix_lr: float = 0.01
    embedding_lr: float = 0.05
    head_lr: float = 3e-3
    cooldown: float = 0.6
    reward_steps: int = 600


@dataclass
class Folder(PictureRecipe):
    """Your own pictures: a folder with captions.csv, a .jsonl, LLaVA .json, .parquet, or hf:owner/name: --data PATH.

    The model starts from `photos`, and its encoder stays as it is. With --start-from none, or where a flag names another
    encoder, tokenizer or shape, it starts from random weights, so nothing is downloaded. To start from a pretrained encoder:
    --encoder WEIGHTS.pt --batchnorm frozen --layer p5+p4+p3."""

    layer: str = "6"
    train_encoder: bool = True
    batchnorm: BatchNorm = "train"
    encoder_lr: float = 3e-3
    word_loss: float = 1.0
    decoder_gradient: float = 0.05


@dataclass
class Recording:
    """What is read of a recording: the same flags for inspect and train robot."""

    cameras: tuple[str, ...] = ()
    "Names of the cameras to read, such as front wrist, the one that questions are about first; default all of the data."
    action_key: str = ""
    "Column of the actions; default action, or actions."
    state_key: str = ""
    "Column of the robot's state; default observation.state, or state."
    fps: float | None = None
    "Frames per second to read of a recording of absolute targets; default all. The nearest ones, where it does not divide."


@dataclass
class Robot(Recording, Recipe):
    """A robot policy that also answers questions, from demonstrations in the LeRobot layout: --data DIR.

    `nanochat record` makes some in a simulator."""

    data: str = ""
    "Folder of a LeRobot dataset, v2.1 or v3.0, or of BridgeData frames (frames.jsonl)."
    also: tuple[str, ...] = ()
    "Further folders of the same robot, learnt with it: another day's recordings, or corrections of `nanochat record --policy`."
    camera_dropout: float = 0.0
    "Share of single cameras that are hidden at random, so that the policy can do without one (needs several cameras)."
    skip_damaged: bool = False
    "Leave out episodes whose pictures are damaged or missing, instead of refusing the data."
    encoder: str = "yolov9t.yaml"
    layer: str = "4"
    image_size: int = 128
    vision_tokens: int = 12
    train_encoder: bool = True
    batchnorm: BatchNorm = "train"
    vocab_size: int = 1024
    "Vocabulary: bytes, merges and special tokens together, at most. The 256 action bins come on top."
    n_layer: int = 3
    n_head: int = 4
    n_embd: int = 128
    dtype: DType = "bfloat16"
    images_per_step: int = 64
    "Frames per optimiser step whose actions are learnt."
    encoder_lr: float = 2e-3
    decoder_gradient: float = 0.05
    blind_share: float | None = None
    "Share of the training rows whose picture is masked; default 0.03, and 0.9 for a short recording (docs/ROBOT.md)."
    dropout: float | None = None
    "Share of the decoder's activations that are dropped in training; default 0, and 0.1 for a short recording."
    weight_decay: float | None = None
    "Weight decay of the decoder's matrices; default 0, and 0.1 for a short recording."
    state_noise: float | None = None
    "Standard deviation of noise on training states, in half ranges; default 0, and 0.6 for a short recording."
    steps: int | None = None
    "Optimiser steps; default 4,500, fewer for a short recording, which would be learnt by heart."
    save_every: int = 300
    threads: int | None = 1

    action_head: ActionHead = "continuous"
    "How actions are written: continuous gives a whole chunk at once, bins one token per number."
    targets: Targets = "auto"
    "What the data's actions are: relative (motions) or absolute (joint angles, poses); auto finds it from the data."
    predict: Predict = "auto"
    """What the network predicts of absolute targets: absolute, the targets; delta, how far they are from the present state, for
    the numbers that follow it; or last, how far from the last action sent, which clients send along (docs/ROBOT.md). auto
    takes what is nearest before any training. Robots get targets in any case."""
    units: str = ""
    "Unit of the states and actions, such as degrees: the policy tells it to its clients, since the data does not say it."
    glance_dim: int = 64
    "Width of each vision token before it is projected."
    chunk: int | None = None
    "Actions per prediction; default --chunk-seconds, 10 for data of a simulator."
    chunk_seconds: float | None = None
    "Length of a prediction in seconds of the data; default 1 for recordings."
    wrong_words: float = 0.0
    """Share of training rows with the instruction of a task of another scene, for which the robot must not move (relative actions
    only). For data in which each task has a scene of its own; of the simulator's tasks, those that share one are known."""
    committed: int = 0
    "Show a quarter of the rows up to so many actions that the robot carries out while a chunk is made (docs/ROBOT.md); 0: none."
    questions_per_step: int = 16
    "Questions per optimiser step, in addition to the frames (only for data of a simulator)."
    question_loss: float = 0.3
    "Weight of the questions' loss; the actions' loss has weight 1 (only for data of a simulator)."
    shift: int = 4
    "Random shift of training pictures, in pixels."
    scene_loss: float = 1.0
    "Weight of an auxiliary loss that predicts object positions from the vision vectors (only for data of a simulator)."


@dataclass
class Distill(PictureData):
    """An encoder that learns to see as another one does, from pictures alone: --data DIR. Other recipes take it by --encoder.

    With --start-from PRUNED --teacher WHOLE, the encoder of a pruned model learns the maps that its decoder was trained on.
    Of the data only the pictures count, and only --data is validated on."""

    teacher: str = "efficientnet_lite2"
    "The encoder to learn from, named as in --encoder."
    components: int = 256
    "Principal components of the teacher's map that are learnt."
    mixed: float = 0.0
    "Share of the views of the first part of a run with another picture over them; for runs of a hundred epochs and more."

    layer: str = "p5+p4+p3+8"
    vision_tokens: int = 49
    train_encoder: bool = True
    train_decoder: bool = False
    batchnorm: BatchNorm = "train"
    vocab_size: int = 300
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 16
    dtype: DType = "bfloat16"
    encoder_lr: float = 2e-3
    warmup_steps: int = 100
    steps: int = 3000
    "Optimiser steps."
    threads: int | None = 1


RECIPES = {
    "easy_vqa": EasyVQA,
    "flickr8k": Flickr8k,
    "daquar": Daquar,
    "photos": Photos,
    "folder": Folder,
    "robot": Robot,
    "distill": Distill,
}


def recipe_name(recipe: Recipe) -> str:
    """The name of a recipe on the command line."""
    return next(name for name, kind in RECIPES.items() if kind is type(recipe))
