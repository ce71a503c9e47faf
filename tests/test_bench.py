"""nanochat bench: turns, medians and ratios, what could not run, fitted exponents, and the page that it writes."""

import json
import subprocess
from importlib import import_module
from inspect import signature
from pathlib import Path

import pytest
import torch

from nanochat.bench import fixed, growth, ours, report, runner
from nanochat.bench.groups import GROUPS
from nanochat.bench.runner import Contestant, Race, Result, Worker, on_device, run_race
from nanochat.engine import Engine
from nanochat.errors import UserError

TURNS: list[str] = []


class Fake(Worker):
    """A contestant that says its times instead of measuring them, and cannot run if it has none."""

    def __init__(self, contestant, threads):
        self.contestant, self.wall, self.own, self.peak = contestant, [], [], 0
        self.about, self.times = {"threads": threads}, iter(contestant.arguments["times"])

    def make(self):
        if not self.contestant.arguments["times"]:
            raise ChildProcessError("ImportError: no such package")

    def tell(self, line):
        self.n = int(line)

    def answer(self):
        TURNS.extend([self.contestant.label] * self.n)
        seconds = [next(self.times) for _ in range(self.n)]
        return {"wall": seconds, "own": [2 * value for value in seconds], "peak": 7_000_000}

    def close(self):
        TURNS.append(f"{self.contestant.label} ends")


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(runner, "Worker", Fake)
    TURNS.clear()


def contestant(label, *times):
    return Contestant(label, "ours:none", {"times": [9.0] * (runner.WARM_UP if times else 0) + list(times)})


def test_contestants_take_turns_and_the_warm_up_does_not_count(fakes):
    race = Race("a race", (contestant("a", 0.4, 0.2, 0.6), contestant("b", 0.9, 0.7, 0.8)), times=4)
    a, b = run_race(race, threads=2, rounds=3)
    assert TURNS == ["a"] * 3 + ["b"] * 3 + ["a", "b"] * 3 + ["b ends", "a ends"]
    assert (a.wall, a.low, a.high, a.own) == pytest.approx((100, 75, 125, 200))  # ms, of each of the four
    assert b.wall == pytest.approx(200) and a.about == {"threads": 2} and a.peak == 7_000_000
    table = report.race_table(race, [a, b]).splitlines()
    assert table[2] == "| a | 100 (75.0 .. 125) | 1.00 | 200 | 1.00 | 7 |"
    assert table[3] == "| b | 200 (188 .. 212) | 2.00 | 400 | 2.00 | 7 |"


def test_a_long_race_has_fewer_rounds(fakes):
    (a,) = run_race(Race("long", (contestant("a", 1.0, 3.0),), rounds=2), threads=1, rounds=50)
    assert a.wall == 2000


def test_a_peer_that_cannot_run_is_named_and_ours_is_an_error(fakes):
    race = Race("a race", (contestant("a", 0.1), contestant("b")))
    results = run_race(race, threads=1, rounds=1)
    assert [result.missing for result in results] == ["", "ImportError: no such package"]
    assert "| b | not measured: ImportError: no such package |" in report.race_table(race, results)
    with pytest.raises(UserError, match="a race: b cannot run: ImportError"):
        run_race(Race("a race", (contestant("b"), contestant("a", 0.1))), threads=1, rounds=1)


def test_a_process_of_its_own(tmp_path):
    worker = Worker(Contestant("ours", "ours:forward", {"length": 4}), threads=1)
    worker.make()
    worker.run(2)
    worker.close()
    assert worker.about["parameters"] > 2e6 and len(worker.wall) == 2 and min(worker.own) > 0 and worker.peak > 5e7
    assert worker.process.returncode == 0


def test_every_contestant_exists_and_takes_its_arguments():
    for name, group in GROUPS.items():
        for race in group("yolov9t.yaml", "photos", "robot", "picture.jpg"):
            assert len({one.label for one in race.contestants}) == len(race.contestants), name
            for one in race.contestants:
                module, function = one.make.split(":")
                takes = signature(getattr(import_module(f"nanochat.bench.{module}"), function))
                takes.bind(**one.arguments)
                if one.only != "cpu":
                    takes.bind(**one.arguments, device="cuda")


def test_on_a_gpu_run_those_who_can():
    both, here, there = (
        Contestant(only or "both", "ours:forward", {"length": 4}, only) for only in ("", "cpu", "cuda")
    )
    race = Race("a race", (both, here, there))
    assert on_device(race, "cpu").contestants == (both, here)
    ran = on_device(race, "cuda:1").contestants
    assert [(one.label, one.arguments) for one in ran] == [
        (label, {"length": 4, "device": "cuda:1"}) for label in ("both", "cuda")
    ]


class Forgetful(fixed.FixedCache):
    """A token sees the first place alone."""

    def plan(self, T):
        positions, mask = super().plan(T)
        return positions, mask if T > 1 else mask & (torch.arange(self.max_len) < 1)


def test_fixed_shapes_say_what_the_engine_says(monkeypatch):
    """Uncompiled: torch.compile changes no shape."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(fixed.shutil, "which", lambda name: name)
    monkeypatch.setitem(ours.SHAPES, "tiny", (32, 2, 2, 50))
    generate, about = fixed.decode("tiny", 5, 6, compiled=True)
    with torch.no_grad():
        assert generate()[0] == Engine(ours.model_of("tiny")).generate([ours.prompt(5, 50)], 6)[0]
    assert about["parameters"] == ours.model_of("tiny").num_parameters()
    monkeypatch.setattr(fixed, "FixedCache", Forgetful)
    with pytest.raises(ImportError, match="says something else"):
        fixed.decode("tiny", 5, 6, compiled=True)
    monkeypatch.setattr(fixed.shutil, "which", lambda name: None)
    with pytest.raises(ImportError, match="needs a C\\+\\+ compiler"):
        fixed.decode("tiny", 5, 6, compiled=True)


# ---- growth


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_law(power):
    sizes = [1, 2, 4, 8]
    assert growth.exponent(sizes, [3 * size**power for size in sizes]) == pytest.approx(power)


def test_growth_measures_each_size(monkeypatch, tmp_path):
    monkeypatch.setattr(growth, "REPEATS", 2)
    _, about = growth.grow("prefill", [4, 8])
    assert [row[0] for row in about["rows"]] == [4, 8] and all(min(row) > 0 for row in about["rows"])
    table = report.growth_table({"prefill": [[64, 1e-3, 2e-3, 5e6], [128, 4e-3, 4e-3, 6e6]]}).splitlines()
    assert table[2] == "| read a row | 64 .. 128 tokens | 2.00 | 1.00 | 2 | 1.00, 4.00 | 5, 6 |"
    report.plot_growth({"prefill": about["rows"]}, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 5000


def test_parameters_are_counted_as_the_models_have_them():
    for millions, (width, layers, vocab) in growth.WIDTHS.items():
        if millions < 20:
            found = growth.decoder(width, layers, vocab, context=16).num_parameters()
            assert found == growth.parameters_of(millions) == pytest.approx(millions * 1e6, rel=0.5)


# ---- the page


def test_a_group_replaces_its_own_section_only(tmp_path):
    page = tmp_path / "benchmarks.md"
    for group, text in (("embed", "first"), ("ask", "asked"), ("embed", "    a command\n\nsecond")):
        report.write_section(page, group, text)
    text = page.read_text()
    assert text == report.HEAD + "\n## embed\n\n    a command\n\nsecond\n\n## ask\n\nasked\n"


def test_roofline():
    machine = {"bytes": 20e9, "float32": 1e11, "bfloat16": 3e11}
    results = [Result("torch", wall=1.0), Result("int8", wall=1.0), Result("Llama", missing="ImportError")]
    lines = report.roofline_lines(machine, {"a token of 2.1 M parameters, batch 1": results, "other": results})
    weights = 12 * 2 * 256**2 + 1000 * 256
    assert lines.splitlines()[1:] == [
        f"- 2.1 M, torch: {4 * weights / 1e6:.1f} GB/s, {4 * weights * 1e3 / 20e9:.0%}.",
        f"- 2.1 M, int8: {1.0625 * weights / 1e6:.1f} GB/s, {1.0625 * weights * 1e3 / 20e9:.0%}.",
    ]


def test_the_command(monkeypatch, nanochat, tmp_path):
    def race(race, threads, rounds, progress):
        return [Result(one.label, 1.0 + number, 1, 3, 2, 9_000_000) for number, one in enumerate(race.contestants)]

    monkeypatch.setattr(runner, "run_race", race)
    page, found = tmp_path / "page.md", tmp_path / "found.json"
    printed = nanochat("bench", "act", "--threads", "2", "-o", page, "--json", found).out
    assert "| ResNet-18 of torchvision alone, ready pixels of 128 x 128 | 4.00 (1.00 .. 3.00) | 4.00 |" in printed
    assert "nanochat bench act --threads 2" in page.read_text() and "2 threads" in page.read_text()
    assert json.loads(found.read_text())["act"]["one camera of 128 x 128 to a chunk of actions"][0]["label"] == "robot"


def test_a_run_that_is_stopped_leaves_the_races_that_it_has(monkeypatch, nanochat, tmp_path):
    def race(race, *_):
        if "two cameras" in race.name:
            raise KeyboardInterrupt
        return [Result(one.label, 1.0, 1, 1, 1, 9_000_000) for one in race.contestants]

    monkeypatch.setattr(runner, "run_race", race)
    page, found = tmp_path / "page.md", tmp_path / "found.json"
    printed = nanochat("bench", "act", "-o", page, "--json", found, code=130).out
    for text in (printed, page.read_text()):
        assert "| one camera of 128 x 128 to a chunk of actions | ms |" in text and "two cameras" not in text
    assert list(json.loads(found.read_text())["act"]) == ["one camera of 128 x 128 to a chunk of actions"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rounds", "0"], "--threads and --rounds must be at least 1, got 1 and 0"),
        (["--device", "gpu"], "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        (["--device", "cuda:99"], "there is no cuda:99 here"),
        (["--picture", "nowhere.jpg"], "--picture: there is no file nowhere.jpg"),
        (["--policy", "nowhere"], "--policy: there is no checkpoint nowhere"),
        (["-o", "page.txt"], "page.txt"),
        (["--checkpoint", "nowhere", "-o", "/no/such/page.md"], "/no/such"),
    ],
)
def test_wrong_requests(nanochat, words, message):
    assert message in nanochat("bench", "ask", *words, code=2).err
    assert not Path("page.txt").exists()


def test_contestants_that_load_at_once_share_an_export(monkeypatch, tmp_path):
    """Each makes its own; the folder of whoever is first stays."""
    monkeypatch.setenv(ours.EXPORTS, str(tmp_path))

    def run(words, **options):
        new = Path(words[-1].split("(*(")[1].split(",")[0].strip("'"))
        for folder in (new, new.with_suffix("")):  # another contestant is done meanwhile
            (folder / "onnx").mkdir(parents=True)
            (folder / "onnx" / "by").write_text(folder.suffix)
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(subprocess, "run", run)
    folder = Path(ours.exported("export_shape", "2.1 M", False))
    assert (folder / "by").read_text() == "" and folder == Path(ours.exported("export_shape", "2.1 M", False))
