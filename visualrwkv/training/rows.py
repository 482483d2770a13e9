"""The rows of a Hugging Face data set as they come: of one that is too large for the disk no more is fetched than is read."""

from __future__ import annotations

import os
import random
from collections.abc import Generator
from pathlib import Path
from typing import Any

from visualrwkv.training.tables import (
    SHOWN,
    TEXTS,
    Cell,
    check_columns,
    from_hub,
    stored_picture,
    table_files,
    train_split,
)

Row = dict[str, Any]


class StreamedRows:
    """Rows numbered in the order in which they come, epoch after epoch; only those in `held` can be asked for."""

    def __init__(self, path: Path, images: Path):
        self.path, self.folder = path, images
        self.stream, self._mark = _open_stream(path)
        if self.stream.features:  # None where the files do not say
            check_columns(path, self.stream.column_names)
            self.stream = self.stream.decode(False)
        self.held: dict[int, Row] = {}

    def rows(self, epoch: int, seed: int, place: Any = None) -> Generator[tuple[Row, Any], None, None]:
        """An epoch's rows, each with the place to go on from after it; the files are in an order of the epoch's own.

        ConnectionError where no more can be read.
        """
        self.stream.set_epoch(random.Random(f"{seed} {epoch}").randrange(1, 1 << 31))  # 0 would keep their order
        self.stream.load_state_dict(place)
        count = 0
        try:
            for row in self.stream:
                count += 1
                yield {k: row[k] for k in (*TEXTS, *SHOWN) if k in row}, self.stream.state_dict()
        except Exception as error:  # a network, a Hub and a library's readers: anything
            words = " ".join(str(error).split())[:160]
            raise ConnectionError(
                f"{self.path}: the stream breaks off after {count} rows ({words}); the same command goes on "
                "from the last checkpoint"
            ) from error

    def __getitem__(self, index: int) -> Any:
        row = self.held[index]
        record = {k: v for k, v in row.items() if k in TEXTS}
        for column in SHOWN:
            value = row.get(column)
            if isinstance(value, list):
                record[column] = [Cell(self, index, column, place) for place in range(len(value))]
            elif value is not None:
                record[column] = [Cell(self, index, column, None)]
        return record

    def picture(self, row: int, column: str, place: int | None) -> bytes | Path:
        """A picture's bytes, or its path where the row holds only that."""
        value = self.held[row][column]
        value = value if place is None else value[place]
        return stored_picture(value, self.folder, f"{self.name(row)} has no picture in column {column}")

    def images(self, index: int) -> Path:
        return self.folder

    def name(self, index: int) -> str:
        mark = self.held.get(index, {}).get("id")
        return f"{self.path}, row {index} of the stream" + (f" (id {mark})" if mark is not None else "")

    def mark(self) -> list[Any]:
        return [str(self.path), str(self.folder), *self._mark]


def _open_stream(path: Path) -> tuple[Any, list[Any]]:
    """The stream, and what changes when its files do: on the Hub the commit."""
    import datasets

    datasets.disable_progress_bars()
    if not path.exists():
        builder = from_hub(path, lambda: datasets.load_dataset_builder(str(path)))
        return from_hub(path, lambda: builder.as_streaming_dataset(split="train")), [builder.hash]
    if not path.is_dir() and path.suffix not in (".parquet", ".arrow"):
        raise ValueError(
            f"{path} is no Hugging Face data set, and only such are streamed; its records are read from where they lie: "
            "leave --streaming out"
        )
    kind, files = table_files(train_split(path))
    states = [(file, os.stat(file)) for file in files]
    builder = datasets.load_dataset_builder(kind, data_files=files)
    return builder.as_streaming_dataset(split="train"), [[file, s.st_size, s.st_mtime_ns] for file, s in states]
