"""Plays chunks of actions on a robot that goes on moving while its next chunk is made. No torch, no clock, no threads.

    t          t+d         t+s                     s: `execute`, steps from one request to the next
    │ ask      │ receive   │ ask                   d: the delay, steps until the answer is there
    ├──────────┼───────────┼───────────
      the old     the new chunk, from its
      chunk       action d on

Two ways from overlapping chunks to one action a step. The newest chunk replaces the older ones when it is there; at that step
the arm jerks, unless the new chunk agrees with what was carried out while it was made. So a request may carry those actions,
the committed ones, and a policy that was trained with them continues them (real-time chunking: Black et al. 2025, arXiv
2506.07339; learnt in training as in arXiv 2512.05964). Or the mean of all chunks that have an action for this step is carried out
(temporal ensembling: ACT, Zhao et al. 2023, arXiv 2304.13705).
"""

from collections import deque

import numpy as np

from nanochat.actions import described
from nanochat.errors import UserError

REMEMBERED_DELAYS = 10  # the next answer is expected to take as long as the slowest of these


class ChunkPlayer:
    """The plan of one robot, in steps of its control rate. In every step:

        if player.due: send an observation, with the actions that `ask` returns
        if an answer is there: player.receive(chunk)
        action = player.play()

    execute: steps from one request to the next, at least; there is never more than one request under way, and one is due
        earlier if the plan would end before its answer.
    ensemble: None: the newest chunk replaces the older ones. A number m >= 0: temporal ensembling, the action of a step is the
        mean of all chunks that have one for it, weighted by exp(-m i), i = 0 for the oldest of them. ACT has m = 0.01 and a
        request in every step (execute 1); the greater m is, the less the newer ones count.
    committed: the most actions that a request may carry, `metadata["committed"]` of the policy; 0 for one that was trained
        without.
    rest: (D,), the action of a robot that stands still, zeros for relative ones: it is committed before the first chunk, so that
        the robot does not start with a jerk. None if it is unknown.
    previous: how many of the last actions a request carries, `metadata["previous"]`; 0 for a policy that does not read them.

    Raises UserError for settings out of range.
    """

    def __init__(
        self,
        execute: int = 1,
        ensemble: float | None = None,
        committed: int = 0,
        previous: int = 0,
        rest: np.ndarray | None = None,
    ):
        if execute < 1:
            raise UserError(f"execute must be at least 1 step, got {execute}")
        if ensemble is not None and not (np.isfinite(ensemble) and ensemble >= 0):
            raise UserError(f"ensemble must be a number from 0 on, or None for the newest chunk alone, got {ensemble}")
        if committed < 0:
            raise UserError(f"committed must be at least 0 actions, got {committed}")
        if previous < 0:
            raise UserError(f"previous must be at least 0 actions, got {previous}")
        self.execute, self.ensemble, self.committed = execute, ensemble, committed
        self.rest = rest
        self.sent: deque[np.ndarray] = deque(maxlen=previous)
        self.delays: deque[int] = deque(maxlen=REMEMBERED_DELAYS)
        self.reset()

    def reset(self) -> None:
        """Forget the plan, for a new episode. The delays of earlier answers are remembered."""
        self.step = 0  # the step that `play` will carry out next
        self.chunks: list[tuple[int, np.ndarray]] = []  # (the step of its first action, (n, D)), from the oldest on
        self.asked: int | None = None  # the step of the observation that is under way
        self.last_asked: int | None = None
        self.sent.clear()

    # ---- requests

    @property
    def delay(self) -> int:
        """The steps that the next answer is expected to take."""
        return max(self.delays, default=0)

    @property
    def due(self) -> bool:
        """Whether an observation should be sent in this step."""
        if self.asked is not None:
            return False
        started = self.last_asked is not None and self.step - self.last_asked < self.execute
        return not started or len(self.planned(self.delay + 1)) <= self.delay

    def ask(self) -> np.ndarray | None:
        """An observation of this step is sent. Returns the actions (d, D) that will be carried out before its answer is expected,
        to be sent along; None where there is nothing to send."""
        self.asked = self.last_asked = self.step
        n = min(self.delay, self.committed)
        planned = self.planned(n)
        if n and not len(planned) and self.rest is not None:
            return np.repeat(np.asarray(self.rest)[None], n, axis=0)
        return planned if len(planned) else None

    def receive(self, chunk: np.ndarray) -> None:
        """The answer to the observation that is under way. chunk: (n, D), its first action is for the step of the observation.
        Raises UserError for anything else, and where nothing was asked."""
        chunk = np.asarray(chunk)
        if self.asked is None:
            raise UserError("a chunk of actions came, but no observation is under way")
        wrong = chunk.ndim != 2 or not chunk.size or chunk.dtype.kind not in "iuf"
        if wrong or (self.chunks and chunk.shape[1] != self.chunks[-1][1].shape[1]):
            before = f" with {self.chunks[-1][1].shape[1]} numbers as before" if self.chunks else ""
            raise UserError(f"a chunk must be a (steps, numbers) array{before}, got {described(chunk)}")
        self.delays.append(self.step - self.asked)
        self.chunks.append((self.asked, chunk))
        self.asked = None

    def lose(self) -> None:
        """There will be no answer to the observation that is under way: the next one is due at once."""
        self.asked = self.last_asked = None

    def previous(self) -> np.ndarray | None:
        """The last actions (k, D) that were carried out, from the oldest on, to be sent along; None where there is nothing to
        send."""
        return np.stack(self.sent) if self.sent else None

    # ---- actions

    def correct(self, action: np.ndarray) -> None:
        """The action of the last step that was really sent, where it was limited."""
        if self.sent:
            self.sent[-1] = np.asarray(action)

    def play(self) -> np.ndarray | None:
        """The action (D,) of this step; None where no chunk has one, and the robot should hold. Goes on to the next step."""
        action = self.at(self.step)
        if action is not None:
            self.sent.append(action)
        self.step += 1
        self.chunks = [(start, chunk) for start, chunk in self.chunks if start + len(chunk) > self.step]
        return action

    def planned(self, n: int) -> np.ndarray:
        """(k, D), k <= n: the actions of this step and the next ones, as they stand now."""
        found = []
        while len(found) < n and (action := self.at(self.step + len(found))) is not None:
            found.append(action)
        return np.stack(found) if found else np.zeros((0, 0), np.float32)

    def at(self, step: int) -> np.ndarray | None:
        """The action of a step, by the chunks that are there; None if none of them reaches it."""
        found = [chunk[step - start] for start, chunk in self.chunks if start <= step < start + len(chunk)]
        if not found or self.ensemble is None:
            return found[-1] if found else None
        weights = np.exp(-self.ensemble * np.arange(len(found)))
        return (weights @ np.stack(found) / weights.sum()).astype(found[0].dtype)

    @property
    def age(self) -> int | None:
        """How many steps ago the newest observation was made that the action of this step follows from; None if there is none."""
        starts = [start for start, chunk in self.chunks if start <= self.step < start + len(chunk)]
        return self.step - starts[-1] if starts else None
