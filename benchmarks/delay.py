"""What a delay costs in Meta-World, and what it is worth that chunks go on from the actions that are carried out meanwhile.

    python benchmarks/delay.py CHECKPOINT [--tasks mt10] [--episodes 10] [--delays 0 2 4] [--out out/delay.json]

Rows, all with the same weights and layouts: each delay, with the actions until then committed and without; and temporal
ensembling with a request in every step, without a delay. Jerk: of the motions that are sent, see `rollout_figures.jerk`. Re-run
the command to resume: rows that are done are not repeated.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from nanochat.evaluation.rollout import Settings, run_rollouts
from nanochat.files import atomic_path
from nanochat.metaworld.instructions import task_list


@dataclass
class Args:
    checkpoint: tyro.conf.Positional[str]
    tasks: tuple[str, ...] = ("mt10",)
    episodes: int = 10
    "Per task."
    seed: int = 0
    execute: int = 5
    "Steps from one observation to the next."
    delays: tuple[int, ...] = (0, 2, 4)
    processes: int = 2
    out: Path = Path("out/delay.json")


def rows(args: Args) -> dict[str, dict]:
    """Name -> fields of `rollout.Settings`."""
    found = {}
    for delay in args.delays:
        for committed in (True, False) if delay else (False,):
            name = f"delay {delay}{', committed' if committed else ''}"
            found[name] = {"delay": delay, "committed": None if committed else 0, "execute": args.execute}
    return found | {"ensembling": {"ensemble": 0.01, "committed": 0, "execute": 1}}


def main(args: Args) -> None:
    done = json.loads(args.out.read_text()) if args.out.exists() else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = [args.checkpoint, list(args.tasks), args.episodes, args.seed]
    for name, wanted in rows(args).items():
        key = json.dumps([*settings, wanted])
        if key not in done:
            found = run_rollouts(
                args.checkpoint,
                task_list(args.tasks),
                Settings(**wanted),
                episodes=args.episodes,
                seed=args.seed,
                processes=args.processes,
            )
            done[key] = found["drivers"]["policy"] | {"name": name}
            with atomic_path(args.out) as new:
                new.write_text(json.dumps(done, indent=1))
    report([row for key, row in done.items() if json.loads(key)[:-1] == settings])


def report(found: list[dict]) -> None:
    table = Table("row", "success", "95 %", "jerk, mm/step³", title="delays in Meta-World")
    for row in found:
        low, high = row["pooled_ci95"]
        table.add_row(row["name"], f"{row['pooled']:.1%}", f"{low:.1%} .. {high:.1%}", f"{row['jerk']:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main(tyro.cli(Args))
