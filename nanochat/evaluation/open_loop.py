"""How far a policy's actions are from those of demonstrations that it did not learn from: the report for a robot without a
simulator.

At each of some recorded frames the policy predicts a chunk of actions, and each number is compared with the recorded one. Nothing
moves, which is why this is called open loop: a policy can be near to the demonstrations here and still fail on a robot, where its
own errors lead it to states that nobody demonstrated. The reverse does not happen: one that is not nearer to the demonstrations
than a robot that stands still (see `baselines`) is not worth a trial on an arm.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from nanochat.actions import LEAST_RANGE
from nanochat.agent import Agent
from nanochat.data.demonstrations import Demonstrations
from nanochat.errors import UserError
from nanochat.evaluation.baselines import baselines
from nanochat.evaluation.controls import another_group
from nanochat.evaluation.metrics import Estimate, bootstrap
from nanochat.metaworld.questions import paraphrase

POLICY, SHUFFLED, BLIND, OTHER_TASK = "policy", "shuffled", "blind", "other task"  # the rows of the network
ALONE = "no last actions"
Shown = tuple[Demonstrations, np.ndarray]  # (n,) frames of these demonstrations
Progress = Callable[..., Iterable[int]]  # wraps the starts of batches


@dataclass
class OpenLoop:
    """What was predicted at n frames and what was recorded there: chunks of T actions of A numbers.

    frames: (n,) of the data, in order. episode: (n,) of each. truth: (n, T, A) float32. inside: (n, T) bool, False after the end
        of an episode (of its part with the frame's task).
    chunks: row of the report -> (n, T, A) float32. low, high: (A,), the 1st and the 99th percentile of the training data.

    Errors are means of absolute differences: in the units of the data, or as shares of each number's range (high - low), which
    can be averaged over numbers of different units. Numbers that hardly moved in training count only in the former.
    """

    frames: np.ndarray
    episode: np.ndarray
    truth: np.ndarray
    inside: np.ndarray
    chunks: dict[str, np.ndarray]
    low: np.ndarray
    high: np.ndarray

    def __post_init__(self):
        self.moves = self.high - self.low >= LEAST_RANGE  # (A,)
        if not self.moves.any():
            raise UserError("no number of the actions moves in the training data: there is nothing to compare")

    def by_number(self, row: str) -> np.ndarray:
        """(A,): the error of each number over all steps, in the units of the data."""
        return np.abs(self.chunks[row] - self.truth)[self.inside].mean(0)

    def by_number_and_step(self, row: str) -> np.ndarray:
        """(A, T): the same at each step of the chunk; NaN at a step that no frame has."""
        inside = self.inside[..., None]
        total = (np.abs(self.chunks[row] - self.truth) * inside).sum(0)  # (T, A)
        return np.where(inside.any(0), total / np.maximum(inside.sum(0), 1), np.nan).T

    def by_step(self, row: str) -> np.ndarray:
        """(T,): at each step of the chunk, the error as a share of the range, over the numbers that move."""
        return self._shares(self.by_number_and_step(row).T).mean(1)

    def share(self, row: str) -> float:
        """The error as a share of the range, over the numbers that move and all steps."""
        return float(self._shares(self.by_number(row)).mean())

    def compared(self, row: str, other: str) -> Estimate:
        """The `share` of one row divided by that of another, with a 95 % bootstrap interval over episodes, because frames of one
        episode are alike. With one episode the interval has no width."""
        return bootstrap(
            np.stack([self._sums(row), self._sums(other)], axis=1),
            self.episode.tolist(),
            lambda sums: sums[..., :1] / np.maximum(sums[..., 1:], 1e-12),
        )[0]

    def by_episode(self, row: str) -> dict[int, float]:
        """Episode -> its error as a share of the range, over the numbers that move and all steps."""
        sums, steps = self._sums(row), self.inside.sum(1)
        own = {int(episode): self.episode == episode for episode in np.unique(self.episode)}
        return {episode: float(sums[rows].sum() / steps[rows].sum()) for episode, rows in own.items()}

    def _shares(self, errors: np.ndarray) -> np.ndarray:
        """(..., A) in the units of the data -> shares of the range, of the numbers that move."""
        return (errors / np.maximum(self.high - self.low, LEAST_RANGE))[..., self.moves]

    def _sums(self, row: str) -> np.ndarray:
        """(n,): for each frame the sum over its steps of the errors as shares."""
        return (self._shares(np.abs(self.chunks[row] - self.truth)).mean(-1) * self.inside).sum(1)


def run_open_loop(
    agent: Agent,
    data: Demonstrations,
    frames: np.ndarray,
    batch_size: int,
    known: Demonstrations | None,
    progress: Progress,
) -> OpenLoop:
    """Predict a chunk at each of the frames, with the right picture and under the conditions of `conditions`, and compute
    `baselines`. known: as there. Raises UserError for states or actions of another size than the policy's."""
    check_sizes(agent, data.state.shape[1], data.action.shape[1])
    length, targets = agent.metadata["chunk"], agent.metadata["targets"]
    truth, inside = data.chunks(frames, length)
    chunks = {}
    for row, shown, texts in conditions(data, frames, known):
        starts = progress(range(0, len(frames), batch_size), description=f"predicting: {row}")
        chunks[row] = predict(agent, data, frames, shown, texts, batch_size, starts)
    if agent.metadata.get("previous"):
        starts = progress(range(0, len(frames), batch_size), description=f"predicting: {ALONE}")
        texts = [paraphrase(data.task(frame), None) for frame in frames]
        chunks[ALONE] = predict(agent, data, frames, (data, frames), texts, batch_size, starts, previous=False)
    chunks |= baselines(data, frames, length, targets, known)
    low, high = map(np.asarray, agent.action_range)
    return OpenLoop(frames, data.episode[frames], truth, inside, chunks, low, high)


def conditions(
    data: Demonstrations, frames: np.ndarray, known: Demonstrations | None
) -> Iterator[tuple[str, Shown | None, list[str]]]:
    """(row, the frames whose pictures are shown, or None for none, the instruction for each frame).

    shuffled: pictures of another episode, or of `known` if there is no other and it has pictures; the state and the instruction
    are right. blind: no picture. other task: the next task's instruction, if there are several.
    """
    texts = [paraphrase(data.task(frame), None) for frame in frames]
    yield POLICY, (data, frames), texts
    partner = another_group(data.episode[frames].tolist())
    if partner is not None:
        yield SHUFFLED, (data, frames[partner]), texts
    elif known is not None and known.cameras:
        first, end = known.first[0], known.end[0]
        yield SHUFFLED, (known, first + (frames - data.first[frames]) % (end - first)), texts
    yield BLIND, None, texts
    tasks = list(data.by_task)
    if len(tasks) > 1:
        following = dict(zip(tasks, [*tasks[1:], tasks[0]], strict=True))
        yield OTHER_TASK, (data, frames), [paraphrase(following[data.task(frame)], None) for frame in frames]


def predict(
    agent: Agent,
    data: Demonstrations,
    frames: np.ndarray,
    shown: Shown | None,
    texts: Sequence[str],
    batch_size: int,
    starts: Iterable[int],
    previous: bool = True,
) -> np.ndarray:
    """(n, chunk, A) float32. shown, texts: see `conditions`. starts: of the batches. previous: whether a policy that reads the
    last actions is shown the recorded ones."""
    chunks, n_cameras, n_before = [], len(agent.metadata["cameras"]), agent.metadata.get("previous", 0) * previous
    for start in starts:
        rows = slice(start, start + batch_size)
        pictures = [None] * len(frames[rows]) if shown is None else pictures_of(shown[0], shown[1][rows], n_cameras)
        states = data.state[frames[rows]] if agent.metadata["state_dim"] else None
        before = {"previous": [data.before(frame, n_before) for frame in frames[rows]]} if n_before else {}
        chunks.append(agent.act(pictures, states, texts[rows], **before))
    found = np.concatenate(chunks)
    if not np.isfinite(found).all():
        raise UserError("the policy's actions are not finite: its weights are damaged, or its training diverged")
    return found


def pictures_of(data: Demonstrations, frames: np.ndarray, n_cameras: int) -> list:
    """What `Agent.act` is shown at each frame: the picture of the only camera, or {camera: picture}."""
    if n_cameras < 2:
        return list(data.images(frames))
    by_camera = [data.images(frames, number) for number in range(len(data.cameras))]
    return [dict(zip(data.cameras, pictures, strict=True)) for pictures in zip(*by_camera, strict=True)]


def check_sizes(agent: Agent, state: int, action: int) -> None:
    """Raises UserError for data whose states or actions have other numbers than the policy's."""
    about = agent.metadata
    for kind, expected, found in (("state", about["state_dim"], state), ("action", about["action_dim"], action)):
        if found != expected and expected:  # a policy without a state reads none, whatever the data has
            raise UserError(
                f"the policy has {kind}s of {expected} numbers, but this data has {found}: choose data of the same robot, or "
                "train a policy on it"
            )


def frames_to_ask(data: Demonstrations, n: int) -> np.ndarray:
    """Up to n evenly spaced frames of all episodes, in order."""
    return np.unique(np.linspace(0, len(data) - 1, min(n, len(data))).round().astype(int))
