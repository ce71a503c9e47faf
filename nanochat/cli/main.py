"""The command line. Each command is a function: its parameters are the flags, its docstring is the help.

Heavy imports wait until a command runs, so that --help is fast. The commands that are
not here are in the other modules of this folder.
"""

import inspect
import os
import re
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import HelptextFromCommentsOff, Positional, arg

from nanochat import __version__
from nanochat.cli.ask import ask, caption
from nanochat.cli.bench import bench
from nanochat.cli.cache import cache
from nanochat.cli.chat import chat
from nanochat.cli.errors import explain, fail
from nanochat.cli.export import average, export, prune
from nanochat.cli.pictures import detect, embed, written_rows
from nanochat.cli.robot import demo, inspect_data, record, rollout
from nanochat.cli.serve import policy_server, serve
from nanochat.errors import UserError
from nanochat.flags import Beams, Checkpoint, Device, JsonOut, JsonRows, Out, check_out, next_step, say_where
from nanochat.training.folder import folder_from_photos, other_shape
from nanochat.training.recipe import Recipe, flag
from nanochat.training.recipes import RECIPES, Folder, recipe_name

MAX_VOCAB = 2**20  # tokens


# ---- checkpoints ----


def evaluate(
    checkpoint: Checkpoint,
    dataset: Annotated[Positional[str], arg(metavar="DATASET")],
    split: str | None = None,
    limit: int | None = None,
    json_out: JsonOut = None,
    batch_size: int = 64,
    strict: bool = False,
    beams: Beams = 1,
    plot: Annotated[
        Path | None,
        arg(
            help="For a real robot's demonstrations: draw an episode with predicted over recorded actions to this .png file."
        ),
    ] = None,
    device: Device = "auto",
) -> None:
    """Evaluate a checkpoint on a dataset, with controls: another picture, no picture, and the most common answer.

    Args:
        dataset: easy_vqa, or a file or folder: .jsonl, captions.csv, LLaVA .json, .parquet, hf:owner/name; docs/DATA.md lists
            all. For a folder of `nanochat record`: questions about 1,000 random frames, or --limit of them. For a real robot's
            demonstrations: the error of each joint over the chunk, beside four baselines that need no training.
        split: Part of the dataset, such as test; fit, val or all if it has no parts. Default: test if there is one;
            otherwise what training held out if the checkpoint was trained on this data; otherwise val, train or all.
        limit: Evaluate a random subset of this many samples.
        batch_size: Samples per batch.
        strict: Refuse data with missing pictures; by default their rows are left out.
    """
    from nanochat.devices import pick_device

    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, got {limit}")
    if json_out is not None:
        check_out(json_out)
    if plot is not None:
        check_out(plot, ".png")
    options = {"batch_size": batch_size, "json_out": json_out, "device": pick_device(device)}
    if is_recording(dataset):
        from nanochat.evaluation.recordings import FRAMES, evaluate_recording

        if beams != 1:
            raise UserError(f"--beams is for captions and questions about pictures, got {beams} for a robot's episodes")
        evaluate_recording(checkpoint, dataset, split, n_frames=limit or FRAMES, plot=plot, **options)
    elif plot is not None:
        raise UserError("--plot draws a robot's actions: leave it out for a dataset of pictures")
    else:
        from nanochat.evaluation.pictures import evaluate_dataset

        evaluate_dataset(checkpoint, dataset, split, n_samples=limit, strict=strict, beams=beams, **options)
    say_where(json_out)
    say_where(plot)


def is_recording(dataset: str) -> bool:
    """Whether these are episodes of a robot: a LeRobot dataset, or a folder of BridgeData frames."""
    from nanochat.files import DataError, json_lines

    folder = Path(dataset)
    if (folder / "meta/info.json").is_file():
        return True
    if not (folder / "frames.jsonl").is_file():
        return False
    try:
        return "action" in next(json_lines(folder / "frames.jsonl"), ("", {}))[1]
    except DataError:
        return False  # the reader of pictures says what is wrong


def models(json_rows: JsonRows = None) -> None:
    """List the models that ship with the package: size, what they were trained for, and their measured figures."""
    from nanochat.shipped import shipped_models

    with written_rows(json_rows) as add:
        for model in shipped_models():
            add(model)
            if json_rows is not None:
                continue
            also = "".join(f" (also called {alias})" for alias in model["aliases"])
            print(f"{model['name']}{also}: {model['parameters'] / 1e6:.2f} M parameters, {model['bytes'] / 1e6:.1f} MB")
            print(f"         {model['purpose']}")
            for figure, score, controls in model["figures"]:
                print(f"         {figure}: {score} ({controls})")
            print(f"         example: {model['example']}")
    if json_rows is None:
        print("Other models: a folder that `nanochat train` wrote, or owner/name on the Hugging Face hub.")


def pack(checkpoint: Checkpoint, out: Out, half: bool = True) -> None:
    """Copy a checkpoint for publication: half precision, no optimiser state, no paths of this machine.

    Args:
        half: Store weights as float16; they are loaded as float32.
    """
    from nanochat.packing import pack_checkpoint

    n_parameters, size = pack_checkpoint(checkpoint, out, half)
    print(f"{n_parameters:,} parameters, {size / 1e6:.1f} MB in {out}")
    next_step(f"nanochat push {shlex.quote(str(out))} OWNER/NAME, or --checkpoint {shlex.quote(str(out))} to use it")


def push(
    checkpoint: Checkpoint, repo: Annotated[Positional[str], arg(metavar="OWNER/NAME")], public: bool = False
) -> None:
    """Upload a checkpoint, without its optimiser state, to the Hugging Face hub.

    Args:
        repo: Name of the repository; it is created if it does not exist.
        public: Create a public repository; by default it is private.
    """
    from nanochat.packing import push_checkpoint

    print(push_checkpoint(checkpoint, repo, private=not public))
    next_step(f"--checkpoint {shlex.quote(repo)} uses it on any machine" + (" that is logged in" if not public else ""))


def tokenizer(
    texts: Annotated[
        Positional[tuple[Path, ...]], arg(metavar="FILE...", help="UTF-8 text files.", help_behavior_hint="")
    ],
    out: Out,
    vocab_size: int = 4096,
) -> None:
    """Train a byte-level BPE tokenizer on text files and write it as JSON.

    Args:
        vocab_size: Maximum number of tokens: bytes, merges and special tokens together.
    """
    from rich.console import Console

    from nanochat.tokenizer import Tokenizer

    if not texts:
        raise UserError("tokenizer needs at least one text file: nanochat tokenizer FILE... -o tokenizer.json")
    check_out(out)
    if vocab_size > MAX_VOCAB:
        raise UserError(f"--vocab-size must be at most {MAX_VOCAB:,}, got {vocab_size}")
    with Console(stderr=True).status("training the tokenizer"):
        trained = Tokenizer.train((line for path in texts for line in lines_of(path)), vocab_size)
    trained.save(out)
    print(f"{trained.vocab_size} tokens in {out}")
    next_step(f"nanochat train folder --data DATA --tokenizer {shlex.quote(str(out))}")


def lines_of(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error


def import_upstream(
    source: Annotated[Positional[Path], arg(metavar="FOLDER")],
    out: Out,
    step: int | None = None,
    tokenizer_path: Path | None = None,
    trust_pickle: bool = False,
) -> None:
    """Convert a karpathy/nanochat checkpoint of October 2025 to a checkpoint folder of this project.

    Args:
        source: Folder with model_NNNNNN.pt and meta_NNNNNN.json.
        step: The NNNNNN to convert; default the last.
        tokenizer_path: Path of tokenizer.pkl if it is not in the source folder.
        trust_pickle: Read tokenizer.pkl. A pickle can run any code: only for files you trust.
    """
    from nanochat.upstream import import_upstream as convert

    print(convert(source, out, step=step, tokenizer_path=tokenizer_path, trust_pickle=trust_pickle))
    next_step(f"nanochat chat --checkpoint {shlex.quote(str(out))}")


# ---- training ----


def train(words: list[str]) -> None:
    """Train a model with a recipe; every field of it is a flag. With --resume, flags you omit keep their saved values.

    With several processes: torchrun --standalone --nproc_per_node 2 -m nanochat train RECIPE ..."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return train_alone(words)
    from nanochat.training.distributed import one_voice

    with one_voice():
        train_alone(words)


def train_alone(words: list[str]) -> None:
    words = with_new_flags(words)
    defaults = {name: kind() for name, kind in RECIPES.items()}
    recipe = parse_recipe(words, defaults | {"folder": folder_from_photos()})
    if isinstance(recipe, Folder) and not recipe.resume:
        recipe = folder_recipe(words, recipe)
    from nanochat.training.run import Run, started_recipe

    if recipe.resume:
        recipe = parse_recipe(words, {recipe_name(recipe): started_recipe(recipe)})
    Run(recipe).train()


def folder_recipe(words: list[str], recipe: Folder) -> Folder:
    """The recipe as it was parsed; or, where flags ask for random weights, with the defaults for these."""
    others = other_shape(recipe) if recipe.start_from == "photos" else []
    if recipe.start_from and not others:
        return recipe
    if others:
        named = ", ".join(map(flag, others))
        print(
            f"note: the model starts from random weights, not from photos, whose encoder and shape are fixed: {named} would "
            "change them",
            file=sys.stderr,
        )
    return replace(parse_recipe(words, {"folder": Folder()}), start_from="")


def parse_recipe(words: list[str], defaults: dict[str, Recipe]) -> Recipe:
    described = {name: (inspect.getdoc(recipe), recipe) for name, recipe in defaults.items()}
    config = (HelptextFromCommentsOff,)  # comments in a recipe are headings of its sections
    return tyro.extras.overridable_config_cli(described, prog="nanochat train", args=words, config=config)


# ---- the program ----

COMMANDS = {
    "train": train,  # only for --help: `main` calls it, because its flags depend on the recipe
    "demo": demo,
    "ask": ask,
    "caption": caption,
    "chat": chat,
    "embed": embed,
    "detect": detect,
    "eval": evaluate,
    "models": models,
    "export": export,
    "prune": prune,
    "average": average,
    "pack": pack,
    "push": push,
    "cache": cache,
    "inspect": inspect_data,
    "record": record,
    "rollout": rollout,
    "policy-server": policy_server,
    "serve": serve,
    "tokenizer": tokenizer,
    "bench": bench,
    "import-upstream": import_upstream,
}
DESCRIPTION = (
    "A small vision-language model: ask about pictures, train on your own, control a robot.\n\n"
    f"nanochat train {{{','.join(RECIPES)}}} trains a model; nanochat train RECIPE --help lists its flags. "
    "nanochat COMMAND --help explains a command. nanochat models lists the models that ship. "
    "nanochat --version prints the version. "
    "nanochat --tyro-print-completion {bash,zsh,tcsh} prints a completion script for a shell."
)
WITH_JSON_ROWS = ("ask", "caption", "embed", "detect", "models")
OLD_NAMES = {"demos": "record"}  # work for one more release
OLD_FLAGS = {"--camera": "--cameras"}  # of train, likewise


def main() -> None:
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # text in another encoding is no reason to stop
        with suppress(AttributeError, ValueError, OSError):
            stream.reconfigure(errors="replace" if stream is sys.stdin else "backslashreplace")
    try:
        words = plain_words(with_new_name(sys.argv[1:] or ["--help"]))
        if words == ["--version"]:
            print(f"nanochat-vision {__version__}")
        elif words[0] == "train":
            train(words[1:])
        elif words[0] in COMMANDS:  # not as a subcommand, so that errors name the help of this command
            tyro.cli(COMMANDS[words[0]], prog=f"nanochat {words[0]}", args=words[1:])
        else:
            listed = summaries(COMMANDS) if words[0] in ("-h", "--help") else COMMANDS
            tyro.extras.subcommand_cli_from_dict(listed, prog="nanochat", description=DESCRIPTION, args=words)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, as in `| head`: avoid a second error when Python exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as stop:
        fail(str(stop) or "stopped", 130)
    except Exception as error:
        if os.environ.get("NANOCHAT_DEBUG"):
            raise
        explain(error, sys.argv[1:])


def summaries(commands: dict[str, Callable]) -> dict[str, Callable]:
    """Functions that have only the first paragraph of the commands' help, for the list of all commands."""

    def summary(command: Callable) -> Callable:
        def named() -> None: ...

        named.__doc__ = " ".join(inspect.getdoc(command).split("\n\n")[0].split())
        return named

    return {name: summary(command) for name, command in commands.items()}


def with_new_flags(words: list[str]) -> list[str]:
    """The arguments of train with the current names of flags. Prints a note for an old one."""
    new = []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag in OLD_FLAGS:
            print(f"note: `{flag}` is deprecated, use `{OLD_FLAGS[flag]}`", file=sys.stderr)
        new.append(OLD_FLAGS.get(flag, flag) + equals + value)
    return new


def with_new_name(words: list[str]) -> list[str]:
    """The arguments with the current name of the command. Prints a note for an old one."""
    if not words or words[0] not in OLD_NAMES:
        return words
    new = OLD_NAMES[words[0]]
    print(f"note: `nanochat {words[0]}` is deprecated, use `nanochat {new}`", file=sys.stderr)
    return [new, *words[1:]]


def plain_words(words: list[str]) -> list[str]:
    """The arguments with ~ replaced by the home folder, also in --out=~/runs, where a shell leaves it; and - as the file of a
    --json that names none."""
    expanded = []
    for word in words:
        flag, value = re.fullmatch(r"(--?[\w-]+=)?(.*)", word, re.S).groups("")
        path = os.path.expanduser(value)
        unknown_user = re.fullmatch(r"~[\w.-]*(/\S*)?", path)  # as in a shell, it is a plain name then
        expanded.append(flag + (os.path.abspath(path) if unknown_user else path))
    if words[0] in WITH_JSON_ROWS:
        for i in reversed([i for i, word in enumerate(expanded) if word == "--json"]):
            if not re.fullmatch(r"-|.*\.jsonl?", "".join(expanded[i + 1 : i + 2]), re.S | re.I):
                expanded.insert(i + 1, "-")
    return expanded


if __name__ == "__main__":
    main()
