"""A whole token on the CPU in one call: all layers and the head of an RWKV, with packed weights (cuda/token6.cpp, token7.cpp).

It reads the module's weights and holds them a second time, packed. Activations and states are fp32; with int8 and int4
weights vectors are rounded to int8 before products. Matrices of low rank stay in bf16, and with int4 the head is int8.
`without_library` makes a module whose own step gives the same, for machines without compiled kernels, and for tests.

L layers, B sequences, C channels, H heads, N head size, V vocabulary.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visualrwkv.ops import library
from visualrwkv.ops.arena import Arena
from visualrwkv.ops.packed import KINDS, Packed, pack, round_vectors, rounded
from visualrwkv.ops.pages import Pages

Net = Any
"""An RWKV, whose class is of a floor above."""
Arrays = tuple[Tensor, Tensor, Tensor]
"""att_shift, ffn_shift (L, B, C) and wkv (L, B, H, N, N), fp32."""


class _Matrix(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "kind")),
    ]


class _Network(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("version", "layers", "C", "head_size", "F", "V", "integers")),
        *((name, ctypes.c_void_p) for name in ("ln0_weight", "ln0_bias", "ln_out_weight", "ln_out_bias")),
        ("eps", ctypes.c_float),
        ("group_eps", ctypes.c_float),
        ("head", _Matrix),
        ("blocks", ctypes.c_void_p),
    ]


class _Call(ctypes.Structure):
    _fields_ = [("B", ctypes.c_int64)] + [
        (name, ctypes.c_void_p)
        for name in ("x", "att_shift", "ffn_shift", "wkv", "new_att_shift", "new_ffn_shift", "new_wkv", "logits")
    ]


def _block(vectors: str, matrices: str) -> type[ctypes.Structure]:
    fields = [(name, ctypes.c_void_p) for name in vectors.split()] + [(name, _Matrix) for name in matrices.split()]
    return type("Block", (ctypes.Structure,), {"_fields_": fields})


NORMS = "ln1_weight ln1_bias ln2_weight ln2_bias group_weight group_bias "
_Block6 = _block(
    NORMS + "mix_x mix decay bonus ffn_mix",
    "mix_in mix_out0 mix_out1 mix_out2 mix_out3 mix_out4 decay_in decay_out receptance key value gate output "
    "ffn_key ffn_receptance ffn_value",
)
_Block7 = _block(
    NORMS + "mix decay rate value_share removal replacement bonus ffn_mix",
    "decay_in rate_in share_in gate_in decay_out rate_out share_out gate_out "
    "receptance key value output ffn_key ffn_value",
)


def parts6(block: Any, version: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Vectors, matrices of low rank (rows first), and matrices of a block of RWKV-6 or 5, by cuda/token6.cpp's names."""
    att, ffn = block.att, block.ffn
    small: dict[str, Tensor] = {}
    if version == 5:
        kept = (torch.ones_like(att.time_mix_k), att.time_mix_k, att.time_mix_v, att.time_mix_r, att.time_mix_g)
        vectors = {"mix": 1 - torch.cat(kept, 1).float(), "decay": att.time_decay}
        vectors["ffn_mix"] = 1 - torch.cat((ffn.time_mix_k, ffn.time_mix_r), 1).float()
    else:
        maa = (att.time_maa_w, att.time_maa_k, att.time_maa_v, att.time_maa_r, att.time_maa_g)
        vectors = {"mix_x": att.time_maa_x, "mix": torch.cat(maa, 1), "decay": att.time_decay}
        vectors["ffn_mix"] = torch.cat((ffn.time_maa_k, ffn.time_maa_r), 1)
        small = {"mix_in": att.time_maa_w1.t(), "decay_in": att.time_decay_w1.t(), "decay_out": att.time_decay_w2.t()}
        small |= {f"mix_out{i}": w.t() for i, w in enumerate(att.time_maa_w2)}
    large = {name: getattr(att, name).weight for name in ("receptance", "key", "value", "gate", "output")}
    large |= {f"ffn_{name}": getattr(ffn, name).weight for name in ("key", "receptance", "value")}
    return vectors | {"bonus": att.time_faaaa}, small, large


def parts7(block: Any, version: int) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """The same of a block of RWKV-7, by cuda/token7.cpp's names."""
    att, ffn = block.att, block.ffn
    vectors = {
        "mix": torch.cat((att.x_r, att.x_w, att.x_k, att.x_v, att.x_a, att.x_g), 1),
        **{"decay": att.w0, "rate": att.a0, "removal": att.k_k, "replacement": att.k_a},
        **{"bonus": att.r_k, "ffn_mix": ffn.x_k},
    }
    small = {"decay_in": att.w1, "rate_in": att.a1, "gate_in": att.g1}
    small |= {"decay_out": att.w2, "rate_out": att.a2, "gate_out": att.g2}
    if block.layer > 0:
        vectors["value_share"] = att.v0
        small |= {"share_in": att.v1, "share_out": att.v2}
    large = {name: getattr(att, name).weight for name in ("receptance", "key", "value", "output")}
    large |= {"ffn_key": ffn.key.weight, "ffn_value": ffn.value.weight}
    return vectors, {name: w.t() for name, w in small.items()}, large


class TokenStep:
    """One token for each of B sequences, any B, with weights of a dtype of `KINDS`. Needs the compiled library."""

    @torch.no_grad()
    def __init__(self, net: Net, dtype: str):
        config = net.config
        self.dtype = dtype
        self.vocab_size = config.vocab_size
        self._arena, self._pages = Arena(), Pages()
        self._kept: list[Tensor] = []  # what C++ holds pointers to
        self._bytes = 0
        kind, parts = (_Block7, parts7) if config.version == 7 else (_Block6, parts6)
        blocks = (kind * config.n_layer)()
        self._rank = 1
        for block, to in zip(net.blocks, blocks, strict=True):
            vectors, small, large = parts(block, config.version)
            for name in ("ln1", "ln2"):
                vectors |= {f"{name}_{x}": getattr(getattr(block, name), x) for x in ("weight", "bias")}
            vectors |= {"group_weight": block.att.ln_x.weight, "group_bias": block.att.ln_x.bias}
            for name, x in vectors.items():
                setattr(to, name, self._vector(x))
            for name, w in small.items():
                setattr(to, name, self._matrix(w, "bfloat16"))
                if name.endswith("_in"):
                    self._rank = max(self._rank, len(w))
            for name, w in large.items():
                setattr(to, name, self._matrix(w, dtype))
        norms = net.blocks[0].ln0, net.ln_out
        self._blocks = blocks
        self._network = _Network(
            *(config.version, config.n_layer, config.n_embd, config.head_size, config.dim_ffn, config.vocab_size),
            dtype != "bfloat16",
            *(self._vector(x) for norm in norms for x in (norm.weight, norm.bias)),
            *(norms[0].eps, net.blocks[0].att.ln_x.eps),
            self._matrix(net.head.weight, head_dtype(dtype)),
            ctypes.addressof(blocks),
        )
        name = "visualrwkv_token7" if config.version == 7 else "visualrwkv_token6"
        pointers = (ctypes.POINTER(_Network), ctypes.POINTER(_Call))
        self._function = library.function(name, *pointers, ctypes.c_int64, ctypes.c_int64)

    def __call__(self, x: Tensor, before: Arrays) -> tuple[Tensor, Arrays]:
        """Embeddings x (B, C), the state's arrays → logits (B, V) fp32, new arrays."""
        x, *old = (t.float().contiguous() for t in (x, *before))
        new = [self._arena.take(*t.shape) for t in old]
        logits = torch.empty(len(x), self.vocab_size)
        call = _Call(len(x), *(t.data_ptr() for t in (x, *old, *new, logits)))
        self._function(self._network, call, torch.get_num_threads(), self._rank)
        return logits, (new[0], new[1], new[2])

    def nbytes(self) -> int:
        """What a token reads: all weights but the embedding, of which it reads a row."""
        return self._bytes

    def _vector(self, x: Tensor) -> int:
        self._kept.append(x.detach().float().flatten().contiguous())
        return self._kept[-1].data_ptr()

    def _matrix(self, weight: Tensor, kind: str) -> _Matrix:
        packed: Packed = pack(weight.detach(), kind)
        parts = [self._pages.keep(t) for t in (packed.data, packed.scales) if t is not None]
        self._kept += parts
        self._bytes += packed.nbytes()
        pointers = [t.data_ptr() for t in parts] + [None] * (2 - len(parts))
        return _Matrix(*pointers, packed.rows, packed.columns, KINDS.index(kind))


def head_dtype(dtype: str) -> str:
    """Of the head's weights: logits lie close together, and four bits would confuse them."""
    return "int8" if dtype == "int4" else dtype


# Without a library ---------------------------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """A linear layer with the packed weights' numbers, and their products' rounding, in plain torch."""

    def __init__(self, weight: Tensor, kind: str):
        super().__init__()
        self.weight: Tensor
        self.kind = kind
        self.register_buffer("weight", rounded(weight.detach(), kind))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x if self.kind == "bfloat16" else round_vectors(x), self.weight)


@torch.no_grad()
def without_library(net: Net, dtype: str) -> Net:
    """A copy of the module in fp32 whose steps give what a `TokenStep` with that dtype gives; slow."""
    twin = copy.deepcopy(net).to(torch.bfloat16).float().requires_grad_(False)  # so are low ranks rounded
    for module in list(twin.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, PackedLinear(child.weight, head_dtype(dtype) if name == "head" else dtype))
    return twin


# Which of them a module gets ------------------------------------------------------------------------------------------


class _Kept:
    """What was made of a module's weights, and how to see that they are no longer the same."""

    def __init__(self, net: Net, dtype: str, made: TokenStep | Net | None):
        self.made = made
        self._dtype = dtype
        self._parameters = list(net.parameters())
        self._inner = net.blocks[-1].ffn.value  # another one after adapters were put around it
        self._seen = self._look(net)

    def _look(self, net: Net) -> tuple[object, ...]:
        head = net.head.weight
        changes = sum(0 if p.is_inference() else p._version for p in self._parameters)
        return changes, head.data_ptr(), head.dtype, head.device, id(net.blocks[-1].ffn.value), library.COMPILED

    def fits(self, net: Net, dtype: str) -> bool:
        return dtype == self._dtype and self._look(net) == self._seen


_KEPT: WeakKeyDictionary[nn.Module, _Kept] = WeakKeyDictionary()


def packed_step(net: Net, dtype: str = "bfloat16") -> TokenStep | Net | None:
    """What takes a module's tokens on with weights of that dtype, made at the first call and when weights have changed.

    A `TokenStep` for a bf16 module on the CPU; for int8 and int4 without a library, a module (`without_library`); None
    where the module itself is what there is: fp32 or on a GPU, in bf16 without a library, or changed by adapters.
    """
    kept = _KEPT.get(net)
    if kept is None or not kept.fits(net, dtype):
        made: TokenStep | Net | None = None
        if _packable(net):
            if library.COMPILED:
                made = TokenStep(net, dtype)
            elif dtype != "bfloat16":
                made = without_library(net, dtype)
        kept = _KEPT[net] = _Kept(net, dtype, made)
    return kept.made


def _packable(net: Net) -> bool:
    if any(p.dtype != torch.bfloat16 or p.device.type != "cpu" for p in net.parameters()):
        return False
    return all(type(m) is nn.Linear for m in _projections(net))


def _projections(net: Net) -> Iterator[nn.Module]:
    yield net.head
    for block in net.blocks:
        for mixer in (block.att, block.ffn):
            yield from (m for name, m in mixer.named_children() if name != "ln_x")
