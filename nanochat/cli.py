"""The command line: a function a command, its arguments are the flags, its docstring the help. The work is done elsewhere.

Heavy imports wait until a command runs, so that --help answers at once.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import OmitArgPrefixes, Positional, arg

from nanochat.flags import DEVICE, Checkpoint, Eyes, Out, Pictures, Speech, check_out
from nanochat.training.recipes import RECIPES, Recipe, Robot

PICTURES_AT_ONCE = 16  # of embed: bounds the memory


def demo(out: Out = Path("out/demo.png"), task: str = "door-open", seed: int = 0) -> None:
    """The shipped robot model describes a picture, answers questions, and drives a simulated arm: a film and a contact sheet.

    Args:
        task: One of Meta-World's, such as door-open: see nanochat demos --help.
        seed: Of the layout; small ones were never trained on.
    """
    from nanochat.demo import run
    from nanochat.metaworld.instructions import task_list

    out.parent.mkdir(parents=True, exist_ok=True)
    check_out(out, ".png")
    if len(names := task_list([task])) != 1:
        raise ValueError(f"demo drives one task, {task} are {len(names)}: nanochat rollout takes several")
    run(out, names[0], seed)


def ask(
    args: Annotated[
        Positional[tuple[str, ...]],
        arg(metavar='IMAGE... "QUESTION"', help="Picture files and, last, the question.", help_behavior_hint=""),
    ],
    speech: OmitArgPrefixes[Speech] = Speech(),
) -> None:
    """Ask one question about one or more pictures: nanochat ask IMAGE... "QUESTION"."""
    if len(args) < 2:
        raise ValueError(
            f'ask takes pictures and, last, a question: nanochat ask IMAGE... "QUESTION"; got {len(args)} words'
        )
    *images, question = args
    if not question.strip():
        raise ValueError('the question is empty: nanochat ask IMAGE... "QUESTION"')
    answer_each(images, question, speech)


def caption(images: Pictures, speech: OmitArgPrefixes[Speech] = Speech()) -> None:
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
    """Talk about a picture, turn by turn; the cache is kept between turns. An empty line or Ctrl-D ends it.

    Args:
        image: The picture; without one, the model speaks blind.
    """
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
        try:
            show(conversation.say(question, speech.max_new_tokens, sampling))
        except ValueError as error:
            if not interactive:
                raise
            print(f"error: {error}", file=sys.stderr)  # a question that does not fit is no reason to lose the talk


def embed(
    images: Pictures,
    out: Out,
    layer: str = "head",
    pool: Literal["avg", "max", "flatten"] = "avg",
    eyes: OmitArgPrefixes[Eyes] = Eyes(),
) -> None:
    """Write the pictures' vision embeddings to a .npz file: `embeddings` (n, C) float32 and `files` (n,).

    Args:
        layer: Map of the encoder: head (the predictions), p3, p4, p5, the number of a module, or several joined by +.
        pool: How the map becomes a vector: its mean, its maximum, or all of it.
    """
    import numpy as np
    from rich.progress import Progress

    from nanochat.data.sample import written_whole

    if not images:
        raise ValueError("embed takes at least one picture: nanochat embed IMAGE... -o FILE.npz")
    check_out(out, ".npz")
    encoder, n = eyes.encoder(), PICTURES_AT_ONCE
    with Progress(disable=len(images) <= n) as progress:
        starts = progress.track(range(0, len(images), n), description="looking")
        parts = [encoder.get_image_embeddings(images[i : i + n], pool, layer).cpu().numpy() for i in starts]
    vectors = np.concatenate(parts)
    with written_whole(out) as new, open(new, "wb") as file:
        np.savez(file, embeddings=vectors, files=np.array(images))
    print(f"{vectors.shape[0]} x {vectors.shape[1]} embeddings in {out}")


def detect(
    image: Annotated[Positional[str], arg(metavar="IMAGE")],
    out: Out,
    conf: float = 0.25,
    iou: float = 0.7,
    eyes: OmitArgPrefixes[Eyes] = Eyes(),
) -> None:
    """Find objects: boxes drawn into a picture (.png, .jpg), or written as .json.

    Args:
        image: A picture file.
        conf: Least score of what counts, 0..1.
        iou: Boxes of a class that overlap more than this share are taken for one object.
    """
    from dataclasses import asdict

    from nanochat.data.sample import written_whole
    from nanochat.vision.images import open_image

    check_out(out, ".png", ".jpg", ".jpeg", ".json")
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
    checkpoint: Checkpoint,
    dataset: Annotated[Positional[str], arg(metavar="DATASET")],
    split: str = "test",
    limit: int | None = None,
    json_out: Annotated[Path | None, arg(name="json")] = None,
    batch_size: int = 64,
    strict: bool = False,
    device: Annotated[str, arg(help=DEVICE)] = "auto",
) -> None:
    """Score a checkpoint on a dataset, beside the same questions with another picture, with none, and the commonest answer.

    Args:
        checkpoint: A checkpoint folder, a hub name, or `default`.
        dataset: easy_vqa, or a file or folder: .jsonl, captions.csv, LLaVA .json, .parquet, hf:owner/name. Of demonstrations
            (`nanochat demos`), questions about 1,000 frames, or --limit of them.
        split: Part of the dataset; of a single file, or of demonstrations, fit, val, or any other name for all of it.
        limit: Score a random subset of that many samples.
        json_out: Write the figures to this file.
        batch_size: Samples that are answered together.
        strict: Refuse data with missing pictures instead of leaving their rows out.
    """
    from nanochat.training.run import pick_device

    if json_out is not None:
        check_out(json_out)
    if (Path(dataset).expanduser() / "meta" / "info.json").is_file():
        from nanochat.evaluation.questions import run as examine

        examine(checkpoint, dataset, split, limit or 1000, batch_size, json_out, pick_device(device))
    else:
        from nanochat.evaluation.pictures import run

        run(checkpoint, dataset, split, limit, json_out, batch_size, strict, pick_device(device))


def export(checkpoint: Checkpoint, out: Out, half: bool = True) -> None:
    """Copy a checkpoint without its optimiser state and the folders of this machine, in half precision: what to ship.

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
    for said in (training.get("recipe", {}), *training.get("earlier", [])):
        said |= {
            name: Path(said[name]).name for name in ("data", "encoder", "start_from", "tokenizer") if said.get(name)
        }
    save_checkpoint(out, model, vocabulary, training, dtype=torch.float16 if half else None)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(f"{model.num_parameters():,} parameters, {size / 1e6:.1f} MB in {out}")


def push(
    checkpoint: Checkpoint, repo: Annotated[Positional[str], arg(metavar="OWNER/NAME")], public: bool = False
) -> None:
    """Upload a checkpoint, without its optimiser state, to the Hugging Face hub.

    Args:
        checkpoint: A checkpoint folder, or `default`.
        repo: Where to; it is made if it is not there.
        public: A new one can be seen by everybody; else by you alone.
    """
    from nanochat.assistant import resolve_checkpoint
    from nanochat.checkpoint import push_to_hub

    print(push_to_hub(resolve_checkpoint(checkpoint), repo, private=not public))


def tokenizer(
    texts: Annotated[Positional[tuple[Path, ...]], arg(metavar="FILE...", help="UTF-8 text.", help_behavior_hint="")],
    out: Out,
    vocab_size: int = 4096,
) -> None:
    """Train a byte-level BPE tokenizer on text files and write it as JSON.

    Args:
        vocab_size: Bytes, merges and special tokens together, at most.
    """
    from nanochat.tokenizer import Tokenizer

    if not texts:
        raise ValueError("tokenizer takes at least one text file: nanochat tokenizer FILE... -o tokenizer.json")
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
    """Read a karpathy/nanochat checkpoint of October 2025 into a checkpoint folder of this project.

    Args:
        source: Folder with model_NNNNNN.pt and meta_NNNNNN.json.
        step: Which NNNNNN; default the last.
        tokenizer_path: tokenizer.pkl, where it does not lie in the source folder.
        trust_pickle: Read tokenizer.pkl. A pickle can run any code: only for files you trust.
    """
    from nanochat.upstream import import_upstream as read

    print(read(source, out, step=step, tokenizer_path=tokenizer_path, trust_pickle=trust_pickle))


def demos(
    out: Out,
    tasks: tuple[str, ...] = ("mt10",),
    episodes: int = 50,
    seed: int = 1_000_000,
    noise: float = 0.25,
    image_size: int = 128,
    processes: int | None = None,
) -> None:
    """Record demonstrations of Meta-World's scripted experts, as a LeRobot v3.0 dataset. Said again, it goes on where it stopped.

    Args:
        tasks: mt10, mt50, or names such as door-open.
        episodes: Of each task; only those that succeed are kept.
        seed: Of the first episode; rollouts use small ones, so that they test on layouts that were not seen.
        noise: Standard deviation of the pushes that the expert has to answer, actions being within -1..1.
        image_size: Side of the pictures in pixels.
        processes: At work side by side; default as many as there are cores.
    """
    from nanochat.metaworld.instructions import task_list
    from nanochat.metaworld.record import default_processes, record

    record(task_list(tasks), episodes, out, seed, noise, image_size, processes or default_processes())


def rollout(
    checkpoint: Checkpoint,
    tasks: tuple[str, ...] = ("mt10",),
    episodes: int = 10,
    seed: int = 0,
    drivers: tuple[Literal["policy", "shuffled", "blind", "random", "expert"], ...] = ("policy",),
    execute: int = 5,
    max_steps: int = 500,
    processes: int | None = None,
    record: Path | None = None,
    json_out: Annotated[Path | None, arg(name="json")] = None,
    device: Annotated[str, arg(help=DEVICE)] = "cpu",
) -> None:
    """Let a checkpoint drive the simulated arm, and count the episodes in which the task gets done.

    Args:
        checkpoint: A checkpoint folder, a hub name, or `robot`: the policy that ships.
        tasks: mt10, mt50, or names such as door-open.
        episodes: Of each task.
        seed: Of the first episode.
        drivers: Who drives: the policy; the policy told another task (shuffled); the policy without a picture (blind); chance
            (random); Meta-World's script, which sees everything (expert).
        execute: Steps of a chunk that are carried out before the policy looks again.
        max_steps: An episode is lost after so many.
        processes: At work side by side; default as many as there are cores.
        record: Folder for a GIF of every episode.
        json_out: Write the figures to this file.
    """
    from nanochat.evaluation.rollout import run
    from nanochat.metaworld.instructions import task_list
    from nanochat.metaworld.record import default_processes
    from nanochat.training.run import pick_device

    if json_out is not None:
        check_out(json_out)
    names, workers = task_list(tasks), processes or default_processes()
    run(
        checkpoint,
        names,
        episodes,
        seed,
        list(drivers),
        execute,
        max_steps,
        workers,
        record,
        json_out,
        pick_device(device),
    )


def policy_server(
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT")] = "robot",
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    execute: int | None = None,
    max_change: float | None = None,
    hold: Literal["still", "last"] = "still",
    device: Annotated[str, arg(help=DEVICE)] = "cpu",
) -> None:
    """Serve a policy by openpi's websocket protocol, so that `openpi-client` drives a robot with it.

    Args:
        checkpoint: A checkpoint folder, a hub name, or `robot`: the policy that ships.
        host: Who may connect: 127.0.0.1 is this machine alone, 0.0.0.0 is everybody.
        port: Where to listen.
        token: What clients must know (their api_key); default $NANOCHAT_TOKEN, else none.
        execute: Actions of a chunk that are sent; default all. The robot should carry out all of them before it asks again.
        max_change: The most that a number of an action may change from one to the next.
        hold: What is sent where the network gives no numbers: still is no motion, for actions that say how far to move; last is
            the action before, for actions that say where to be.
    """
    import asyncio

    from nanochat.policy import Policy, Served
    from nanochat.serving.openpi import serve_policy
    from nanochat.training.run import pick_device

    policy = Policy.load(checkpoint, pick_device(device))
    served = Served(policy, execute, max_change, hold)
    asyncio.run(serve_policy(served, host, port, token or os.environ.get("NANOCHAT_TOKEN")))


def train(words: list[str]) -> None:
    """Run a recipe, every field of which is a flag. With --resume, what is not said anew is as the run was started with."""
    recipe = parse_recipe(words, {name: kind() for name, kind in RECIPES.items()})
    from nanochat.training.run import recipe_name, started_recipe

    if recipe.resume:
        recipe = parse_recipe(words, {recipe_name(recipe): started_recipe(recipe)})
    if isinstance(recipe, Robot):
        from nanochat.training.robots import train_robot as run
    else:
        from nanochat.training.pictures import train as run
    run(recipe)


def parse_recipe(words: list[str], defaults: dict[str, Recipe]) -> Recipe:
    described = {name: (type(recipe).__doc__, recipe) for name, recipe in defaults.items()}
    return tyro.extras.overridable_config_cli(described, prog="nanochat train", args=words)


COMMANDS = {
    "train": train,  # listed here for --help; `main` runs it, since its flags depend on the recipe
    "demo": demo,
    "ask": ask,
    "caption": caption,
    "chat": chat,
    "embed": embed,
    "detect": detect,
    "eval": evaluate,
    "export": export,
    "push": push,
    "demos": demos,
    "rollout": rollout,
    "policy-server": policy_server,
    "tokenizer": tokenizer,
    "import-upstream": import_upstream,
}


def main() -> None:
    description = (
        "A small vision-language model: ask pictures, train on your own.\n\n"
        f"nanochat train {{{','.join(RECIPES)}}} trains a model; nanochat train RECIPE --help shows what it takes."
    )
    try:
        if sys.argv[1:2] == ["train"]:
            train(sys.argv[2:])
        else:
            tyro.extras.subcommand_cli_from_dict(COMMANDS, prog="nanochat", description=description)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has gone, as in `| head`: nobody is left to be told, now or at Python's exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt as stop:
        fail(str(stop) or "stopped", 130)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, by name: importing torch here would slow --help down
            raise
        fail("error: the GPU is full: look at fewer pictures at once, lower --batch-size, or use --device cpu", 2)
    except (ValueError, OSError, ImportError, MemoryError) as error:  # SimulatorError is an ImportError
        if os.environ.get("NANOCHAT_DEBUG"):
            raise
        fail(f"error: {error}", 2)


def fail(message: str, code: int) -> None:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
