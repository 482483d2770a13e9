"""A small data set of several parquet files, with pictures inside, as it would lie on the Hub."""

from pathlib import Path
from typing import Any

FILES = (9, 5, 12)
BROKEN = (3, 17)  # records without an answer, where there are some


def write(folder: Path, picture: Any, broken: tuple[int, ...] = ()) -> Path:
    """Twenty-six records in three files, in groups of four rows; every fifth is text alone."""
    import datasets

    text = datasets.Value("string")
    features = {"id": datasets.Value("int64"), "image": datasets.Image(), "texts": [{"user": text, "assistant": text}]}
    folder.mkdir(parents=True)
    rows = []
    for i in range(sum(FILES)):
        answer = " " if i in broken else f"It is {i * i}."
        turns = [{"user": f"What is number {i}?" + " Please." * (i % 4), "assistant": answer}]
        rows.append({"id": i, "image": picture(i) if i % 5 else None, "texts": turns})
    for number, count in enumerate(FILES):
        part, rows = rows[:count], rows[count:]
        table = datasets.Dataset.from_list(part, features=datasets.Features(features))
        table.to_parquet(str(folder / f"{number}.parquet"), batch_size=4)
    return folder
