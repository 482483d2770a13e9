"""Training records from Hugging Face `datasets`: the rows of a data set on disk or from the Hub, read by index."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

TEXTS = ("id", "conversations", "messages", "texts")
SHOWN = ("image", "images", "video")


class TableRecords:
    """The rows of a Hugging Face data set: what `save_to_disk` wrote, parquet or arrow files, or "owner/name" on the Hub,
    which is fetched once and kept in the library's cache."""

    def __init__(self, path: Path, images: Path):
        self.path, self.folder = path, images
        self.table = _open_table(path)
        columns = self.table.column_names
        check_columns(path, columns)
        self.texts = [c for c in columns if c in TEXTS]
        self.shown = [c for c in columns if c in SHOWN]
        self._text = self.table.select_columns(self.texts)
        self._arrow = self.table.with_format("arrow")

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Any:
        record = dict(self._text[index])
        row = self._arrow[index] if self.shown else None
        for column in self.shown:
            value = row[column][0]  # type: ignore[index]
            if not value.is_valid:
                continue
            if hasattr(value.type, "value_type"):
                record[column] = [Cell(self, index, column, place) for place in range(len(value))]
            else:
                record[column] = [Cell(self, index, column, None)]
        return record

    def picture(self, row: int, column: str, place: int | None) -> bytes | Path:
        """A picture's bytes, or its path where the table holds only that."""
        value = self._arrow[row][column][0]
        value = (value if place is None else value[place]).as_py()
        return stored_picture(value, self.folder, f"{self.name(row)} has no picture in column {column}")

    def images(self, index: int) -> Path:
        return self.folder

    def name(self, index: int) -> str:
        return f"{self.path}, row {index}"

    def order(self, epoch: int) -> list[int]:
        return list(range(len(self)))

    def mark(self) -> list[Any]:
        return [str(self.path), str(self.folder), len(self), self.table._fingerprint]


def check_columns(path: Path, columns: Sequence[str]) -> None:
    """ValueError where no column holds what was said."""
    if not set(columns) & set(TEXTS) - {"id"}:
        raise ValueError(
            f"{path} has the columns {', '.join(columns)}; one of them must be conversations, messages or texts"
        )


def stored_picture(value: Any, folder: Path, otherwise: str) -> bytes | Path:
    """What a cell says of a picture: its bytes, or a path relative to the folder; ValueError says `otherwise` for neither."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str):
        return folder / value
    if isinstance(value, bytes):
        return value
    raise ValueError(otherwise)


def _open_table(path: Path) -> Any:
    import datasets

    datasets.disable_progress_bars()
    if not path.exists():
        return from_hub(path, lambda: datasets.load_dataset(str(path), split="train"))
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return datasets.load_from_disk(str(train_split(path)))
    kind, files = table_files(path)
    return datasets.load_dataset(kind, data_files=files, split="train")


def from_hub(path: Path, get: Callable[[], Any]) -> Any:
    """What `get` gets from the Hub; FileNotFoundError where that fails."""
    try:
        return get()
    except Exception as error:  # a network, a Hub and a library's readers: anything
        words = " ".join(str(error).split())[:160]
        raise FileNotFoundError(
            f"{path}: there is no such data file or directory here, and the Hub gave no data set ({words})"
        ) from error


def train_split(path: Path) -> Path:
    """Where `save_to_disk` wrote the split to train on, if it wrote several."""
    if not (path / "dataset_dict.json").exists():
        return path
    if not (path / "train").is_dir():
        splits = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir()))
        raise ValueError(f"{path} has the splits {splits}; give the directory of one of them")
    return path / "train"


def table_files(path: Path) -> tuple[str, list[str]]:
    """The kind, parquet or arrow, and the files of a data set on disk."""
    files = sorted(path.rglob("*.parquet")) or sorted(path.rglob("*.arrow")) if path.is_dir() else [path]
    if not files:
        raise ValueError(
            f"{path} is no data set: it holds no parquet or arrow file and is not what save_to_disk writes"
        )
    return files[0].suffix[1:], [str(file) for file in files]


class Pictures(Protocol):
    """What holds pictures in cells."""

    path: Path

    def picture(self, row: int, column: str, place: int | None) -> bytes | Path: ...


@dataclass(frozen=True)
class Cell:
    """A picture that lies in a table of Hugging Face `datasets`, read when it is needed."""

    table: Pictures
    row: int
    column: str
    place: int | None  # in a list of pictures

    def read(self) -> bytes | Path:
        return self.table.picture(self.row, self.column, self.place)

    def __str__(self) -> str:
        return f"{self.table.path}#{self.row}.{self.column}" + ("" if self.place is None else f".{self.place}")
