"""Wrong requests to `nanochat serve`, which this starts: mutated bodies, mutated pictures, and schemathesis over /openapi.json.
No answer may have a status of 500, and none may take more than two seconds. Needs the extras serve and dev.

    python -m benchmarks.serve_attack --requests 10000
"""

import argparse
import base64
import collections
import io
import json
import random
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from benchmarks.serve_load import body, picture, serving
from tests.test_serve_more import PATHS, mutated

SLOW_S = 2.0
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


def bodies() -> list[dict]:
    """A right body for each of PATHS."""
    url = picture(0, 64)
    schema = {
        "type": "json_schema",
        "json_schema": {"name": "a", "schema": {"type": "object", "properties": {"a": {}}}},
    }
    shown = [
        {"role": "user", "content": [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "x?"}]}
    ]
    return [
        body("what is it?", url, max_tokens=3, n=2, stop=["x"], temperature=0.5, stream=False, response_format=schema),
        {
            "input": shown,
            "max_output_tokens": 3,
            "stream": True,
            "instructions": "x",
            "text": {"format": {"type": "text"}},
        },
        {"input": [url, url], "encoding_format": "base64"},
        {"image": url, "conf": 0.5},
        {"messages": body("what is it?", url)["messages"], "answer": "a red box"},
        {
            "observation/image": url,
            "observation/state": [0.0, 0.6, 0.2, 1.0],
            "prompt": "open the door",
            "session": "x",
        },
    ]


def broken_picture(rng: random.Random) -> str:
    """A small picture of some format with a few other bytes, or cut off."""
    file = io.BytesIO()
    noise = np.frombuffer(rng.randbytes(32 * 32 * 3), np.uint8).reshape(32, 32, 3)
    Image.fromarray(noise).save(file, rng.choice(FORMATS))
    data = bytearray(file.getvalue())
    for _ in range(rng.randrange(5)):
        data[int(len(data) * rng.random() ** 3)] = rng.randrange(256)  # headers are hit more often
    return base64.b64encode(data[: rng.choice((len(data), rng.randrange(len(data))))]).decode()


def attack(http: httpx.Client, requests: int) -> None:
    rng, statuses, slowest, right = random.Random(0), collections.Counter(), 0.0, bodies()
    for number in range(requests):
        path, sent = PATHS[number // 2 % len(PATHS)], right[number // 2 % len(PATHS)]
        if number % 2:
            path, sent = "/v1/embeddings", {"input": broken_picture(rng)}
        text = json.dumps(mutated(sent, rng) if number % 2 == 0 else sent)
        if rng.random() < 0.1:
            at = rng.randrange(len(text))
            text = text[:at] + rng.choice('{}[]",:0\\x') + text[at + 1 :]
        since = time.perf_counter()
        answer = http.post(path, content=text, headers={"Content-Type": "application/json"})
        took = time.perf_counter() - since
        slowest = max(slowest, took)
        statuses[answer.status_code] += 1
        if answer.status_code >= 500 and answer.status_code != 503 or took > SLOW_S:
            print(f"{answer.status_code} after {took:.2f} s: {path} {text[:300]}")
    print(f"{requests} requests: {dict(sorted(statuses.items()))}; the slowest took {slowest:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--examples", type=int, default=30, help="of schemathesis, for each endpoint; 0 leaves it out")
    options = parser.parse_args()
    with serving("photos", "robot") as (address, _):
        with httpx.Client(base_url=address, timeout=60) as http:
            attack(http, options.requests)
        if options.examples:
            schemathesis = Path(sys.executable).with_name("schemathesis")
            words = f"run {address}/openapi.json --checks not_a_server_error --exclude-path /detect".split()
            subprocess.run([schemathesis, *words, "--max-examples", str(options.examples)], check=False)


if __name__ == "__main__":
    main()
