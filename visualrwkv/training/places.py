"""Where the records of a JSON file lie, found without holding them: a gigabyte takes some ten seconds."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

WINDOW = 1 << 24  # bytes of a JSON file that are looked at together
QUOTE, OPEN, CLOSE, COMMA, SLASH = range(1, 6)
MARKS = np.zeros(256, np.uint8)
for _kind, _signs in ((QUOTE, b'"'), (OPEN, b"[{"), (CLOSE, b"]}"), (COMMA, b","), (SLASH, b"\\")):
    MARKS[list(_signs)] = _kind
SMALL = 1 << 26  # a file up to this size may be read whole, to say what it is


def record_bounds(path: Path) -> npt.NDArray[np.int64]:
    """First and last byte + 1 of each record of a JSON list or of JSON lines (R, 2); ValueError where it is neither."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such data file") from None
    with open(path, "rb") as file:
        start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")[:1]
        if path.suffix == ".jsonl":
            found = _line_bounds(file)
        elif start == b"[":
            found = _list_bounds(file, path)
        else:
            held = "a file of this size" if size > SMALL else _held(path)
            raise ValueError(f"{path} must hold a list of records, it holds {held}")
    if not len(found):
        raise ValueError(
            f"{path} must hold a list of records, it holds {'no line' if path.suffix == '.jsonl' else '[]'}"
        )
    return found


def _held(path: Path) -> str:
    """What a JSON file holds that is no list."""
    try:
        return json.dumps(json.loads(path.read_bytes()))[:40]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error


def _windows(file: Any) -> Iterator[tuple[int, npt.NDArray[np.uint8]]]:
    """A file in windows, with where each begins; none ends within an escape."""
    file.seek(0)
    place, rest = 0, b""
    while data := file.read(WINDOW):
        data = rest + data
        kept = data.rstrip(b"\\")
        rest = data[len(kept) :]
        yield place, np.frombuffer(kept, np.uint8)
        place += len(kept)


def _line_bounds(file: Any) -> npt.NDArray[np.int64]:
    ends = [np.flatnonzero(window == ord("\n")) + place for place, window in _windows(file)]
    size = file.seek(0, os.SEEK_END)
    stops = np.append(np.concatenate([np.empty(0, np.int64), *ends]), size).astype(np.int64)
    starts = np.append(0, stops[:-1] + 1)
    file.seek(0)
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else open(os.devnull, "rb") as data:
        # a line of white space alone is none; only short ones can be
        full = [b - a > 8 or (b > a and not data[a:b].isspace()) for a, b in zip(starts.tolist(), stops.tolist())]  # type: ignore[index]
    return np.stack([starts, stops], 1)[np.array(full, bool)]


def _list_bounds(file: Any, path: Path) -> npt.NDArray[np.int64]:
    """Where the items of a list of a JSON file lie, by its brackets and commas outside of strings."""
    inside, depth, end = 0, 0, -1
    cuts: list[int] = []
    for place, window in _windows(file):
        signs = MARKS[window]
        at = np.flatnonzero(signs.view(np.bool_))
        kinds = signs[at]
        quotes = kinds == QUOTE
        _unescape(window, at, kinds, quotes)
        text = (np.cumsum(quotes) + inside) & 1
        inside = int(text[-1]) if len(text) else inside
        at, kinds = at[text == 0], kinds[text == 0]
        levels = depth + np.cumsum((kinds == OPEN).astype(np.int64) - (kinds == CLOSE))
        depth = int(levels[-1]) if len(levels) else depth
        first = at[(kinds == OPEN) & (levels == 1)][:1] if not cuts else at[:0]
        last = at[(kinds == CLOSE) & (levels == 0)][:1]
        between = at[(kinds == COMMA) & (levels == 1)]
        cuts += [*(first + place).tolist(), *(between + place).tolist(), *(last + place).tolist()]
        if len(last):
            end = cuts[-1]
            break
    if end < 0:
        raise ValueError(f"{path} is not valid JSON (its list does not end)")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[end + 1 :].strip():
            raise ValueError(f"{path} is not valid JSON (text follows the end of its list)")
        bounds = np.array(cuts, np.int64)
        if len(bounds) == 2 and not data[int(bounds[0]) + 1 : end].strip():
            return np.empty((0, 2), np.int64)
    return np.stack([bounds[:-1] + 1, bounds[1:]], 1)


def _unescape(window: Any, at: Any, kinds: Any, quotes: Any) -> None:
    """Take out of `quotes` those that an odd run of backslashes stands before; at: where marks of these kinds stand."""
    slashes = at[kinds == SLASH]
    if not len(slashes):
        return
    breaks = np.flatnonzero(np.diff(slashes) > 1)
    firsts, lasts = slashes[np.append(0, breaks + 1)], slashes[np.append(breaks, len(slashes) - 1)]
    after = lasts[(lasts - firsts) % 2 == 0] + 1
    after = after[window[after] == ord('"')]  # no window ends with a backslash
    quotes[np.searchsorted(at, after)] = False
