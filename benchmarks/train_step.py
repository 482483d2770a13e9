"""A training step of stage 2 against a Llama of the same size in transformers, with the same encoder. `python benchmarks/train_step.py`

Both read one picture (CLIP's ViT, frozen, 577 image tokens) and text up to the length, in bf16 products, and take a step of
AdamW, in memory that is kept as training keeps it. A fifth of the tokens is learned. "head at labels": both with our loss,
which computes logits there alone; "head everywhere": transformers' own loss for the Llama, and ours with every position
labelled.

Writes benchmarks/results/<machine>/train_step.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import measure  # first: it pins threads
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from visualrwkv.config import ModelConfig, RWKVConfig, ViTConfig
from visualrwkv.model import Encoded, VisualRWKV
from visualrwkv.text.prompt import IGNORE
from visualrwkv.training.loss import packed_loss
from visualrwkv.training.memory import keep_freed_memory, share_one_heap

ENCODER = ViTConfig(12, 384, 6, 1536, image_size=336, patch_size=14)
LANGUAGE = {"n_layer": 8, "n_embd": 512}


def llama(count: int) -> LlamaForCausalLM:
    """A Llama of as many parameters: the same layers and width, its feed-forward as wide as that takes."""
    layers, width = LANGUAGE["n_layer"], LANGUAGE["n_embd"]
    inner = (count - 2 * 65536 * width) // layers // (3 * width) - 4 * width // 3
    config = LlamaConfig(
        vocab_size=65536,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        intermediate_size=inner // 64 * 64,
        max_position_embeddings=32768,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


class Llava(nn.Module):
    """A Llama that reads the picture as its first tokens."""

    def __init__(self, ours: VisualRWKV, language: LlamaForCausalLM):
        super().__init__()
        self.encode, self.proj, self.language = ours.encode, ours.proj, language

    def embeddings(self, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        x = self.language.model.embed_tokens(ids.masked_fill(ids == 65535, 0))
        with torch.no_grad():
            features = self.encode(pixels)
        return x.masked_scatter((ids == 65535)[..., None], self.proj(features).to(x.dtype))


def steps(version: int, length: int, everywhere: bool) -> dict[str, Callable[[], object]]:
    """A step of each candidate."""
    torch.manual_seed(0)
    extra = {"head_size": 64} | (
        {} if version == 6 else {"decay_rank": 64, "rate_rank": 64, "value_rank": 32, "gate_rank": 128}
    )
    ours = VisualRWKV(ModelConfig(RWKVConfig(**LANGUAGE, version=version, **extra), ENCODER, "linear", 577)).train()  # type: ignore[arg-type]
    ours.vit.requires_grad_(False)  # type: ignore[union-attr]
    count = sum(p.numel() for p in ours.rwkv.parameters())
    theirs = Llava(ours, llama(count)).train()
    for embedding in (ours.rwkv.emb, theirs.language.model.embed_tokens):
        embedding.requires_grad_(False)
    nn.init.normal_(ours.rwkv.head.weight, std=0.02)
    pixels = torch.randn(1, 3, 336, 336)
    ids = torch.randint(1, 60000, (1, length))
    ids[0, 8 : 8 + 577] = 65535
    labels = torch.full((length,), IGNORE)
    labels[-length // 5 :] = ids[0, -length // 5 :]
    if everywhere:
        labels = ids[0].clone()
        labels[8 : 8 + 577] = 5
    bounds = torch.tensor([0, length])
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
        for name, model in (("ours", ours), ("llama", theirs))
    }

    def step(name: str, loss: Callable[[], torch.Tensor]) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            value = loss()
        value.backward()
        optimizers[name].step()
        optimizers[name].zero_grad()

    def our_loss() -> torch.Tensor:
        with torch.no_grad():
            features = ours.encode(pixels)
        hidden = ours.hidden(ids, Encoded(features))[0][0]
        return packed_loss(hidden, ours.rwkv.head.weight, labels, bounds)

    def their_loss() -> torch.Tensor:
        x = theirs.embeddings(ids, pixels)
        if everywhere:
            return theirs.language(inputs_embeds=x, labels=labels[None]).loss
        hidden = theirs.language.model(inputs_embeds=x).last_hidden_state[0]
        return packed_loss(hidden, theirs.language.lm_head.weight, labels, bounds)

    return {"ours": lambda: step("ours", our_loss), "llama": lambda: step("llama", their_loss)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", nargs="*", type=int, default=[640, 2048, 8192])
    parser.add_argument("--versions", nargs="*", type=int, default=[6, 7])
    parser.add_argument("--seconds", type=float, default=40.0, help="for each pair")
    options = parser.parse_args()
    share_one_heap()
    keep_freed_memory()  # as training does
    found: dict[str, Any] = {}
    for version in options.versions:
        for length in options.lengths:
            for everywhere in (False, True):
                name = f"RWKV-{version}, {length} tokens, head {'everywhere' if everywhere else 'at labels'}"
                found[name] = measure.figures(
                    measure.take_turns(steps(version, length, everywhere), options.seconds, 3)
                )
                print(f"{name}: Llama takes {found[name]['ours']['ratio']['llama']:.2f} times as long", flush=True)
    shapes = {"language model": str(LANGUAGE), "encoder": str(ENCODER), "vocabulary": 65536, "products": "bf16"}
    print(measure.record("train_step", {"shapes": shapes, "figures": found}, ("torch", "transformers", "visualrwkv")))


if __name__ == "__main__":
    main()
