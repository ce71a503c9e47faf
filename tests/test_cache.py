"""The shared cache folder and the command that lists and clears it."""

import os
import time

import pytest

from nanochat.cache import KINDS, cache_folder, clear, entries
from nanochat.errors import UserError


@pytest.fixture
def full(tmp_path):
    """A cache with something of each kind."""
    for kind in KINDS:
        (tmp_path / kind).mkdir()
    (tmp_path / "frames/aa11.npy").write_bytes(b"x" * 3000)
    (tmp_path / "frames/aa11.json").write_text('{"about": "front of a robot"}')
    (tmp_path / "frames/.ab22.npy.17.tmp").write_bytes(b"x" * 500)
    (tmp_path / "features/cc").mkdir()
    (tmp_path / "features/cc/part.npy").write_bytes(b"x" * 200)
    (tmp_path / "exports/dd").mkdir()
    (tmp_path / "digests/ee.json").write_text("damaged")
    return tmp_path


def test_the_folder_is_the_flags_the_variables_or_the_usual_one(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_CACHE", str(tmp_path / "a"))
    assert cache_folder("frames", tmp_path / "b") == tmp_path / "b/frames"
    assert cache_folder("frames") == cache_folder("frames", "") == tmp_path / "a/frames"
    monkeypatch.delenv("NANOCHAT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    assert cache_folder("features") == tmp_path / "c/nanochat/features"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "d"))
    assert cache_folder("features") == tmp_path / "d/.cache/nanochat/features"
    assert cache_folder("features", "~/e") == tmp_path / "d/e/features"


def test_entries_are_listed_the_largest_first(full):
    found = entries(full)
    assert [(entry.name, entry.size) for entry in found] == [
        ("frames/aa11", 3029), ("frames/ab22", 500), ("features/cc", 200), ("digests/ee", 7), ("exports/dd", 0),
    ]  # fmt: skip
    assert [entry.about for entry in found[:2]] == [
        "front of a robot",
        "left by a run that was stopped, or being written",
    ]
    assert entries(full / "nothing") == []


@pytest.mark.parametrize(
    "names, left",
    [
        (["frames/aa"], ["frames/ab22", "features/cc", "digests/ee", "exports/dd"]),
        (["frames"], ["features/cc", "digests/ee", "exports/dd"]),
        (["features/cc", "exports"], ["frames/aa11", "frames/ab22", "digests/ee"]),
        (["all"], []),
    ],
)
def test_entries_are_deleted_by_name(full, names, left):
    before = {entry.name for entry in entries(full)}
    gone = {entry.name for entry in clear(names, full)}
    assert [entry.name for entry in entries(full)] == left and gone == before - set(left)


def test_a_name_that_fits_nothing_deletes_nothing(full):
    with pytest.raises(UserError, match="nothing in the cache is called frames/zz: nanochat cache lists the names"):
        clear(["features", "frames/zz"], full)
    assert len(entries(full)) == 5
    assert clear(["features"], full) and clear(["features", "all"], full) and clear(["frames"], full) == []


def test_only_what_the_cache_knows_is_deleted(full):
    (full / "thesis").mkdir()
    (full / "thesis/final.tex").write_text("x")
    clear(["all"], full)
    assert (full / "thesis/final.tex").is_file()


def test_the_command(full, nanochat):
    old = time.mktime((2020, 1, 2, 3, 4, 5, 0, 0, -1))
    for path in (full / "frames").iterdir():
        os.utime(path, (old, old))
    out, _ = nanochat("cache", "--cache", full)
    assert out.splitlines()[0] == "    0.000 GB  2020-01-02  frames/aa11  front of a robot"
    assert out.splitlines()[-1] == f"5 entries, 0.000 GB in {full}"
    out, _ = nanochat("cache", "--clear", "frames", "--cache", full)
    assert out.splitlines()[-1] == f"2 entries, 0.000 GB deleted from {full}"
    assert "error: nothing in the cache is called x" in nanochat("cache", "--clear", "x", "--cache", full, code=2)[1]
    assert "error: --clear needs the names of entries" in nanochat("cache", "--cache", full, "--clear", code=2)[1]
    assert len(entries(full)) == 3
