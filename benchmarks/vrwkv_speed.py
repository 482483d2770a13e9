"""Vision-RWKV against a ViT of the same size as pictures grow. `python benchmarks/vrwkv_speed.py` (some ten minutes)

vrwkv_t and vrwkv_s against timm's vit_tiny and vit_small with patches of 16, random weights, from 224 to 2,048 pixels,
forward and forward with backward, one picture and eight. The ViT attends by torch's fused kernel, which never holds the
matrix of all pairs, and, for a forward pass where memory allows, by the plain products that the paper compared with.
Models take turns in one process; the memory of each is that of a process of its own, beside what it held before.

All in one dtype, --dtype; the cases "dtypes" time both models in both at 1,024 pixels and say which is the faster.
Goes on where an interrupted run left off. Writes benchmarks/results/<machine>/vrwkv_speed.json and .png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh  # first: it pins threads
import measure
import timm
import torch
from torch import Tensor, nn

from visualrwkv.config import VISION_PRESETS
from visualrwkv.vision.vrwkv import vrwkv

PIXELS = (224, 512, 1024, 1536, 2048)
PEERS = {"vrwkv_t": "vit_tiny_patch16_224", "vrwkv_s": "vit_small_patch16_224"}
HEADS = {"vrwkv_t": 3, "vrwkv_s": 6}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ATTENTION = ("fused", "plain")
MOST_BYTES, MOST_WORK = 12e9, 3e12
PAPER = "VRWKV-T against ViT-T at 2,048 pixels, an A100, attention not fused as it seems: 10 times as fast, 80 % less memory"


def vit(size: str, attention: str) -> nn.Module:
    """timm's ViT beside that VRWKV, for any picture size, giving patches."""
    net = timm.create_model(PEERS[size], dynamic_img_size=True, num_classes=0, global_pool="")
    for block in net.blocks:
        block.attn.fused_attn = attention == "fused"
    return net


def build(size: str, who: str, dtype: str) -> nn.Module:
    torch.manual_seed(0)
    net = vrwkv(size) if who == "VRWKV" else vit(size, who.removeprefix("ViT, "))
    return net.to(DTYPES[dtype])


def runs(net: nn.Module, px: int, batch: int, train: bool, dtype: str) -> Callable[[], None]:
    """A forward pass, or one with backward to every parameter that has a part in it."""
    pixels = torch.randn(batch, 3, px, px, generator=torch.Generator().manual_seed(px)).to(DTYPES[dtype])

    def forward() -> None:
        with torch.inference_mode():
            net(pixels)

    def both() -> None:
        y: Tensor = net(pixels)
        y.backward(torch.ones_like(y))
        net.zero_grad()

    net.train(train)
    return both if train else forward


# What there is to measure --------------------------------------------------------------------------------------------


def skipped(size: str, who: str, px: int, batch: int, train: bool) -> str:
    """Why that is not measured, or nothing."""
    tokens, width = (px // 16) ** 2, VISION_PRESETS[size].width
    need = 4.0 * batch * tokens * width * (12 * 30 if train else 12)  # fp32; all layers' or one's
    if who == "ViT, plain":
        if train:
            return "the paper's claim is of a forward pass"
        need = max(need, 2 * 4.0 * batch * HEADS[size] * tokens**2)  # the products, and their softmax
    if need > MOST_BYTES:
        return f"some {need / 1e9:.0f} GB"
    work = batch * 12 * (2.0 * tokens**2 * width + 12.0 * tokens * width**2)  # the ViT's multiplications
    if work > (MOST_WORK if batch == 1 and not train else MOST_WORK / 6):
        return f"{work / 1e12:.1f} T multiplications for the ViT: it would take minutes"
    return ""


def cases(sizes: list[str], pixels: list[int], batches: list[int]) -> tuple[list[str], dict[str, str]]:
    """Names of all cases, and of those left out why."""
    found, out = [], {}
    for size in sizes:
        found.append(f"dtypes {size} 1024 1 forward")
        for px in pixels:
            for batch in batches:
                for way in ("forward", "training"):
                    case = f"{size} {px} {batch} {way}"
                    people = []
                    for who in ("VRWKV", *(f"ViT, {kind}" for kind in ATTENTION)):
                        if why := skipped(size, who, px, batch, way == "training"):
                            out[f"{who}: {case}"] = why
                        else:
                            people.append(who)
                    if len(people) > 1:
                        found.append(f"times {case} {'|'.join(people)}")
                        found += [f"memory {case} {who}" for who in people if batch == 1 and px >= 512]
    return found, out


def one(case: str, seconds: float, dtype: str) -> dict[str, Any]:
    """The result of a case, in its own process."""
    what, size, px, batch, way, *rest = case.split(" ", 5)
    where = int(px), int(batch), way == "training"
    if what == "dtypes":
        people = {f"{who}, {d}": (who, d) for who in ("VRWKV", "ViT, fused") for d in DTYPES}
    else:
        people = {who: (who, dtype) for who in rest[0].split("|")}
    nets = {name: build(size, *how) for name, how in people.items()}
    for name, (_, d) in people.items():
        runs(nets[name], 224, 1, where[2], d)()  # to warm up
    calls = {name: runs(nets[name], *where, d) for name, (_, d) in people.items()}
    if what == "memory":
        with fresh.Peak() as peak:
            calls[rest[0]]()
        return {"growth": peak.most - peak.before, "process": peak.most}
    return measure.figures(measure.take_turns(calls, seconds, 2 if where[0] > 512 else 4, 30, warm=True))


# What it comes to ----------------------------------------------------------------------------------------------------


def gather(found: dict[str, Any]) -> dict[str, Any]:
    """By case: seconds, bytes, and how many times VRWKV's the ViT's are."""
    rows: dict[str, Any] = {}
    for case, result in found.items():
        what, size, px, batch, way, *rest = case.split(" ", 5)
        if "failed" in result:
            rows.setdefault("failed", {})[case] = result["failed"]
            continue
        row = rows.setdefault(f"{'dtypes, ' * (what == 'dtypes')}{size}, {px} pixels, batch {batch}, {way}", {})
        if what == "memory":
            row.setdefault("memory", {})[rest[0]] = result
        else:
            row["times"] = result
            row["ViT over VRWKV"] = result.get("VRWKV", {}).get("ratio")
    return rows


def draw(rows: dict[str, Any], pixels: list[int], dtype: str, path: Path) -> None:
    """Seconds and memory of a forward pass with one picture over its size."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4))
    colours = dict(zip(("VRWKV", "ViT, fused", "ViT, plain"), plt.get_cmap("tab10").colors, strict=False))
    for size, line in zip(PEERS, ("-", "--"), strict=True):
        for who, colour in colours.items():
            where = [(px, rows.get(f"{size}, {px} pixels, batch 1, forward", {})) for px in pixels]
            times = [(px, row["times"][who]["median"]) for px, row in where if who in row.get("times", {})]
            sizes = [(px, row["memory"][who]["growth"] / 1e6) for px, row in where if who in row.get("memory", {})]
            for panel, points in zip(panels, (times, sizes), strict=True):
                if points:
                    panel.plot(
                        *zip(*points, strict=True),
                        line,
                        color=colour,
                        marker="o",
                        markersize=3,
                        label=f"{who}, {size[-1].upper()}",
                    )
    for panel, title in zip(panels, ("a forward pass, seconds", "its memory, MB"), strict=True):
        panel.set(xscale="log", yscale="log", title=title, xlabel="pixels along a side")
        panel.set_xticks(pixels, [f"{px:,}" for px in pixels], fontsize=8)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=7)
    figure.suptitle("Vision-RWKV and ViT of the same size on the CPU, " + dtype)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=list(PEERS), choices=list(PEERS))
    parser.add_argument("--pixels", type=int, nargs="*", default=list(PIXELS))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=5.0, help="about so long a case; large pictures take longer")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(one(options.only, options.seconds, options.dtype)))
        return
    names, out = cases(options.sizes, options.pixels, options.batches)
    rows = gather(
        fresh.each("vrwkv_speed", __file__, names, ["--seconds", str(options.seconds), "--dtype", options.dtype])
    )
    shapes = {
        "models": PEERS,
        "patch": 16,
        "dtype": options.dtype,
        "attention": "fused: torch's; plain: timm's products",
    }
    results = {"shapes": shapes, "paper": PAPER, "left out": out, "figures": rows}
    path = measure.record("vrwkv_speed", results, ("visualrwkv", "torch", "timm"))
    draw(rows, options.pixels, options.dtype, path.with_suffix(".png"))
    fresh.partial_file("vrwkv_speed").unlink()
    for name, row in rows.items():
        shown = [f"{who} takes {ratio:.2f} times as long" for who, ratio in (row.get("ViT over VRWKV") or {}).items()]
        if "memory" in row:
            mine = row["memory"]["VRWKV"]["growth"]
            shown += [
                f"{who} {m['growth'] / mine:.2f} times the memory" for who, m in row["memory"].items() if who != "VRWKV"
            ]
        if name.startswith("dtypes"):
            shown = [f"{who} {values['median']:.3f} s" for who, values in row["times"].items()]
        print(f"{name}: {'; '.join(shown)}")
    for case, why in out.items():
        print(f"left out: {case}: {why}")
    print(f"paper: {PAPER}")
    print(json.dumps({"written": str(path.relative_to(measure.ROOT))}))


if __name__ == "__main__":
    main()
