"""What leaves this machine holds none of its paths."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat import packing
from nanochat.checkpoint import SHIPPED, CheckpointError, load_checkpoint
from nanochat.packing import pack_checkpoint, push_checkpoint, without_paths
from tests.test_untrusted import copied, sign


def with_training(folder: Path, **changes) -> Path:
    training = json.loads((copied(folder) / "training.json").read_text())
    (folder / "training.json").write_text(json.dumps(training | changes))
    return sign(folder)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/srv/ann/data", "data"),
        ("/srv/ann/data/", "data"),
        ("~/secret/photos", "photos"),
        ("~ann/photos", "photos"),
        ("C:\\Users\\ann\\photos", "photos"),
        ("/srv/Ann Smith/my photos", "my photos"),
        ("left out: /srv/ann/data/7.jpg, 8.jpg", "left out: 7.jpg, 8.jpg"),
        ("of '/srv/ann/a.json' and \"/mnt/disk 2/b.json\"", "of 'a.json' and \"b.json\""),
        ("in /srv/Ann Smith/x.csv:7", "in x.csv:7"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("owner/name", "owner/name"),
        ("2.14.1+cu130", "2.14.1+cu130"),
        ("and/or 3/4", "and/or 3/4"),
        ("yes / no", "yes / no"),
    ],
)
def test_folders_are_left_out_of_texts(value, expected):
    assert without_paths(value) == expected
    assert without_paths({"notes": [{value: value}]}) == {"notes": [{expected: expected}]}


def test_relative_paths_are_left_out_of_the_fields_that_hold_paths():
    recipe = {
        "data": "../ann/photos",
        "out": "runs/ann",
        "encoder": "a/b.pt",
        "start_from": "shapes",
        "layer": "p3+p4",
    }
    expected = {"data": "photos", "out": "ann", "encoder": "b.pt", "start_from": "shapes", "layer": "p3+p4"}
    also = ["captions-questions:/srv/ann/photos", "captions-questions:../ann/photos", "../ann/rooms", "pairs"]
    assert without_paths({"also": also})["also"] == ["captions-questions:photos"] * 2 + ["rooms", "pairs"]
    assert without_paths({"recipe": recipe, "earlier": [recipe]}) == {"recipe": expected, "earlier": [expected]}


PRIVATE = {
    "recipe": {"data": "/srv/ann/photos", "start_from": "../ann/model", "steps": 3},
    "earlier": [{"data": "/srv/ann/first"}],
    "data": {
        "fingerprint": {"/srv/ann/photos/captions.csv": "12ab"},
        "left_out": ["/srv/ann/photos/7.jpg is missing"],
    },
}


class Hub:
    """Keeps a copy of what is uploaded."""

    def __init__(self, folder: Path):
        self.folder = folder

    def upload(self, folder, repo_id, files, private):
        for name in files:
            shutil.copy(folder / name, self.folder / name)
        return repo_id


def test_no_path_is_packed_or_pushed(tmp_path, monkeypatch):
    folder = with_training(tmp_path / "m", **PRIVATE)
    (tmp_path / "hub").mkdir()
    monkeypatch.setattr(packing, "hub", Hub(tmp_path / "hub"))
    push_checkpoint(folder, "me/model")
    pack_checkpoint(folder, tmp_path / "packed")
    for public in (tmp_path / "hub", tmp_path / "packed"):
        texts = "".join(path.read_text() for path in public.glob("*.json"))
        assert "ann" not in texts and "/home" not in texts and str(tmp_path) not in texts
        training = load_checkpoint(public)[2]
        assert training["recipe"] == {"data": "photos", "start_from": "model", "steps": 3}
        assert training["data"]["left_out"] == ["7.jpg is missing"]
    assert "/srv/ann" in (folder / "training.json").read_text()  # here it stays


def test_licences_go_with_the_weights(tmp_path, monkeypatch):
    folder = with_training(tmp_path / "m")
    (tmp_path / "hub").mkdir()
    for name in ("NOTICE", "LICENSE-APACHE-2.0", "README.md", "diary.txt"):
        (folder / name).write_text(name)
    monkeypatch.setattr(packing, "hub", Hub(tmp_path / "hub"))
    push_checkpoint(folder, "me/model")
    pack_checkpoint(folder, tmp_path / "packed")
    for public in (tmp_path / "hub", tmp_path / "packed"):
        load_checkpoint(public)
        texts = {
            path.name: path.read_text() for path in public.iterdir() if path.suffix not in (".json", ".safetensors")
        }
        assert texts == {"NOTICE": "NOTICE", "LICENSE-APACHE-2.0": "LICENSE-APACHE-2.0"}


@pytest.mark.parametrize(
    "value", [None, [], 3, "x", True, {"data": None}, {"data": 5}, {"data": ["/a/b"]}, [None], [3], {}]
)
@pytest.mark.parametrize("key", ["recipe", "earlier", "history", "multi_turn", "learnt", "images", "data"])
def test_any_json_in_training_is_packed_or_refused(tmp_path, key, value):
    folder = with_training(tmp_path / "m", **{key: value})
    try:
        pack_checkpoint(folder, tmp_path / "out")
    except CheckpointError as error:
        assert f"training.json: {key!r} should be" in str(error) and not (tmp_path / "out").exists()
    else:
        load_checkpoint(tmp_path / "out")


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    )
)
@settings(max_examples=100)
def test_any_json_stays_json(value):
    stripped = without_paths(value)
    assert type(stripped) is type(value)
    json.dumps(stripped)


def test_shipped_models_have_no_paths():
    for folder in SHIPPED.values():
        training = json.loads((folder / "training.json").read_text())
        assert without_paths(training) == training
