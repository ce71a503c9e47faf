"""nanochat serve: an endpoint that OpenAI's clients speak to, and a page. See cli.py."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction, arg

from nanochat.errors import UserError
from nanochat.flags import CHECKPOINT, Device

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

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 < value < 2**31:
                raise UserError(f"--{name.replace('_', '-')} must be above 0, got {value}")


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
    limits: OmitArgPrefixes[LimitFlags] = LimitFlags(),
    device: Device = "auto",
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
    """
    need_extra()
    from nanochat.serving.app import create_app
    from nanochat.serving.guard import Entrance
    from nanochat.serving.http import check_tls
    from nanochat.serving.http import serve as serve_app
    from nanochat.serving.log import log_to_stderr
    from nanochat.serving.openpi import check_settings, is_local
    from nanochat.serving.sources import Sources

    key = read_key(api_key)
    check_settings(host, port, key, 1)
    check_tls(ssl_certfile, ssl_keyfile)
    if media_path is not None and not media_path.is_dir():
        raise UserError(f"--media-path {media_path} is no folder")
    log_to_stderr()
    if key is None and not is_local(host):
        print(
            f"warning: everyone who can reach {host} port {port} can use these models: set --api-key", file=sys.stderr
        )
    models = load_models(checkpoints or ("photos",), device, limits)
    sources = Sources(allow_host, media_path, int(limits.max_picture_mb * 1e6))
    entrance = Entrance(
        key, is_local(host), cors, max_bytes=int(1.4e6 * limits.max_picture_mb * limits.max_pictures) + 2**20
    )
    serve_app(create_app(models, sources, limits, entrance), host, port, ssl_certfile, ssl_keyfile)


def need_extra() -> None:
    """Raises UserError where the packages of the extra `serve` are missing."""
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"nanochat serve needs {error.name}: pip install 'nanochat-vision[serve]'") from error


def load_models(checkpoints, device: str, limits: LimitFlags):
    """The models by the last part of their name. Raises UserError for two of the same name."""
    from nanochat.agent import Agent
    from nanochat.devices import pick_device
    from nanochat.serving.batching import Batcher
    from nanochat.serving.models import Models, Served

    found = {}
    for checkpoint in checkpoints:
        name = Path(checkpoint).name or checkpoint
        if name in found:
            raise UserError(f"two checkpoints are called {name}: rename the folder of one")
        agent = Agent.load(checkpoint, pick_device(device))
        found[name] = Served(name, agent, Batcher(agent, limits.max_rows, limits.max_queue, limits.max_pixels))
    return Models(found)


def read_key(flag: str | None) -> str | None:
    """The key of --api-key, from a file if it names one, else of $NANOCHAT_API_KEY. Raises UserError for an empty one: a
    forgotten variable must not open a server."""
    source, key = ("--api-key", flag) if flag is not None else ("$NANOCHAT_API_KEY", os.environ.get("NANOCHAT_API_KEY"))
    if key is None:
        return None
    if key and os.path.isfile(key):
        source, key = key, Path(key).read_text(encoding="utf-8", errors="replace").strip()
    if not key.strip():
        raise UserError(
            f"{source} is empty, so the server would not ask for a key: give one, such as --api-key $(openssl rand -hex 16), or "
            "serve without one by leaving it out"
        )
    return key
