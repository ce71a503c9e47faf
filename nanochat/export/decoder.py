"""The decoder as ONNX graphs, from the weights of a GPT (see `gpt`, `multimodal_gpt`, `robot_gpt`, whose maths this is):

    decoder.onnx     ids, the cache and what stands beside the words -> logits after each row's last token; fills the cache
    policy.onnx      the same for whole rows without a cache, up to the action head: normalised chunks
    attention.onnx   the same for whole rows: how much each position attends to each other one, or to the cells of pictures
    pictures.onnx    vision vectors -> tokens of the row (prefix), or keys and values of every layer (cross)
    states.onnx      a robot's normalised states -> tokens of the row

All of them read one file of weights. Each is compared with torch when it is exported.
"""

import math
from pathlib import Path

import numpy as np

from nanochat.export.graph import MICROSOFT, TYPES, Graph, Weights
from nanochat.fusion import MATCH_SHARPNESS
from nanochat.gpt import LOGIT_CAP
from nanochat.onnx.cache import stored_width
from nanochat.robot_gpt import FREQUENCIES, STATE_LIMIT

ROW = ("batch", "time")


class DecoderGraph(Graph):
    """Shared by the graphs with layers. model: GPT or one of its kinds, in float32."""

    def __init__(self, model, weights: Weights, int8: bool):
        super().__init__(weights, int8)
        self.model, self.config = model, model.config
        self.state = {name: tensor.detach().float().cpu().numpy() for name, tensor in model.state_dict().items()}
        self.crosses = getattr(model, "cross_attention", None) is not None
        self.reads_more = hasattr(model, "vision_projector")
        self.seen: list[str] = []  # attention weights of each layer

    def matrix(self, x: str, name: str) -> str:
        return self.linear(x, name, self.state[f"{name}.weight"])

    # ---- the start of a row

    def words(self, committed: bool = False) -> str:
        """(B, T, C), normed. beside: (M, C) what stands in the row at the places beside_at (M, 2), instead of words."""
        ids = self.input("ids", "int64", ROW)
        x = self.rows_of(ids, "transformer.wte.weight", self.state["transformer.wte.weight"])
        if self.reads_more and not self.crosses:
            beside = self.input("beside", "float32", ("beside", self.config.n_embd))
            x = self.op("ScatterND", x, self.input("beside_at", "int64", ("beside", 2)), beside)
        if committed:
            numbers = self.config.known_rows * (self.config.action_dim + 1)
            known = self.matrix(self.input("committed", "float32", ("batch", numbers)), "committed_projector")
            known_at = self.input("committed_at", "int64", ("batch", 2))
            x = self.op("ScatterND", x, known_at, known, reduction="add")
        return self.norm(x, self.config.n_embd)

    # ---- layers

    def layers(self, x: str, cached: bool, attention: bool = False) -> str:
        """(B, T, C) to (B, C): the last token of each row (or all of them, (B, T, C), to see their attention), normed."""
        config, C = self.config, self.config.n_embd
        self.lengths = self.input("lengths", "int32", ("batch",))  # of each row with its new tokens, less one
        self.total = self.input("total", "int32", (1,))  # the greatest of them, plus one
        positions = [self.weight(name, self.table(name)) for name in ("cos", "sin")]
        if self.crosses:
            self.bias = self.input("bias", "float32", ("batch", 1, "time", "cells"))
            self.sees = self.input("sees", "float32", ("batch", "time", 1))
        normed = None
        for number in range(config.n_layer):
            if self.crosses:
                normed = self.norm(x, C) if normed is None else normed
                normed, x = self.added_and_normed(x, self.look(normed, number, attention), C)
            normed = self.norm(x, C) if normed is None else normed
            normed, x = self.added_and_normed(x, self.attend(normed, number, positions, cached, attention), C)
            hidden = self.squared_relu(self.matrix(normed, f"transformer.h.{number}.mlp.c_fc"))
            normed, x = self.added_and_normed(x, self.matrix(hidden, f"transformer.h.{number}.mlp.c_proj"), C)
        if attention:
            return normed
        return self.op("GatherND", normed, self.input("last", "int64", ("batch", 1)), batch_dims=1)

    def table(self, name: str) -> np.ndarray:
        """(sequence_len, W / 2), as ONNX Runtime turns: the other way round than nanochat. W: a head's width with its zeros."""
        half = self.config.head_dim // 2
        values = getattr(self.model, name)[:, 0, :half].float().cpu().numpy()
        values = np.pad(values, ((0, 0), (0, stored_width(2 * half) // 2 - half)))
        return np.ascontiguousarray(values if name == "cos" else -values)

    def attend(self, x: str, number: int, positions: list[str], cached: bool, attention: bool) -> str:
        """Self-attention. The norm of queries and keys stands before the rotation here, which does not change their length. Zeros
        beside a head, where it needs them, stand behind each half that is turned."""
        config, prefix = self.config, f"transformer.h.{number}.attn"
        D, H, H_kv = config.head_dim, config.n_head, config.n_kv_head
        W = stored_width(D)
        parts = [widened(self.state[f"{prefix}.c_{name}.weight"], D, W) for name in "qkv"]
        whole = self.linear(x, f"{prefix}.qkv", np.concatenate(parts))  # one matrix instead of three
        sizes = self.numbers([H * W, H_kv * W, H_kv * W])
        q, k, v = self.op("Split", whole, sizes, outputs=3, axis=-1)
        q, k = self.heads_normed(q, H, W), self.heads_normed(k, H_kv, W)
        past = ["", ""]
        if cached:
            shape = ("batch", H_kv, "room", W)
            past = [self.input(f"past_{name}_{number}", "float32", shape) for name in "kv"]
        names = [f"attended_{number}", *(f"{'present' if cached else 'own'}_{name}_{number}" for name in "kv")]
        if attention and not self.crosses:
            names.append(f"weights_{number}")
            self.seen.append(names[-1])
        self.op(
            "GroupQueryAttention", q, k, v, *past, self.lengths, self.total, *positions, outputs=names, domain=MICROSOFT,
            num_heads=H, kv_num_heads=H_kv, do_rotary=1, scale=D**-0.5, **({"qk_output": 2} if len(names) > 3 else {}),
        )  # fmt: skip
        if cached:  # filled in place: these are the same memory as the inputs
            self.outputs += [self.declared(name, shape) for name in names[1:3]]
        last = widened(self.state[f"{prefix}.c_proj.weight"].T, D, W).T
        return self.linear(names[0], f"{prefix}.c_proj", np.ascontiguousarray(last))

    def declared(self, name: str, shape):
        from onnx import TensorProto, helper

        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    def heads_normed(self, x: str, n_heads: int, width: int) -> str:
        """(B, T, H * W), each head normed by itself."""
        x = self.op("Reshape", x, self.numbers([0, 0, n_heads, width]))
        return self.op("Reshape", self.norm(x, width, self.config.head_dim), self.numbers([0, 0, n_heads * width]))

    def look(self, x: str, number: int, attention: bool) -> str:
        """Cross-attention to the cells of pictures, through its gate, which is a factor of its last matrix here."""
        config, prefix = self.config, f"cross_attention.{number}"
        D, H = config.head_dim, config.n_head
        q = self.heads_normed(self.matrix(x, f"{prefix}.c_q"), H, D)
        keys, values = (self.input(f"cells_{name}_{number}", "float32", ("batch", H, "cells", D)) for name in "kv")
        if attention:
            apart = self.op("Reshape", q, self.numbers([0, 0, H, D]))
            scores = self.op(
                "MatMul", self.op("Transpose", apart, perm=[0, 2, 1, 3]), self.op("Transpose", keys, perm=[0, 1, 3, 2])
            )
            scores = self.op("Mul", scores, self.numbers(D**-0.5, np.float32))
            weights = self.op("Softmax", self.op("Add", scores, self.bias), axis=-1)
            self.seen.append(self.op("Mul", weights, self.op("Unsqueeze", self.sees, self.numbers([1]))))
        y = self.op(
            "MultiHeadAttention", q, keys, values, "", "", self.bias, domain=MICROSOFT, num_heads=H, scale=D**-0.5
        )
        gate = np.tanh(self.state[f"{prefix}.gate"])
        return self.linear(
            self.op("Mul", y, self.sees), f"{prefix}.c_proj", gate * self.state[f"{prefix}.c_proj.weight"]
        )


def widened(weight: np.ndarray, D: int, W: int) -> np.ndarray:
    """(H * D, C) -> (H * W, C): rows of zeros behind each half of a head."""
    halves = weight.reshape(-1, 2, D // 2, weight.shape[1])
    return np.pad(halves, ((0, 0), (0, 0), (0, (W - D) // 2), (0, 0))).reshape(-1, weight.shape[1])


def export_decoder(model, weights: Weights, int8: bool, path: Path) -> None:
    graph = DecoderGraph(model, weights, int8)
    hidden = graph.layers(graph.words(), cached=True)
    head = graph.state["lm_head.weight"] / LOGIT_CAP
    logits = graph.op("Tanh", graph.linear(hidden, "lm_head", head))
    logits = graph.op("Mul", logits, graph.numbers(LOGIT_CAP, np.float32))
    graph.output(logits, "logits", "float32", ("batch", model.config.vocab_size))
    graph.save(path)


def export_policy(model, weights: Weights, int8: bool, path: Path) -> None:
    graph, config = DecoderGraph(model, weights, int8), model.config
    hidden = graph.layers(graph.words(committed=config.known_rows > 0), cached=False)
    # 8-bit steps would differ from one action of a chunk to the next, which shakes the arm
    chunk = graph.exact_linear(hidden, "action_head", graph.state["action_head.weight"])
    chunk = graph.op("Reshape", chunk, graph.numbers([0, config.chunk, config.action_dim]))
    graph.output(chunk, "chunk", "float32", ("batch", config.chunk, config.action_dim))
    graph.save(path)


def export_attention(model, weights: Weights, int8: bool, path: Path) -> None:
    """weights: (1, n_layer * n_head, T, S), S the positions of the row (prefix) or the cells of its pictures (cross)."""
    graph = DecoderGraph(model, weights, int8)
    graph.layers(graph.words(), cached=False, attention=True)
    found = graph.op("Concat", *graph.seen, axis=1) if len(graph.seen) > 1 else graph.seen[0]
    graph.output(found, "weights", "float32", ("batch", "heads", "time", "seen"))
    graph.save(path)


def export_pictures(model, weights: Weights, int8: bool, path: Path) -> None:
    graph, config = DecoderGraph(model, weights, int8), model.config
    N, D, C = config.vision_tokens_per_image, config.vision_embedding_dim, config.n_embd
    vectors = graph.input("vectors", "float32", ("pictures", N, D))
    if graph.crosses:
        before, numbers = (
            graph.input("before", "float32", ("pictures", N, D)),
            graph.input("numbers", "int64", ("pictures",)),
        )
        cells, earlier = (cells_of(graph, part, D) for part in (vectors, before))
        place = graph.op(
            "Gather", graph.weight("vision_projector.picture", graph.state["vision_projector.picture"]), numbers
        )
        x = graph.op("Add", cells, graph.op("Unsqueeze", place, graph.numbers([1])))
        later = graph.op("Cast", graph.op("Greater", numbers, graph.numbers(0)), to=TYPES["float32"])
        later = graph.op("Unsqueeze", later, graph.numbers([1, 2]))
        x = graph.op("Add", x, graph.op("Mul", later, change(graph, cells, earlier)))  # (S, N, C)
        for number in range(config.n_layer):
            prefix = f"cross_attention.{number}"
            keys = graph.heads_normed(graph.matrix(x, f"{prefix}.c_k"), config.n_head, config.head_dim)
            for name, part in (("k", keys), ("v", graph.matrix(x, f"{prefix}.c_v"))):
                part = graph.op("Reshape", part, graph.numbers([0, 0, config.n_head, config.head_dim]))
                part = graph.op("Transpose", part, perm=[0, 2, 1, 3])
                graph.output(part, f"{name}_{number}", "float32", ("pictures", config.n_head, N, config.head_dim))
    else:
        x = vectors
        if config.use_vision_projection:
            x = graph.squared_relu(graph.matrix(graph.norm(vectors, D), "vision_projector.c_fc"))
            x = graph.matrix(x, "vision_projector.c_proj")
        if "vision_projector.position" in graph.state:
            x = graph.op("Add", x, graph.weight("vision_projector.position", graph.state["vision_projector.position"]))
        graph.output(x, "tokens", "float32", ("pictures", N, C))
    graph.save(path)


def cells_of(graph: DecoderGraph, vectors: str, width: int) -> str:
    """`fusion.CellProjector`: (S, N, D) -> (S, N, C)."""
    cells = graph.matrix(graph.norm(vectors, width), "vision_projector.linear")
    return graph.op("Add", cells, graph.weight("vision_projector.cell", graph.state["vision_projector.cell"]))


def change(graph: DecoderGraph, cells: str, before: str) -> str:
    """`fusion.Change`: two times (S, N, C) -> (S, N, C)."""
    unit = [graph.op("Div", x, graph.op("Max", graph.op("ReduceL2", x, graph.numbers([-1])), graph.numbers(1e-12, np.float32)))
            for x in (cells, before)]  # fmt: skip
    cosine = graph.op("MatMul", unit[0], graph.op("Transpose", unit[1], perm=[0, 2, 1]))
    share = graph.op("Softmax", graph.op("Mul", cosine, graph.numbers(MATCH_SHARPNESS, np.float32)), axis=-1)
    alike = graph.op("MatMul", share, before)
    parts = graph.op("Concat", cells, graph.op("Sub", cells, before), graph.op("Sub", cells, alike), axis=-1)
    hidden = graph.squared_relu(graph.matrix(parts, "vision_projector.change.c_fc"))
    return graph.matrix(hidden, "vision_projector.change.c_proj")


def export_states(model, weights: Weights, path: Path) -> None:
    """In float32: the numbers of a state are few, and small differences of them matter."""
    graph, n = DecoderGraph(model, weights, int8=False), model.config.state_dim
    states = graph.input("states", "float32", ("states", n))
    limits = (graph.numbers(limit, np.float32) for limit in (-STATE_LIMIT, STATE_LIMIT))
    frequency = math.pi / 2 * 2 ** np.arange(FREQUENCIES, dtype=np.float32)
    angle = graph.op("Unsqueeze", graph.op("Clip", states, *limits), graph.numbers([2]))
    angle = graph.op("Mul", angle, graph.weight("frequency", frequency.astype(np.float32)))
    angle = graph.op("Reshape", angle, graph.numbers([0, n * FREQUENCIES]))
    waves = graph.op("Concat", graph.op("Sin", angle), graph.op("Cos", angle), axis=-1)
    graph.output(graph.matrix(waves, "state_projector"), "tokens", "float32", ("states", model.config.n_embd))
    graph.save(path)
