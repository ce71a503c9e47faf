"""Drives an SO-101 arm with a policy of `nanochat policy-server`. docs/ROBOT.md leads there from lerobot-record.

    python examples/so101.py --port /dev/ttyACM0 --id my_arm --camera front=0 wrist=2 --task "put the cube into the box" --dry-run

It runs in the environment of lerobot (0.6, Python 3.12) with websockets and msgpack, and nanochat installed without its
dependencies: no torch of ours, no openpi-client. The arm moves while the next chunk of actions is made
(`nanochat.chunk_player`). What can go wrong ends in holding the pose: no answer from the server, a hanging camera, the stop key.
"""

import argparse
import os
import select
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from nanochat.chunk_player import ChunkPlayer
from nanochat.errors import UserError
from nanochat.safety import SafeActions, hold_last
from nanochat.serving.client import PolicyClient, ServerGone

RETRY_S = 1.0  # between attempts to reach a server that is gone


# ---- the arm


def open_arm(args: argparse.Namespace):
    """lerobot's SO-101 follower with its cameras, connected: it holds its pose. With --dry-run it is limp."""
    try:
        from lerobot.cameras.opencv import OpenCVCameraConfig
        from lerobot.robots.so_follower import SO101Follower, SO101FollowerConfig
    except ImportError as error:
        raise UserError(
            f"lerobot cannot be imported ({error}): pip install 'lerobot[core_scripts,feetech]==0.6.1' in this environment"
        ) from error

    width, height = args.camera_size
    cameras = {
        name: OpenCVCameraConfig(index_or_path=place, width=width, height=height, fps=args.camera_fps)
        for name, place in args.camera
    }
    arm = SO101Follower(
        SO101FollowerConfig(port=args.port, id=args.id, cameras=cameras, use_degrees=not args.no_degrees)
    )
    arm.connect()
    if args.dry_run:
        arm.bus.disable_torque()
    return arm


class Wiring:
    """Which numbers and pictures of the arm are which of the policy's.

    arm: has lerobot's `action_features` {"shoulder_pan.pos": float, ...} and `get_observation()`, a dict of such numbers and of
    pictures (H, W, 3) uint8 by camera. metadata: of the policy. Raises UserError where they do not fit together.
    """

    def __init__(self, arm, cameras: list[str], metadata: dict):
        joints = list(arm.action_features)
        self.state = self.names(metadata, "state", joints) if metadata["state_dim"] else []
        self.action = self.names(metadata, "action", joints)
        if metadata.get("targets") != "absolute":
            raise UserError(
                "the policy's actions are relative (motions), but the arm takes joint positions: train with --targets absolute "
                "if the data's actions are positions, as those of lerobot-record are"
            )
        wanted = metadata.get("cameras") or []
        missing = [name for name in wanted if name not in cameras]
        if missing and not (metadata.get("camera_dropout") and len(missing) < len(wanted)):
            raise UserError(
                f"the policy needs the camera {', '.join(missing)} (all of them: {', '.join(wanted)}), the arm has "
                f"{', '.join(cameras) or 'none'}: name it with --camera {missing[0]}=0"
            )
        if not wanted and len(cameras) != 1:
            raise UserError(f"the policy has one camera without a name: give one --camera, got {len(cameras)}")
        shown = [
            name for name in wanted if name not in missing
        ]  # the policy learnt to do without some (--camera-dropout)
        self.pictures = {name: f"observation.images.{name}" for name in shown} or {cameras[0]: "observation/image"}

    def names(self, metadata: dict, kind: str, joints: list[str]) -> list[str]:
        """The arm's joints in the policy's order; the arm's own order if its data gave them no names."""
        names, n = metadata.get(f"{kind}_names") or [], metadata[f"{kind}_dim"]
        if names and (unknown := [name for name in names if name not in joints]):
            raise UserError(
                f"the policy's {kind} has {', '.join(unknown)}, but the arm's joints are {', '.join(joints)}"
            )
        if not names and n != len(joints):
            raise UserError(f"the policy's {kind} has {n} numbers, the arm {len(joints)} joints ({', '.join(joints)})")
        return names or joints

    def observation(
        self, seen: dict, task: str, committed: np.ndarray | None, previous: np.ndarray | None = None
    ) -> dict:
        """What the server gets. seen: of the arm's `get_observation`. committed, previous: see `ChunkPlayer.ask`, `previous`."""
        sent = {key: np.ascontiguousarray(seen[name]) for name, key in self.pictures.items()} | {"prompt": task}
        if self.state:
            sent["observation/state"] = np.array([seen[name] for name in self.state], np.float32)
        given = {"observation/committed": committed, "observation/previous": previous}
        return sent | {key: actions.astype(np.float32) for key, actions in given.items() if actions is not None}

    def pose(self, seen: dict) -> np.ndarray:
        return np.array([seen[name] for name in self.action], np.float32)


# ---- the policy


class Asker:
    """Asks the policy in a thread of its own, one observation at a time, and connects again when the server is back.

    open_client: returns a connected `PolicyClient`; its policy must be the one that was there at first.
    """

    def __init__(self, open_client: Callable[[], PolicyClient]):
        self.open_client, self.client = open_client, open_client()
        self.metadata, self.worker = self.client.metadata, ThreadPoolExecutor(1)
        self.pending: Future | None = None

    def send(self, observation: dict) -> None:
        self.pending = self.worker.submit(self.infer, observation)

    def infer(self, observation: dict) -> np.ndarray:
        if self.client is None:
            self.client = self.open_client()
            if self.client.metadata != self.metadata:
                raise UserError("the server is back with another policy: start this program again")
        try:
            return self.client.infer(observation)
        except ServerGone:
            self.client = None
            raise

    def answer(self) -> np.ndarray | None:
        """The chunk, if it is there. Raises ServerGone, or UserError for an observation that the server refuses."""
        if self.pending is None or not self.pending.done():
            return None
        done, self.pending = self.pending, None
        return done.result()

    def close(self) -> None:
        self.worker.shutdown()
        if self.client is not None:
            self.client.close()


# ---- the loop


def drive(
    arm, wiring: Wiring, asker, player: ChunkPlayer, fps: float, task: str, speed: float, max_age_s: float,
    stopped: Callable[[], bool], seconds: float = np.inf, dry_run: bool = False, clock=time, say: Callable = print,
) -> Counter:  # fmt: skip
    """Move the arm until `stopped` says so, or for so many seconds. Returns how many steps went how.

    speed: units a second of each joint, at most; measured from what was sent before, at first from the arm's pose.
    max_age_s: actions from an older observation are not carried out.
    """
    low, high = (np.array(limit) for limit in asker.metadata["action_range"])
    start = wiring.pose(arm.get_observation())
    # the arm may start outside of the training data's range: it is led into it at the allowed speed, without a jump
    limits = SafeActions(low, high, hold_last(len(low)), speed / fps, start=start)
    counts, began, retry, holding, trouble = Counter(), clock.monotonic(), 0.0, True, ""
    due = began
    while not stopped() and (now := clock.monotonic()) - began < seconds:
        try:
            if player.due and now >= retry:
                seen = arm.get_observation()
                asker.send(wiring.observation(seen, task, player.ask(), player.previous()))
            if (chunk := asker.answer()) is not None:
                player.receive(chunk)
                trouble = ""
        except (
            ServerGone,
            TimeoutError,
        ) as error:  # TimeoutError: lerobot's for a camera whose last picture is too old
            player.lose()
            retry = now + RETRY_S
            if str(error) != trouble:
                trouble = str(error)
                say(f"{trouble}; trying again")
        age, action = player.age, player.play()
        if action is None or age / fps > max_age_s:  # nothing is sent: the motors keep their last goal
            action = None
            counts["held"] += 1
        else:
            target = limits(action)
            player.correct(target)
            if not dry_run:
                arm.send_action(dict(zip(wiring.action, target.tolist(), strict=True)))
            elif player.step % max(1, round(fps)) == 0:
                say(", ".join(f"{name} -> {value:.1f}" for name, value in zip(wiring.action, target, strict=True)))
            counts["moved"] += 1
        if holding != (action is None):
            holding = action is None
            say("holding the pose: no fresh actions" if holding else "moving")
        due += 1 / fps
        if (late := clock.monotonic() - due) > 1 / fps:  # a step took too long: do not hurry after it
            counts["late"] += 1
            due += late
        clock.sleep(max(0.0, due - clock.monotonic()))
    return counts + limits.counts


class StopKeys:
    """Calling it says how often the user wanted to stop: any key in this terminal, Ctrl-C, or SIGTERM.

    Signals only count, so that none of them cuts a message to the motors in half."""

    def __init__(self):
        self.count = 0

    def __call__(self) -> int:
        while sys.stdin.isatty() and select.select([sys.stdin], [], [], 0)[0] and os.read(sys.stdin.fileno(), 64):
            self.count += 1
        return self.count

    def wait(self) -> None:
        """Until the user wants to stop once more."""
        pressed = self()
        while self() == pressed:
            time.sleep(0.05)

    def signalled(self, *_) -> None:
        self.count += 1

    @contextmanager
    def listening(self):
        old = {number: signal.signal(number, self.signalled) for number in (signal.SIGINT, signal.SIGTERM)}
        terminal = sys.stdin.isatty()
        if terminal:
            import termios
            import tty

            settings = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)
        try:
            yield self
        finally:
            if terminal:
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)
            for number, handler in old.items():
                signal.signal(number, handler)


# ---- the command


def camera(text: str) -> tuple[str, int | Path]:
    name, _, place = text.partition("=")
    if not name or not place:
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER or NAME=PATH, such as front=0, got {text}")
    return name, int(place) if place.isdigit() else Path(place)


def read_args(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--task", required=True, help="the instruction, worded as in the recording")
    parser.add_argument("--port", required=True, help="of the arm; lerobot-find-port tells it")
    parser.add_argument("--id", required=True, help="of the arm, as in lerobot-calibrate and lerobot-record")
    parser.add_argument("--camera", nargs="+", type=camera, default=[], metavar="NAME=PLACE",
                        help="cameras, named as in the recording: front=0 wrist=/dev/video2")  # fmt: skip
    parser.add_argument("--camera-size", nargs=2, type=int, default=(640, 480), metavar=("W", "H"), help="pixels")
    parser.add_argument("--camera-fps", type=int, default=30, help="pictures a second")
    parser.add_argument(
        "--no-degrees", action="store_true", help="joints in -100..100, as recorded by lerobot before 0.5"
    )
    parser.add_argument("--server", default="ws://127.0.0.1:8000", help="address of nanochat policy-server")
    parser.add_argument("--token", help="what the server was started with")
    parser.add_argument("--speed", type=float, default=90.0, help="units (degrees) a second of each joint, at most")
    parser.add_argument("--execute", type=int, help="steps between two requests; default half a chunk")
    parser.add_argument("--ensemble", type=float, metavar="M", help="temporal ensembling as in ACT, such as 0.01")
    parser.add_argument("--no-previous", action="store_true",
                        help="do not tell the policy its last actions: try it where the arm never starts to move")  # fmt: skip
    parser.add_argument("--fps", type=float, help="steps a second; default those of the training data")
    parser.add_argument("--max-age", type=float, default=1.0, help="seconds; older actions are not carried out")
    parser.add_argument(
        "--seconds", type=float, default=np.inf, help="stop after this time; default: when a key is pressed"
    )
    parser.add_argument("--dry-run", action="store_true", help="the arm is limp, and what would be sent is printed")
    args = parser.parse_args(words)
    for name in ("speed", "fps", "max_age", "seconds", "execute"):
        if getattr(args, name) is not None and not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be more than 0")
    return args


def main(words: list[str] | None = None, connect_arm: Callable = open_arm, stop: StopKeys | None = None) -> int:
    """Returns the exit code. connect_arm: gets the arguments, returns an arm with lerobot's methods."""
    args, arm, asker, failed = read_args(words), None, None, 0
    with (stop or StopKeys()).listening() as stop:
        try:
            asker = Asker(lambda: PolicyClient(args.server, args.token))  # first: without a server the arm stays off
            fps = args.fps or asker.metadata.get("fps")
            if not fps:
                raise UserError("the policy does not know the rate of its data: give it with --fps, such as --fps 30")
            arm = connect_arm(args)
            move(arm, asker, fps, args, stop)
        except (UserError, OSError) as error:  # lerobot's errors of a lost device are OSErrors
            print(f"error: {error}", file=sys.stderr, flush=True)
            failed = 2
        if arm is not None:
            if not args.dry_run:
                print("holding the pose. Support the arm and press a key: then its motors are switched off", flush=True)
                stop.wait()
            arm.disconnect()
        if asker is not None:
            asker.close()
    return failed


def move(arm, asker: Asker, fps: float, args: argparse.Namespace, stop: StopKeys) -> None:
    metadata = asker.metadata
    wiring = Wiring(arm, [name for name, _ in args.camera], metadata)
    execute, previous = args.execute or max(1, metadata["chunk"] // 2), metadata.get("previous", 0)
    player = ChunkPlayer(execute, args.ensemble, metadata.get("committed", 0), 0 if args.no_previous else previous)
    print(f"{fps:g} steps a second, {' '.join(wiring.action)}; any key or Ctrl-C stops", flush=True)
    counts = drive(
        arm, wiring, asker, player, fps, args.task, args.speed, args.max_age, stop, args.seconds, args.dry_run
    )
    steps = ", ".join(f"{n} {what}" for what, n in counts.items())
    print(
        f"steps: {steps or 'none'}; the last answers took {', '.join(map(str, player.delays)) or 'no'} steps",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())
