"""The commands that make one model of others: export for ONNX Runtime, prune, average."""

import shlex
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from nanochat.flags import CHECKPOINT, Checkpoint, Out, next_step


def export(
    checkpoint: Checkpoint,
    out: Annotated[
        Positional[Path], arg(metavar="OUT", help="The folder to write; an earlier export there is replaced.")
    ],
    int8: bool = False,
    calibrate: Path | None = None,
) -> None:
    """Export a checkpoint to a folder that runs on ONNX Runtime, without torch: give that folder to --checkpoint.

    It is compared with torch before it is written.

    Args:
        int8: 8-bit weights and products: a quarter of the size, and faster; answers change slightly, and how much is printed.
        calibrate: For --int8: a folder with pictures such as the model will see, 20 or more, to measure the encoder's ranges on.
    """
    from rich.console import Console

    from nanochat.export import export as write

    with Console(stderr=True).status("exporting"):
        report = write(checkpoint, out, int8, calibrate)
    print(f"{report.bytes / 1e6:.1f} MB in {out}")
    if int8:
        print(f"the likeliest token is torch's for {report.agreement:.1%} of the tokens compared")
    else:
        print(f"logits differ from torch by at most {report.logits:.1g}")
    if report.actions is not None:
        print(f"actions differ from torch by at most {report.actions:.2g} half ranges")
    folder = shlex.quote(str(out))
    next_step(f"nanochat policy-server {folder}" if report.actions is not None else f"--checkpoint {folder} uses it")


def prune(
    checkpoint: Checkpoint,
    out: Annotated[Positional[Path], arg(metavar="OUT", help="The folder to write; it must not exist.")],
    ratio: float = 0.3,
) -> None:
    """Remove hidden units of MLPs and hidden channels of the encoder, those with the smallest weights. Then train the result.

    What others read keeps its width: maps, attention, embeddings, heads. The result is an ordinary, smaller checkpoint.

    Args:
        ratio: Share to remove: of the hidden units of each MLP, and of the channels inside each block of the encoder.
    """
    from nanochat.pruning import prune_checkpoint

    report = prune_checkpoint(checkpoint, out, ratio)
    (hidden, kept), (channels, left), (before, after) = report
    of_encoder = f"{left:,} of {channels:,} hidden channels of the encoder, " if channels else ""
    print(
        f"{kept} of {hidden} hidden units in each MLP, {of_encoder}{after / 1e6:.2f} of {before / 1e6:.2f} M parameters, in {out}"
    )
    next_step(f"nanochat train RECIPE --start-from {shlex.quote(str(out))} --out runs/again, see docs/RUNTIME.md")


def average(
    checkpoints: Annotated[
        Positional[tuple[str, ...]], arg(metavar="CHECKPOINT...", help=CHECKPOINT, help_behavior_hint="")
    ],
    out: Out,
) -> None:
    """Average the weights of checkpoints that were trained on from the same one, this one itself among them if you like.

    The mean of a model and what it became on your data often keeps what the first knew and has what the second learnt. A name
    given twice counts twice. The result is an ordinary checkpoint: compare it with the others, `nanochat eval`.
    """
    from nanochat.training.averaging import average_checkpoints

    model = average_checkpoints(checkpoints, out)
    print(f"the mean of {len(checkpoints)} checkpoints, {model.num_parameters() / 1e6:.2f} M parameters, in {out}")
    next_step(f"nanochat eval {shlex.quote(str(out))} DATA, and the same with each of them")
