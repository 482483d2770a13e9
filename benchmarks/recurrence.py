"""The recurrences on the CPU against what else there is: `python benchmarks/recurrence.py` (some ten minutes).

- wkv6 and wkv7, B = 1, H = 32, N = 64: ours against the loop over time that the `rwkv` package runs, our own torch form,
  and flash-linear-attention's naive forms, where that package is installed;
- bi_wkv, 768 channels: ours against attention with 12 heads of 64, from 224 to 2,048 pixels of 16 × 16 patches.

Writes benchmarks/results/<machine>/recurrence.json and .png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure  # first: it pins threads
import torch
from rich.progress import track
from torch import Tensor

from visualrwkv.ops import bi_wkv, wkv6, wkv7
from visualrwkv.ops.biwkv import bi_wkv_torch
from visualrwkv.ops.wkv6 import wkv6_torch
from visualrwkv.ops.wkv7 import wkv7_torch

HEADS, SIZE, CHANNELS = 32, 64, 768
PIXELS = (224, 336, 448, 768, 1024, 1536, 2048)


def loop6(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """One step of whole-tensor operations after another, as the `rwkv` package reads a prompt."""
    decay, S = torch.exp(-torch.exp(w)), torch.zeros(r.shape[0], HEADS, SIZE, SIZE)
    out = []
    for t in range(r.shape[1]):
        kv = k[:, t, :, :, None] @ v[:, t, :, None, :]
        out.append((r[:, t, :, None, :] @ (u[..., None] * kv + S)).squeeze(-2))
        S = kv + decay[:, t, ..., None] * S
    return torch.stack(out, 1), S


def loop7(r: Tensor, w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """The same for RWKV-7."""
    decay, S = torch.exp(-torch.exp(w)), torch.zeros(r.shape[0], HEADS, SIZE, SIZE)
    out = []
    for t in range(r.shape[1]):
        kv = v[:, t, :, :, None] @ k[:, t, :, None, :]
        ab = a[:, t, :, :, None] @ b[:, t, :, None, :]
        S = S * decay[:, t, :, None, :] + S @ ab + kv
        out.append((S @ r[:, t, ..., None]).squeeze(-1))
    return torch.stack(out, 1), S


def naive_peers() -> dict[str, Callable]:
    """flash-linear-attention's forms that run on a CPU."""
    try:
        from fla.ops.rwkv6.chunk_naive import naive_chunk_rwkv6
        from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6
    except ImportError:
        print("flash-linear-attention is not installed: measured without it")
        return {}

    def heads_first(run: Callable, **options: Any) -> Callable:
        def call(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> object:
            log_decay = -torch.exp(w)
            return run(*(x.transpose(1, 2).contiguous() for x in (r, k, v, log_decay)), u, **options)

        return call

    return {
        "fla naive_recurrent": heads_first(naive_recurrent_rwkv6),
        "fla naive_chunk": heads_first(naive_chunk_rwkv6, chunk_size=32),
    }


def inputs6(T: int) -> list[Tensor]:
    """r, k, v, w with decays as trained models have them, and u."""
    g = torch.Generator().manual_seed(T)
    r, k, v, w = (torch.randn(1, T, HEADS, SIZE, generator=g) for _ in range(4))
    return [r, k * 0.3, v, w - 2, torch.randn(HEADS, SIZE, generator=g)]


def inputs7(T: int) -> list[Tensor]:
    """r, w, k, v, a, b: decays in (0.545, 1), a of length one."""
    g = torch.Generator().manual_seed(T)
    r, w, k, v, a, rate = (torch.randn(1, T, HEADS, SIZE, generator=g) for _ in range(6))
    a = torch.nn.functional.normalize(a, dim=-1)
    return [r, torch.log(0.6065 * torch.sigmoid(w)), k * 0.3, v, -a, a * torch.sigmoid(rate)]


def forward(run: Callable, inputs: list[Tensor]) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            run(*inputs)

    return call


def training(run: Callable, inputs: list[Tensor]) -> Callable[[], None]:
    """Forward and backward."""
    leaves = [x.clone().requires_grad_() for x in inputs]

    def call() -> None:
        y = run(*leaves)[0] if run is not bi_wkv else run(*leaves)
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    return call


def attention(tokens: int) -> Callable[[], None]:
    q, k, v = (torch.randn(1, 12, tokens, 64) for _ in range(3))
    return forward(torch.nn.functional.scaled_dot_product_attention, [q, k, v])


def bi_inputs(tokens: int) -> list[Tensor]:
    w, u = torch.rand(CHANNELS) * 8 / tokens, torch.randn(CHANNELS) / tokens
    return [w, u, torch.randn(1, tokens, CHANNELS), torch.randn(1, tokens, CHANNELS)]


def cases(lengths: list[int], pixels: list[int]) -> dict[str, dict[str, Callable[[], None]]]:
    """What runs against what."""
    found: dict[str, dict[str, Callable[[], None]]] = {}
    naive = naive_peers()
    for T in lengths:
        six, seven = inputs6(T), inputs7(T)
        forms6 = {"ours": wkv6, "torch form": wkv6_torch, "loop": loop6, **naive}
        forms7 = {"ours": wkv7, "torch form": wkv7_torch, "loop": loop7}
        trained = [n for n in ("ours", "torch form", "loop") if n != "loop" or T <= 1024]  # its graph grows without end
        found[f"wkv6 forward, T = {T}"] = {n: forward(f, six) for n, f in forms6.items()}
        found[f"wkv6 forward+backward, T = {T}"] = {n: training(forms6[n], six) for n in trained}
        found[f"wkv7 forward, T = {T}"] = {n: forward(f, seven) for n, f in forms7.items()}
        found[f"wkv7 forward+backward, T = {T}"] = {n: training(forms7[n], seven) for n in trained}
    for px in pixels:
        tokens = (px // 16) ** 2
        both = bi_inputs(tokens)
        found[f"bi_wkv forward, {tokens} tokens"] = {
            "ours": forward(bi_wkv, both),
            "torch form": forward(bi_wkv_torch, both),
            "attention": attention(tokens),
        }
    return found


def draw(measured: dict[str, Any], path: Path) -> None:
    """Milliseconds of every candidate, one group of bars a case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = list(measured)
    names = list(dict.fromkeys(n for group in measured.values() for n in group))
    colours = dict(zip(names, plt.get_cmap("tab10").colors, strict=False))
    figure, axes = plt.subplots(figsize=(9, 0.55 * len(groups) + 1.5))
    for row, group in enumerate(groups):
        height = 0.8 / len(measured[group])
        for i, (name, values) in enumerate(measured[group].items()):
            ms = values["median"] * 1e3
            axes.barh(row + (i + 0.5) * height - 0.4, ms, height, color=colours[name])
            axes.text(ms, row + (i + 0.5) * height - 0.4, f" {ms:.3g}", va="center", fontsize=6)
    axes.set(xscale="log", xlabel="milliseconds (median)", yticks=range(len(groups)), yticklabels=groups)
    axes.invert_yaxis()
    axes.legend([plt.Rectangle((0, 0), 1, 1, color=colours[n]) for n in names], names, fontsize=7)
    axes.set_title("The recurrences on the CPU, fp32")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[640, 2048])
    parser.add_argument("--pixels", type=int, nargs="*", default=list(PIXELS))
    parser.add_argument("--seconds", type=float, default=20.0, help="about so long a case")
    options = parser.parse_args()
    torch.manual_seed(0)
    measured = {}
    for name, candidates in track(cases(options.lengths, options.pixels).items(), "measuring"):
        measured[name] = measure.figures(measure.take_turns(candidates, options.seconds))
    shapes = {"wkv": f"B 1, H {HEADS}, N {SIZE}, fp32", "bi_wkv": f"B 1, C {CHANNELS}, fp32, attention 12 x 64"}
    packages = ("visualrwkv", "torch", "flash-linear-attention")
    path = measure.record("recurrence", {"shapes": shapes, "figures": measured}, packages)
    draw(measured, path.with_suffix(".png"))
    for name, group in measured.items():
        ratios = ", ".join(f"{peer} {ratio:.1f} x" for peer, ratio in group["ours"]["ratio"].items())
        print(f"{name}: {group['ours']['median'] * 1e3:.2f} ms; {ratios}")
    print(json.dumps({"written": str(path.relative_to(measure.ROOT))}))


if __name__ == "__main__":
    main()
