"""Models that run on ONNX Runtime, from a folder that `nanochat export` made. No torch.

They have what `engine.Engine`, `agent.Agent` and `acting.Policy` need, so prompts, sampling, beams, safety and servers are the
same code for both runtimes. Vision vectors are numpy arrays. The graphs are described in `export.decoder` and `export.encoder`.
"""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np

from nanochat.acting import Policy, act_at_once, act_by_tokens
from nanochat.engine import Unread
from nanochat.errors import UserError
from nanochat.onnx.cache import OnnxCache, Picture
from nanochat.vision.images import as_list
from nanochat.vision.letterbox import of_rectangles, square

PART = 4  # pictures that go through the encoder at once: the maps of more leave a processor's caches
HEADS = {"continuous": act_at_once, "bins": act_by_tokens}


class OnnxGPT:
    """A text model. config: a `GPTConfig`, or one of its kinds. encoder: {"image_size", "antialias", "rectangles"}, None for a
    text model; without "rectangles", which older exports lack, its graph takes squares only."""

    reads_more = False
    continues_many = False  # ONNX Runtime continues one row of several tokens at a time

    def __init__(self, folder: Path, config, encoder: dict | None):
        self.folder, self.config, self.encoder = folder, config, encoder
        self.crosses = getattr(config, "fusion", "prefix") == "cross"
        self.session = cache(self.open)  # a graph is loaded when it is first needed

    def open(self, name: str):
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS") or 0)  # 0: as many as cores
        options.log_severity_level = 4  # errors are raised anyway
        try:
            return onnxruntime.InferenceSession(self.folder / f"{name}.onnx", options, ["CPUExecutionProvider"])
        except Exception as error:  # each kind of failure has a class of its own
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"ONNX Runtime {onnxruntime.__version__} cannot run {self.folder / name}.onnx: {reason}; upgrade onnxruntime, or "
                "export the model again"
            ) from error

    def run(self, name: str, **inputs) -> list[np.ndarray]:
        return self.session(name).run(None, inputs)

    # ---- what the engine needs

    def new_cache(self, batch_size: int = 1, max_len: int | None = None) -> OnnxCache:
        return OnnxCache(self.config, batch_size, max_len or self.config.sequence_len)

    def read(self, rows: Sequence[Unread], cache: OnnxCache) -> np.ndarray:
        """As `GPT.read`. Rows of several tokens that continue what the cache holds are read one at a time, alone in their
        cache."""
        n_tokens, starts = [len(row.tokens) for row in rows], cache.lengths
        longest = max(n_tokens)
        if longest > 1 and len(rows) > 1 and any(starts):
            raise ValueError("ONNX Runtime continues one row of several tokens at a time")
        ends = [start + n for start, n in zip(starts, n_tokens, strict=True)]
        if max(ends) > self.config.sequence_len:
            raise UserError(
                f"{max(ends)} tokens do not fit the context of {self.config.sequence_len}: shorten the prompt"
            )
        cache.advance(n_tokens, longest)
        if self.crosses:
            for line, (row, start) in enumerate(zip(rows, starts, strict=True)):
                self.show(cache, line, row, start)
        numbers = {"lengths": np.array(ends, np.int32) - 1, "total": np.array([max(ends)], np.int32)}
        if longest == 1 and all(row.images is None and row.states is None for row in rows):
            if cache.bound is None:
                cache.bound = Step(self, cache)
            return cache.bound(np.array([row.tokens for row in rows]), numbers)
        numbers["last"] = np.array(n_tokens)[:, None] - 1
        if self.crosses:
            numbers |= cache.cells() | cache.visible(starts, longest)
        return Bound(self, cache, self.row_inputs(rows) | numbers).run().copy()

    def row_inputs(self, rows: Sequence[Unread]) -> dict[str, np.ndarray]:
        """ids, and what stands beside the words."""
        found = {"ids": padded([row.tokens for row in rows])}
        return found if self.crosses or not self.reads_more else found | self.beside(rows)


class OnnxModel(OnnxGPT):
    """A model that reads pictures. config: a `MultimodalGPTConfig`."""

    reads_more = True

    # ---- pictures

    def look(self, images) -> np.ndarray:
        """One picture or a list of B -> (B, N, D) float32. images: anything that `vision.images.open_image` takes."""
        return self.encode(as_list(images))

    def embed(self, images, rectangles: bool = False) -> np.ndarray:
        """One picture or a list of B -> (B, D) float32, the mean of a picture's vectors. rectangles: borders up to a multiple of
        32 only, not to a square. Raises UserError for rectangles where the graph takes none."""
        if not rectangles:
            return self.look(images).mean(1)
        if not self.encoder.get("rectangles"):
            raise UserError(
                f"{self.folder} takes squares only, as models with several vision tokens do: leave out --rectangles"
            )

        def vectors(pixels: np.ndarray, fits) -> list[np.ndarray]:
            parts = (pixels[first : first + PART] for first in range(0, len(pixels), PART))
            return [found[0] for part in parts for found in self.run("encoder", squares=part)[0]]

        return np.stack(of_rectangles(images, self.encoder["image_size"], self.encoder["antialias"], vectors))

    def encode(self, images: Sequence, cameras: np.ndarray | None = None) -> np.ndarray:
        size, antialias = self.encoder["image_size"], self.encoder["antialias"]
        found = []
        for first in range(0, len(images), PART):
            squares = np.stack([square(image, size, antialias)[0] for image in images[first : first + PART]])
            more = {} if cameras is None else {"cameras": cameras[first : first + PART]}
            found += self.run("encoder", squares=squares, **more)
        return np.concatenate(found)

    def checked_vectors(self, vectors, n_places: int, n_shown: int = 0) -> np.ndarray:
        """As `MultimodalGPT.checked_vectors`: (M, D) or (n, N, D) -> (M, D)."""
        vectors = np.asarray(vectors, np.float32)
        vectors = vectors.reshape(-1, vectors.shape[-1]) if vectors.ndim > 2 else vectors
        self.config.check_vectors(vectors.shape, n_places, n_shown)
        if not np.isfinite(vectors).all():
            raise UserError("vision_embeddings hold NaN or infinite values: check the encoder and its input")
        return vectors

    def one_by_one(self, vectors: np.ndarray) -> np.ndarray:
        """(M, D) -> (n, N, D)."""
        return vectors.reshape(-1, self.config.vision_tokens_per_image, self.config.vision_embedding_dim)

    # ---- what stands in the row beside the words

    def beside(self, rows: Sequence[Unread]) -> dict[str, np.ndarray]:
        tokens, places = [np.zeros((0, self.config.n_embd), np.float32)], []
        shown = [row.images for row in rows if row.images is not None]
        if shown:
            (found,) = self.run("pictures", vectors=self.one_by_one(np.concatenate(shown)))
            tokens.append(found.reshape(-1, self.config.n_embd))
            places += places_of(
                self.config.vision_token_id, [row.tokens if row.images is not None else [] for row in rows]
            )
        states = [row.states for row in rows if row.states is not None]
        if states:
            tokens += self.run("states", states=np.concatenate(states))
            places += places_of(
                self.config.state_token_id, [row.tokens if row.states is not None else [] for row in rows]
            )
        return {"beside": np.concatenate(tokens), "beside_at": np.array(places, np.int64).reshape(-1, 2)}

    def show(self, cache: OnnxCache, line: int, row: Unread, start: int) -> None:
        """Make keys and values of the pictures that stand in what is unread of a row."""
        if row.images is None:
            return
        vectors, held = self.one_by_one(row.images), cache.pictures[line]
        first = held[-1].vectors if held else vectors[0]
        before = np.concatenate([first[None], vectors[:-1]])
        numbers = np.arange(len(held), len(held) + len(vectors))
        self.config.check_images(len(held) + len(vectors))
        found = self.run("pictures", vectors=vectors, before=before, numbers=numbers)  # k_0, v_0, k_1, ...
        columns = [column for _, column in places_of(self.config.vision_token_id, [row.tokens])]
        for i, column in enumerate(columns):
            keys, values = [part[i] for part in found[::2]], [part[i] for part in found[1::2]]
            cache.show(line, Picture(start + column, vectors[i], keys, values))

    def attention(self, ids: Sequence[int], vectors) -> np.ndarray:
        """(n_layer, n_head, T, P, N), see `attention.attention_to_images`."""
        config, ids = self.config, list(ids)
        row = Unread(ids, self.checked_vectors(vectors, ids.count(config.vision_token_id)))
        inputs = {"lengths": np.array([len(ids) - 1], np.int32), "total": np.array([len(ids)], np.int32)}
        if self.crosses:
            cache = self.new_cache()
            self.show(cache, 0, row, 0)
            inputs |= cache.cells() | cache.visible([0], len(ids))
        (found,) = self.run("attention", **self.row_inputs([row]), **inputs)
        found = found[0].reshape(config.n_layer, config.n_head, len(ids), -1)
        if not self.crosses:
            found = found[..., np.array(ids) == config.vision_token_id]
        return found.reshape(*found.shape[:3], -1, config.vision_tokens_per_image)


class OnnxPolicy(Policy, OnnxModel):
    """config: a `RobotGPTConfig`."""

    def look_around(self, rows: Sequence[Sequence]) -> np.ndarray:
        """As `RobotGPT.look_around`: B rows with a picture of each of the K cameras -> (B, K * N, D)."""
        config = self.config
        shape = (config.vision_tokens_per_image, config.vision_embedding_dim)
        vectors = np.zeros((len(rows), config.n_cameras, *shape), np.float32)
        shown = [(row, camera) for row, its in enumerate(rows) for camera, one in enumerate(its) if one is not None]
        if shown:
            cameras = np.array([camera for _, camera in shown]) if config.n_cameras > 1 else None
            vectors[tuple(zip(*shown, strict=True))] = self.encode(
                [rows[row][camera] for row, camera in shown], cameras
            )
        return vectors.reshape(len(rows), -1, shape[1])

    def look(self, images) -> np.ndarray:
        images = as_list(images)
        return self.encode(images, np.zeros(len(images), np.int64) if self.config.n_cameras > 1 else None)

    def predict(self, *arguments) -> np.ndarray:
        return HEADS[self.config.action_head](self, *arguments)

    def chunks(self, rows: Sequence[list[int]], images: np.ndarray, states, known: np.ndarray | None) -> np.ndarray:
        """As `RobotGPT.chunks`."""
        nothing = [None] * len(rows)
        states = nothing if states is None else states[:, None]
        inputs = self.row_inputs([
            Unread(row, seen, state) for row, seen, state in zip(rows, images, states, strict=True)
        ])  # fmt: skip
        ends = np.array([len(row) for row in rows])
        if known is not None:
            places = places_of(self.config.act_token_id, rows)
            inputs |= {"committed": known.reshape(len(rows), -1).astype(np.float32), "committed_at": np.array(places)}
        (chunks,) = self.run(
            "policy", **inputs, lengths=(ends - 1).astype(np.int32), total=np.array([ends.max()], np.int32),
            last=ends[:, None] - 1,
        )  # fmt: skip
        return chunks


class Bound:
    """A pass of the decoder that reads and writes arrays where they are."""

    def __init__(self, model: OnnxGPT, cache: OnnxCache, inputs: dict[str, np.ndarray]):
        from onnxruntime import OrtValue

        self.session, self.inputs = model.session("decoder"), inputs
        self.logits = np.empty((len(inputs["ids"]), model.config.vocab_size), np.float32)
        self.binding = self.session.io_binding()
        kept = {}
        for kind, name in enumerate("kv"):
            for layer in range(model.config.n_layer):
                kept[f"{name}_{layer}"] = OrtValue.ortvalue_from_numpy(cache.store[kind, layer])
        for name, array in inputs.items():
            self.binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array))
        for name, value in kept.items():
            self.binding.bind_ortvalue_input(f"past_{name}", value)
            self.binding.bind_ortvalue_output(f"present_{name}", value)
        self.binding.bind_ortvalue_output("logits", OrtValue.ortvalue_from_numpy(self.logits))

    def run(self) -> np.ndarray:
        """(B, vocab_size) logits, in memory that the next run overwrites."""
        self.session.run_with_iobinding(self.binding)
        return self.logits


class Step(Bound):
    """The next token of every row of a cache, again and again."""

    def __init__(self, model: OnnxGPT, cache: OnnxCache):
        n = len(cache.lengths)
        inputs = {"ids": np.zeros((n, 1), np.int64), "last": np.zeros((n, 1), np.int64)}
        inputs |= {"lengths": np.zeros(n, np.int32), "total": np.zeros(1, np.int32)}
        if model.crosses:
            inputs |= cache.cells() | cache.visible([held - 1 for held in cache.lengths], 1)
        elif model.reads_more:
            inputs |= model.beside([])
        super().__init__(model, cache, inputs)

    def __call__(self, ids: np.ndarray, numbers: dict[str, np.ndarray]) -> np.ndarray:
        for name, array in {"ids": ids, **numbers}.items():
            self.inputs[name][...] = array
        return self.run().copy()


def padded(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """(B, T) int64, padded on the right, where nothing attends to."""
    longest = max(map(len, rows))
    return np.array([[*row, *[0] * (longest - len(row))] for row in rows], np.int64)


def places_of(token: int, rows: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(row, column) of each occurrence, in reading order."""
    return [(i, j) for i, row in enumerate(rows) for j, one in enumerate(row) if one == token]
