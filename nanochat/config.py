"""The shapes of the models, as config.json of a checkpoint has them. No torch: every runtime reads them.

The files may come from a stranger: each value is checked before anything is built from it.
"""

from dataclasses import dataclass, field
from math import isqrt

from nanochat.actions import N_BINS, TARGETS, Scale
from nanochat.cameras import check_names
from nanochat.errors import UserError
from nanochat.files import short_repr
from nanochat.previous_actions import MOTION_STEPS, PREVIOUS
from nanochat.vision.letterbox import MAX_IMAGE_SIZE

# Beyond the largest models of this kind: a larger number is a mistake, or a file from a stranger that would fill the memory
LARGEST = {
    "sequence_len": 2**20, "vocab_size": 2**21, "n_layer": 512, "n_head": 1024, "n_kv_head": 1024, "n_embd": 2**16,
}  # fmt: skip
LARGEST_TABLE = 2**24
FUSIONS = ("prefix", "cross")
MAX_DIMENSIONS = 1024  # of a state or an action; a humanoid has about 100


@dataclass
class GPTConfig:
    sequence_len: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 6  # query heads
    n_kv_head: int = 6  # key/value heads; fewer than n_head is grouped-query attention
    n_embd: int = 768
    n_hidden: int = 0  # hidden units of an MLP; 0 is four times n_embd, a pruned model has fewer

    def __post_init__(self):
        for name, most in LARGEST.items():
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= most:
                raise UserError(f"{name} must be a positive integer up to {most:,}, got {str(value)[:80]}")
        check_integer("n_hidden", self.n_hidden, 0, 4 * LARGEST["n_embd"])
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head ({self.n_head}) must be a multiple of n_kv_head ({self.n_kv_head})")
        if self.n_embd % (2 * self.n_head):
            raise UserError(
                f"n_embd ({self.n_embd}) must be a multiple of 2 * n_head ({2 * self.n_head}): "
                "rotary positions turn pairs of channels inside a head"
            )
        if self.sequence_len * self.head_dim > LARGEST_TABLE:
            raise UserError(
                f"sequence_len ({self.sequence_len}) times the width of a head ({self.head_dim}) must be at most "
                f"{LARGEST_TABLE:,}: so large are the tables of positions"
            )

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def mlp_width(self) -> int:
        return self.n_hidden or 4 * self.n_embd


@dataclass
class MultimodalGPTConfig(GPTConfig):
    vision_embedding_dim: int = (
        84  # channels of the encoder's map; the default layer has 4 box values + 80 class scores
    )
    use_vision_projection: bool = True  # False: the vectors already have n_embd channels and go in as they are
    vision_tokens_per_image: int = 1  # 1 is the pooled vector; a square number is an h x h grid of the map
    vision_token_id: int | None = None  # placeholder in the token row; None is the last id of the vocabulary
    vision_layer: str = "head"  # which map of the encoder, see YOLOv9Plus
    vision_image_size: int = 640  # the encoder's square input, in pixels
    fusion: str = "prefix"  # "prefix": vision vectors are tokens of the row; "cross": every layer looks at them
    max_images: int = 8  # of a row, for "cross": as many pictures get a number that tells first from second

    def __post_init__(self):
        super().__post_init__()
        if self.vision_token_id is None:
            self.vision_token_id = self.vocab_size - 1
        check_integer("vision_token_id", self.vision_token_id, 0, self.vocab_size - 1)
        check_integer("vision_embedding_dim", self.vision_embedding_dim, 1, 2**16)
        check_integer("vision_tokens_per_image", self.vision_tokens_per_image, 0, 2**14)
        check_integer("vision_image_size", self.vision_image_size, 32, MAX_IMAGE_SIZE)
        if self.vision_image_size % 32:
            raise UserError(f"vision_image_size must be a multiple of 32, got {self.vision_image_size}")
        if not isinstance(self.use_vision_projection, bool) or not isinstance(self.vision_layer, (str, int)):
            raise UserError(
                f"use_vision_projection must be true or false and vision_layer the name of a map, got "
                f"{short_repr(self.use_vision_projection)} and {short_repr(self.vision_layer)}"
            )
        if not self.use_vision_projection and self.vision_embedding_dim != self.n_embd:
            raise UserError(
                f"without a projection the vision vectors ({self.vision_embedding_dim}) must be as wide as the model "
                f"({self.n_embd}): set use_vision_projection=True"
            )
        if self.fusion not in FUSIONS:
            raise UserError(f"fusion must be {' or '.join(FUSIONS)}, got {short_repr(self.fusion)}")
        check_integer("max_images", self.max_images, 1, 1024)
        if self.fusion == "cross" and not self.use_vision_projection:
            raise UserError('fusion="cross" needs the projection of the vision vectors: set use_vision_projection=True')
        self.check_vision_tokens()

    def check_vision_tokens(self) -> None:
        grid_side(self.vision_tokens_per_image)

    def check_vectors(self, shape: tuple[int, ...], n_places: int, n_shown: int = 0) -> None:
        """Raises UserError unless vision vectors of this shape, (M, D), are those of n_places places of a row. n_shown:
        pictures that the row's cache holds."""
        if len(shape) != 2 or shape[1] != self.vision_embedding_dim:
            width = self.vision_embedding_dim
            raise UserError(
                f"vision_embeddings must be (B, {width}), (B, N, {width}) or a list of (n, {width}); "
                f"got a row of shape {tuple(shape)}, and vision_embedding_dim is {width}"
            )
        if shape[0] != n_places * self.vectors_per_place:
            each = f", expected {self.vectors_per_place} for each" if self.vectors_per_place > 1 else ""
            raise UserError(f"a row has {n_places} places for vision vectors, but {shape[0]} vectors were given{each}")
        if shape[0] % self.vision_tokens_per_image:
            raise UserError(
                f"{shape[0]} vision vectors are not a whole number of images of {self.vision_tokens_per_image} vectors each"
            )
        if self.fusion == "cross":
            self.check_images(n_places + n_shown)

    def check_images(self, n: int) -> None:
        """Raises UserError for more pictures in a row than have a number."""
        if n > self.max_images:
            raise UserError(
                f"{n} pictures in one row, but this model tells at most {self.max_images} apart (max_images): show fewer"
            )

    @property
    def places_per_image(self) -> int:
        """Placeholders of a picture in the token row."""
        return 1 if self.fusion == "cross" else self.vision_tokens_per_image

    @property
    def vectors_per_place(self) -> int:
        return self.vision_tokens_per_image // self.places_per_image


@dataclass
class RobotGPTConfig(MultimodalGPTConfig):
    action_head: str = "continuous"  # see `action_heads.HEADS`
    chunk: int = 10  # actions that are predicted at once
    map_channels: int = 64  # of the encoder's map; vision_embedding_dim is the width of a glance
    state_scale: dict = field(default_factory=dict)  # of `actions.Scale`; empty for a policy that reads no state
    state_range: dict = field(default_factory=dict)  # least and greatest in the data; empty in older checkpoints
    action_scale: dict = field(default_factory=dict)
    targets: str = "relative"  # of the actions: relative or absolute
    committed: int = 0  # the continuous head was shown up to so many actions that a robot carries out anyway
    # numbers of an action that the network predicts as differences from the state's number of the same place, and the
    # percentiles of what it predicts; empty where it predicts the actions as they are
    deltas: list[int] = field(default_factory=list)
    delta_scale: dict = field(default_factory=dict)
    # so many of the last actions that the robot was sent are read, and all numbers are predicted as differences from the last
    # one (see `previous_actions`); then `deltas` are those that stand at the state's while no action was sent
    previous: int = 0
    cameras: list[str] = field(default_factory=list)  # short names; empty in older ones: one camera without a name
    camera_dropout: float = 0.0  # share of single cameras that training hid; above 0, a policy can do without one
    state_names: list[str] = field(default_factory=list)  # of the numbers of a state; empty if the data names none
    action_names: list[str] = field(default_factory=list)
    units: str = ""  # of states and actions, if whoever trained it said so
    fps: float = 0.0  # actions per second; 0 if unknown
    state_token_id: int = 0
    act_token_id: int = 0
    bin_token_id: int = 0  # of the first bin; the others follow

    def __post_init__(self):
        super().__post_init__()
        if self.fusion != "prefix":
            raise UserError(f'a robot\'s glances are tokens of the row: fusion must be "prefix", got "{self.fusion}"')
        if not isinstance(self.action_head, str):
            raise UserError(f"action_head must be the name of one, got {short_repr(self.action_head)}")
        check_integer("chunk", self.chunk, 1, 1024)
        check_integer("committed", self.committed, 0, self.chunk - 1)
        check_integer("map_channels", self.map_channels, 1, 2**16)
        check_names(self.cameras)
        if not isinstance(self.units, str) or len(self.units) > 100:
            raise UserError(f"units must be a short text such as degrees, got {self.units!r:.80}")
        if type(self.fps) not in (int, float) or not 0 <= self.fps < 1e6:
            raise UserError(f"fps must be a number of actions per second, 0 if unknown, got {self.fps!r:.80}")
        if type(self.camera_dropout) not in (int, float) or not 0 <= self.camera_dropout < 1:
            raise UserError(f"camera_dropout must be a share, at least 0 and below 1, got {self.camera_dropout!r:.80}")
        if self.targets not in TARGETS:
            raise UserError(f"targets must be one of {', '.join(TARGETS)}, got {self.targets!r}")
        for scale in (self.state_scale, self.state_range, self.action_scale, self.delta_scale):
            if not isinstance(scale, dict):
                raise UserError(f"a scale must be an object with low and high, got {scale!r:.80}")
            if (scale or scale is self.action_scale) and len(Scale(**scale).low) > MAX_DIMENSIONS:
                raise UserError(f"a state or an action has at most {MAX_DIMENSIONS} numbers, got {len(scale['low'])}")
        if self.state_range and len(self.state_range["low"]) != self.state_dim:
            raise UserError(f"state_range must have {self.state_dim} numbers, got {len(self.state_range['low'])}")
        for name, width in (("state_names", self.state_dim), ("action_names", self.action_dim)):
            check_labels(name, getattr(self, name), width)
        self.check_deltas()
        last = {"state_token_id": self.state_token_id, "act_token_id": self.act_token_id,
                "bin_token_id": self.bin_token_id + N_BINS - 1}  # fmt: skip
        for name, token in last.items():
            check_integer(name, token, 0, self.vocab_size - 1)

    def check_vision_tokens(self) -> None:
        """Glances are no grid: any number will do."""

    def check_deltas(self) -> None:
        both = min(self.state_dim, self.action_dim)
        good = isinstance(self.deltas, list) and all(type(n) is int and 0 <= n < both for n in self.deltas)
        if not good or len(set(self.deltas)) < len(self.deltas) or bool(self.deltas) != bool(self.delta_scale):
            raise UserError(
                f"deltas must be different numbers in 0..{both - 1} that have a state, with a delta_scale, got "
                f"{self.deltas!r:.80} and a delta_scale of {len(self.delta_scale.get('low', ()))} numbers"
            )
        if self.previous not in (0, PREVIOUS) or type(self.previous) is not int or self.previous and not self.deltas:
            raise UserError(f"previous must be 0, or {PREVIOUS} with deltas, got {self.previous!r:.80}")
        if self.deltas and (self.targets != "absolute" or len(self.delta_scale["low"]) != self.action_dim):
            raise UserError(f"deltas are of absolute targets, and delta_scale needs {self.action_dim} numbers")

    @property
    def most_committed(self) -> int:
        """So many actions of a chunk may be given at most."""
        return self.chunk - 1

    @property
    def known_rows(self) -> int:
        """Rows of `Inputs.committed`: motions of the last actions, and committed ones."""
        return len(MOTION_STEPS) * bool(self.previous) + self.committed

    @property
    def predicted_scale(self) -> dict:
        """The percentiles of what the action head predicts."""
        return self.delta_scale or self.action_scale

    @property
    def n_cameras(self) -> int:
        return max(1, len(self.cameras))

    @property
    def state_dim(self) -> int:
        return len(self.state_scale.get("low", ()))

    @property
    def action_dim(self) -> int:
        return len(self.action_scale["low"])


def check_integer(name: str, value: object, least: int, most: int) -> None:
    """Raises UserError unless a field of a config is an integer in these bounds."""
    if type(value) is not int or not least <= value <= most:
        raise UserError(f"{name} must be an integer in {least}..{most}, got {short_repr(value)}")


def check_labels(name: str, labels: object, n: int) -> None:
    """Raises UserError unless this is a list of n texts, or an empty one."""
    if not isinstance(labels, list) or len(labels) not in (0, n) or not all(isinstance(text, str) for text in labels):
        raise UserError(f"{name} must be a list of {n} names, or empty, got {labels!r:.80}")


def grid_side(n_tokens: int) -> int:
    """Side of the square grid with that many cells. Raises ValueError for a number that is not square."""
    side = isqrt(max(0, n_tokens))
    if n_tokens < 1 or side * side != n_tokens:
        raise UserError(
            f"vision_tokens_per_image must be a square number (1, 4, 9, 16, 25, ...): "
            f"the map is pooled to a square grid; got {n_tokens}"
        )
    return side
