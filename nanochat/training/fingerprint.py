"""What a run was trained on, in a few numbers: a resumed run must get the same. Paths are no part of it, so data may move."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nanochat.data import Sample
from nanochat.training.features import source_digest
from nanochat.vision.images import ImageSource

if TYPE_CHECKING:  # it needs pyarrow, which training on pictures does not
    from nanochat.data.demonstrations import Demonstrations

SAMPLED_FRAMES = 64  # pictures of demonstrations that are compared; their numbers are compared completely


def digest(parts: Iterable[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part).digest())  # so that the borders between parts count
    return found.hexdigest()


def samples_fingerprint(samples: Sequence[Sample], images: Iterable[ImageSource]) -> dict:
    """Of conversations about pictures. images: the distinct pictures, whose files are read."""
    texts = digest(json.dumps([sample.messages, sample.references]).encode() for sample in samples)
    digests = [source_digest(image) for image in images]
    return {
        "conversations": len(samples),
        "pictures": len(digests),
        "sha256": {"texts": texts, "pictures": digest(found.encode() for found in digests)},
    }


def demonstrations_fingerprint(data: "Demonstrations") -> dict:
    frames = np.unique(np.linspace(0, len(data) - 1, SAMPLED_FRAMES).astype(int)).tolist()
    return {
        "frames": len(data),
        "episodes": len(data.tasks),
        "sha256": {
            "instructions": digest(task.encode() for task in data.tasks),
            "states": digest([data.state.tobytes()]),
            "actions": digest([data.action.tobytes()]),
            "pictures": digest(data.images(frames, camera).tobytes() for camera in range(len(data.cameras))),
        },
    }


def changes(before: dict[str, dict], now: dict[str, dict]) -> list[str]:
    """What differs between two fingerprints {"training": ..., "validation": ...}, in words."""
    found = []
    for part, old in before.items():
        new = now.get(part, {})
        counts = [name for name in old if name != "sha256" and old[name] != new.get(name)]
        found += [f"{old[name]} {part} {name} then, {new.get(name)} now" for name in counts]
        if not counts:
            others = [name for name, sha in old["sha256"].items() if sha != new.get("sha256", {}).get(name)]
            found += [f"other {name} in the {part} data" for name in others]
    return found
