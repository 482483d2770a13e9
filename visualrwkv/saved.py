"""A conversation as a value, and as a file: what is remembered, what was said, and the model that it belongs to."""

from __future__ import annotations

import io
import json
import uuid
import weakref
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from visualrwkv.config import RWKVConfig
from visualrwkv.files import write_whole
from visualrwkv.rwkv.state import State
from visualrwkv.vision.processor import Picture, open_picture

FORMAT, FORMAT_VERSION = "visualrwkv-session", 1
PARTS = ("att_shift", "ffn_shift", "wkv")
KEPT = 8  # snapshots that stay in memory


@dataclass(frozen=True)
class Turn:
    """A question, its answer, and all that the state read of them, as ids."""

    text: str
    answer: str
    ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Question:
    """What was asked, the pictures shown with it, and its settings: enough to ask again."""

    text: str
    pictures: tuple[Picture, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Snapshot:
    """A conversation between two turns; a value. waiting: pictures for its next question, which `asked` is where it is known."""

    state: State | None
    waiting: tuple[Picture, ...] = ()
    turns: tuple[Turn, ...] = ()
    asked: Question | None = None


# Files ---------------------------------------------------------------------------------------------------------------


def save_snapshot(path: str | Path, now: Snapshot, model: str) -> None:
    """Write a safetensors file: the state's three tensors and pictures that wait to be shown; in its metadata the rest.

    model: the `fingerprint` of the model that the state belongs to. Pictures that were shown live on in the state alone.
    """
    tensors: dict[str, Tensor] = {"sequences": torch.tensor(0 if now.state is None else len(now.state))}
    if now.state is not None:
        tensors |= {name: getattr(now.state, name).detach().cpu().contiguous() for name in PARTS}
    for number, picture in enumerate(now.waiting):
        tensors[f"waiting.{number}"] = torch.frombuffer(bytearray(png(picture)), dtype=torch.uint8)
    about = {"format": FORMAT, "version": str(FORMAT_VERSION), "model": model}
    about["prompt"] = json.dumps([i for turn in now.turns for i in turn.ids])
    about["turns"] = json.dumps([{"text": t.text, "answer": t.answer, "length": len(t.ids)} for t in now.turns])
    write_whole({Path(path): lambda part: save_file(tensors, part, metadata=about)})


def load_snapshot(
    path: str | Path, model: str, device: torch.device | str = "cpu", like: RWKVConfig | None = None
) -> Snapshot:
    """What `save_snapshot` wrote; `like` says what shape its state must have.

    FileNotFoundError or ValueError in one sentence where it is none or another model's."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such file")
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # on a foreign file the library raises kinds that are private to it
        raise ValueError(f"{path} is no saved conversation ({str(error).splitlines()[0]})") from error
    if about.get("format") != FORMAT:
        raise ValueError(f"{path} is no saved conversation; Session.save writes one")
    if about.get("version") != str(FORMAT_VERSION):
        raise ValueError(
            f"{path} is a conversation of format version {about.get('version')}, and this package reads "
            f"{FORMAT_VERSION}; open it with the version that wrote it"
        )
    if about.get("model") != model:
        raise ValueError(
            f"{path} belongs to another model ({about.get('model')}, not {model}); load the model that it was saved with"
        )
    try:
        ids, turns = iter([int(i) for i in json.loads(about["prompt"])]), []
        for turn in json.loads(about["turns"]):
            turns.append(Turn(str(turn["text"]), str(turn["answer"]), tuple(islice(ids, int(turn["length"])))))
        state = State(*(tensors[name].to(device) for name in PARTS)) if int(tensors["sequences"]) else None
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{path} is a damaged conversation ({type(error).__name__}: {error})") from error
    if state is not None and not all(x.isfinite().all() for x in vars(state).values()):
        raise ValueError(f"{path} holds numbers that are not finite")
    if state is not None and like is not None and shapes(state) != shapes(State.zeros(like)):
        raise ValueError(f"{path} is damaged: its state is {shapes(state)} instead of {shapes(State.zeros(like))}")
    waiting = (tensors[name] for name in sorted((n for n in tensors if n.startswith("waiting.")), key=place))
    return Snapshot(state, tuple(x.numpy().tobytes() for x in waiting), tuple(turns))


def shapes(state: State) -> list[list[int]]:
    """Those of its tensors."""
    return [list(x.shape) for x in vars(state).values()]


def place(name: str) -> int:
    """The number in `waiting.N`."""
    return int(name.partition(".")[2])


def png(picture: Picture) -> bytes:
    """A picture in any form as the bytes of a file."""
    if isinstance(picture, bytes):
        return picture
    if not isinstance(picture, Image.Image):
        return Path(picture).read_bytes()
    held = io.BytesIO()
    open_picture(picture).save(held, "PNG")
    return held.getvalue()


# History -------------------------------------------------------------------------------------------------------------


class Shelved:
    """A snapshot whose state and pictures lie in a file, which goes when nobody needs it any more."""

    def __init__(self, snapshot: Snapshot, directory: TemporaryDirectory):
        """The directory is held on to: it goes with the last of what lies in it."""
        self._directory = directory
        self._turns, self._asked, self._waiting = snapshot.turns, snapshot.asked, len(snapshot.waiting)
        assert snapshot.state is not None
        self._device = snapshot.state.wkv.device
        asked = snapshot.asked.pictures if snapshot.asked else ()
        self._file = Path(directory.name) / f"{uuid.uuid4().hex}.safetensors"
        save_snapshot(self._file, Snapshot(snapshot.state, (*snapshot.waiting, *asked)), "")
        if self._asked:
            self._asked = replace(self._asked, pictures=())
        weakref.finalize(self, self._file.unlink, missing_ok=True)

    def open(self) -> Snapshot:
        """The snapshot as it was."""
        held = load_snapshot(self._file, "", self._device)
        asked = self._asked and replace(self._asked, pictures=held.waiting[self._waiting :])
        return Snapshot(held.state, held.waiting[: self._waiting], self._turns, asked)


class History:
    """Snapshots to go back to: the last eight in memory, older ones in a temporary directory."""

    def __init__(self) -> None:
        self._items: list[Snapshot | Shelved] = []
        self._directory: TemporaryDirectory | None = None

    def __len__(self) -> int:
        return len(self._items)

    def copy(self) -> History:
        """A second history of the same snapshots, which are values; each goes on alone."""
        other = History()
        other._items, other._directory = list(self._items), self._directory
        return other

    def push(self, snapshot: Snapshot) -> None:
        """Remember one more."""
        self._items.append(snapshot)
        at = len(self._items) - KEPT - 1
        if at >= 0 and isinstance(old := self._items[at], Snapshot) and old.state is not None:
            self._directory = self._directory or TemporaryDirectory(prefix="visualrwkv-session-")
            self._items[at] = Shelved(old, self._directory)

    def pop(self) -> Snapshot:
        """The last one, which is forgotten."""
        last = self._items.pop()
        return last.open() if isinstance(last, Shelved) else last
