"""A bench's folder while it is written: lists in files, entry by entry, and every picture once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

SUFFIXES = {
    b"\xff\xd8\xff": ".jpg",
    b"\x89PNG": ".png",
    b"GIF8": ".gif",
    b"RIFF": ".webp",
    b"BM": ".bmp",
    b"II*\0": ".tif",
    b"MM\0*": ".tif",
}
"""What the files of each format begin with. Readers look at the content too, so a name may end otherwise."""


class Listing:
    """A file of many entries that need not fit in memory. Without an entry there is no file."""

    def __init__(self, file: Path, head: str, between: str, tail: str):
        self.file, self.head, self.between, self.tail = file, head, between, tail
        self.lines: IO[str] | None = None

    def add(self, entry: Any) -> None:
        before = self.between
        if self.lines is None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.lines = open(self.file, "w", encoding="utf-8", newline="\n")  # noqa: SIM115 (closed at the end)
            before = self.head
        self.lines.write(before + json.dumps(entry, ensure_ascii=False))

    def __enter__(self) -> Listing:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.lines:
            self.lines.write(self.tail)
            self.lines.close()


class Folder:
    """Where a bench's official files are written to."""

    def __init__(self, place: Path):
        self.place = place
        self._written: dict[tuple[str, str], str] = {}

    def entries(self, file: str, key: str = "", rest: Mapping[str, Any] | None = None) -> Listing:
        """A JSON list; with a key an object that holds it under that, beside the rest."""
        if not key:
            return Listing(self.place / file, "[", ",\n", "]\n")
        after = "".join(f", {json.dumps(name)}: {json.dumps(value)}" for name, value in (rest or {}).items())
        return Listing(self.place / file, f"{{{json.dumps(key)}: [", ",\n", f"]{after}}}\n")

    def lines(self, file: str) -> Listing:
        """A JSONL file."""
        return Listing(self.place / file, "", "\n", "\n")

    def text(self, file: str, content: str) -> None:
        target = self.place / file
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content, encoding="utf-8", newline="\n")

    def json(self, file: str, value: Any) -> None:
        self.text(file, json.dumps(value, ensure_ascii=False) + "\n")

    def picture(self, image: Mapping[str, Any], folder: str, name: str = "", stem: str = "") -> str:
        """Write a picture as it was published, unless it is there; its name in `folder`.

        That is the given name, the stem with the format's suffix, or else a hash of the picture, which questions then share.
        ValueError where there are no bytes.
        """
        content = bytes_of(image)
        key = (folder, name or stem or hashlib.sha1(content, usedforsecurity=False).hexdigest()[:20])
        if key not in self._written:
            self._written[key] = name or key[1] + suffix(content)
            target = self.place / folder / self._written[key]
            if not target.resolve().is_relative_to(self.place.resolve()):
                raise ValueError(f"a picture is called {folder}/{self._written[key]}, which lies elsewhere")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return self._written[key]


def bytes_of(image: Mapping[str, Any]) -> bytes:
    """A picture's bytes, of a column that is not decoded."""
    if not image or not image.get("bytes"):
        raise ValueError("a row has no picture")
    return image["bytes"]


def suffix(content: bytes) -> str:
    return next((end for start, end in SUFFIXES.items() if content.startswith(start)), ".img")
