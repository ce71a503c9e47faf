"""What the command line says of an error: one line, and the exit code. 2: the user can mend it; 1: a bug of this project."""

import sys
from typing import NoReturn

from nanochat.errors import NotTrained, TooManyPictures, UserError, install

OF_TORCH = ("torch", "torchvision", "ultralytics", "timm", "safetensors", "huggingface_hub", "matplotlib")  # the extra
REMEDIES = {
    TooManyPictures: " (nanochat ask --each)",
    NotTrained: " with --checkpoint, such as photos, or train one with nanochat train folder",
}


def explain(error: Exception, words: list[str]) -> NoReturn:
    """End the program that `words`, its arguments, have led to this error."""
    if type(error).__name__ == "OutOfMemoryError":  # torch's, by name: importing torch here would slow --help down
        fail("error: the GPU is out of memory: use fewer pictures, a lower --batch-size, or --device cpu", 2)
    if "allocate memory" in str(error):  # a RuntimeError of torch's
        fail("error: there is not enough memory: use a smaller model, smaller pictures or fewer at once", 2)
    if isinstance(error, (UserError, OSError, ImportError, MemoryError)):  # SimulatorError is an ImportError
        fail(f"error: {as_typed(reason(error), words)}{REMEDIES.get(type(error), '')}{how_to_install(error, words)}", 2)
    fail(f"bug in nanochat: {type(error).__name__}: {reason(error)}; NANOCHAT_DEBUG=1 shows where, please report it", 1)


def reason(error: BaseException) -> str:
    """The message of an error on one line; its type if there is no message."""
    return " ".join(str(error).split()) or type(error).__name__


def as_typed(message: str, words: list[str]) -> str:
    """The message of a check, with the flag that was typed in place of the field it sets: top_k must be -> --top-k must be."""
    for word in words:
        flag = word.partition("=")[0]
        field = flag.removeprefix("--").replace("-", "_")
        if flag.startswith("--") and message.startswith(f"{field} must "):
            return flag + message.removeprefix(field)
    return message


def how_to_install(error: Exception, words: list[str]) -> str:
    """What to install where a package of the extra `torch` is missing; nothing for other errors."""
    missing = (getattr(error, "name", None) or "").split(".")[0]
    if not isinstance(error, ModuleNotFoundError) or missing not in OF_TORCH:
        return ""
    if words[:1] == ["train"]:
        return f"; training needs torch: {install('torch,train')}"
    return (
        f"; this command needs torch: {install('torch')}. Without it, ask, caption, embed, chat, serve and policy-server run a "
        "folder of `nanochat export`"
    )


def fail(message: str, code: int) -> NoReturn:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)
