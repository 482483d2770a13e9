"""Data at LLaVA's scale: how soon a run over 665,000 records starts, and whether pictures load as fast as they are read.

    python benchmarks/loading.py

Writes a LLaVA JSON of a gigabyte into a temporary directory, looks at it as a run does, and plans two epochs. Then decodes
336-pixel JPEGs through the training loader with one worker, and reads them with the encoder of v060 (CLIP ViT-L/14-336) on all
cores.

Writes benchmarks/results/<machine>/loading.json.
"""

from __future__ import annotations

import os

os.environ["OMP_PROC_BIND"] = "false"  # processes that look at records would inherit the core of the first one

import argparse
import json
import random
import resource
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import measure  # first: it pins threads
import torch
from PIL import Image
from torch.utils.data import DataLoader

from visualrwkv.config import CLIP_L_336, MEET_PRESETS, RWKV_PRESETS, ModelConfig
from visualrwkv.training.data import Conversations
from visualrwkv.training.packing import Plan
from visualrwkv.vision.encoder import make_encoder
from visualrwkv.vision.processor import make_processor

WORDS = [
    "the",
    "a",
    "of",
    "and",
    "is",
    "on",
    "with",
    "man",
    "dog",
    "street",
    "red",
    "picture",
    "sitting",
    "table",
    "what",
]
SHOWN = 1000  # picture files, shared by the records


def write(folder: Path, count: int) -> int:
    """Records like mix665k's; returns the file's bytes."""
    rng = random.Random(0)

    def words(many: int) -> str:
        return " ".join(rng.choices(WORDS, k=many))

    with open(folder / "data.json", "w") as file:
        for i in range(count):
            kind = rng.random()
            pairs, long = (
                (rng.randint(1, 6), 150)
                if kind < 0.06
                else (rng.randint(1, 4), 80)
                if kind < 0.3
                else (rng.randint(3, 12), 3)
            )
            record: dict[str, Any] = {"id": f"{i:012d}", "conversations": []}
            if kind >= 0.06:
                record["image"] = f"{i % SHOWN:06d}.jpg"
            for turn in range(pairs):
                tag = "<image>\n" if turn == 0 and kind >= 0.06 else ""
                ask = "\nAnswer the question using a single word or phrase." if long == 3 else ""
                record["conversations"] += [
                    {"from": "human", "value": tag + words(rng.randint(5, 15)) + ask},
                    {"from": "gpt", "value": words(max(1, round(rng.expovariate(1 / long))))},
                ]
            file.write(("[" if i == 0 else ",\n") + json.dumps(record))
        file.write("]")
    for i in range(SHOWN):
        Image.effect_noise((336, 336), 40).convert("RGB").save(folder / f"{i:06d}.jpg", quality=90)
    return (folder / "data.json").stat().st_size


def start(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """Seconds until the first batch could be asked for, and the peak of this process's memory."""
    began = time.perf_counter()
    data = Conversations(folder / "data.json", folder, config, "middle", 16384)
    found = time.perf_counter()
    data.prepare()
    looked = time.perf_counter()
    plan = Plan(data.lengths, 16384, 0, 2, 5, 1024, data.source.order)
    steps = plan.steps(2.0)
    shares = list(plan.shares(0, 0, steps))
    planned = time.perf_counter()
    data.pack(shares[0].batches[0])
    return {
        "seconds": {
            "records found": found - began,
            "records looked at": looked - found,
            "two epochs planned": planned - looked,
            "first batch": time.perf_counter() - planned,
            "in all": time.perf_counter() - began,
        },
        "peak memory bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "steps": steps,
    }


class Pictures(torch.utils.data.Dataset):
    """The pictures alone, as the loader makes them."""

    def __init__(self, folder: Path):
        self.files = sorted(folder.glob("*.jpg"))
        self.processor = make_processor(CLIP_L_336)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.processor(self.files[index])


def rates(folder: Path) -> dict[str, Any]:
    """Pictures a second: one worker's, and what the encoder reads on all cores."""
    pictures = Pictures(folder)
    loaded = []
    for _ in range(3):
        began = time.perf_counter()
        batches = [batch[0].sum() for batch in DataLoader(pictures, batch_size=16, num_workers=1)]
        loaded.append(len(batches) * 16 / (time.perf_counter() - began))
    encoder = make_encoder(CLIP_L_336).eval()
    pixels = torch.stack([pictures[i] for i in range(4)])
    read = []
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        encoder(pixels)
        for _ in range(3):
            began = time.perf_counter()
            encoder(pixels)
            read.append(len(pixels) / (time.perf_counter() - began))
    cores = torch.get_num_threads()
    figures = {
        "loaded by one core": statistics.median(loaded),
        f"read by the encoder on {cores} cores": statistics.median(read),
    }
    return figures | {"loaded per core / read per core": statistics.median(loaded) / (statistics.median(read) / cores)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=665_000)
    options = parser.parse_args()
    config = ModelConfig(RWKV_PRESETS["rwkv6-1b6"], CLIP_L_336, **MEET_PRESETS["v6.0"].settings(CLIP_L_336))
    with tempfile.TemporaryDirectory() as folder:
        size = write(Path(folder), options.records)
        figures = {"start": start(Path(folder), config), "pictures per second": rates(Path(folder))}
    shapes = {"records": options.records, "bytes": size, "picture": "336 x 336 JPEG", "encoder": str(CLIP_L_336)}
    path = measure.record("loading", {"shapes": shapes, "figures": figures}, ("torch", "pillow", "visualrwkv"))
    print(json.dumps(figures, indent=2), path, sep="\n")


if __name__ == "__main__":
    main()
