"""What the claims are tried on: RWKV-5, 6 and 7 and a Llama from transformers, of equal size, in one and the same VisualRWKV.

T tokens of all sequences in one packed row, S sequences, C channels.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from visualrwkv.config import MEET_PRESETS, RWKV_PRESETS, ModelConfig, RWKVConfig
from visualrwkv.files import read_tensors
from visualrwkv.model import LANGUAGE_MODELS, VisualRWKV
from visualrwkv.rwkv.network import Order
from visualrwkv.rwkv.state import State
from visualrwkv.vision.encoder import Encoder

NANO = RWKV_PRESETS["rwkv6-nano"]
SIZES = {
    "RWKV-5": replace(NANO, version=5),
    "RWKV-6": NANO,
    "RWKV-7": replace(NANO, version=7, decay_rank=16, rate_rank=16, value_rank=16, gate_rank=32),
    "Llama": NANO,  # its vocabulary, layers and width
}
KINDS = tuple(SIZES)


class Llama(nn.Module):
    """transformers' Llama in the language model's place: it reads packed rows, and keeps nothing."""

    def __init__(self, config: RWKVConfig, inner: int):
        super().__init__()
        self.emb = nn.Embedding(config.vocab_size, config.n_embd)
        settings = LlamaConfig(
            vocab_size=1,
            hidden_size=config.n_embd,
            num_hidden_layers=config.n_layer,
            num_attention_heads=config.n_head,
            intermediate_size=inner,
            max_position_embeddings=65536,
            attn_implementation="sdpa",
            bos_token_id=None,
            eos_token_id=None,
        )
        model = LlamaModel(settings)
        del model.embed_tokens
        self.__dict__["model"] = model  # no module of this one: its parts are, by the names that training knows
        self.blocks, self.ln_out = model.layers, model.norm
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        nn.init.normal_(self.emb.weight, std=0.02)
        nn.init.zeros_(self.head.weight)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, state: State | None = None, orders: list[Order | None] | None = None
    ) -> tuple[Tensor, None]:
        """x (T, C), bounds (S+1,) -> hidden (T, C). What follows a sequence in its row does not change it: no mask."""
        rows = [x[a:b] for a, b in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist())]
        out = self.model(inputs_embeds=nn.utils.rnn.pad_sequence(rows, batch_first=True), use_cache=False)
        return torch.cat([y[: len(row)] for y, row in zip(out.last_hidden_state, rows)]), None


def size(language: nn.Module) -> int:
    """Parameters of the blocks: embedding and head are the same in all."""
    return sum(p.numel() for p in language.blocks.parameters())  # type: ignore[union-attr]


@cache
def width(kind: str) -> int:
    """How wide a feed-forward makes a kind's blocks as large as those of RWKV-6."""
    wanted = size(LANGUAGE_MODELS[6](replace(NANO, vocab_size=1)))
    near = {abs(size(language(kind, w, 1)) - wanted): w for w in range(128, 769, 8)}
    return near[min(near)]


def language(kind: str, inner: int, vocabulary: int = NANO.vocab_size) -> nn.Module:
    """A fresh language model of that kind whose feed-forward is so wide."""
    config = replace(SIZES[kind], vocab_size=vocabulary, dim_ffn=inner)
    return Llama(config, inner) if kind == "Llama" else LANGUAGE_MODELS[config.version](config)


def model(kind: str, vit: Encoder | None = None, **settings: object) -> VisualRWKV:
    """A fresh model; with an encoder one that sees, `settings` over those that nano models meet it with."""
    shape = replace(SIZES[kind], dim_ffn=width(kind))
    meet = {**MEET_PRESETS["nano"].settings(vit.config), **settings} if vit is not None else {}
    config = ModelConfig(replace(shape, vocab_size=1), None if vit is None else vit.config, **meet)  # type: ignore[arg-type]
    made = VisualRWKV(config)
    made.config = replace(config, rwkv=shape)
    made.rwkv = language(kind, width(kind))  # type: ignore[assignment]
    if vit is not None:
        made.vit = vit
    return made


def fill(made: VisualRWKV, folder: Path) -> VisualRWKV:
    """Give it what a stage of training left; a projector that was not there yet stays as it is."""
    missing, unknown = made.load_state_dict(read_tensors(folder), strict=False)
    parts = {name.partition(".")[0] for name in missing}
    if unknown or parts - {"proj", "vit"}:
        raise ValueError(f"{folder} is another model's: it lacks {missing[:1]} and has {unknown[:1]}")
    return made
