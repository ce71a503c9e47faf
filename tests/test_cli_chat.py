"""nanochat chat: at a terminal, from a file, and its commands."""

import io
import os
import pty
import select
import shutil
import subprocess
import sys
import time

import pytest

from nanochat.agent import Chat
from nanochat.cli import chat
from tests.test_cli import PICTURE, QUESTION, ROOT, SHAPES, Terminal, picture


def say(nanochat, monkeypatch, *lines, terminal=True, words=("--image", PICTURE), **options):
    text = "".join(f"{line}\n" for line in lines)
    monkeypatch.setattr(sys, "stdin", Terminal(text) if terminal else io.StringIO(text))
    return nanochat("chat", *SHAPES, *words, **options)


@pytest.mark.parametrize("terminal", [True, False])
def test_image_changes_the_picture(nanochat, monkeypatch, tmp_path, terminal):
    shutil.copy(picture(1), tmp_path / "my photo.png")
    commands = [QUESTION, f"/image {tmp_path}/my photo.png", QUESTION, f"/image '{PICTURE}'", QUESTION]
    printed = say(nanochat, monkeypatch, *commands, "/quit", "never asked", terminal=terminal)
    answers = [line.removeprefix("> ").strip() for line in printed.out.splitlines()]
    answers = [line for line in answers if line in ("red", "black")]
    assert answers == ["red", "black", "red"] and printed.err == ""


def test_help_lists_the_commands(nanochat, monkeypatch):
    out = say(nanochat, monkeypatch, "/help", "/quit").out
    assert all(command in out for command in chat.COMMANDS)


def test_an_error_does_not_end_a_chat_at_a_terminal(nanochat, monkeypatch):
    printed = say(nanochat, monkeypatch, "/image gone.png", "/fly", QUESTION, "/quit")
    assert "there is no file gone.png" in printed.err and "there is no command /fly" in printed.err
    assert "red" in printed.out  # the old picture is still there
    assert "no command /fly" in say(nanochat, monkeypatch, "/fly", terminal=False, code=2).err


def test_ctrl_c_stops_the_answer_and_not_the_chat(nanochat, monkeypatch):
    whole, calls = Chat.say, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 1:
            yield "re"
            raise KeyboardInterrupt
        yield from whole(self, *args)

    monkeypatch.setattr(Chat, "say", interrupted)
    printed = say(nanochat, monkeypatch, QUESTION, QUESTION, "/quit")
    assert "stopped" in printed.err and "> red\n" in printed.out
    calls.clear()
    assert "stopped" in say(nanochat, monkeypatch, QUESTION, terminal=False, code=130).err


def test_ctrl_c_at_the_prompt_clears_the_line(nanochat, monkeypatch):
    lines = iter([KeyboardInterrupt, QUESTION, KeyboardInterrupt, "/quit"])

    def read(prompt: str) -> str:
        line = next(lines)
        if line is KeyboardInterrupt:
            raise line
        return line

    monkeypatch.setattr("builtins.input", read)
    printed = say(nanochat, monkeypatch)
    assert printed.out.count("/quit or Ctrl-D ends the chat") + printed.err.count("/quit or Ctrl-D ends the chat") == 2
    assert "red" in printed.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--image", ""], "the name of the picture is empty"),
        (["--image", str(ROOT / "nanochat/assets")], "is a folder, expected a picture"),
        (["--image", PICTURE, "--camera", "0"], "not both"),
        (["--image", "gone.png"], "there is no file gone.png"),
        (["--checkpoint", " "], "--checkpoint is empty"),
    ],
)
def test_wrong_flags(nanochat, monkeypatch, words, message):
    assert message in say(nanochat, monkeypatch, words=words, code=2).err


class Console:
    """`nanochat chat` at a pseudo-terminal."""

    def __init__(self, *words):
        self.master, slave = pty.openpty()
        self.read = ""  # but not asked for yet
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "TERM": "xterm",
            "OMP_NUM_THREADS": "1",
            "INPUTRC": "/dev/null",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nanochat", "chat", *SHAPES, *words],
            stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
        )  # fmt: skip
        os.close(slave)

    def until(self, text: str, seconds: float = 60) -> str:
        """What is printed until `text` comes."""
        end = time.monotonic() + seconds
        while text not in self.read:
            ready = select.select([self.master], [], [], max(0.0, end - time.monotonic()))[0]
            assert ready, f"no {text!r} in {self.read!r}"
            self.read += os.read(self.master, 4096).decode()
        found, _, self.read = self.read.partition(text)
        return found

    def send(self, keys: str) -> None:
        os.write(self.master, keys.encode())


def test_editing_and_history_at_a_real_terminal():
    pytest.importorskip("readline")
    console = Console("--image", PICTURE, "--device", "cpu")
    try:
        console.until("> ")
        console.send("what color is the shapX\x7fe?\n")  # backspace
        console.until("red\r\n")
        console.until("> ")
        console.send("\x1b[A")  # the line before, from the history
        console.until("what color is the shape?")
        console.send("\n")
        console.until("red\r\n")
        console.until("> ")
        console.send("/he\t")  # completed
        console.until("/help")
        console.send("\n")
        assert "/image FILE" in console.until("Ctrl-C stops an answer")
        console.until("> ")
        console.send("\x04")
        assert console.process.wait(20) == 0
    finally:
        console.process.kill()
        console.process.wait()
        os.close(console.master)


def test_completions(tmp_path, monkeypatch):
    (tmp_path / "photo.png").touch()
    (tmp_path / "photos").mkdir()
    monkeypatch.chdir(tmp_path)
    assert chat.completions("/i") == ["/image"] and chat.completions("pho") == ["photo.png", "photos/"]
