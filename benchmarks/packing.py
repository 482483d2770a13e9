"""Packing against padding: how full the batches are, and useful tokens a second on the same model. `python benchmarks/packing.py`

Lengths as in LLaVA's mix665k (`lengths`; its quantiles are stored): most records show one picture of 577 image tokens and hold a few
short turns or a long one, some are text alone. Padding is the reference's: each sample in a row of its own, as long as the
context, and cut there. Both take steps of the same number of tokens.

Writes benchmarks/results/<machine>/packing.json.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import measure  # first: it pins threads
import torch

from visualrwkv.config import ModelConfig, RWKVConfig
from visualrwkv.model import VisualRWKV
from visualrwkv.text.prompt import IGNORE
from visualrwkv.training.loss import packed_loss
from visualrwkv.training.packing import plan_epoch

CONTEXT = 2048
MODEL = RWKVConfig(n_layer=6, n_embd=256, vocab_size=4096, head_size=64, mix_rank=16, decay_rank=32)
"""Small, and so is its vocabulary: the head is a tenth of the blocks in RWKV-6 1B6, a fifth here, and with 65,536 ids it would be
three times as much as they are."""


def lengths(count: int, image_tokens: int, seed: int = 0) -> list[int]:
    """Tokens of so many records, cut to the context.

    6 % are text alone (log-normal, median 700), 24 % a picture and one long answer (median 120), 70 % a picture and 1 to 12
    short questions of about 22 tokens, answer included.
    """
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        kind = rng.random()
        if kind < 0.06:
            length = rng.lognormvariate(6.55, 0.8)
        elif kind < 0.30:
            length = image_tokens + 20 + rng.lognormvariate(4.8, 0.5)
        else:
            length = image_tokens + sum(rng.lognormvariate(3.1, 0.3) for _ in range(rng.randint(1, 12)))
        found.append(min(CONTEXT, max(8, round(length))))
    return found


def quantiles(values: list[int]) -> dict[str, int]:
    ordered = sorted(values)
    marks = {f"{q} %": ordered[min(q * len(ordered) // 100, len(ordered) - 1)] for q in (1, 10, 25, 50, 75, 90, 99)}
    return marks | {"mean": round(statistics.fmean(ordered))}


def filling(image_tokens: int, budgets: tuple[int, ...], look_ahead: int) -> dict[str, object]:
    """How full an epoch of 665,000 records is in each budget, and how long the plan takes."""
    found = lengths(665_000, image_tokens)
    rows: dict[str, object] = {
        "quantiles": quantiles(found),
        "padded to the context": sum(found) / len(found) / CONTEXT,
    }
    for budget in budgets:
        for look in (1, look_ahead):
            began = time.perf_counter()
            batches = len(plan_epoch(found, budget, 0, 0, look))
            seconds = time.perf_counter() - began
            rows[f"budget {budget}, look-ahead {look}"] = {
                "filled": sum(found) / (batches * budget),
                "seconds": seconds,
            }
    return rows


def step(model: VisualRWKV, samples: list[int], padded: bool) -> None:
    """Forward and backward over these samples, a fifth of whose last tokens are learned."""
    rows = [CONTEXT] * len(samples) if padded else samples
    bounds = torch.tensor([0, *rows]).cumsum(0)
    ids = torch.randint(1, MODEL.vocab_size, (1, int(bounds[-1])))
    labels = torch.full((int(bounds[-1]),), IGNORE)
    for start, length in zip(bounds.tolist(), samples):
        labels[start + length - length // 5 : start + length] = 7
    hidden = model.hidden(ids, cu_seqlens=bounds)[0][0]
    packed_loss(hidden, model.rwkv.head.weight, labels, bounds).backward()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="of a step")
    parser.add_argument("--seconds", type=float, default=90.0)
    options = parser.parse_args()
    look_ahead = 1024
    filled = {str(n): filling(n, (options.tokens, 16384), look_ahead) for n in (577, 1024)}

    torch.manual_seed(0)
    model = VisualRWKV(ModelConfig(MODEL)).train()
    model.rwkv.emb.requires_grad_(False)
    torch.nn.init.normal_(model.rwkv.head.weight, std=0.02)
    found = lengths(4000, 577, seed=1)
    batches = plan_epoch(found, options.tokens, 0, 0, look_ahead)
    rows = options.tokens // CONTEXT
    packed, alone = iter(batches), iter([found[i : i + rows] for i in range(0, len(found), rows)])
    useful: dict[str, list[int]] = {"packed": [], "padded": []}

    def run(name: str) -> None:
        samples = [found[i] for i in next(packed)] if name == "packed" else next(alone)
        useful[name].append(sum(samples))
        step(model, samples, name == "padded")
        model.zero_grad()

    times = measure.take_turns({name: lambda name=name: run(name) for name in useful}, options.seconds)  # type: ignore[misc]
    rates = {k: [n / t for n, t in zip(useful[k][1:], times[k], strict=True)] for k in useful}
    gain = statistics.fmean(rates["packed"]) / statistics.fmean(rates["padded"])
    mean = statistics.fmean(found)
    figures = {
        "filled": filled,
        "useful tokens per second": {
            k: {"median": statistics.median(r), "spread": statistics.quantiles(r, n=4)[::2], "unit": "tokens/s"}
            for k, r in rates.items()
        },
        "gain": gain,
        "context / mean length": CONTEXT / mean,
        "gain over context / mean length": gain * mean / CONTEXT,
    }
    shapes = {"model": str(MODEL), "context": CONTEXT, "tokens of a step": options.tokens, "look-ahead": look_ahead}
    path = measure.record("packing", {"shapes": shapes, "figures": figures}, ("torch", "visualrwkv"))
    for tokens, part in filled.items():
        print(f"{tokens} image tokens: {part}")
    print(f"useful tokens: {gain:.2f} times padding's; context / mean length is {CONTEXT / mean:.2f}; {path}")


if __name__ == "__main__":
    main()
