"""The command line: every function is a command, its arguments are the flags, its docstring the help. No logic lives here.

Heavy imports wait until a command runs, so that --help answers at once.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from nanochat.recipes import RECIPES, Recipe

Out = Annotated[Path, arg(aliases=["-o"])]


@dataclass(frozen=True)
class Speech:
    """How the model is asked to speak."""

    checkpoint: str = "default"
    "A checkpoint folder, a hub name, or `default`: the model that ships."
    device: str = "auto"
    max_new_tokens: int | None = None
    temperature: float = 0.0
    "0 is greedy: always the likeliest token."
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int = 0

    def sampling(self):
        from nanochat.sampling import Sampling

        return Sampling(
            temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p,
            repetition_penalty=self.repetition_penalty, seed=self.seed,
        )  # fmt: skip

    def assistant(self):
        from nanochat.assistant import Assistant
        from nanochat.train import pick_device

        return Assistant.load(self.checkpoint, pick_device(self.device))


def demo(out: Out = Path("out/demo.png")) -> None:
    """Answer questions about pictures that the shipped model never trained on, and draw a contact sheet."""
    from nanochat.demo import run

    run(out)


def ask(args: Positional[tuple[str, ...]], speech: OmitArgPrefixes[Speech] = Speech()) -> None:
    """Ask one question about one or more pictures: nanochat ask IMAGE... "QUESTION"."""
    if len(args) < 2:
        raise ValueError(
            f'ask takes pictures and, last, a question: nanochat ask IMAGE... "QUESTION"; got {len(args)} words'
        )
    *images, question = args
    answer_each(images, question, speech)


def caption(images: Positional[tuple[str, ...]], speech: OmitArgPrefixes[Speech] = Speech()) -> None:
    """Describe each picture in a line (with a checkpoint that was trained on captions)."""
    from nanochat.data import CAPTION_PROMPT

    if not images:
        raise ValueError("caption takes at least one picture: nanochat caption IMAGE...")
    answer_each(images, CAPTION_PROMPT, speech)


def answer_each(images, question: str, speech: Speech) -> None:
    sampling, assistant = speech.sampling(), speech.assistant()
    from nanochat.vision.images import open_image

    opened = [open_image(image) for image in images]  # all are checked before the first answer
    for name, image in zip(images, opened, strict=True):
        if len(images) > 1:
            print(f"{name}: ", end="")
        show(assistant.ask(question, assistant.look(image), speech.max_new_tokens, sampling))


def show(pieces) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()


def chat(image: str | None = None, speech: OmitArgPrefixes[Speech] = Speech()) -> None:
    """Talk about a picture, turn by turn; the cache is kept between turns. An empty line or Ctrl-D ends it."""
    from nanochat.assistant import Chat

    sampling, assistant = speech.sampling(), speech.assistant()
    conversation = Chat(assistant, assistant.look(image) if image else None)
    interactive = sys.stdin.isatty()
    while True:
        try:
            question = input("> " if interactive else "").strip()
        except EOFError:
            return
        if not question:
            return
        show(conversation.say(question, speech.max_new_tokens, sampling))


@dataclass(frozen=True)
class Eyes:
    """Which encoder, and how it looks."""

    weights: str | None = None
    "Official name (yolov9t.pt ... yolov9e.pt), .pt path, or .yaml for random weights; default $NANOCHAT_YOLO_WEIGHTS."
    image_size: int = 640
    device: str = "auto"
    trust_pickle: bool = False
    "Load a .pt file that holds more than a plain detector. It can run any code: only for files you made."

    def encoder(self):
        from nanochat.train import pick_device
        from nanochat.vision import YOLOv9Plus

        return YOLOv9Plus(
            self.weights, device=pick_device(self.device), image_size=self.image_size, trust_pickle=self.trust_pickle
        )


def embed(
    images: Positional[tuple[str, ...]],
    out: Out,
    layer: str = "head",
    pool: str = "avg",
    eyes: OmitArgPrefixes[Eyes] = Eyes(),
) -> None:
    """Write the pictures' vision embeddings to a .npz file: `embeddings` (n, C) float32 and `files` (n,)."""
    import numpy as np

    from nanochat.data.sample import written_whole
    from nanochat.vision.images import open_image

    if not images:
        raise ValueError("embed takes at least one picture: nanochat embed IMAGE... -o FILE.npz")
    if out.suffix != ".npz":
        raise ValueError(f"embeddings are written as .npz, got {out}")
    opened = [open_image(image) for image in images]
    vectors = eyes.encoder().get_image_embeddings(opened, pool=pool, layer=layer).cpu().numpy()
    with written_whole(out) as new, open(new, "wb") as file:
        np.savez(file, embeddings=vectors, files=np.array(images))
    print(f"{vectors.shape[0]} x {vectors.shape[1]} embeddings in {out}")


def detect(
    image: Positional[str],
    out: Out,
    conf: float = 0.25,
    iou: float = 0.7,
    eyes: OmitArgPrefixes[Eyes] = Eyes(),
) -> None:
    """Find objects: boxes drawn into a picture (.png, .jpg), or written as .json."""
    from dataclasses import asdict

    from nanochat.data.sample import written_whole
    from nanochat.vision.images import open_image

    if out.suffix not in (".json", ".png", ".jpg", ".jpeg"):
        raise ValueError(f"detections are written as .png, .jpg or .json, got {out}")
    picture, encoder = open_image(image), eyes.encoder()
    found = encoder.detect(picture, conf=conf, iou=iou)
    with written_whole(out) as new:
        if out.suffix == ".json":
            new.write_text(json.dumps([asdict(detection) for detection in found], indent=1))
        else:
            encoder.draw(picture, found).save(new, format="PNG" if out.suffix == ".png" else "JPEG")
    for detection in found:
        box = " ".join(f"{value:7.1f}" for value in detection.box)
        print(f"{detection.class_name:20s} {detection.score:5.1%}  {box}")
    print(f"{len(found)} objects; see {out}")


def evaluate(
    checkpoint: Positional[str],
    dataset: Positional[str],
    split: str = "test",
    limit: int | None = None,
    json_out: Annotated[Path | None, arg(name="json")] = None,
    batch_size: int = 64,
    strict: bool = False,
    device: str = "auto",
) -> None:
    """Score a checkpoint on a dataset, beside the same questions with another picture, with none, and the commonest answer.

    Args:
        checkpoint: A checkpoint folder, a hub name, or `default`.
        dataset: easy_vqa, or a file or folder: .jsonl, captions.csv, LLaVA .json, .parquet, hf:owner/name.
        limit: Score a random subset of that many samples.
        json_out: Write the figures to this file.
        strict: Refuse data with missing pictures instead of leaving their rows out.
    """
    from rich.console import Console
    from rich.progress import Progress

    from nanochat import data
    from nanochat.assistant import Assistant
    from nanochat.data.sample import written_whole
    from nanochat.evaluate import answer_dataset, score, table
    from nanochat.train import pick_device

    found = data.load_dataset(dataset, split, strict)
    if limit is not None:
        found.samples = data.limit(found.samples, limit)
    assistant = Assistant.load(checkpoint, pick_device(device))
    console = Console()
    with Progress(console=console) as progress:
        bar = progress.add_task("answering", total=None)
        answers = answer_dataset(
            assistant, found, batch_size, lambda done, total: progress.update(bar, completed=done, total=total)
        )
    result = score(answers)
    console.print(table(result))
    if found.skipped:
        console.print(f"{found.skipped} rows left out: their picture is missing")
    if json_out is not None:
        with written_whole(json_out) as new:
            new.write_text(json.dumps(result, indent=1))


def export(checkpoint: Positional[str], out: Out, half: bool = True) -> None:
    """Copy a checkpoint without its optimiser state, in half precision: what to ship to a robot.

    Args:
        checkpoint: A checkpoint folder, a hub name, or `default`.
        half: Store weights as float16; they are loaded as float32.
    """
    import torch

    from nanochat.assistant import resolve_checkpoint
    from nanochat.checkpoint import load_checkpoint, save_checkpoint

    if out.exists():
        raise FileExistsError(f"{out} exists: choose another name")
    model, vocabulary, training = load_checkpoint(resolve_checkpoint(checkpoint))
    save_checkpoint(out, model, vocabulary, training, dtype=torch.float16 if half else None)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{model.num_parameters():,} parameters, {size / 1e6:.1f} MB in {out}")


def tokenizer(texts: Positional[tuple[Path, ...]], out: Out, vocab_size: int = 4096) -> None:
    """Train a byte-level BPE tokenizer on text files and write it as JSON."""
    from nanochat.tokenizer import Tokenizer

    if not texts:
        raise ValueError("tokenizer takes at least one text file: nanochat tokenizer FILE... -o tokenizer.json")
    trained = Tokenizer.train(
        (line for path in texts for line in path.read_text(encoding="utf-8").splitlines()), vocab_size
    )
    trained.save(out)
    print(f"{trained.vocab_size} tokens in {out}")


def import_upstream(
    source: Positional[Path],
    out: Out,
    step: int | None = None,
    tokenizer_path: Path | None = None,
    trust_pickle: bool = False,
) -> None:
    """Read a karpathy/nanochat checkpoint of October 2025 into a checkpoint folder of this project.

    Args:
        source: Folder with model_NNNNNN.pt and meta_NNNNNN.json.
        step: Which NNNNNN; default the last.
        tokenizer_path: tokenizer.pkl, where it does not lie in the source folder.
        trust_pickle: Read tokenizer.pkl. A pickle can run any code: only for files you trust.
    """
    from nanochat.upstream import import_upstream as read

    print(read(source, out, step=step, tokenizer_path=tokenizer_path, trust_pickle=trust_pickle))


def train(words: list[str]) -> None:
    """Run a recipe, every field of which is a flag. With --resume, what is not said anew is as the run was started with."""
    recipe = parse_recipe(words, {name: kind() for name, kind in RECIPES.items()})
    from nanochat.train import recipe_name, started_recipe
    from nanochat.train import train as run

    if recipe.resume:
        recipe = parse_recipe(words, {recipe_name(recipe): started_recipe(recipe)})
    run(recipe)


def parse_recipe(words: list[str], defaults: dict[str, Recipe]) -> Recipe:
    described = {name: (type(recipe).__doc__, recipe) for name, recipe in defaults.items()}
    return tyro.extras.overridable_config_cli(described, prog="nanochat train", args=words)


COMMANDS = {
    "demo": demo,
    "ask": ask,
    "caption": caption,
    "chat": chat,
    "embed": embed,
    "detect": detect,
    "eval": evaluate,
    "export": export,
    "tokenizer": tokenizer,
    "import-upstream": import_upstream,
}


def main() -> None:
    description = "A small vision-language model: ask pictures, train on your own."
    try:
        if sys.argv[1:2] == ["train"]:
            train(sys.argv[2:])
        else:
            tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="nanochat", description=description)
    except KeyboardInterrupt as stop:
        fail(str(stop) or "stopped", 130)
    except (ValueError, OSError, ImportError, MemoryError) as error:
        if os.environ.get("NANOCHAT_DEBUG"):
            raise
        fail(f"error: {error}", 2)


def fail(message: str, code: int) -> None:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
