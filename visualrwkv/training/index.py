"""What a run must know of its records before it starts: their lengths, which are bad, and which ids occur.

Made once, by all cores, and kept beside the run: a run that goes on starts at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from visualrwkv.files import write_whole
from visualrwkv.text.prompt import IGNORE
from visualrwkv.training.progress import Bar

PIECE = 256  # records that a worker takes at a time
VOCABULARY = 1 << 16

Made = TypeVar("Made")


@dataclass
class Index:
    """lengths (R,) in tokens, 0 for a record that is left out; cut (R,): whether it was cut to the longest length; words,
    answers (65536,): which ids occur at all, and in answers; problems: what is wrong with a record that is left out."""

    lengths: npt.NDArray[np.int32]
    cut: npt.NDArray[np.bool_]
    words: npt.NDArray[np.bool_]
    answers: npt.NDArray[np.bool_]
    problems: list[tuple[int, str]]

    def save(self, path: Path, mark: Any) -> None:
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "problems"}
        arrays |= {"problems": np.array(json.dumps(self.problems)), "mark": np.array(json.dumps(mark))}

        def write(part: Path) -> None:
            with open(part, "wb") as file:  # a name would get another ending
                np.savez(file, **arrays)

        write_whole({path: write})

    def mark(self) -> str:
        """What two machines must have alike."""
        return hashlib.sha256(self.lengths.tobytes() + self.cut.tobytes()).hexdigest()

    @classmethod
    def load(cls, path: Path, mark: Any) -> Index | None:
        """The index that was kept of the same records, read in the same way."""
        if not path.exists():
            return None
        with np.load(path) as kept:
            if str(kept["mark"]) != json.dumps(mark):
                return None
            arrays = {f.name: kept[f.name] for f in fields(cls) if f.name != "problems"}
            return cls(**arrays, problems=[(i, words) for i, words in json.loads(str(kept["problems"]))])


Encode = Callable[[int], tuple[list[int], list[int], bool]]


def look(encode: Encode, indices: range) -> Index:
    """Encode these records, to know how long they are."""
    lengths, cut = np.zeros(len(indices), np.int32), np.zeros(len(indices), bool)
    words: set[int] = set()
    answers: set[int] = set()
    problems = []
    for place, index in enumerate(indices):
        try:
            ids, labels, cut[place] = encode(index)
        except (ValueError, OSError) as error:
            problems.append((index, str(error)))
            continue
        lengths[place] = len(ids)
        words.update(ids)
        answers.update(labels)
    return Index(lengths, cut, _flags(words), _flags(answers - {IGNORE}), problems)


def _flags(ids: set[int]) -> npt.NDArray[np.bool_]:
    flags = np.zeros(VOCABULARY, bool)
    flags[list(ids)] = True
    return flags


def make_index(encode: Encode, count: int, workers: int = 0) -> Index:
    """Look at all records, with so many processes (0: one a core; a small set needs no second)."""
    pieces = [range(start, min(start + PIECE, count)) for start in range(0, count, PIECE)]
    workers = workers or (os.cpu_count() or 1 if count > 16 * PIECE else 1)
    found: list[Index] = []
    with Bar("records", count, shown=count > 16 * PIECE) as bar:
        for piece, part in zip(pieces, in_pieces(lambda indices: look(encode, indices), pieces, workers), strict=True):
            found.append(part)
            bar.advance(len(piece))
    return Index(
        np.concatenate([part.lengths for part in found]),
        np.concatenate([part.cut for part in found]),
        np.logical_or.reduce([part.words for part in found]),
        np.logical_or.reduce([part.answers for part in found]),
        [problem for part in found for problem in part.problems],
    )


_look: Callable[[range], Any]  # a worker's, from the process that it parted from


def _piece(piece: range) -> Any:
    return _look(piece)


def in_pieces(look: Callable[[range], Made], pieces: Sequence[range], workers: int) -> Iterator[Made]:
    """What `look` makes of each piece, in order; the records are shared with the workers, not sent."""
    global _look
    if workers == 1:
        yield from map(look, pieces)
        return
    _look = look
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        yield from pool.map(_piece, pieces, chunksize=4)
