"""The command line. Each command is a function: its parameters are the flags, its docstring is the help.

Heavy imports wait until a command runs, so that --help is fast. The commands of robots are in cli_robot.py.
"""

import inspect
import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import HelptextFromCommentsOff, OmitArgPrefixes, Positional, arg

from nanochat.cli_robot import demo, policy_server, record, rollout
from nanochat.errors import UserError
from nanochat.flags import Checkpoint, Device, EncoderFlags, JsonOut, Out, Pictures, SamplingFlags, check_out
from nanochat.training.recipes import RECIPES, Recipe, recipe_name

EMBED_BATCH = 16  # images per forward pass of `embed`: limits the memory


# ---- asking ----


def ask(
    args: Annotated[
        Positional[tuple[str, ...]],
        arg(metavar='IMAGE... "QUESTION"', help="Image files, then the question.", help_behavior_hint=""),
    ],
    sampling: OmitArgPrefixes[SamplingFlags] = SamplingFlags(),
) -> None:
    """Ask a question about a picture. With several pictures, the question is asked about each of them separately."""
    if len(args) < 2:
        raise UserError(
            f'ask needs at least one picture, then a question: nanochat ask IMAGE... "QUESTION"; got {len(args)} arguments'
        )
    *images, question = args
    if not question.strip():
        raise UserError('the question is empty: nanochat ask IMAGE... "QUESTION"')
    answer_each(images, question, sampling)


def caption(images: Pictures, sampling: OmitArgPrefixes[SamplingFlags] = SamplingFlags()) -> None:
    """Describe each picture in one line. Needs a checkpoint that was trained on captions."""
    from nanochat.data import CAPTION_PROMPT

    if not images:
        raise UserError("caption needs at least one picture: nanochat caption IMAGE...")
    answer_each(images, CAPTION_PROMPT, sampling)


def answer_each(images: Sequence[str], question: str, flags: SamplingFlags) -> None:
    sampling, agent = flags.sampling(), flags.agent()
    seen = [agent.look(image) for image in images]  # an unreadable file is reported before the first answer
    for name, vectors in zip(images, seen, strict=True):
        if len(images) > 1:
            print(f"{name}: ", end="")
        print_stream(agent.ask(question, vectors, flags.max_new_tokens, sampling))


def print_stream(pieces: Iterable[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def chat(image: str | None = None, sampling: OmitArgPrefixes[SamplingFlags] = SamplingFlags()) -> None:
    """Chat about a picture. An empty line or Ctrl-D ends the chat.

    Args:
        image: An image file; by default the model answers without one.
    """
    from nanochat.agent import Chat

    settings, agent = sampling.sampling(), sampling.agent()
    conversation = Chat(agent, agent.look(image) if image else None)
    interactive = sys.stdin.isatty()
    while True:
        try:
            question = input("> " if interactive else "").strip()
        except EOFError:
            return
        if not question:
            return
        try:
            print_stream(conversation.say(question, sampling.max_new_tokens, settings))
        except UserError as error:
            if not interactive:
                raise
            print(f"error: {reason(error)}", file=sys.stderr)  # a question that is too long does not end the chat


# ---- vision ----


def embed(
    images: Pictures,
    out: Out,
    layer: str = "head",
    pool: Literal["avg", "max", "flatten"] = "avg",
    vision: OmitArgPrefixes[EncoderFlags] = EncoderFlags(),
) -> None:
    """Write the embeddings of pictures to a .npz file with `embeddings` (n, C) float32 and `files` (n,).

    Args:
        layer: Feature map of the encoder: head (the predictions), p3, p4, p5, a module index, or several joined by +.
        pool: How a map becomes one vector: its mean, its maximum, or all values.
    """
    import numpy as np
    from rich.progress import Progress

    from nanochat.files import atomic_path

    if not images:
        raise UserError("embed needs at least one picture: nanochat embed IMAGE... -o FILE.npz")
    check_out(out, ".npz")
    encoder, n = vision.encoder(), EMBED_BATCH
    with Progress(disable=len(images) <= n) as progress:
        starts = progress.track(range(0, len(images), n), description="encoding")
        parts = [encoder.get_image_embeddings(images[i : i + n], pool, layer).cpu().numpy() for i in starts]
    vectors = np.concatenate(parts)
    with atomic_path(out) as new, open(new, "wb") as file:
        np.savez(file, embeddings=vectors, files=np.array(images))
    print(f"{vectors.shape[0]} x {vectors.shape[1]} embeddings in {out}")


def detect(
    image: Annotated[Positional[str], arg(metavar="IMAGE", help="An image file.")],
    out: Out,
    conf: float = 0.25,
    iou: float = 0.7,
    vision: OmitArgPrefixes[EncoderFlags] = EncoderFlags(),
) -> None:
    """Detect objects; write a picture with boxes (.png, .jpg) or a list of boxes (.json).

    Args:
        conf: Minimum score of a detection, 0..1.
        iou: Two boxes of one class that overlap more than this (intersection over union) count as one object.
    """
    from dataclasses import asdict

    from nanochat.files import atomic_path
    from nanochat.vision.detections import draw_detections
    from nanochat.vision.images import open_image

    check_out(out, ".png", ".jpg", ".jpeg", ".json")
    picture, encoder = open_image(image), vision.encoder()
    found = encoder.detect(picture, conf=conf, iou=iou)
    with atomic_path(out) as new:
        if out.suffix == ".json":
            new.write_text(json.dumps([asdict(detection) for detection in found], indent=1))
        else:
            draw_detections(picture, found).save(new, format="PNG" if out.suffix == ".png" else "JPEG")
    for detection in found:
        box = " ".join(f"{value:7.1f}" for value in detection.box)
        print(f"{detection.class_name:20s} {detection.score:5.1%}  {box}")
    print(f"{len(found)} objects, written to {out}")


# ---- checkpoints ----


def evaluate(
    checkpoint: Checkpoint,
    dataset: Annotated[Positional[str], arg(metavar="DATASET")],
    split: str = "test",
    limit: int | None = None,
    json_out: JsonOut = None,
    batch_size: int = 64,
    strict: bool = False,
    device: Device = "auto",
) -> None:
    """Evaluate a checkpoint on a dataset, with controls: another picture, no picture, and the most common answer.

    Args:
        dataset: easy_vqa, or a file or folder: .jsonl, captions.csv, LLaVA .json, .parquet, hf:owner/name. For a folder of
            `nanochat record`: questions about 1,000 random frames, or --limit of them.
        split: Part of the dataset. For a single file or demonstrations: fit, val, or any other name for all of it.
        limit: Evaluate a random subset of this many samples.
        batch_size: Samples per batch.
        strict: Refuse data with missing pictures; by default their rows are left out.
    """
    from nanochat.devices import pick_device

    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, got {limit}")
    if json_out is not None:
        check_out(json_out)
    if (Path(dataset).expanduser() / "meta" / "info.json").is_file():
        from nanochat.evaluation.questions import evaluate_questions

        n_frames = 1000 if limit is None else limit
        evaluate_questions(checkpoint, dataset, split, n_frames, batch_size, json_out, pick_device(device))
    else:
        from nanochat.evaluation.pictures import evaluate_dataset

        evaluate_dataset(checkpoint, dataset, split, limit, json_out, batch_size, strict, pick_device(device))


def pack(checkpoint: Checkpoint, out: Out, half: bool = True) -> None:
    """Copy a checkpoint for publication: half precision, no optimiser state, no paths of this machine.

    Args:
        half: Store weights as float16; they are loaded as float32.
    """
    from nanochat.packing import pack_checkpoint

    n_parameters, size = pack_checkpoint(checkpoint, out, half)
    print(f"{n_parameters:,} parameters, {size / 1e6:.1f} MB in {out}")


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
    from nanochat.tokenizer import Tokenizer

    if not texts:
        raise UserError("tokenizer needs at least one text file: nanochat tokenizer FILE... -o tokenizer.json")
    check_out(out)
    trained = Tokenizer.train(
        (line for path in texts for line in path.read_text(encoding="utf-8").splitlines()), vocab_size
    )
    trained.save(out)
    print(f"{trained.vocab_size} tokens in {out}")


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


# ---- training ----


def train(words: list[str]) -> None:
    """Train a model with a recipe; every field of it is a flag. With --resume, flags you omit keep their saved values."""
    recipe = parse_recipe(words, {name: kind() for name, kind in RECIPES.items()})
    from nanochat.training.run import Run, started_recipe

    if recipe.resume:
        recipe = parse_recipe(words, {recipe_name(recipe): started_recipe(recipe)})
    Run(recipe).train()


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
    "pack": pack,
    "push": push,
    "record": record,
    "rollout": rollout,
    "policy-server": policy_server,
    "tokenizer": tokenizer,
    "import-upstream": import_upstream,
}
DESCRIPTION = (
    "A small vision-language model: ask about pictures, train on your own, control a robot.\n\n"
    f"nanochat train {{{','.join(RECIPES)}}} trains a model; nanochat train RECIPE --help lists its flags."
)
OLD_NAMES = {"demos": "record", "export": "pack"}  # work for one more release


def main() -> None:
    try:
        words = with_new_name(sys.argv[1:])
        if words[:1] == ["train"]:
            train(words[1:])
        else:
            tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="nanochat", description=DESCRIPTION, args=words)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has closed the pipe, as in `| head`: avoid a second error when Python exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as stop:
        fail(str(stop) or "stopped", 130)
    except Exception as error:  # SimulatorError is an ImportError
        if os.environ.get("NANOCHAT_DEBUG"):
            raise
        if type(error).__name__ == "OutOfMemoryError":  # torch's, by name: importing torch here would slow --help down
            fail("error: the GPU is out of memory: use fewer pictures, a lower --batch-size, or --device cpu", 2)
        if isinstance(error, (UserError, OSError, ImportError, MemoryError)):
            fail(f"error: {reason(error)}", 2)
        fail(
            f"bug in nanochat: {type(error).__name__}: {reason(error)}; NANOCHAT_DEBUG=1 shows where, please report it",
            1,
        )


def with_new_name(words: list[str]) -> list[str]:
    """The arguments with the current name of the command. Prints a note for an old one."""
    if not words or words[0] not in OLD_NAMES:
        return words
    new = OLD_NAMES[words[0]]
    print(f"note: `nanochat {words[0]}` is deprecated, use `nanochat {new}`", file=sys.stderr)
    return [new, *words[1:]]


def reason(error: BaseException) -> str:
    """The message of an error on one line; its type if there is no message."""
    return " ".join(str(error).split()) or type(error).__name__


def fail(message: str, code: int) -> None:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
