"""A robot's cameras by name, in the order in which a policy reads them. No torch.

A camera has a short name, such as front or wrist; LeRobot's column observation.images.front is the camera front.
"""

from collections.abc import Sequence

from nanochat.errors import UserError
from nanochat.files import short_repr

MAX_CAMERAS = 16
MAX_NAME = 200  # characters


def short_names(columns: Sequence[str]) -> list[str]:
    """The last part of each column's name; the whole name where two would be alike."""
    short = [column.rpartition(".")[2] or column for column in columns]
    return [name if short.count(name) == 1 else column for name, column in zip(short, columns, strict=True)]


def check_names(names: object) -> None:
    """Raises UserError unless this is a list of different names of cameras."""
    good = isinstance(names, list) and all(isinstance(name, str) and 0 < len(name) <= MAX_NAME for name in names)
    if not good or len(set(names)) < len(names) or len(names) > MAX_CAMERAS:
        raise UserError(
            f"cameras must be up to {MAX_CAMERAS} different names, such as front and wrist, got {short_repr(names)}"
        )


def by_camera(shown: object, cameras: Sequence[str], may_be_missing: bool) -> list:
    """What a policy is shown at one moment -> a picture of each of its cameras, in their order, None where it is masked.

    shown: {camera: picture} under the cameras' short names or LeRobot's; a picture alone is that of the first camera; None masks
        all of them. cameras: of the policy; none for the one camera of an older policy, which may have any name.
    may_be_missing: whether single cameras may be left out (or None), as they were in training.

    Raises UserError that names the camera that is missing, or that the policy does not have.
    """
    if shown is None:
        return [None] * max(1, len(cameras))
    known = list(cameras) or ["camera"]
    if not isinstance(shown, dict):
        shown = {known[0]: shown}
    if not cameras and len(shown) == 1:
        shown = dict(zip(known, shown.values(), strict=True))
    found = {name if name in known else short_names([str(name)])[0]: picture for name, picture in shown.items()}
    if unknown := [name for name in found if name not in known]:
        has = f"has {', '.join(cameras)}" if cameras else "reads one camera: give its picture alone"
        raise UserError(f"this policy has no camera {' and '.join(map(short_repr, unknown))}; it {has}")
    missing = [name for name in known if found.get(name) is None]
    if missing and not may_be_missing:
        raise UserError(
            f"there is no picture of the camera {' and of '.join(missing)}; this policy needs all of its cameras "
            f"({', '.join(known)}) at every step: send it, or train with --camera-dropout to do without a camera at times"
        )
    return [found.get(name) for name in known]
