"""The rows of ablations.py as a page in Markdown and a plot."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nanochat.files import atomic_path

PAGE, PLOT = "ABLATIONS.md", "ablations.png"
MEASURES = {"bleu4": "BLEU-4", "cider": "CIDEr"}
PEER = "ResNet-18 alone"
COLUMNS = (
    "row", "vectors", "trained", "all", "min", "question", "caption", "peer",
    *(column for name in MEASURES.values() for column in (name, "95 %", "shuffled", "blind")),
)  # fmt: skip
INTRODUCTION = """\
# Ablations

What each part of the recipe `photos` is worth. Every row is one short run of the same size: {size}.
Compare rows with each other only; the models that ship were trained longer. Made by:

    python benchmarks/ablations.py --data {data} --epochs {epochs:g} --taught DIR

DIR is the checkpoint of `nanochat train distill`; without it, the rows of the taught encoder are left out.

`vectors`: numbers of a picture that the decoder reads, vectors x width. `trained`, `all`: parameters in millions, without
and with those that stay as they are. `min`: the processor's minutes of training, on {threads}; a frozen encoder's maps are
computed before and not included. `question`, `caption`: milliseconds on one thread in float32, from a picture's file to an
answer of 2 and a caption of 12 tokens, beside torchvision's ResNet-18 (`peer`: one pass, 224 pixels) in the same rounds,
medians; all times were taken on a machine that may have had other work. `shuffled` is the score with another picture, `blind`
without one; `95 %` is the bootstrap interval over pictures.

![BLEU-4 and the time to a caption of every row]({plot})
"""


def write(
    docs: Path,
    data: str,
    comparisons: Mapping[str, Sequence[str]],
    texts: Mapping[str, str],
    records: Mapping[str, dict],
) -> None:
    """Write PAGE and PLOT into a folder. data: name of the data set; comparisons: {heading: rows}; texts, records: of rows by
    their names. Rows without a record are named as missing."""
    if not records:
        return
    with atomic_path(docs / PAGE) as new:
        new.write_text(page(data, comparisons, texts, records), encoding="utf-8")
    shown = [name for name in dict.fromkeys(name for rows in comparisons.values() for name in rows) if name in records]
    with atomic_path(docs / PLOT) as new:
        plot({texts[name]: records[name] for name in shown}).savefig(new, format="png", dpi=110)


def page(data: str, comparisons, texts, records) -> str:
    settings = next(iter(records.values()))["settings"]
    threads = settings["threads"] or "all"
    size = f"{settings['epochs']:g} x the captions of {data}, {settings['scored']:,} held-out pictures, greedy"
    parts = [
        INTRODUCTION.format(
            size=size,
            data=data,
            epochs=settings["epochs"],
            plot=PLOT,
            threads="one thread" if threads == 1 else f"{threads} threads",
        )
    ]
    for heading, names in comparisons.items():
        lines = [f"## {heading}", "", line_of(COLUMNS), line_of(["---", *["---:"] * (len(COLUMNS) - 1)])]
        lines += [line_of(cells(texts[name], records[name])) for name in names if name in records]
        missing = [name for name in names if name not in records]
        if missing:
            lines += ["", f"Not run: {', '.join(f'`{name}`' for name in missing)}."]
        if len(missing) < len(names):
            parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def line_of(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def cells(text: str, record: dict) -> list[str]:
    n, width = record["vectors"]
    found = [text, f"{n} x {width}", f"{record['trained'] / 1e6:.2f}", f"{record['parameters'] / 1e6:.2f}"]
    found += [f"{record['minutes']:.1f}", *(f"{record['ms'][name]:.0f}" for name in ("question", "caption", PEER))]
    for name in MEASURES:
        measure = record["scores"][name]
        low, high = measure["ci95"]
        found += [f"**{measure['aligned']:.1f}**", f"{low:.1f} .. {high:.1f}"]
        found += [f"{measure[key]:.1f}" for key in ("shuffled", "blind")]
    return found


def plot(records: Mapping[str, dict]) -> Figure:
    """BLEU-4 and CIDEr with their intervals and controls, and the time to a caption beside the peer's; a line for each row."""
    figure = Figure(figsize=(13, 1.6 + 0.36 * len(records)), layout="constrained")
    FigureCanvasAgg(figure)
    *scores, speed = figure.subplots(1, 3, sharey=True, width_ratios=(3, 3, 2))
    places = range(len(records))
    for axes, (name, label) in zip(scores, MEASURES.items(), strict=True):
        found = [record["scores"][name] for record in records.values()]
        values = [measure["aligned"] for measure in found]
        reach = [[abs(v - measure["ci95"][end]) for v, measure in zip(values, found, strict=True)] for end in (0, 1)]
        axes.barh(places, values, xerr=reach, color="#8ab4d8", capsize=3, label="right picture, 95 % interval")
        for key, marker, colour in (("shuffled", "o", "#c0392b"), ("blind", "x", "#333333")):
            axes.scatter([measure[key] for measure in found], places, marker=marker, color=colour, zorder=3, label=key)
        axes.set_xlabel(label)
    times = [record["ms"]["caption"] / record["ms"][PEER] for record in records.values()]  # in the same rounds
    speed.barh(places, times, color="#a9cfa0")
    speed.set_xlabel(f"time to a caption / {PEER}")
    speed.set_yticks(places, [name.replace("`", "") for name in records])
    speed.invert_yaxis()
    figure.legend(*scores[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, fontsize=8)
    return figure
