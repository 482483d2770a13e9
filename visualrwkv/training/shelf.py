"""What a frozen encoder makes of a data set's pictures, computed once and kept on disk in safetensors shards.

I pictures, M image tokens, D vision width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from visualrwkv.files import write_whole
from visualrwkv.model import VisualRWKV
from visualrwkv.training.data import Conversations
from visualrwkv.training.engine import World
from visualrwkv.training.progress import Bar
from visualrwkv.training.records import Stored

SHARD = 512  # pictures in a file
TOGETHER = 32  # pictures that the encoder reads at once
ABOUT = "encoder.json"


class Shelf:
    """A directory of features by the names of their pictures; ValueError where it holds another encoder's."""

    def __init__(self, folder: Path, about: dict[str, Any]):
        self.folder = folder
        file = folder / ABOUT
        if file.exists() and (theirs := json.loads(file.read_text(encoding="utf-8"))) != about:
            changed = next(k for k in about if theirs.get(k) != about[k])
            raise ValueError(
                f"{folder} holds features of another encoder ({changed} {theirs.get(changed)!r}, not {about[changed]!r}); "
                "take another directory"
            )
        if not file.exists():
            text = json.dumps(about, indent=2) + "\n"
            write_whole({file: lambda part: part.write_text(text, encoding="utf-8")})
        self.places: dict[str, int] = {}
        self.files: list[Any] = []
        self._known: set[Path] = set()
        self.refresh()

    def refresh(self) -> None:
        """Take up the shards that have been written meanwhile."""
        for path in sorted(set(self.folder.glob("*.safetensors")) - self._known):
            shard = safe_open(path, "pt")
            self.places.update(dict.fromkeys(shard.keys(), len(self.files)))
            self.files.append(shard)
            self._known.add(path)

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __getitem__(self, name: str) -> Tensor:
        """A picture's features (M, D)."""
        return self.files[self.places[name]].get_tensor(name)

    def add(self, file: str, features: dict[str, Tensor]) -> None:
        """Keep the features of some pictures in a shard of that name."""
        write_whole({self.folder / f"{file}.safetensors": lambda part: save_file(features, part)})


def encoder_mark(model: VisualRWKV) -> dict[str, Any]:
    """What features depend on."""
    assert model.vit is not None
    found = hashlib.sha256()
    for name, tensor in sorted(model.vit.state_dict().items()):
        found.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {"encoder": found.hexdigest()[:12], "image_tokens": model.config.image_tokens}


class _Pictures(Dataset):
    """Pictures as the encoder sees them; what is wrong with one is returned."""

    def __init__(self, data: Conversations, pictures: Sequence[tuple[int, Stored]]):
        self.data, self.pictures = data, pictures

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: int) -> tuple[str, Tensor | None, str]:
        index, picture = self.pictures[place]
        try:
            return str(picture), self.data.pixels(index, picture), ""
        except (ValueError, OSError) as error:
            return str(picture), None, str(error)


def missing(data: Conversations, shelf: Shelf, rank: int, ranks: int) -> Iterator[tuple[int, Stored]]:
    """This rank's share of the pictures that the shelf lacks, each once, with a record that shows it."""
    seen: set[str] = set()
    for index, length in enumerate(data.index.lengths.tolist()):
        if not length:
            continue
        for picture in data.encode(index)[2]:
            if (name := str(picture)) not in seen and name not in shelf:
                seen.add(name)
                if len(seen) % ranks == rank:
                    yield index, picture


@torch.inference_mode()
def fill(model: VisualRWKV, data: Conversations, shelf: Shelf, world: World, workers: int, bf16: bool) -> None:
    """Encode the pictures that the shelf lacks, each rank its share; shards that are written stay if this is cut.

    ValueError names a picture that cannot be read, unless bad records are to be skipped.
    """
    assert model.vit is not None
    device = world.device
    todo = list(missing(data, shelf, world.rank, world.size))
    model.to(device).eval()
    done: dict[str, Tensor] = {}
    number = len(list(shelf.folder.glob(f"part-{world.rank}-*.safetensors")))
    loader: Any = DataLoader(
        _Pictures(data, todo), batch_size=TOGETHER, num_workers=workers, collate_fn=lambda items: items
    )
    with Bar("features", len(todo), shown=world.chief and bool(todo)) as bar:
        for items in loader:
            for _, pixels, wrong in items:
                if pixels is None and data.bad == "error":
                    raise ValueError(wrong)
            good = [(name, pixels) for name, pixels, _ in items if pixels is not None]
            if good:
                with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
                    features = model.encode(torch.stack([pixels for _, pixels in good]).to(device)).cpu()
                done |= {name: part.contiguous() for (name, _), part in zip(good, features)}
            if len(done) >= SHARD:
                shelf.add(f"part-{world.rank}-{number:06}", done)
                number, done = number + 1, {}
            bar.advance(len(items))
    if done:
        shelf.add(f"part-{world.rank}-{number:06}", done)
