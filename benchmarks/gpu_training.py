"""Training throughput of stage 2 on one GPU, and what share of its arithmetic that is. `python benchmarks/gpu_training.py`

RWKV-6 1B6 behind CLIP ViT-L/14-336 (577 image tokens) and RWKV-7 0B4 alike, packed rows of 8,192 tokens with a picture for each
735, all of the language model trained in bf16 with AdamW, with and without recomputed blocks. MFU counts 6 operations per
trained parameter and token (4 for what is frozen on the way back, 2 for the head at places that are not learned: none) and the
recurrence's own, against the GPU's dense bf16 peak.

Writes benchmarks/results/<gpu>/training.json. `--tiny` runs on any machine, to see that it works.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from typing import Any

import measure  # first: it pins threads
import torch

from visualrwkv.config import CLIP_L_336, RWKV_PRESETS, ModelConfig, RWKVConfig, ViTConfig
from visualrwkv.model import VisualRWKV
from visualrwkv.text.prompt import IGNORE
from visualrwkv.training.engine import recompute_blocks
from visualrwkv.training.loss import packed_loss

PEAK = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "4090": 165e12, "L20": 119.5e12}
"""Dense bf16 operations a second, by NVIDIA's data sheets."""
MEAN, LEARNED = 735, 0.15  # tokens of a sample, and the share of them that is learned
TINY = ModelConfig(
    RWKVConfig(2, 64, vocab_size=65536, mix_rank=8, decay_rank=8),
    ViTConfig(2, 64, 1, 64, image_size=336, patch_size=14),
    "linear",
    577,
)


def operations(config: ModelConfig, tokens: int) -> float:
    """Of the language model, forward and backward, in one step."""
    language = config.rwkv
    with torch.device("meta"):
        model = VisualRWKV(ModelConfig(language))
    blocks = sum(p.numel() for name, p in model.named_parameters() if "blocks" in name and p.dim() >= 2)
    head = language.vocab_size * language.n_embd
    recurrence = language.n_layer * language.n_embd * language.head_size * (4 if language.version < 7 else 8)
    return tokens * (6 * blocks + 6 * head * LEARNED + 3 * recurrence)


def batch(config: ModelConfig, tokens: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """A packed row: ids, pixels, labels, bounds."""
    count = tokens // MEAN
    bounds = torch.arange(count + 1) * MEAN
    bounds[-1] = tokens
    ids = torch.randint(1, 60000, (1, tokens))
    labels = torch.full((tokens,), IGNORE)
    for start, stop in zip(bounds.tolist(), bounds[1:].tolist()):
        ids[0, start + 8 : start + 8 + config.image_tokens] = 65535
        learned = int((stop - start) * LEARNED)
        labels[stop - learned : stop] = ids[0, stop - learned : stop]
    pixels = torch.randn(count, 3, 336, 336, dtype=torch.bfloat16)
    return ids.to(device), pixels.to(device), labels.to(device), bounds.to(device)


def throughput(config: ModelConfig, tokens: int, recompute: bool, device: torch.device, repeats: int) -> dict[str, Any]:
    """Seconds of a step and of its parts, tokens a second, peak memory."""
    torch.manual_seed(0)
    with device:
        model = VisualRWKV(config)
    model = model.to(torch.bfloat16).train()
    torch.nn.init.normal_(model.rwkv.head.weight, std=0.02)
    model.requires_grad_(False)
    for part in (model.proj, model.rwkv):
        part.requires_grad_(True)  # type: ignore[union-attr]
    model.rwkv.emb.requires_grad_(False)
    if recompute:
        recompute_blocks(model.rwkv, 0)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    ids, pixels, labels, bounds = batch(config, tokens, device)
    gpu = device.type == "cuda"

    def clock() -> float:
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    rows = []
    for turn in range(repeats + 2):
        if gpu and turn == 1:
            torch.cuda.reset_peak_memory_stats()
        marks = [clock()]
        with torch.no_grad():
            model.encode(pixels)  # alone, to know its share
        marks.append(clock())
        hidden, _ = model.hidden(ids, pixels, cu_seqlens=bounds)
        loss = packed_loss(hidden[0], model.rwkv.head.weight, labels, bounds) / (len(bounds) - 1)
        marks.append(clock())
        loss.backward()
        marks.append(clock())
        optimizer.step()
        optimizer.zero_grad()
        marks.append(clock())
        if turn > 1:
            encoder, forward, backward, update = (b - a for a, b in itertools.pairwise(marks))
            rows.append({"encoder": encoder, "forward": forward - encoder, "backward": backward, "optimizer": update})
    seconds = {part: statistics.median(row[part] for row in rows) for part in rows[0]}
    whole = sum(seconds.values())
    name = torch.cuda.get_device_name() if gpu else "cpu"
    peak = next((value for key, value in PEAK.items() if key in name), None)
    language = whole - seconds["encoder"]
    return {
        "seconds": seconds,
        "tokens per second": tokens / whole,
        "MFU of the language model": None if peak is None else operations(config, tokens) / language / peak,
        "peak memory bytes": torch.cuda.max_memory_allocated() if gpu else None,
        "longest part": max(seconds, key=lambda part: seconds[part]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() and not options.tiny else "cpu")
    names = ("rwkv6-1b6", "rwkv7-0b4")
    models = {n: ModelConfig(RWKV_PRESETS[n], CLIP_L_336, "linear", 577) for n in names}
    if options.tiny:
        models = {"tiny": TINY}
    elif device.type == "cpu":
        raise SystemExit("error: there is no GPU here; --tiny shows that the benchmark works")
    figures = {}
    for name, config in models.items():
        for recompute in (False, True):
            key = f"{name}, blocks {'recomputed' if recompute else 'kept'}"
            try:
                figures[key] = throughput(config, options.tokens, recompute, device, options.repeats)
            except torch.cuda.OutOfMemoryError:
                figures[key] = {"out of memory": options.tokens}
            print(key, figures[key], flush=True)
    if not options.tiny:
        name = torch.cuda.get_device_name().lower()
        folder = next((part for part in ("h200", "h100", "a100") if part in name), name.replace(" ", "-"))
        shapes = {"tokens": options.tokens, "sample": MEAN, "learned": LEARNED}
        print(measure.record("training", {"shapes": shapes, "figures": figures}, ("torch", "visualrwkv"), folder))


if __name__ == "__main__":
    main()
