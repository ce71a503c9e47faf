"""Worker processes: they do not run the user's script again."""

import subprocess
import sys

from nanochat.workers import in_processes, without_main

SCRIPT = """
from nanochat.workers import in_processes
print("the script runs")
print(sorted(in_processes(abs, [-3, 1, -2], 2)))
"""


def test_a_script_needs_no_guard(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "the script runs\n[1, 2, 3]\n"), done.stderr


def test_the_main_module_is_as_before():
    main = sys.modules["__main__"]
    before = {name: getattr(main, name, None) for name in ("__file__", "__spec__")}
    with without_main():
        assert main.__spec__ is None and not hasattr(main, "__file__")
    assert {name: getattr(main, name, None) for name in ("__file__", "__spec__")} == before
    assert list(in_processes(abs, [-1], 1)) == [1]
