"""Where a picture of a request may come from: its own bytes, and, only where the operator allows it, a web host or a folder.

A server that opens any address for its clients lets them into its own network (server-side request forgery, CWE-918). So a URL
must name a host of --allow-host; the name is resolved once, every address it has must be public, and the connection goes to
that very address; redirects are not followed.
"""

import base64
import binascii
import http.client
import ipaddress
import os
import re
import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote_to_bytes, urlsplit

from nanochat.serving.problems import ApiError

FETCH_S = 10.0  # for a whole picture from the web
DATA_URI = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+-]+=[^;,]*)*)(;base64)?,", re.I)


@dataclass(frozen=True)
class Sources:
    """allow_hosts: names of web hosts. media_path: a folder with pictures. max_bytes: of a picture."""

    allow_hosts: Sequence[str] = ()
    media_path: Path | None = None
    max_bytes: int = 20_000_000

    def load(self, url: str, param: str) -> bytes:
        """The bytes behind a data URI, raw base64, an http(s) URL or a file:// URL. Waits for the network. Raises ApiError."""
        kind = url[:8].lower()
        if kind.startswith("data:"):
            data = from_data_uri(url, param)
        elif kind.startswith(("http://", "https://")):
            data = self.fetch(url, param)
        elif kind.startswith("file://"):
            data = self.file(url, param)
        else:
            data = from_base64(url, param)
        if len(data) > self.max_bytes:
            raise ApiError(
                413, f"{param}: a picture has at most {self.max_bytes:,} bytes here", param, "image_too_large"
            )
        return data

    def is_slow(self, url: str) -> bool:
        """Whether `load` may have to wait."""
        return url[:5].lower() in ("http:", "https", "file:")

    def file(self, url: str, param: str) -> bytes:
        """A file below the media path, after all links were followed."""
        if self.media_path is None:
            raise ApiError(400, f"{param}: this server reads no local files (--media-path)", param, "invalid_image_url")
        try:
            parts = urlsplit(url)
            path = Path(os.path.realpath(os.fsdecode(unquote_to_bytes(parts.path))))
            inside = parts.netloc in ("", "localhost") and path.is_relative_to(os.path.realpath(self.media_path))
            if not inside or not path.is_file():  # the same words for both: they do not tell which files there are
                raise ValueError
            with path.open("rb") as file:
                return file.read(self.max_bytes + 1)
        except (OSError, ValueError):
            raise ApiError(
                400, f"{param}: there is no such file below --media-path", param, "invalid_image_url"
            ) from None

    def fetch(self, url: str, param: str) -> bytes:
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port or {"http": 80, "https": 443}[parts.scheme.lower()]
        except ValueError:
            raise ApiError(400, f"{param}: this URL cannot be read", param, "invalid_image_url") from None
        allowed = host in self.allow_hosts and port in (80, 443) or f"{host}:{port}" in self.allow_hosts
        if not allowed or parts.username is not None:
            raise ApiError(
                400, f"{param}: this server fetches pictures from {', '.join(self.allow_hosts) or 'no host'} only "
                "(--allow-host); send the picture itself as a data URI", param, "invalid_image_url",
            )  # fmt: skip
        try:
            return download(parts, host, port, self.max_bytes)
        except (OSError, http.client.HTTPException, ValueError) as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise ApiError(
                400, f"{param}: the picture cannot be fetched: {reason}", param, "invalid_image_url"
            ) from error


def download(parts, host: str, port: int, max_bytes: int) -> bytes:
    """The body of a 200 answer, at most max_bytes + 1 of it, within FETCH_S."""
    end = time.monotonic() + FETCH_S
    address = public_address(host, port)
    connection = http.client.HTTPConnection(host, port, timeout=FETCH_S)
    plain = socket.create_connection(
        (address, port), timeout=FETCH_S
    )  # the address that was checked, not resolved again
    secure = parts.scheme.lower() == "https"
    connection.sock = ssl.create_default_context().wrap_socket(plain, server_hostname=host) if secure else plain
    try:
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request(
            "GET", path, headers={"Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}
        )
        answer = connection.getresponse()
        if answer.status != 200:
            raise ValueError(f"{host} answered with status {answer.status}; redirects are not followed")
        found = bytearray()
        while len(found) <= max_bytes and (piece := answer.read1(65536)):
            found += piece
            if time.monotonic() > end:
                raise TimeoutError(f"{host} took more than {FETCH_S:g} s")
        return bytes(found)
    finally:
        connection.close()


def public_address(host: str, port: int) -> str:
    """An address of the host. Raises ValueError where any of its addresses is private, loopback, link-local or reserved."""
    found = [
        ipaddress.ip_address(info[4][0].split("%")[0])
        for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    ]
    for address in found:
        inner = getattr(address, "ipv4_mapped", None) or getattr(address, "sixtofour", None) or address
        if not (address.is_global and inner.is_global) or address.is_multicast:
            raise ValueError(f"{host} has the address {address}, which is not public")
    return str(found[0])


def from_data_uri(url: str, param: str) -> bytes:
    head = DATA_URI.match(url[:500])
    if head is None:
        raise ApiError(400, f"{param}: expected data:image/png;base64,...", param, "invalid_image_url")
    body = url[head.end() :]
    return from_base64(body, param) if head[3] else unquote_to_bytes(body)


def from_base64(text: str, param: str) -> bytes:
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
        if data:
            return data
    except (binascii.Error, ValueError):
        pass
    raise ApiError(
        400, f"{param}: expected a data URI (data:image/png;base64,...) or base64", param, "invalid_base64_image"
    )
