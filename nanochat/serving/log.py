"""The log of a server: one short line per event on the standard error, and never a flood of them."""

import logging
import os
import time

WINDOW_S = 60
MOST = 20  # lines of one kind within the window
HANDSHAKE = "opening handshake failed"


def log_to_stderr() -> None:
    """Show warnings of all libraries, and what this project has to say. NANOCHAT_DEBUG=1 shows everything."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    debug = bool(os.environ.get("NANOCHAT_DEBUG"))
    if not debug:
        handler.addFilter(readable)
        handler.addFilter(Repeats())
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("nanochat").setLevel(logging.DEBUG if debug else logging.INFO)


def readable(record: logging.LogRecord) -> bool:
    """Whether a record says something. Drops asyncio's line for every write to a connection that is gone, which the server
    reports itself, and cuts the traceback of a failed handshake (a port scan, a browser) to one line."""
    if record.name == "asyncio" and "socket.send() raised exception" in str(record.msg):
        return False
    if record.name.startswith("uvicorn") and "without completing handshake" in str(record.msg):
        return False  # of a websocket that was refused with a status and a reason
    if record.name.startswith("websockets") and record.exc_info and HANDSHAKE in str(record.msg):
        record.msg, record.args = f"{HANDSHAKE}: %s", (" ".join(str(record.exc_info[1]).split())[:200],)
        record.levelno, record.levelname = logging.INFO, "INFO"
        record.exc_info = record.exc_text = None
    return True


class Repeats(logging.Filter):
    """Lets at most MOST lines of one kind (one place in the code) pass per window; the next one says how many were left out."""

    def __init__(self):
        super().__init__()
        self.kinds: dict[tuple[str, int], tuple[float, int]] = {}  # place -> (start of its window, lines in it)

    def filter(self, record: logging.LogRecord) -> bool:
        place, now = (record.pathname, record.lineno), time.monotonic()
        start, count = self.kinds.get(place, (now, 0))
        if now - start >= WINDOW_S:
            if count > MOST:
                self.add(record, f"({count - MOST} more like this were left out before)")
            start, count = now, 0
        self.kinds[place] = start, count + 1
        if count + 1 == MOST:
            self.add(record, f"(more like this are left out for {WINDOW_S} s)")
        return count < MOST

    def add(self, record: logging.LogRecord, remark: str) -> None:
        record.msg, record.args = f"{record.getMessage()} {remark}", ()
