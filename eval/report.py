"""`python eval/report.py RUN RUN … --out DIR`: our results beside the published ones, as Markdown and as a picture.

A RUN is a directory that eval/run.py wrote, or the result.json in it. Intervals are 95 %, clustered by picture; two of our
models are also compared question by question, which sees smaller differences than their two intervals do.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]  # a checkout needs no installation

import tyro  # noqa: E402
from finished import Run, read_run  # noqa: E402
from intervals import paired  # noqa: E402
from published import COLUMNS, PUBLISHED  # noqa: E402
from questions import whole  # noqa: E402

from visualrwkv.commandline import parse, run  # noqa: E402

ALL_PAIRS = 3
"""Up to so many models are all compared with each other; more only with the first."""

Table = list[list[str]]


@dataclass(frozen=True)
class Options:
    """Our results beside the published ones."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # directories of eval/run.py, or the result.json files in them
    out: Path = Path("report")  # report.md and report.png are written here


def main_table(runs: Sequence[Run]) -> Table:
    """A column for each figure that a run has; ours first, then who published one of them."""
    keys = [key for key in COLUMNS if any(key in run_.figures for run_ in runs)]
    table = [["model", "source", *(COLUMNS[key].title for key in keys)]]
    for run_ in runs:
        cells = [run_.figures[key].text(COLUMNS[key].decimals) if key in run_.figures else "–" for key in keys]
        table.append([run_.name, "ours", *cells])
    for row in PUBLISHED:
        if any(key in row.figures for key in keys):
            cells = [f"{row.figures[key]:.1f}" if key in row.figures else "–" for key in keys]
            table.append([row.name, row.source, *cells])
    return table


def differences(runs: Sequence[Run]) -> Table:
    """The second model less the first, on the questions that both answered. Bold: the interval does not hold 0."""
    pairs = list(itertools.combinations(runs, 2))
    if len(runs) > ALL_PAIRS:
        pairs = [(runs[0], other) for other in runs[1:]]
    table = [["bench", "first", "second", "second − first", "questions", "pictures"]]
    for first, second in pairs:
        for key, column in COLUMNS.items():
            one, two = first.figures.get(key), second.figures.get(key)
            if not one or not two or one.split != two.split or not one.values.keys() & two.values.keys():
                continue
            found = paired(one.values, two.values, {**two.pictures, **one.pictures}).scaled(100)
            told = f"{found.mean:+.1f} ± {found.half:.1f}"
            told = told if found.holds_zero else f"**{told}**"
            cells = [told, str(found.questions), str(found.pictures)]
            table.append([column.title, first.name, second.name, *cells])
    return table


def protocols(runs: Sequence[Run]) -> list[str]:
    """By what each column is measured, and on how many questions."""
    lines = []
    for key, column in COLUMNS.items():
        ours = {(f.split, f.questions) for run_ in runs if (f := run_.figures.get(key))}
        if ours:
            told = ", ".join(f"{split or 'its'} split, {count:,} questions" for split, count in sorted(ours))
            lines.append(f"- {column.title}: {column.protocol}. Ours: {told}.")
    return lines


def told_apart(runs: Sequence[Run], places: Sequence[Path]) -> list[Run]:
    """Runs of one model under several settings get the names of their directories as well."""
    names = [run_.name for run_ in runs]
    return [
        replace(run_, name=f"{run_.name}, {place.parent.name if place.is_file() else place.name}")
        if names.count(run_.name) > 1
        else run_
        for run_, place in zip(runs, places)
    ]


def markdown(table: Table) -> str:
    head, *rows = ([cell.replace("|", "\\|") for cell in row] for row in table)
    rule = ["---", "---", *["--:"] * (len(head) - 2)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def written(runs: Sequence[Run]) -> str:
    """The whole report."""
    limited = any(figure.limit for run_ in runs for figure in run_.figures.values())
    parts = [
        "# Results",
        markdown(main_table(runs)),
        "± is half of a 95 % interval, clustered by picture. A figure that is no mean over questions stands alone, with the "
        "share of right answers after it. Published rows are quoted, under their own protocols."
        + (" * of the first questions only." if limited else ""),
        "## Protocols",
        "\n".join([*protocols(runs), *(f"- {r.name}: {r.settings}." for r in runs if r.settings)]),
    ]
    compared = differences(runs)
    if len(compared) > 1:
        parts += [
            "## Differences between our models",
            markdown(compared),
            "Points of the mean over questions that both answered, question by question. Bold: the 95 % interval does not "
            "hold 0. Of many such comparisons one in twenty is bold by chance.",
        ]
    return "\n\n".join(parts) + "\n"


def draw(table: Table, ours: int, file: Path) -> None:
    """The main table as a picture, our rows shaded."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    widths = [1.12 * max(len(row[at]) for row in table) + 2 for at in range(len(table[0]))]
    figure, axes = plt.subplots(figsize=(sum(widths) * 0.085 + 0.4, len(table) * 0.28 + 0.5))
    axes.axis("off")
    drawn = axes.table(
        table[1:], colLabels=table[0], cellLoc="right", loc="center", colWidths=[w / sum(widths) for w in widths]
    )
    drawn.auto_set_font_size(False)
    drawn.set_fontsize(9)
    drawn.scale(1, 1.35)
    for (row, column), cell in drawn.get_celld().items():
        cell.PAD = 0.75 / widths[column]  # three quarters of a letter, whatever the column's width
        cell.set_linewidth(0.4)
        cell.set_edgecolor("#bbbbbb")
        if column < 2:
            cell.set_text_props(ha="left")
        if row == 0:
            cell.set_text_props(weight="bold")
        elif row <= ours:
            cell.set_facecolor("#e8f0fa")
    with whole(file) as part:
        figure.savefig(part, dpi=160, bbox_inches="tight", format="png")
    plt.close(figure)


def main() -> None:
    options = parse(Options)
    if not options.runs:
        raise ValueError(
            "no run is given; name directories that eval/run.py wrote, such as runs/quickstart/finetune/eval-…"
        )
    runs = told_apart([read_run(place) for place in options.runs], options.runs)
    with whole(options.out / "report.md") as part:
        part.write_text(written(runs), encoding="utf-8")
    draw(main_table(runs), len(runs), options.out / "report.png")
    print(options.out / "report.md")


if __name__ == "__main__":
    run(main)
