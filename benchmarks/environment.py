"""The environment that an exported model needs: its size, the time of an import, and memory, in a fresh virtual environment.

    python benchmarks/environment.py EXPORTED PICTURE [--folder FOLDER]

EXPORTED: a folder of `nanochat export` that answers questions. The package is installed there without extras, so without torch.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
IMPORT = """
import time
start, own = time.perf_counter(), time.process_time()
import nanochat.runtime
print(time.perf_counter() - start, time.process_time() - own)
"""
ANSWER = """
import json, resource, sys, time
start = time.perf_counter()
from nanochat.runtime import load
agent = load(sys.argv[1])
loaded = time.perf_counter()
answer = "".join(agent.ask("Describe the image.", agent.look(sys.argv[2])))
answered = time.perf_counter()
unit = 1 if sys.platform == "darwin" else 1024
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
times = {"load": loaded - start, "answer": answered - loaded}
print(json.dumps(times | {"peak": peak, "said": answer, "torch": "torch" in sys.modules}))
"""


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exported", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--folder", type=Path, help="where to make the environment; by default a temporary folder")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp())
    try:
        venv.create(folder, with_pip=True, clear=True)
        python, empty = folder / "bin/python", size_of(folder)
        install = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", ROOT]
        subprocess.run(install, check=True)
        packages, models = size_of(folder) - empty, size_of(options.exported)
        imports = [subprocess.check_output([python, "-c", IMPORT], cwd=folder).split() for _ in range(7)]
        waited, own = (statistics.median(map(float, column)) for column in zip(*imports, strict=True))
        words = [python, "-c", ANSWER, options.exported.resolve(), options.picture.resolve()]
        found = json.loads(subprocess.check_output(words, cwd=folder))
        print(f"packages {packages / 1e6:.0f} MB, the exported model {models / 1e6:.1f} MB")
        print(f"import {waited:.2f} s, of the processor {own:.2f} s (medians of 7)")
        print(f"load {found['load']:.2f} s, answer {found['answer']:.2f} s")
        print(f"peak resident memory {found['peak'] / 1e6:.0f} MB; torch imported: {found['torch']}")
        print(f"said: {found['said']}")
        if found["torch"]:
            sys.exit("torch was imported")
    finally:
        if options.folder is None:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
