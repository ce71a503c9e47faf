"""Runs the app on a port until SIGTERM or Ctrl-C: answers that run are finished first. No torch."""

import asyncio
import signal
import ssl
from contextlib import suppress
from pathlib import Path

import uvicorn

from nanochat.errors import UserError
from nanochat.serving import openpi

DRAIN_S = 30  # for answers that run when the server is told to stop


def check_tls(certfile: Path | None, keyfile: Path | None) -> None:
    """Raises UserError for a certificate and a key that cannot be used together."""
    if (certfile is None) != (keyfile is None):
        raise UserError("--ssl-certfile and --ssl-keyfile belong together: give both, or neither")
    if certfile is not None:
        try:
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile)
        except (OSError, ValueError) as error:  # SSLError is an OSError
            raise UserError(f"{certfile} and {keyfile} are no certificate and its key: {error}") from error


class Server(uvicorn.Server):
    """uvicorn, which says where it listens on the standard output once it does."""

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        if self.started:
            scheme = "https" if self.config.is_ssl else "http"
            for server in self.servers:
                for sock in server.sockets:
                    host, port = sock.getsockname()[:2]
                    print(
                        f"serving {scheme}://{f'[{host}]' if ':' in host else host}:{port}; press Ctrl-C to stop",
                        flush=True,
                    )


def make_server(app, host: str, port: int, certfile: Path | None = None, keyfile: Path | None = None) -> Server:
    config = uvicorn.Config(
        app, host, port, ssl_certfile=certfile, ssl_keyfile=keyfile, log_config=None, access_log=False, server_header=False,
        timeout_graceful_shutdown=DRAIN_S, timeout_keep_alive=30, backlog=512, lifespan="on",
        ws="websockets-sansio", ws_max_size=openpi.MAX_MESSAGE, ws_max_queue=1, ws_per_message_deflate=False,
    )  # fmt: skip
    return Server(config)


def serve(app, host: str, port: int, certfile: Path | None = None, keyfile: Path | None = None) -> None:
    """Serve until SIGTERM or Ctrl-C. Raises OSError where the address is not available."""
    server = make_server(app, host, port, certfile, keyfile)
    with suppress(ValueError):  # not the main thread
        signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn sends itself the signal again once it has drained
    try:
        asyncio.run(server.serve())
    except SystemExit as stop:  # uvicorn has logged why it could not start
        raise OSError(
            f"cannot listen on {host} port {port}: is another server there? --port 0 takes a free port"
        ) from stop
