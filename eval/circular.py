"""MMBench in any language: every question is asked once for each rotation of its options, and is right if all are.

A table holds the rotations as rows: rotation r of question i has the index r * 1,000,000 + i.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from choices import LETTERS, listed
from places import matching
from questions import Question, Row, fitted, match, whole
from tables import Cells, accuracies, decode_pictures, read_table, right

ROTATION = 1_000_000
DROPPED = ("hint", "category", "source", "image", "comment", "l2-category")
"""What LLaVA's submission leaves out of the table."""
PREDICTION_AT = 6
SERVER = "https://mmbench.opencompass.org.cn/mmbench-submission"


def files(data: Path, folder: str, chinese: bool) -> dict[str, Path]:
    """The tables of one language by the names of their splits, those with public answers first."""
    found = {}
    for file in matching(data, (folder,), r"mmbench.*\.tsv"):
        if chinese == ("cn" in re.split(r"[^a-z]+", file.stem.lower())):
            found[re.sub("^mmbench_", "", file.stem.lower())] = file
    return dict(sorted(found.items(), key=lambda item: ("test" in item[0], item[0])))


def load(file: Path, suffix: str) -> list[Question]:
    """One question a row, every rotation its own: hint, question, options, and what to answer with."""
    rows = read_table(file, pictures=True)
    questions = []
    for row, picture in zip(rows, decode_pictures(file, rows)):
        hint = row.get("hint")
        before = "" if hint is None or blank(hint) else f"{hint}\n"
        text = f"{before}{row['question'] or ''}{listed(leading(row))}\n{suffix}"
        index = int(row["index"] or 0)
        fields = {"image": str(question_of(row)), "answer": row.get("answer")}
        questions.append(Question(str(index), text, (picture,), fields))
    return questions


def blank(cell: str) -> bool:
    """Whether LLaVA takes what pandas does not for a missing cell."""
    return cell.lower() in ("nan", "none")


def leading(row: Cells) -> list[str]:
    """The options before the first that is missing: those that LLaVA shows."""
    shown = []
    for letter in LETTERS[:4]:
        cell = row.get(letter)
        if cell is None or blank(cell):
            break
        shown.append(cell)
    return shown


def hits(file: Path, rows: list[Row], bench: str) -> tuple[list[Cells], list[bool], list[bool]]:
    """(the table, whether each row is right, whether each row's question is right in all its rotations)."""
    table = read_table(file)
    if not any(row.get("answer") for row in table):
        raise ValueError(f"{file} has no answers; the file of `submit` goes to {SERVER}")
    otherwise = "the official code takes the last of several, and reads a missing answer as 'nan' and scores that"
    found = fitted(bench, rows, [row["index"] for row in table], otherwise)
    single = [right(row, found.answers.get(row["index"] or "")) for row in table]
    groups = defaultdict(list)
    for row, hit in zip(table, single):
        groups[question_of(row)].append(hit)
    return table, single, [all(groups[question_of(row)]) for row in table]


def question_of(row: Cells) -> int:
    """Which question a row is a rotation of: the index of its first row."""
    return int(row.get("g_index") or int(row["index"] or 0) % ROTATION)


def score(file: Path, rows: list[Row], bench: str) -> dict[str, Any]:
    """`circular`, the published number, and for comparison plain accuracy of the first rotation and of all rows."""
    table, single, group = hits(file, rows, bench)
    main = [at for at, row in enumerate(table) if question_of(row) == int(row["index"] or 0)]
    first = [table[at] for at in main]
    return {
        "circular": accuracies(first, [group[at] for at in main]),
        "vanilla_pass0": accuracies(first, [single[at] for at in main]),
        "vanilla_all_rows": accuracies(table, single),
    }


def per_question(file: Path, rows: list[Row], bench: str) -> dict[str, float]:
    """1.0 for each question that is right in all rotations, by the index of its first row."""
    table, _, group = hits(file, rows, bench)
    return {str(question_of(row)): float(hit) for row, hit in zip(table, group)}


def submit(file: Path, rows: list[Row], out: Path, bench: str) -> Path:
    """The table with the answers beside the options, as an Excel file for the server."""
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    table = read_table(file)
    found = match(rows, (row["index"] for row in table))
    columns = [name for name in table[0] if name not in DROPPED] if table else []
    columns.insert(PREDICTION_AT, "prediction")
    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append(columns)

    def cell(row: Cells, name: str) -> Any:
        index = row["index"] or ""
        if name == "index":
            return int(index)
        text = found.answers.get(index) if name == "prediction" else row[name]
        if text is None:
            return None
        made = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", text))
        made.data_type = "s"  # also where it begins with "=": an answer is no formula
        return made

    for row in table:
        sheet.append([cell(row, name) for name in columns])
    target = out / f"{bench}-{file.stem.lower().removeprefix('mmbench_')}.xlsx"
    with whole(target) as part:
        book.save(part)
    return target
