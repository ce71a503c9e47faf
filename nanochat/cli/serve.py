"""nanochat serve: an endpoint that OpenAI's clients and robots speak to, and a page; nanochat policy-server."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from nanochat.errors import UserError, install
from nanochat.flags import CHECKPOINT, Device, EncoderFlags, Runtime, load_agent

Hosts = UseAppendAction[
    Annotated[
        tuple[str, ...],
        arg(
            metavar="HOST",
            help="A web host that pictures may be fetched from. Repeat the flag for more; by default none.",
        ),
    ]
]
Origins = UseAppendAction[
    Annotated[
        tuple[str, ...],
        arg(
            metavar="ORIGIN",
            help="Other web pages that may ask, such as https://example.org, or * for all; default none.",
        ),
    ]
]


@dataclass(frozen=True)
class LimitFlags:
    """How much one request may ask for, and how many may wait."""

    max_picture_mb: float = 20.0
    "Megabytes of one picture."
    max_pixels: int = 25_000_000
    "Pixels of one picture."
    max_pictures: int = 8
    "Pictures in one request."
    max_seconds: float = 60.0
    "An answer that takes longer ends as it is."
    max_rows: int = 32
    "Answers that are made at a time, for each model."
    max_queue: int = 128
    "Requests that wait for their turn, for each model. One more is refused with status 429 and the time to wait."

    def check(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < 2**31:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, got {value}")


@dataclass(frozen=True)
class PolicyFlags:
    """For the first model that acts: how its actions leave, at /act and by openpi's websocket protocol."""

    execute: int | None = None
    "Actions of a chunk that are sent; default all. The robot should execute all of them before it asks again."
    max_change: float | None = None
    "Largest allowed change of each number between consecutive actions; default no limit."
    hold: Literal["auto", "still", "last"] = "auto"
    """What is sent instead of an action that is not finite: still (no motion) for relative actions, last (the previous action)
    for absolute targets; auto is the one that fits the checkpoint."""
    max_clients: int = 16
    """Websocket clients that are served at a time. A further one takes the place of the client that has been idle the longest,
    and waits while all are in use."""


def serve(
    checkpoints: Annotated[
        Positional[tuple[str, ...]],
        arg(metavar="CHECKPOINT...", help=f"{CHECKPOINT} Default: photos.", help_behavior_hint=""),
    ] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: Annotated[str | None, arg(aliases=["--token"])] = None,
    allow_host: Hosts = (),
    media_path: Path | None = None,
    cors: Origins = (),
    ssl_certfile: Path | None = None,
    ssl_keyfile: Path | None = None,
    detect: str | None = None,
    limits: OmitArgPrefixes[LimitFlags] = LimitFlags(),
    policy: OmitArgPrefixes[PolicyFlags] = PolicyFlags(),
    device: Device = "auto",
    runtime: Runtime = "auto",
) -> None:
    """Serve models to OpenAI's clients and to web browsers: http://127.0.0.1:8000 has a page to ask about pictures, /docs lists
    the endpoints.

    Args:
        host: Address to listen on: 127.0.0.1 accepts connections from this machine only, 0.0.0.0 from everywhere.
        port: Port to listen on; 0 picks a free one.
        api_key: The key that clients must send, or the file it is in; default $NANOCHAT_API_KEY. Without it, none is required.
        media_path: A folder whose pictures clients may name as file:///path; by default none.
        ssl_certfile: Certificate (.pem), to serve https: a browser gives its camera to a page of another machine only then.
        ssl_keyfile: The private key of the certificate.
        detect: YOLO weights for /detect, such as yolov9t.pt; see `nanochat detect --help`. By default it answers with status 503.
    """
    settings = Settings(host, port, api_key, "--api-key", allow_host, media_path, cors, ssl_certfile, ssl_keyfile)
    limits.check()
    run_server(checkpoints or ("photos",), settings, limits, policy, device, runtime, detect=detect)


def policy_server(
    checkpoint: Annotated[Positional[str], arg(metavar="CHECKPOINT", help=CHECKPOINT)] = "robot",
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    policy: OmitArgPrefixes[PolicyFlags] = PolicyFlags(),
    device: Device = "auto",
    runtime: Runtime = "auto",
) -> None:
    """Serve a policy with openpi's websocket protocol, so that `openpi-client` can control a robot with it. The same server as
    `nanochat serve CHECKPOINT`.

    Args:
        host: Address to listen on: 127.0.0.1 accepts connections from this machine only, 0.0.0.0 from everywhere.
        port: Port to listen on; 0 picks a free one.
        token: The api_key that clients must send; default $NANOCHAT_API_KEY or $NANOCHAT_TOKEN. Without it, none is required.
    """
    settings = Settings(host, port, token, "--token")
    run_server((checkpoint,), settings, LimitFlags(), policy, device, runtime, must_act=True)


@dataclass(frozen=True)
class Settings:
    """Where the server listens, and who may come in. key: of the flag `key_flag`, not read yet."""

    host: str
    port: int
    key: str | None
    key_flag: str
    allow_hosts: tuple[str, ...] = ()
    media_path: Path | None = None
    cors: tuple[str, ...] = ()
    certfile: Path | None = None
    keyfile: Path | None = None


def run_server(
    checkpoints: Sequence[str], settings: Settings, limits: LimitFlags, policy_flags: PolicyFlags, device: str, runtime: str,
    must_act: bool = False, detect: str | None = None,
) -> None:  # fmt: skip
    """Load the models and serve them until the process is stopped. Raises UserError before that for what cannot be meant."""
    need_extra()
    share_the_cores(must_act)
    from nanochat.serving.app import create_app
    from nanochat.serving.guard import Entrance
    from nanochat.serving.http import check_tls, serve
    from nanochat.serving.log import log_to_stderr
    from nanochat.serving.openpi import check_settings, is_local
    from nanochat.serving.sources import Sources

    key, host, port = read_key(settings.key, settings.key_flag), settings.host, settings.port
    check_settings(host, port, key, policy_flags.max_clients)
    check_tls(settings.certfile, settings.keyfile)
    if settings.media_path is not None and not settings.media_path.is_dir():
        raise UserError(f"--media-path {settings.media_path} is no folder")
    log_to_stderr()
    if key is None and not is_local(host):
        print(f"warning: everyone who can reach {host} port {port} can use these models: set a key", file=sys.stderr)
    detector = None if detect is None else EncoderFlags(weights=detect, device=device).encoder()
    agents = load_agents(checkpoints, device, runtime)
    acting = next(
        (name for name, agent in agents.items() if must_act or hasattr(agent.model.config, "action_dim")), None
    )
    policy = None if acting is None else safe_policy(agents[acting], policy_flags)
    models = serve_agents(agents, limits)
    bytes_of_body = int(1.4e6 * limits.max_picture_mb * limits.max_pictures) + 2**20  # base64 is a third longer
    app = create_app(
        models, Sources(settings.allow_hosts, settings.media_path, int(limits.max_picture_mb * 1e6)), limits,
        Entrance(key, is_local(host), settings.cors, bytes_of_body),
        policy, None if acting is None else models.served[acting].batcher.run, policy_flags.max_clients, detector,
    )  # fmt: skip
    serve(app, host, port, settings.certfile, settings.keyfile)


def need_extra() -> None:
    """Raises UserError where the packages of the extra `serve` are missing."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"nanochat serve needs {error.name}: {install('serve')}") from error


def share_the_cores(alone: bool) -> None:
    """Settings of OpenMP, unless the user made them, before torch or ONNX Runtime is loaded.

    A thread that waits must sleep: one that spins takes the core that others wait for, so that where the engine, the encoder and
    other processes share few cores, a step takes up to a hundred times as long. So the engine and the encoder have one thread
    each. alone: a policy has no encoder beside it, and keeps all cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if not alone:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def load_agents(checkpoints: Sequence[str], device: str, runtime: str) -> dict:
    """The models by the last part of their name. Raises UserError for two of the same name."""
    found = {}
    for checkpoint in checkpoints:
        name = Path(checkpoint).name or checkpoint
        if name in found:
            raise UserError(f"two checkpoints are called {name}: rename the folder of one")
        found[name] = load_agent(checkpoint, device, runtime)
    return found


def serve_agents(agents: dict, limits: LimitFlags):
    """Each model behind a batcher of its own, warm: the first picture of a process takes several times as long."""
    from PIL import Image

    from nanochat.serving.batching import Batcher
    from nanochat.serving.models import Models, Served

    for agent in agents.values():
        if agent.places_per_image:
            agent.look(Image.new("RGB", (64, 64)))
    return Models(
        {
            name: Served(name, agent, Batcher(agent, limits.max_rows, limits.max_queue, limits.max_pixels))
            for name, agent in agents.items()
        }
    )


def safe_policy(agent, flags: PolicyFlags):
    """The policy as it is served. Prints what its clients have to know."""
    from nanochat.serving.policy import SafePolicy

    policy = SafePolicy(agent, flags.execute, flags.max_change, flags.hold)
    if names := policy.metadata["cameras"]:
        rest = "; one may be missing" if policy.metadata["camera_dropout"] else ""
        print(f"reads the camera{'s' * (len(names) > 1)} {', '.join(names)}{rest}")
    instead = {"still": "no motion", "last": "the previous action"}[policy.hold]
    print(
        f"actions are {policy.metadata['targets']}; one that is not finite is replaced by {instead} (--hold {policy.hold})"
    )
    return policy


def read_key(flag: str | None, name: str = "--api-key") -> str | None:
    """The key of the flag, from a file if it names one, else of $NANOCHAT_API_KEY or $NANOCHAT_TOKEN. Raises UserError for an
    empty one: a forgotten variable must not open a server."""
    given = {
        name: flag,
        "$NANOCHAT_API_KEY": os.environ.get("NANOCHAT_API_KEY"),
        "$NANOCHAT_TOKEN": os.environ.get("NANOCHAT_TOKEN"),
    }
    source, key = next(((source, key) for source, key in given.items() if key is not None), ("", None))
    if key and os.path.isfile(key):
        source, key = key, Path(key).read_text(encoding="utf-8", errors="replace").strip()
    if key is not None and not key.strip():
        raise UserError(
            f"{source} is empty, so the server would not ask for a key: give one, such as {name} $(openssl rand -hex 16), or "
            "serve without one by leaving it out"
        )
    return key
