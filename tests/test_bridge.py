"""Folders of BridgeData V2 frames."""

import json

import numpy as np
import pytest

from nanochat.data.bridge import CAMERA, BridgeFrames
from nanochat.data.demonstration_folder import open_demonstrations
from nanochat.files import DataError
from nanochat.vision.letterbox import square
from tests.conftest import REAL_DATA

needs_bridge = pytest.mark.skipif(
    not (REAL_DATA / "bridge_v2_sample").is_dir(), reason="NANOCHAT_TEST_DATA has no bridge_v2_sample"
)


@needs_bridge
def test_the_bridge_sample_is_read(tmp_path):
    data = open_demonstrations(REAL_DATA / "bridge_v2_sample").read("all", 32, cache=tmp_path)
    assert len(data.tasks) == 9 and data.action.shape == (336, 7)
    paths = [path for paths in BridgeFrames(REAL_DATA / "bridge_v2_sample").paths for path in paths]
    for frame in (0, 100, 335):
        np.testing.assert_array_equal(data.images([frame])[0], square(paths[frame], 32)[0])


def bridge_row(**changes) -> dict:
    return {
        "image": "0.png",
        "episode": 4,
        "step": 0,
        "instruction": "öffne",
        "rephrasings": ["a", "b"],
        "action": [0] * 7,
    } | changes


def test_bridge_rows(tmp_path):
    (tmp_path / "0.png").write_bytes(b"kept as it is")
    rows = [bridge_row(), bridge_row(step=1, action=[1] * 7), bridge_row(episode=6)]
    (tmp_path / "frames.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = BridgeFrames(tmp_path)
    first, second = data.episodes
    assert first.task == "öffne" and first.extra == {"name": "bridge-4", "rephrasings": "a\nb"}
    np.testing.assert_array_equal(first.columns["action"], np.float32([[0] * 7, [1] * 7]))
    assert second.task == "öffne" and list(data.pictures(1, CAMERA, [0])) == [b"kept as it is"]


@pytest.mark.parametrize(
    "changes, error",
    [
        ({"step": 1}, DataError),
        ({"action": [1, 2]}, DataError),
        ({"action": "x"}, DataError),
        ({"rephrasings": None}, DataError),
        ({"image": "../0.png"}, DataError),
        ({"image": "/0.png"}, DataError),
        ({"image": "1.png"}, FileNotFoundError),
    ],
)
def test_a_bridge_row_that_is_malformed(tmp_path, changes, error):
    (tmp_path / "0.png").write_bytes(b"")
    (tmp_path / "frames.jsonl").write_text(json.dumps(bridge_row(**changes)))
    with pytest.raises(error):
        list(BridgeFrames(tmp_path).pictures(0, CAMERA, [0]))
