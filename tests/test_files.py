"""Atomic writes, JSON that names its line, paths that stay in their folder."""

from pathlib import Path

import pytest

from nanochat.files import DataError, atomic_path, existing_file, json_lines, json_object, path_inside, short_repr


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [found.name for found in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error), atomic_path(str(path)) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old" and [found.name for found in tmp_path.iterdir()] == ["a.json"]


def test_json_lines_are_numbered_with_empty_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xc3\xbc"}')
    assert list(json_lines(path)) == [(f"{path}:1", {"a": 1}), (f"{path}:4", {"a": "ü"})]
    with pytest.raises(FileNotFoundError, match="b.jsonl is missing"):
        list(json_lines(tmp_path / "b.jsonl"))


@pytest.mark.parametrize("line", [b"[1]", b"3", b"null", b"{", b"[" * 100_000, b'{"a": "\xff"}'])
def test_what_is_not_a_json_object_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"{}\n" + line)
    with pytest.raises(DataError, match="a.jsonl:2: expected a JSON object"):
        list(json_lines(path))
    with pytest.raises(DataError, match="^here: expected a JSON object"):
        json_object(line, "here")


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/../../b", "..", None, 3, ["a"]])
def test_paths_out_of_the_folder_are_refused(tmp_path, name):
    with pytest.raises(DataError, match="^rows:7: expected the path of a file below"):
        path_inside(tmp_path, name, "rows:7")


def test_paths_in_the_folder_are_made_plain(tmp_path):
    assert path_inside(tmp_path, "./a/../b/c.png", "x") == tmp_path / "b/c.png"


def test_missing_files_are_named(tmp_path):
    for name in ("none", "a" * 5000, "nul\0"):
        with pytest.raises(FileNotFoundError, match="is missing"):
            existing_file(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        existing_file(tmp_path)
    assert existing_file(Path(__file__)) == Path(__file__)


def test_long_values_are_cut():
    assert short_repr("a") == "'a'" and len(short_repr("a" * 100)) == 80
