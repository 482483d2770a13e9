"""How much memory stage 2 takes on each GPU: weights, gradients and optimizer by ZeRO stage, and activations by token.

    python benchmarks/training_memory.py

Parameters are counted on the presets. What backward keeps of a token is measured on two layers of small width (autograd's saved
tensors, parameters left out) and scaled with width and depth. Not in it: the encoder's activations (it is frozen), the head's
300 MB, buffers of communication.

Writes benchmarks/results/<machine>/training_memory.json and prints the table of docs/training.md.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import measure  # first: it pins threads
import torch

from visualrwkv.config import CLIP_L_336, RWKV_PRESETS, ModelConfig
from visualrwkv.model import VisualRWKV

SIZES = ("rwkv7-0b1", "rwkv7-0b4", "rwkv7-1b5", "rwkv6-1b6", "rwkv6-3b", "rwkv6-7b")
TOKENS = 16384


def counts(name: str) -> dict[str, int]:
    """Parameters that stage 2 trains, and those that it does not."""
    with torch.device("meta"):
        model = VisualRWKV(ModelConfig(RWKV_PRESETS[name], CLIP_L_336, "linear", 577))
    frozen = sum(p.numel() for p in model.vit.parameters()) + model.rwkv.emb.weight.numel()  # type: ignore[union-attr]
    return {"frozen": frozen, "trained": sum(p.numel() for p in model.parameters()) - frozen}


def kept(version: int, recompute: bool) -> float:
    """Bytes that backward keeps of a token in a layer, for each channel, in a model in bf16."""
    width, length, layers = 256, 512, 2
    name = "rwkv7-0b4" if version == 7 else "rwkv6-1b6"
    config = replace(
        RWKV_PRESETS[name], n_layer=layers, n_embd=width, dim_ffn=0, vocab_size=256, mix_rank=8, decay_rank=8
    )
    if version == 7:
        config = replace(config, rate_rank=8, value_rank=8, gate_rank=8)
    model = VisualRWKV(ModelConfig(config)).bfloat16().train()
    if recompute:
        return 2.0  # a block's input
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(length, width, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden, _ = model.rwkv(x, torch.tensor([0, length]))
    hidden.sum()
    return sum(seen.values()) / length / layers / width


def state(count: dict[str, int], zero: int, ranks: int, offload: bool) -> float:
    """GB a GPU of weights and gradients in bf16, and of the optimizer's fp32 weights and moments."""
    part = [ranks if zero >= level else 1 for level in (3, 2, 1)]
    trained = count["trained"] * (2 / part[0] + 2 / part[1] + (0 if offload else 12 / part[2]))
    return (trained + 2 * count["frozen"] / part[0]) / 1e9


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    per_token = {version: kept(version, False) for version in (6, 7)}
    columns = [(0, 1, False), (1, 8, False), (2, 8, False), (3, 8, False), (2, 1, True)]
    figures: dict[str, object] = {"bytes of a token, layer and channel": per_token}
    print(
        "| | trained | "
        + " | ".join(f"ZeRO {z}, {n} GPU{'s' * (n > 1)}{', offload' * o}" for z, n, o in columns)
        + " | activations | recomputed |"
    )
    print("|---|---|" + "---|" * (len(columns) + 2))
    for name in SIZES:
        config, count = RWKV_PRESETS[name], counts(name)
        sizes = [state(count, *column) for column in columns]
        each = config.n_layer * config.n_embd * TOKENS / 1e9
        activations = [
            each * per_token[config.version],
            each * 2 + per_token[config.version] * config.n_embd * TOKENS / 1e9,
        ]
        figures[name] = {**count, "state": sizes, "activations": activations}
        cells = [f"{x:.1f}" for x in (*sizes, *activations)]
        print(f"| `{name}` | {count['trained'] / 1e9:.2f} G | " + " | ".join(cells) + " |")
    shapes = {"tokens": TOKENS, "columns": columns}
    print(measure.record("training_memory", {"shapes": shapes, "figures": figures}, ("torch", "visualrwkv")))


if __name__ == "__main__":
    main()
