"""VLMEvalKit's tables: TSV files of questions with their options and base64 pictures, and the accuracies it reports."""

from __future__ import annotations

import base64
import binascii
import csv
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from choices import LETTERS, infer

Cells = dict[str, str | None]
"""A row by its columns; None where a cell is empty or says that it is."""

MISSING = frozenset(
    {"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"}
    | {"<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"}
)
"""What pandas, and so the official code, reads as a missing cell. An option called "None" is lost there, and so here."""
UNANSWERED = "nan"
"""What the official code makes of a missing answer before it looks for an option in it."""
REFERENCE = 64
"""A picture's cell that is no longer than this holds the index of the row that has the picture."""
ABBREVIATIONS = {
    "coarse_perception": "CP",
    "finegrained_perception (instance-level)": "FP-S",
    "finegrained_perception (cross-instance)": "FP-C",
    "logic_reasoning": "LR",
    "relation_reasoning": "RR",
    "attribute_reasoning": "AR",
}


def read_table(file: Path, pictures: bool = False) -> list[Cells]:
    """The rows of a TSV file, quoted cells unquoted; the pictures, nine tenths of such a file, only if asked for."""
    csv.field_size_limit(2**31 - 1)
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:  # as pandas does: a mark at the start is no text
            table = csv.reader(lines, delimiter="\t")
            columns = next(table, [])
            if not {"index", "question"} <= set(columns):
                raise ValueError(f"{file} has no columns index and question; its first line is {columns[:8]}")
            kept = [(at, name) for at, name in enumerate(columns) if pictures or name != "image"]
            rows = []
            for cells in filter(None, table):
                if len(cells) > len(columns):
                    raise ValueError(
                        f"{file}, line {table.line_num}: {len(cells)} cells stand below {len(columns)} columns"
                    )
                cells += [""] * (len(columns) - len(cells))
                rows.append({name: None if cells[at] in MISSING else cells[at] for at, name in kept})
            return rows
    except FileNotFoundError:
        raise FileNotFoundError(f"{file}: there is no such file") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not a table of tab-separated UTF-8 text ({error})") from error


def options_of(row: Mapping[str, str | None]) -> dict[str, str]:
    """The options that a row has, by their letters."""
    return {letter: text for letter in LETTERS if (text := row.get(letter)) is not None}


def decode_pictures(file: Path, rows: Sequence[Cells]) -> list[bytes]:
    """Each row's picture; rows with the same picture share its bytes."""
    cells = {row["index"]: row["image"] or "" for row in rows}
    decoded: dict[bytes, bytes] = {}
    pictures = []
    for row in rows:
        text = row["image"] or ""
        if len(text) <= REFERENCE:
            text = cells.get(text, "")
        mark = hashlib.sha1(text.encode(), usedforsecurity=False).digest()
        if mark not in decoded:
            try:
                decoded[mark] = base64.b64decode(text, validate=False)
            except (binascii.Error, ValueError) as error:
                raise ValueError(f"{file}, index {row['index']}: its picture is not base64 ({error})") from error
            if not decoded[mark]:
                raise ValueError(f"{file}, index {row['index']}: it has no picture, nor does the row it points to")
        pictures.append(decoded[mark])
    return pictures


def right(row: Mapping[str, str | None], answer: str | None) -> bool:
    """Whether an answer means the row's right option."""
    letter = infer(UNANSWERED if answer is None or answer in MISSING else answer, options_of(row))
    return letter is not None and letter == row["answer"]


def accuracies(rows: Sequence[Cells], hits: Sequence[bool]) -> dict[str, Any]:
    """The share of hits: overall, of each l2-category and of each category; 0 to 1, a list where the rows have several splits."""
    parts = sorted({row.get("split") or "none" for row in rows})
    report: dict[str, Any] = {"split": parts}

    def enter(name: str, chosen: Sequence[bool]) -> None:
        report[name] = []
        for part in parts:
            those = [h for row, h, ok in zip(rows, hits, chosen) if ok and (row.get("split") or "none") == part]
            report[name].append(sum(those) / len(those) if those else None)

    enter("Overall", [True] * len(rows))
    for group in ("l2-category", "category"):
        for name in sorted({value for row in rows if (value := row.get(group))}):
            enter(ABBREVIATIONS.get(name, name), [row.get(group) == name for row in rows])
    return {name: values[0] for name, values in report.items()} if len(parts) == 1 else report
