"""Folders of BridgeData V2 frames."""

import json

import numpy as np
import pytest

from nanochat.data.bridge import bridge_episodes
from nanochat.data.lerobot import RobotDataset
from nanochat.data.lerobot_writer import write_dataset
from nanochat.files import DataError
from tests.conftest import REAL_DATA
from tests.data_files import assert_same

needs_bridge = pytest.mark.skipif(
    not (REAL_DATA / "bridge_v2_sample").is_dir(), reason="NANOCHAT_TEST_DATA has no bridge_v2_sample"
)


@needs_bridge
def test_the_bridge_sample_is_converted(tmp_path):
    write_dataset(tmp_path / "bridge", bridge_episodes(REAL_DATA / "bridge_v2_sample"), 5, "widowx", (256, 256, 3))
    dataset = RobotDataset(tmp_path / "bridge")
    assert len(dataset) == 9 and sum(episode.length for episode in dataset.episodes) == 336
    for i, episode in enumerate(bridge_episodes(REAL_DATA / "bridge_v2_sample")):
        assert episode.columns["action"].shape[1] == 7
        assert_same(dataset.episode(i), episode)


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
    first, second = bridge_episodes(tmp_path)
    assert first.task == "öffne" and first.extra == {"name": "bridge-4", "rephrasings": "a\nb"}
    np.testing.assert_array_equal(first.columns["action"], np.float32([[0] * 7, [1] * 7]))
    assert second.images == {"observation.images.image_0": [b"kept as it is"]}


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
        list(bridge_episodes(tmp_path))
