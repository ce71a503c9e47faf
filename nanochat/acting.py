"""How a policy acts, on any runtime: what is checked of the robot's numbers, their scales, and from what the network predicts to
chunks of actions in physical units. In numpy; the model itself is behind `Policy.chunks` and the engine.

A chunk can continue actions that the robot carries out anyway while it is made: the committed ones, its first (see
`chunk_player`). For bins they are the tokens before. The continuous head lets its difference from the last of them die away, and
can learn to take them into account (Black et al. 2025, arXiv 2512.05964). It can also go on from the actions before them, see
`previous_actions`.
"""

from collections.abc import Sequence
from functools import cached_property

import numpy as np

from nanochat.actions import N_BINS, Scale, check_states, described, number_array
from nanochat.engine import Engine
from nanochat.errors import UserError
from nanochat.previous_actions import completed, motions
from nanochat.sampling import Sampling

RETURN = 0.4  # the rate r of `joined`: so fast a chunk comes back to its own way from the committed actions


class Policy:
    """A model that acts. It has a `config` (`RobotGPTConfig`), whatever the engine needs, and what its head needs:

    predict(prompts, images, states, committed, moved)   chunks (B, chunk, action_dim) float32, in the units of `predicted_scale`
    chunks(rows, images, states, known)           the continuous head's, normalised; see `act_at_once`
    """

    @cached_property
    def state_scale(self) -> Scale | None:
        return Scale(**self.config.state_scale) if self.config.state_dim else None

    @cached_property
    def trained_states(self) -> Scale | None:
        """The range of states in the training data."""
        config = self.config
        return Scale(**(config.state_range or config.state_scale)) if config.state_dim else None

    @cached_property
    def action_scale(self) -> Scale:
        return Scale(**self.config.action_scale)

    @cached_property
    def predicted_scale(self) -> Scale:
        return Scale(**self.config.predicted_scale)

    def act(
        self,
        prompts: Sequence[Sequence[int]],
        images,
        states: np.ndarray | None,
        committed: np.ndarray | None = None,
        previous: Sequence[np.ndarray] | None = None,
    ) -> np.ndarray:
        """Chunks of actions in physical units, (B, chunk, action_dim) float32, as the network gives them: not clipped.

        prompts: of `conversation.action_message`, rendered, each with a picture of each camera and one state. images: (B, K * N,
        D) from `look_around`. states: (B, state_dim) in physical units; None for a policy without a state. committed: (B, d,
        action_dim) in physical units, d <= `config.most_committed`: actions that will be carried out anyway. They are
        the first of the chunks, which continue them. previous: for each robot the last actions that it was sent, (k, action_dim),
        from the oldest on; none for k = 0. Read if `config.previous`.

        Raises UserError where their numbers or shapes do not match, and for states far outside of the training data's range
        (see `actions.check_states`).
        """
        if len(prompts) != len(images):
            raise UserError(f"{len(prompts)} prompts and {len(images)} pictures: expected as many of each")
        normalised = self.normalised_states(states, len(prompts))
        known, before = self.checked_committed(committed, len(prompts)), self.checked_previous(previous, len(prompts))
        if not len(prompts):
            return np.zeros((0, self.config.chunk, self.config.action_dim), np.float32)
        prompts = [list(prompt) for prompt in prompts]
        offsets, moved = self.starts(states, before)
        chunks = self.predict(prompts, images, normalised, known - offsets, moved) + offsets
        chunks[:, : known.shape[1]] = known
        return chunks

    def starts(self, states: np.ndarray | None, previous: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
        """(what is added to the numbers that are predicted (n, 1, action_dim) float32, the motions (n, M, action_dim) of the last
        actions in `predicted_scale`, None for a policy that reads none).

        Added are the last action, or without one the state for `config.deltas`, and for other numbers the middle of their range,
        zero if the policy reads no last actions. states: (n, state_dim) in physical units. previous: see `act`."""
        config, n = self.config, len(previous)
        start = np.tile(self.action_scale.center if config.previous else np.zeros(config.action_dim), (n, 1))
        if config.deltas:
            start[:, config.deltas] = np.asarray(states, np.float32)[:, config.deltas]
        if not config.previous:
            return start[:, None].astype(np.float32), None
        actions = completed(previous, start)
        return actions[:, -1:], motions(actions, self.predicted_scale.half)

    def checked_previous(self, previous: Sequence[np.ndarray] | None, n: int) -> list[np.ndarray]:
        """n arrays (k, action_dim) float32, k = 0 for None."""
        dim, none = self.config.action_dim, np.zeros((0, self.config.action_dim), np.float32)
        if previous is None:
            return [none] * n
        expected = f"previous actions must be rows of {dim} finite numbers for each prompt"
        found = [number_array(actions, expected) if len(actions) else none for actions in previous]
        if not self.config.previous and any(map(len, found)):
            raise UserError("this policy does not read the actions before: leave them out")
        if len(found) != n or any(actions.ndim != 2 or actions.shape[1] != dim for actions in found):
            raise UserError(f"{expected}, got {described(previous)}")
        return [actions.astype(np.float32) for actions in found]

    def checked_committed(self, committed: np.ndarray | None, n: int) -> np.ndarray:
        """(n, d, action_dim) float32, d = 0 for None."""
        dim, most = self.config.action_dim, self.config.most_committed
        expected = f"committed actions must be up to {most} rows of {dim} finite numbers for each prompt"
        if committed is None:
            return np.zeros((n, 0, dim), np.float32)
        values = number_array(committed, expected)
        if values.ndim != 3 or len(values) != n or values.shape[1] > most or values.shape[2] != dim:
            raise UserError(f"{expected}, got {described(committed)}")
        return values.astype(np.float32)

    def normalised_states(self, states: np.ndarray | None, n: int) -> np.ndarray | None:
        """(n, state_dim) float32; None for a policy without a state."""
        dim = self.config.state_dim
        if dim == 0:
            if states is not None and np.size(states):
                raise UserError(f"this policy was trained without a state, got {described(states)}: pass None")
            return None
        if states is None:
            raise UserError(f"this policy reads a state of {dim} numbers, got none")
        values = number_array(states, f"states must be {dim} finite numbers for each prompt")
        if len(values.shape) != 2 or values.shape[1] != dim or len(values) != n:
            raise UserError(
                f"{n} prompts and pictures, and states of shape {values.shape}: expected as many of each, and {dim} numbers "
                "a state"
            )
        check_states(values, self.trained_states)
        return self.state_scale.normalize(values)


def act_at_once(
    model: Policy, prompts: Sequence[list[int]], images, states, committed: np.ndarray, moved: np.ndarray | None = None
) -> np.ndarray:
    """`Policy.predict` of a head that gives the whole chunk at its <|act|> token, by `model.chunks(rows, images, states, known)`.

    states: (B, state_dim) normalised, or None. moved: see `Policy.starts`. known: (B, config.known_rows, action_dim + 1), what is
    given, see `known_rows`; None for a policy that never learnt to read it.
    """
    config, scale = model.config, model.predicted_scale
    rows = [[*prompt, config.act_token_id] for prompt in prompts]
    longest, fits = max(map(len, rows)), config.sequence_len
    if longest > fits:
        raise UserError(f"{longest} tokens do not fit the context of {fits}: shorten the instruction")
    given = scale.normalize(committed[:, : config.committed])  # (B, d, D)
    known = (
        known_rows(given, np.full(len(rows), given.shape[1]), config.committed, moved) if config.known_rows else None
    )
    return joined(scale.restore(model.chunks(rows, images, states, known)), committed)


def known_rows(chunks: np.ndarray, counts: np.ndarray, most: int, moved: np.ndarray | None) -> np.ndarray:
    """(A, M + most, D + 1) float32, for `Inputs.committed`: the motions moved (A, M, D), then the first counts[i] actions of each
    normalised chunk (A, chunk, D), and zeros behind them. The last number is 1 where something is given. counts: (A,), at most
    `most`."""
    given = (np.arange(most) < counts[:, None])[..., None].astype(np.float32)
    actions = np.pad(chunks[:, :most], ((0, 0), (0, max(0, most - chunks.shape[1])), (0, 0)))
    rows = np.concatenate([actions * given, given], -1)
    if moved is None:
        return rows
    return np.concatenate([np.concatenate([moved, np.ones_like(moved[..., :1])], -1), rows], 1)


def act_by_tokens(
    model: Policy, prompts: Sequence[list[int]], images, states, committed: np.ndarray, moved: None = None
) -> np.ndarray:
    """`Policy.predict` of a head that says a chunk number by number, each as the token of a bin. It reads no motions."""
    config, scale = model.config, model.predicted_scale
    shape, first = (config.chunk, config.action_dim), config.bin_token_id
    known = (scale.to_bins(committed) + first).reshape(len(prompts), -1)
    rows = [[*prompt, *before] for prompt, before in zip(prompts, known.tolist(), strict=True)]
    n, bins = shape[0] * shape[1] - known.shape[1], tuple(range(first, first + N_BINS))
    states = None if states is None else states[:, None]
    said = Engine(model).generate(rows, n, sampling=Sampling(allowed_ids=bins), images=images, states=states)
    return scale.from_bins(np.concatenate([known, said], 1).reshape(-1, *shape) - first)


def joined(chunks: np.ndarray, committed: np.ndarray) -> np.ndarray:
    """Chunks (B, n, D) that begin with the committed actions (B, d, D) and go on from them: what these differ by from the chunk's
    own actions dies away as a critically damped spring does, x_k = (x + (v - x ln r) k) r^k in the k-th step, x the last
    difference and v its change from the one before. So neither the action nor its change jumps."""
    d = committed.shape[1]
    if d == 0:
        return chunks
    k = np.arange(1, chunks.shape[1] - d + 1, dtype=np.float32)[:, None]  # (n - d, 1)
    differs = (committed - chunks[:, :d])[:, -2:]
    x, v = differs[:, -1:], differs[:, -1:] - differs[:, :1]  # v is 0 where a single action is committed
    rest = chunks[:, d:] + (x + (v - x * np.log(RETURN, dtype=np.float32)) * k) * RETURN**k
    return np.concatenate([committed, rest], 1)
