"""The valid inputs of fuzz.py and how they are damaged. A kind is a class: Kind(folder) makes its valid inputs and checks that
they are accepted; case(rng) returns what is tried, as text, and a function without arguments that tries it."""

import hashlib
import json
import random
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from fuzz_changes import (
    change_bytes,
    change_json,
    change_json_file,
    change_safetensors,
    encoded,
    times,
    to_json,
    to_msgpack,
    with_checksums,
    write_files,
)
from fuzz_data import Data
from PIL import Image

from nanochat.actions import ACT, BINS, STATE, Scale
from nanochat.agent import Agent
from nanochat.checkpoint import RESUME, load_resume, save_checkpoint
from nanochat.conversation import render
from nanochat.errors import UserError
from nanochat.gpt import GPT, GPTConfig
from nanochat.multimodal_gpt import MultimodalGPT, MultimodalGPTConfig
from nanochat.packing import pack_checkpoint
from nanochat.robot_gpt import RobotGPT, RobotGPTConfig
from nanochat.serving.openpi import pack_array, unpack
from nanochat.serving.policy import SafePolicy
from nanochat.tokenizer import Tokenizer
from nanochat.vision.encoder import encoder_from_architecture
from nanochat.vision.images import open_image

Case = tuple[str, Callable[[], object]]

# ---- messages: observations of a robot, and conversations


def tiny_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.train(["is there a red circle in the picture? yes"], 280)
    tokenizer.add_special_tokens([STATE, ACT, *BINS])
    return tokenizer


def tiny_encoder():
    """YOLOv9's smallest possible relative: 4 channels at every level."""
    rows = [[-1, 1, "Conv", [4, 3, 2]] for _ in range(5)]
    description = {"nc": 2, "backbone": rows, "head": [[[2, 3, 4], 1, "Detect", ["nc"]]]}
    return encoder_from_architecture(
        {"kind": "yolov9", "yaml": description, "names": ["a", "b"], "image_size": 64, "n_layers": 3}
    )


def tiny_policy(tokenizer: Tokenizer) -> RobotGPT:
    config = RobotGPTConfig(
        sequence_len=64, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=1, n_embd=16, vision_embedding_dim=8,
        vision_tokens_per_image=2, vision_token_id=tokenizer.special("<|image|>"), vision_layer="2", vision_image_size=64,
        map_channels=8, chunk=3, state_scale=asdict(Scale([0.0] * 4, [1.0] * 4)),
        action_scale=asdict(Scale([-1.0] * 3, [1.0] * 3)), state_token_id=tokenizer.special(STATE),
        act_token_id=tokenizer.special(ACT), bin_token_id=tokenizer.special(BINS[0]),
    )  # fmt: skip
    model = RobotGPT(config)
    model.init_weights()
    model.attach_encoder(tiny_encoder())
    return model.eval()


class Messages:
    def __init__(self, folder: Path):
        self.tokenizer = tiny_tokenizer()
        self.policy = SafePolicy(Agent(tiny_policy(self.tokenizer), self.tokenizer))
        image = np.arange(12 * 9 * 3, dtype=np.uint8).reshape(12, 9, 3)
        arrays = {
            "observation/image": image,
            "observation/state": np.float32([0.1, 0.2, 0.3, 0.4]),
            "time": np.float64(3),
        }
        self.observation = {key: pack_array(value) for key, value in arrays.items()} | {
            "prompt": "open the door",
            "n": 1,
        }
        parts = [{"type": "image"}, {"type": "state"}, {"type": "text", "text": "is it open? <|image|>"}]
        self.conversation = [
            {"role": "system", "content": "You see."}, {"role": "user", "content": parts},
            {"role": "assistant", "content": "yes"}, {"role": "user", "content": "why?"},
            {"role": "assistant", "content": [{"type": "text", "text": "it is"}]},
        ]  # fmt: skip
        self.act(to_msgpack(self.observation))
        self.render(to_json(self.conversation), False)

    def case(self, rng: random.Random) -> Case:
        if rng.random() < 0.4:
            changed, done = self.conversation, []
            for _ in times(rng):
                changed, what = change_json(changed, rng)
                done.append(what)
            answered = rng.random() < 0.5
            return f"conversation: {'; '.join(done)}", lambda: self.render(to_json(changed), not answered)
        changed, done = self.observation, []
        for _ in times(rng):
            changed, what = self.change(changed, rng)
            done.append(what)
        message = to_msgpack(changed)
        if rng.random() < 0.3:
            message, what = change_bytes(message, rng, to_msgpack(self.observation))
            done.append(what)
        return f"observation: {'; '.join(done)}", lambda: self.act(message)

    def change(self, observation: dict, rng: random.Random) -> tuple[dict, str]:
        """Another array, or a change anywhere in the map."""
        if rng.random() < 0.6:
            return change_json(observation, rng)
        shape = rng.choice(
            [(), (0,), (4,), (3,), (1, 4), (0, 5, 3), (1, 1, 3), (2, 900, 3), (4, 4, 4), (1, 8, 8, 3), (300, 1, 3)]
        )
        kind, value = (
            rng.choice(["u1", "f4", "f8", "i8", "b1", "f2", ">f4", "u4"]),
            rng.choice([0, 1, 9, 255, np.nan, 1e38]),
        )
        with np.errstate(all="ignore"):
            array = np.full(shape, value, np.float64).astype(kind)
        key = rng.choice(["observation/image", "observation/state", "observation.state", "prompt"])
        return observation | {key: pack_array(array)}, f"{key} = {shape} {kind} of {value}"

    def act(self, message: bytes) -> None:
        actions = self.policy.session()(unpack(message))["actions"]
        assert actions.shape == (3, 3) and np.isfinite(actions).all()

    def render(self, text: str, for_completion: bool) -> None:
        try:
            messages = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"not JSON: {str(error)[:200]}") from error
        render(self.tokenizer, messages, 2, for_completion)


# ---- pictures


class Pictures:
    def __init__(self, folder: Path):
        pixels = np.random.default_rng(0).integers(0, 256, (13, 17, 3), np.uint8)
        rgb = Image.fromarray(pixels)
        rgba, grey, wide = (
            rgb.convert("RGBA"),
            rgb.convert("L"),
            Image.fromarray(pixels[..., 0].astype(np.uint16) * 200),
        )
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = 6, "maker"
        self.files = {
            "png": encoded(rgb, "PNG"), "png rgba": encoded(rgba, "PNG"), "png 16": encoded(wide, "PNG"),
            "png palette": encoded(rgb.convert("P"), "PNG", transparency=3), "png exif": encoded(grey, "PNG", exif=exif),
            "jpeg": encoded(rgb, "JPEG", exif=exif), "jpeg cmyk": encoded(rgb.convert("CMYK"), "JPEG", icc_profile=b"p" * 500),
            "jpeg progressive": encoded(rgb, "JPEG", progressive=True), "webp": encoded(rgba, "WEBP", exif=exif.tobytes()),
            "webp lossless": encoded(rgb, "WEBP", lossless=True), "bmp": encoded(rgb, "BMP"),
            "bmp 1": encoded(rgb.convert("1"), "BMP"),
            "gif": encoded(rgb, "GIF"), "gif animated": encoded(rgb, "GIF", save_all=True, append_images=[grey.convert("RGB")]),
            "tiff": encoded(rgb, "TIFF"), "tiff lzw": encoded(rgba, "TIFF", compression="tiff_lzw"),
            "tiff jpeg": encoded(rgb, "TIFF", compression="jpeg"), "tiff 16": encoded(wide, "TIFF"),
            "tiff float": encoded(Image.fromarray(pixels[..., 0] / np.float32(255)), "TIFF"),
        }  # fmt: skip
        refused = [name for name in self.files if not self.opens(name)]
        assert set(refused) <= {"gif animated", "tiff float"}, refused

    @cached_property
    def large(self) -> dict[str, bytes]:
        """A few kilobytes each that decode to 100 million pixels; "beyond" to more than is allowed."""
        kinds = (("RGBA", "RGBA", 10_000), ("16 bit", "I;16", 10_000), ("beyond", "L", 11_000))
        return {
            name: encoded(Image.new(mode, (10_000, height)), "PNG", compress_level=1) for name, mode, height in kinds
        }

    def opens(self, name: str) -> bool:
        try:
            open_image(self.files[name])
        except UserError:
            return False
        return True

    def case(self, rng: random.Random) -> Case:
        large = rng.random() < 0.01
        files = self.large if large else self.files
        name, other = rng.choice(list(files)), rng.choice(list(self.files.values()))
        data, done = files[name], []
        for _ in times(rng) if not large or rng.random() < 0.5 else ():
            data, what = change_bytes(data, rng, other)
            done.append(what)
        if data[:4] == b"\x89PNG" and rng.random() < 0.6:
            data = with_checksums(data)
        return f"{name}: {'; '.join(done)}", lambda: np.asarray(open_image(data))


# ---- checkpoints


class Checkpoints:
    """A text model that can be trained on, a model with an encoder, and a policy."""

    def __init__(self, folder: Path):
        self.folder, tokenizer = folder, tiny_tokenizer()
        size = dict(sequence_len=64, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=1, n_embd=16)
        text = GPT(GPTConfig(**size))
        seeing = MultimodalGPT(MultimodalGPTConfig(
            **size, vision_embedding_dim=8, vision_layer="2", vision_image_size=64, vision_token_id=tokenizer.special("<|image|>")
        ))  # fmt: skip
        seeing.attach_encoder(tiny_encoder())
        models = {"text model": text, "model with pictures": seeing, "policy": tiny_policy(tokenizer)}
        training = {"recipe_name": "folder", "recipe": {"data": "/srv/me/data", "steps": 3}, "step": 3, "multi_turn": False,
                    "earlier": [{"tokenizer": "/a/b.json"}], "best": 0.5, "skipped": 0}  # fmt: skip
        self.files = {}
        for name, model in models.items():
            model.init_weights()
            resume = {"0.exp_avg": torch.zeros(3)} if name == "text model" else None
            save_checkpoint(folder / name, model, tokenizer, training, resume=resume)
            self.files[name] = {path.name: path.read_bytes() for path in (folder / name).iterdir()}
            self.use(self.files[name])

    def case(self, rng: random.Random) -> Case:
        name = rng.choice(list(self.files))
        files = self.files[name]
        path = rng.choice([*files, "config.json", "config.json"])
        data, done = files[path], []
        for _ in times(rng):
            with suppress(Exception):  # after a change that left no valid file
                data, what = self.change(path, data, rng)
                done.append(what)
        if rng.random() < 0.15 or not done:
            data, what = change_bytes(data, rng, files["config.json"])
            done.append(what)
        files = files | {path: data}
        if path != "manifest.json" and rng.random() < 0.95:
            files["manifest.json"] = self.listed(files, path)
        return f"{name}, {path}: {'; '.join(done)}", lambda: self.use(files)

    def change(self, path: str, data: bytes, rng: random.Random) -> tuple[bytes, str]:
        if path.endswith(".safetensors"):
            return change_safetensors(data, rng)
        if path == "tokenizer.json" or rng.random() < 0.8:
            return change_json_file(data, rng)
        content, number = json.loads(data), rng.choice([10**4, 10**6, 2**31 - 1, 2**62])
        if path == "manifest.json":
            name = rng.choice(["/etc/passwd", "../../../etc/passwd", "/dev/zero", ".", "a" * 300, "\ud800", "a\0b"])
            content["files"][name] = {"size": rng.choice([0, number, "1"]), "sha256": "0" * 64}
            return json.dumps(content).encode(), f"it lists {name[:30]!a}"
        fields = [name for name, value in content.get("config", {}).items() if type(value) is int]
        if not fields:
            return change_json_file(data, rng)
        name = rng.choice([*fields, "encoder"])
        if name != "encoder" or not content["encoder"]:
            content["config"][rng.choice(fields)] = number
        elif rng.random() < 0.5:
            rng.choice(content["encoder"]["yaml"]["backbone"])[rng.choice([0, 1])] = number
        else:
            rng.choice(content["encoder"]["yaml"]["backbone"])[3][rng.choice([0, 1])] = number
        return json.dumps(content).encode(), f"{name}: {number}"

    def listed(self, files: dict[str, bytes], path: str) -> bytes:
        """The manifest with the hash of the changed file: otherwise the change would not get past it."""
        manifest = json.loads(files["manifest.json"])
        manifest["files"][path] = {"size": len(files[path]), "sha256": hashlib.sha256(files[path]).hexdigest()}
        return json.dumps(manifest).encode()

    def use(self, files: dict[str, bytes]) -> None:
        """Load it, pack it, resume from it, and ask it or let it act."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            write_files(Path(folder) / "m", files)
            agent = Agent.load(Path(folder) / "m")
            pack_checkpoint(str(Path(folder) / "m"), Path(folder) / "packed")
            if RESUME in files:
                load_resume(Path(folder) / "m")
            if isinstance(agent.model, RobotGPT):
                agent.act([Image.new("RGB", (9, 8))], [[0.1] * agent.model.config.state_dim], ["open the door"])
            vectors = agent.look(Image.new("RGB", (9, 8))) if agent.places_per_image else None
            with suppress(UserError):  # the model was trained on nothing that it could be asked
                "".join(agent.ask("is it red?", vectors, max_new_tokens=2))


KINDS = {"messages": Messages, "pictures": Pictures, "data": Data, "checkpoints": Checkpoints}
