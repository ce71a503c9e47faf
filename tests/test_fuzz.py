"""Damaged inputs, a few of each kind; and the command reports what goes wrong."""

import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from nanochat.errors import UserError

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(BENCHMARKS))
import fuzz  # noqa: E402
import fuzz_kinds  # noqa: E402


def test_damaged_inputs_are_accepted_or_refused_in_one_line():
    scores = fuzz.fuzz(fuzz_kinds.KINDS, 160, seed=1, limit_s=60)  # the command measures time, a test does not
    failures = [failure for score in scores for failure in score.failures.values()]
    assert not failures, "\n".join(map(str, failures))
    for score in scores:
        assert score.outcomes["accepted"] and score.outcomes["refused"] and sum(score.outcomes.values()) == 40
        assert score.peak < fuzz.MAX_MB


def hang():
    while True:
        pass


def refuse(text: str):
    raise UserError(text)


WAYS = (
    ("accepted", lambda: None),
    ("refused", lambda: refuse("expected a number, found 'x'")),
    ("traceback", lambda: {}["a planted bug"]),
    ("traceback", lambda: os._exit(3)),
    ("hang", hang),
    ("memory", lambda: bytearray(fuzz.MAX_MB * 2**20)),
)


class Planted:
    def __init__(self, folder: Path):
        pass

    def case(self, rng):
        way = rng.randrange(len(WAYS))
        return f"way {way}", WAYS[way][1]


def test_planted_faults_are_reported(capsys):
    ways = [fuzz.rng_of("planted", number, 68).randrange(len(WAYS)) for number in range(6)]
    assert set(ways) == set(range(len(WAYS)))
    (score,) = fuzz.fuzz({"planted": Planted}, 6, seed=68, limit_s=8)  # each way once
    assert {name: n for name, n in score.outcomes.items() if n} == Counter(outcome for outcome, _ in WAYS)
    assert not fuzz.report([score], show=9)
    shown = " ".join(capsys.readouterr().out.split())
    for number in (ways.index(way) for way in (2, 3, 4, 5)):
        assert f"--case planted:{number} way {ways[number]}" in shown
    assert "KeyError at" in shown and "a planted bug" in shown and "ended with code 3" in shown


@pytest.mark.parametrize("text", ["", " ", "x" * 2000, "two\nlines"])
def test_messages_that_nobody_can_read_are_reported(text):
    assert fuzz.judge(lambda: refuse(text)).outcome == "message"


def test_a_case_can_be_repeated(capsys):
    shown = []
    for _ in range(2):
        fuzz.run_one(fuzz_kinds.KINDS, "messages:1", seed=0)
        shown.append(capsys.readouterr().out.splitlines()[:2])
    assert shown[0] == shown[1] and len(shown[0]) == 2
