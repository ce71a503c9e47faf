"""Load on `nanochat serve`, which this starts: throughput, waiting times, wrong answers, growth of memory. Needs the
extras serve and dev. Prints a table. Waiting times are those of a client in a process of its own, so that they do not include how
busy the process is that makes the load.

    python -m benchmarks.serve_load --seconds 60 --clients 16
"""

import argparse
import asyncio
import base64
import io
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import numpy as np
from PIL import Image

QUESTIONS = (
    "what is it?",
    "is there a dog?",
    "what is the man doing?",
    "Describe the image.",
    "how many people are there?",
)
WARM_UP = 0.3  # of the time, before memory is measured


def picture(seed: int, side: int = 320) -> str:
    """A data URI of coloured noise, as no other seed gives it."""
    noise = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((side, side)).save(file, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def body(question: str, url: str | None, **options) -> dict:
    shown = [] if url is None else [{"type": "image_url", "image_url": {"url": url}}]
    messages = [{"role": "user", "content": [*shown, {"type": "text", "text": question}]}]
    return {"messages": messages, "stream": True, "stream_options": {"include_usage": True}, "max_tokens": 40} | options


async def ask(http: httpx.AsyncClient, sent: dict, stop_after: int | None = None, slow: float = 0.0) -> dict:
    """{"status", "text", "first": seconds to the first text, "all": seconds, "tokens", "timings", "in time": whether the answer
    was not cut off by the server's limit of seconds}. stop_after: so many events, then the client goes."""
    since = time.perf_counter()
    found = {"status": 0, "text": "", "first": None, "tokens": 0, "timings": {}, "in time": True}
    async with http.stream("POST", "/v1/chat/completions", json=sent) as answer:
        found["status"] = answer.status_code
        events = 0
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk, events = json.loads(line[6:]), events + 1
            piece = chunk["choices"][0]["delta"].get("content") if chunk.get("choices") else None
            if piece:
                found["first"] = found["first"] or time.perf_counter() - since
                found["text"] += piece
            if chunk.get("usage"):
                found["tokens"], found["timings"] = chunk["usage"]["completion_tokens"], chunk["timings"]
                found["in time"] = not any("time of this request" in note for note in chunk.get("notes", ()))
            await asyncio.sleep(slow)
            if stop_after is not None and events >= stop_after:
                break
    return found | {"all": time.perf_counter() - since}


async def memory_mb(http: httpx.AsyncClient, pid: int) -> tuple[float, float]:
    """(MB that the server holds, those of them that are kept vectors, keys and values)."""
    kept = re.findall(r"^nanochat_(?:pictures|prefixes)_bytes\{.* (\S+)$", (await http.get("/metrics")).text, re.M)
    with open(f"/proc/{pid}/status") as status:
        return int(re.search(r"VmRSS:\s+(\d+)", status.read())[1]) / 1024, sum(map(float, kept)) / 2**20


def ask_alone(address: str, sent: dict) -> dict:
    """`ask`, in another process; again after a second where the server is busy, which counts."""

    async def asked() -> dict:
        async with httpx.AsyncClient(base_url=address, timeout=120) as http:
            refused = 0.0
            while (found := await ask(http, sent))["status"] == 429:
                await asyncio.sleep(1)
                refused += found["all"] + 1
            return found | {"all": found["all"] + refused}

    return asyncio.run(asked())


class Good:
    """A client in a process of its own."""

    def __init__(self, address: str):
        self.address = address
        self.pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))

    async def ask(self, sent: dict) -> dict:
        """As `ask` says."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, ask_alone, self.address, sent)


async def throughput(http: httpx.AsyncClient, clients: int, seconds: float, urls: list[str]) -> float:
    """Tokens per second of descriptions of known pictures."""
    end, tokens, since = time.perf_counter() + seconds, 0, time.perf_counter()

    async def client(number: int) -> None:
        nonlocal tokens
        while time.perf_counter() < end:
            found = await ask(http, body("Describe the image.", urls[number % len(urls)]))
            tokens += found["tokens"]  # after the wait: `tokens += await ...` loses what others add meanwhile

    await asyncio.gather(*map(client, range(clients)))
    return tokens / (time.perf_counter() - since)


async def first_tokens(http: httpx.AsyncClient, good: Good, beside: int, n: int, urls: list[str]) -> list[float]:
    """Seconds to the first token of n short questions, while `beside` clients ask for long answers about new pictures."""
    stopped = asyncio.Event()

    async def client(number: int) -> None:
        turn = 0
        while not stopped.is_set():
            turn += 1
            await ask(
                http, body("Describe the image.", picture(10_000 * number + turn), max_tokens=100, temperature=1.0)
            )

    others = [asyncio.create_task(client(number + 1)) for number in range(beside)]
    await asyncio.sleep(1.0 if beside else 0)
    times = []
    for i in range(n):
        found = await good.ask(body("is there a dog?", urls[i % len(urls)], max_tokens=4))
        times.append(found["first"] or found["all"])
    stopped.set()
    await asyncio.gather(*others)
    return times


async def mixed(
    http: httpx.AsyncClient, pid: int, clients: int, seconds: float, urls: list[str], expected: dict
) -> dict:
    """Short and long questions, known and new pictures, and clients that go in the middle."""
    end, counts, memory = (
        time.perf_counter() + seconds,
        {"answers": 0, "5xx": 0, "429": 0, "wrong": 0, "cut off": 0, "out of time": 0},
        [],
    )

    async def client(number: int) -> None:
        rng = random.Random(number)
        while time.perf_counter() < end:
            question, known = rng.choice(QUESTIONS), rng.random() < 0.8
            i = rng.randrange(len(urls))
            url = urls[i] if known else picture(rng.getrandbits(40), rng.choice((64, 320, 1000)))
            gone = rng.randrange(1, 6) if rng.random() < 0.1 else None
            found = await ask(http, body(question, url), gone)
            if found["status"] == 429:
                counts["429"] += 1
                await asyncio.sleep(1)
            elif found["status"] >= 500:
                counts["5xx"] += 1
            elif gone is not None:
                counts["cut off"] += 1
            elif not found["in time"]:
                counts["out of time"] += 1
            else:
                counts["answers"] += 1
                counts["wrong"] += known and found["text"] != expected[question, i]

    async def watch() -> None:
        while time.perf_counter() < end:
            memory.append((time.perf_counter(), *await memory_mb(http, pid)))
            await asyncio.sleep(1)

    start = time.perf_counter()
    await asyncio.gather(watch(), *map(client, range(clients)))
    later = [found for at, *found in memory if at - start > WARM_UP * seconds]
    ends = [np.median(part, axis=0) for part in (later[:5], later[-5:])]
    return counts | {"MB": [mb for mb, _ in ends], "kept MB": [kept for _, kept in ends]}


async def vanishing(http: httpx.AsyncClient, good: Good, urls: list[str]) -> tuple[float, float]:
    """(seconds of a good request alone, while 200 clients vanish in the middle and 50 read slowly)."""
    question = body("Describe the image.", urls[0])
    alone = statistics.median([(await good.ask(question))["all"] for _ in range(5)])
    others = [ask(http, body(QUESTIONS[i % 5], urls[i % len(urls)], temperature=1.0), stop_after=2) for i in range(200)]
    others += [ask(http, body("Describe the image.", urls[i % len(urls)]), slow=0.2) for i in range(50)]
    running = asyncio.gather(*others)
    await asyncio.sleep(0.5)
    beside = (await good.ask(question))["all"]
    await running
    return alone, beside


@dataclass
class Measures:
    """Each prints a row. http: makes the load. clients: of the throughput; the mixed load has four times as many."""

    http: httpx.AsyncClient
    good: Good
    pid: int
    urls: list[str]
    clients: int
    seconds: float

    async def again(self) -> None:
        """First and second question about a picture, to the last word."""
        first = statistics.median([(await ask(self.http, body("is there a dog?", url)))["all"] for url in self.urls])
        second = statistics.median([(await ask(self.http, body("is there a man?", url)))["all"] for url in self.urls])
        times = f"{1e3 * first:.0f} and {1e3 * second:.0f} ms, {first / second:.1f}x"
        row("the same picture: first and second question", times)

    async def throughput(self) -> None:
        one = await throughput(self.http, 1, self.seconds / 6, self.urls)
        many = await throughput(self.http, self.clients, self.seconds / 6, self.urls)
        row(f"tokens per second of 1 and {self.clients} clients", f"{one:.0f} and {many:.0f}, {many / one:.1f}x")

    async def waiting(self) -> None:
        for url in self.urls:
            await ask(self.http, body("what is it?", url))  # known pictures, also with --only
        waits = [await first_tokens(self.http, self.good, n, 60, self.urls) for n in (0, 8)]
        alone, beside = (1e3 * np.percentile(times, 99) for times in waits)
        times = f"{alone:.0f} and {beside:.0f} ms, {beside / alone:.1f}x"
        row("p99 to the first token, alone and beside 8 long ones", times)

    async def vanishing(self) -> None:
        alone, crowded = await vanishing(self.http, self.good, self.urls)
        row("a good request, alone and beside 200 that vanish and 50 slow readers", f"{alone:.2f} and {crowded:.2f} s")

    async def mixed(self) -> None:
        expected = {
            (q, i): (await ask(self.http, body(q, url)))["text"] for q in QUESTIONS for i, url in enumerate(self.urls)
        }
        counts = await mixed(self.http, self.pid, self.clients * 4, self.seconds, self.urls, expected)
        (before, after), kept = counts.pop("MB"), counts.pop("kept MB")
        told = ", ".join(f"{name} {value}" for name, value in counts.items())
        row(f"mixed, {self.clients * 4} clients, {self.seconds:.0f} s", told)
        row(
            "memory of the server after the warm-up and at the end (of it vectors, keys and values)",
            f"{before:.0f} ({kept[0]:.0f}) and {after:.0f} ({kept[1]:.0f}) MB, {100 * (after / before - 1):+.1f} %",
        )


NAMES = ("again", "throughput", "waiting", "vanishing", "mixed")


async def measure(address: str, pid: int, names: list[str], clients: int, seconds: float) -> None:
    limits, good, urls = httpx.Limits(max_connections=1000), Good(address), [picture(seed) for seed in range(8)]
    async with httpx.AsyncClient(base_url=address, timeout=120, limits=limits) as http:
        await ask(http, body("what is it?", picture(99)))  # the first one of a process is slow
        await good.ask(body("what is it?", None, max_tokens=1))
        for name in names:
            await getattr(Measures(http, good, pid, urls, clients, seconds), name)()


@contextmanager
def serving(*models: str) -> Iterator[tuple[str, int]]:
    """A `nanochat serve` of its own: its address and process id."""
    command = [sys.executable, "-m", "nanochat", "serve", *models, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            yield re.search(r"(http://\S+?);", next(line for line in server.stdout if "serving" in line))[1], server.pid
        finally:
            server.terminate()


def row(name: str, value: str) -> None:
    print(f"| {name} | {value} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=60, help="of the mixed load; the others take about as long")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--model", default="photos", help="a checkpoint or a folder of nanochat export")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    options = parser.parse_args()
    with serving(options.model) as (address, pid):
        print(f"load average before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores", flush=True)
        asyncio.run(measure(address, pid, options.only, options.clients, options.seconds))


if __name__ == "__main__":
    main()
