"""The rows of ablations.py: what each changes of the recipe `photos`, and which are compared with each other."""

from dataclasses import dataclass, field
from pathlib import Path

from nanochat.training.recipes import Distill


@dataclass(frozen=True)
class Row:
    """One run. changes: fields of the recipe. width_of: its width is the one with as many parameters as that row. minutes_of:
    (like, other): it takes the shape of `like`, and as many steps as that one makes in the minutes of `other`. after: it goes
    on from the end of that row, with reward steps."""

    name: str
    text: str
    changes: dict = field(default_factory=dict)
    width_of: str = ""
    minutes_of: tuple[str, ...] = ()
    after: str = ""

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(filter(None, (*self.minutes_of, self.after)))


COMPARISONS = {
    "How pictures reach the decoder": ("head", "pooled", "grid16", "grid49", "cross"),
    "Prefix and cross-attention at equal cost": ("cross", "grid49", "grid49-parameters", "grid49-minutes"),
    "Encoders": ("lite0", "cross", "yolo-taught", "yolo-random"),
    "Frozen and trained encoders": (
        "cross", "lite2-trained", "yolo-taught", "yolo-taught-trained", "yolo-random", "yolo-random-trained",
    ),
    "Reward steps": ("cross", "reward"),
}  # fmt: skip


def rows_of(taught: str, detector: str, reward_steps: int) -> dict[str, Row]:
    """All rows by their names, those that others need first. taught: a checkpoint, or "" to leave its rows out; detector: the
    encoder of the row `head`."""
    prefix, layer = {"fusion": "prefix"}, Distill().layer
    same_width = prefix | {"vision_tokens": 49}
    # an encoder that begins with random weights needs a loss of its own, see docs/DESIGN.md; pretrained ones move slowly
    random = {"encoder": "yolov9t.yaml", "layer": layer}
    learns = {
        "train_encoder": True, "batchnorm": "train", "encoder_lr": 3e-3, "word_loss": 1.0, "decoder_gradient": 0.05,
    }  # fmt: skip
    as_taught = {"encoder": taught, "layer": layer}
    moves = {"train_encoder": True, "encoder_lr": 3e-4, "word_loss": 1.0, "decoder_gradient": 0.1}
    without = ", random weights" if detector.endswith((".yaml", ".yml")) else ""
    rows = [
        Row("cross", "Lite2, 49 cells, cross-attention (`photos`)"),
        Row(
            "head", f"first design: head of {Path(detector).stem}{without}, 1 token",
            prefix | {"encoder": detector, "layer": "head", "vision_tokens": 1},
        ),
        Row("pooled", "Lite2, 1 token", prefix | {"vision_tokens": 1}),
        Row("grid16", "Lite2, 16 tokens", prefix | {"vision_tokens": 16}),
        Row("grid49", "Lite2, 49 tokens", same_width),
        Row("grid49-parameters", "Lite2, 49 tokens, parameters of cross-attention", same_width, width_of="cross"),
        Row(
            "grid49-minutes", "Lite2, 49 tokens, minutes of cross-attention", same_width, width_of="cross",
            minutes_of=("grid49-parameters", "cross"),
        ),
        Row("lite0", "Lite0, cross-attention", {"encoder": "efficientnet_lite0"}),
        Row("yolo-random", "YOLOv9-t, random weights, cross-attention", random),
        Row("yolo-random-trained", "YOLOv9-t, random weights, trained, cross-attention", random | learns),
        Row("lite2-trained", "Lite2, trained, cross-attention", {"train_encoder": True, "encoder_lr": 1e-4}),
        Row("reward", "Lite2, cross-attention, then reward steps", {"reward_steps": reward_steps}, after="cross"),
    ]  # fmt: skip
    if taught:
        rows += [
            Row("yolo-taught", "YOLOv9-t, taught by Lite2, cross-attention", as_taught),
            Row("yolo-taught-trained", "YOLOv9-t, taught by Lite2, trained, cross-attention", as_taught | moves),
        ]
    return {row.name: row for row in rows}
