"""The log of the policy server: every event is a line, and nothing floods it."""

import logging
import socket
import struct
import subprocess
import sys
import time

import pytest

pytest.importorskip("websockets")
from nanochat.serving import log

SERVES = """
from nanochat.cli.serve import LimitFlags
from nanochat.serving.app import create_app
from nanochat.serving.guard import Entrance
from nanochat.serving.http import serve
from nanochat.serving.log import log_to_stderr
from nanochat.serving.models import Models
from nanochat.serving.sources import Sources
class Idle:
    metadata = {"chunk": 2, "name": "echo"}
    def session(self): return lambda observation: {}
log_to_stderr()
serve(create_app(Models({}), Sources(), LimitFlags(), Entrance("sesame"), Idle(), None, 2), "127.0.0.1", 0)
"""
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\nAuthorization: Api-Key sesame\r\n\r\n"
)
PING = bytes([0x89, 0x80, 0, 0, 0, 0])


def test_events_and_limits_are_lines_and_lost_connections_no_flood():
    with subprocess.Popen([sys.executable, "-c", SERVES], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            port = int(process.stdout.readline().split(b":")[-1].split(b";")[0])
            with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:  # many pings, then a reset
                peer.sendall(UPGRADE)
                assert peer.recv(4000).startswith(b"HTTP/1.1 101")
                time.sleep(0.3)
                peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                peer.sendall(PING * 3000)
            for _ in range(40):
                with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
                    peer.sendall(UPGRADE.replace(b"sesame", b"guess"))
                    assert peer.recv(4000).startswith(b"HTTP/1.1 401")
                with socket.create_connection(("127.0.0.1", port), timeout=10) as peer:
                    peer.sendall(b"\x16\x03\x01garbage\r\n\r\n")
            time.sleep(0.3)
        finally:
            process.terminate()
            lines = process.communicate(timeout=20)[1].decode().splitlines()
    text = "\n".join(lines)
    assert "connected (1 of 2 clients)" in text and "disconnected" in text
    assert "wrong or missing API key: send Authorization: Bearer KEY (more like this are left out for 60 s)" in text
    assert "socket.send" not in text and "Traceback" not in text and len(lines) < 60


def record(line: int, message="line %d", args=(7,), name="nanochat"):
    return logging.LogRecord(name, logging.INFO, "file.py", line, message, args, None)


def test_repeated_lines_are_counted(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: now[0])
    repeats = log.Repeats()
    passed = [one for one in (record(1) for _ in range(50)) if repeats.filter(one)]
    assert len(passed) == log.MOST and "left out for 60 s" in passed[-1].getMessage()
    assert repeats.filter(record(2, "100 % sure", ()))  # another place in the code
    now[0] = 61.0
    late = record(1)
    assert repeats.filter(late) and late.getMessage() == "line 7 (30 more like this were left out before)"


def test_a_failed_handshake_is_one_line():
    one = record(1, "opening handshake failed", (), "websockets.server")
    try:
        raise EOFError("stream ends\nafter 0 bytes")
    except EOFError:
        one.exc_info = sys.exc_info()
    assert log.readable(one)
    assert logging.Formatter().format(one) == "opening handshake failed: stream ends after 0 bytes"
    assert not log.readable(record(1, "socket.send() raised exception.", (), "asyncio"))
