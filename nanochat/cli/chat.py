"""nanochat chat: many questions about one or several pictures, with line editing, history and commands."""

import glob
import os
import shlex
import sys
from collections.abc import Iterable
from contextlib import suppress
from typing import Annotated

from tyro.conf import OmitArgPrefixes, UseAppendAction, arg

from nanochat.cli.errors import reason
from nanochat.errors import UserError
from nanochat.flags import Camera, SamplingFlags

COMMANDS = {
    "/image": "/image FILE  look at another picture, or at several files (/image alone: at none); the conversation starts again",
    "/help": "/help        this list",
    "/quit": "/quit        end the chat; so do Ctrl-D and an empty line. Ctrl-C stops an answer",
}


def chat(
    image: UseAppendAction[
        Annotated[
            tuple[str, ...],
            arg(
                metavar="FILE",
                help="An image file; by default the model answers without one. Repeat the flag to show several together, if the "
                "model was trained on several.",
            ),
        ]
    ] = (),
    camera: Camera = None,
    sampling: OmitArgPrefixes[SamplingFlags] = SamplingFlags(),
) -> None:
    """Chat about a picture, or several together. /help lists the commands of the chat, such as /image FILE; Ctrl-C stops an
    answer; /quit, an empty line or Ctrl-D ends the chat."""
    from nanochat.inputs import find_pictures, open_source

    if image and camera is not None:
        raise UserError("give --image or --camera, not both")
    pictures = find_pictures([checked_file(name) for name in image], camera)
    settings, agent = sampling.sampling(), sampling.agent()
    session = Session(agent, sampling.max_new_tokens, settings)
    session.show([open_source(picture) for picture in pictures])
    if not sys.stdin.isatty():
        for line in sys.stdin:
            if not line.strip() or not session.answer(line.strip()):
                return
        return
    edit_lines()
    print("/help lists the commands, /quit ends the chat")
    while converse(session):
        pass


def checked_file(image: str) -> str:
    if not image.strip():
        raise UserError("the name of the picture is empty: --image FILE")
    if os.path.isdir(os.path.expanduser(image)):
        raise UserError(f"{image} is a folder, expected a picture: --image FILE")
    return image


def converse(session: "Session") -> bool:
    """One turn at a terminal. Returns whether the chat goes on: neither an error nor Ctrl-C ends it."""
    try:
        line = input("> ").strip()
    except EOFError:
        print()
        return False
    except KeyboardInterrupt:  # at the prompt it clears the line, as in a shell
        print("\n/quit or Ctrl-D ends the chat", file=sys.stderr)
        return True
    try:
        return bool(line) and session.answer(line)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
    except UserError as error:
        print(f"error: {reason(error)}", file=sys.stderr)
    return True


class Session:
    """A conversation about the same pictures, which `/image` replaces."""

    def __init__(self, agent, max_new_tokens: int | None, settings):
        self.agent, self.max_new_tokens, self.settings = agent, max_new_tokens, settings

    def show(self, images: list) -> None:
        from nanochat.agent import Chat

        self.agent.check_images(len(images))
        self.chat = Chat(self.agent, self.agent.look(images) if images else None)

    def answer(self, line: str) -> bool:
        """Answer a question, or carry out a command. Returns whether the chat goes on. Raises UserError."""
        command, _, rest = line.partition(" ")
        if not line.startswith("/"):
            print_stream(self.chat.say(line, self.max_new_tokens, self.settings))
        elif command == "/quit":
            return False
        elif command == "/image":
            self.change_pictures(rest.strip())
        elif command == "/help":
            print(*COMMANDS.values(), sep="\n")
        else:
            raise UserError(f"there is no command {command}: /help lists them")
        return True

    def change_pictures(self, words: str) -> None:
        from nanochat.vision.images import open_image

        names = [words] if words else []
        if words and not os.path.exists(os.path.expanduser(words)):  # it may be quoted, or several, as in a shell
            with suppress(ValueError):
                split = shlex.split(words)
                several = all(os.path.exists(os.path.expanduser(name)) for name in split)
                names = split if several else [" ".join(split)]
        self.show([open_image(name) for name in names])
        print(f"looking at {', '.join(names)}" if names else "no picture now")


def print_stream(pieces: Iterable[str]) -> str:
    """Print the pieces as they come. Returns the whole text."""
    printed = []
    for piece in pieces:
        print(piece, end="", flush=True)
        printed.append(piece)
    print()
    return "".join(printed)


def edit_lines() -> None:
    """Line editing, the history of this chat, and completion of commands and files, where Python has readline."""
    with suppress(ImportError):  # Windows: its console edits lines itself
        import readline

        readline.set_completer_delims(" ")
        readline.set_completer(lambda text, n: dict(enumerate(completions(text))).get(n))
        libedit = "libedit" in (readline.__doc__ or "")  # of macOS
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")


def completions(text: str) -> list[str]:
    """The commands and the files that begin with `text`."""
    files = glob.glob(glob.escape(os.path.expanduser(text)) + "*")
    return [name for name in COMMANDS if name.startswith(text)] + sorted(
        name + "/" * os.path.isdir(name) for name in files
    )
