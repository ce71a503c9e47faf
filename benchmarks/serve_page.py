"""From a picture that is dropped on the page of `nanochat serve` to the first words of its description on the screen, in Debian's
Chromium. Needs the extras serve and dev, and `apt-get install chromium`.

    python -m benchmarks.serve_page [--model photos] [--rounds 20]

Each round loads the page again and drops another picture, so that nothing of it is known. A word counts when the browser has
painted a frame with it.
"""

import argparse
import base64
import io
import shutil
import statistics
import sys

import numpy as np
from PIL import Image
from playwright.sync_api import Page, sync_playwright

from benchmarks.serve_load import serving

# drops a file, asks for its description, and resolves with the milliseconds until the first words of it are painted
DROP = """async (base64) => {
    const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
    const data = new DataTransfer();
    data.items.add(new File([bytes], "photo.jpg", {type: "image/jpeg"}));
    const painted = new Promise((resolve) => {
        const watch = new MutationObserver(() => {
            if (!document.querySelector("#log .answer")?.textContent.trim()) return;
            watch.disconnect();
            requestAnimationFrame(() => setTimeout(() => resolve(performance.now())));
        });
        watch.observe(document.getElementById("log"), {childList: true, subtree: true, characterData: true});
    });
    const since = performance.now();
    document.getElementById("drop").dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true}));
    while (document.getElementById("stage").hidden) await new Promise(requestAnimationFrame);
    document.getElementById("describe").click();
    return await painted - since;
}"""


def photograph(seed: int) -> str:
    """A JPEG of 640 x 480 pixels in base64, as no other seed gives it."""
    blocks = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(blocks).resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG")
    return base64.b64encode(file.getvalue()).decode()


def measure(page: Page, address: str, seed: int) -> float:
    page.goto(address)
    page.wait_for_selector("body[data-ready]")
    return page.evaluate(DROP, photograph(seed))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="photos")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("error: there is no chromium here: apt-get install chromium")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with serving(args.model) as (address, _), sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=chromium, args=flags).new_page()
        times = [measure(page, address, seed) for seed in range(args.rounds + 1)][1:]  # the first warms up
    low, middle, high = statistics.quantiles(times, n=4)
    print(
        f"from the drop to the first painted words: {middle:.0f} ms ({low:.0f} .. {high:.0f}), longest {max(times):.0f} ms"
    )


if __name__ == "__main__":
    main()
