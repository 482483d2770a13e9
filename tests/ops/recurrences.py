"""The recurrences over time as the tests of their CUDA kernels see them: inputs, a run, the truth in float64.

B batch, T time, H heads, N head size, S sequences in a packed row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, normalize

from visualrwkv.ops.wkv6 import _backward_cuda as wkv6_backward
from visualrwkv.ops.wkv6 import _forward_cuda as wkv6_forward
from visualrwkv.ops.wkv6 import wkv6_reference
from visualrwkv.ops.wkv7 import _backward_cuda as wkv7_backward
from visualrwkv.ops.wkv7 import _forward_cuda as wkv7_forward
from visualrwkv.ops.wkv7 import wkv7_reference

BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=("fp32", "bf16"))


@dataclass(frozen=True)
class Recurrence:
    """An op of the CUDA library. Its inputs are `rows` (B, T, H, N), for some u (H, N), and state (S, H, N, N)."""

    name: str
    forward: Callable
    backward: Callable
    reference: Callable
    rows: tuple[str, ...]
    others: tuple[str, ...]  # between the rows and the state
    size: int  # a head size that has both tiled and plain kernels, the smallest
    limits: dict[torch.dtype, dict[str, float]]  # relative L2 error

    @property
    def inputs(self) -> tuple[str, ...]:
        return (*self.rows, *self.others, "state", "dy", "dS")

    @property
    def gradients(self) -> tuple[str, ...]:
        return tuple(f"d{name}" for name in self.inputs[:-2])

    @property
    def per_token(self) -> tuple[str, ...]:
        return ("y", *(f"d{name}" for name in self.rows))

    def make(self, B, T, H, N, dtype, sequences=None, length=1.0, seed=0) -> list[Tensor]:
        """The rows in `dtype`, others and state in fp32, and the gradients dy, dS that come in. Decays as in the model; for
        `wkv7` also a and b, with kk of `length`.
        """
        g = torch.Generator().manual_seed(seed)
        r, w, k, v, kk, rate, dy = (torch.randn(B, T, H, N, generator=g) for _ in range(7))
        u = torch.randn(H, N, generator=g)
        state, dS = (torch.randn(sequences or B, H, N, N, generator=g) for _ in range(2))
        if self.name == "wkv6":
            rows, others = (r, k, v, 1.5 * w - 2), (u,)
        else:
            kk = length * normalize(kk, dim=-1)  # the decays are from 0.545 to 1
            rows, others = (r / N**0.5, logsigmoid(2 * w) - 0.5, k, v, -kk, kk * torch.sigmoid(rate + 1)), ()
        return [*(x.to(dtype) for x in rows), *others, state, dy.to(dtype), dS]

    def run(self, inputs: list[Tensor], cu_seqlens: Tensor | None = None) -> dict[str, Tensor]:
        """y, the final state S and every gradient, by the kernels."""
        *values, dy, dS = inputs
        y, S, states = self.forward(*values, cu_seqlens, True)
        gradients = self.backward(*values, cu_seqlens, states, dy, dS)
        return {"y": y, "S": S, **dict(zip(self.gradients, gradients, strict=True))}

    def true(self, inputs: list[Tensor], cu_seqlens: Tensor | None = None) -> dict[str, Tensor]:
        """The same by the reference in float64."""
        *values, dy, dS = (x.double() for x in inputs)
        leaves = [x.requires_grad_() for x in values]
        y, S = self.reference(*leaves, cu_seqlens)
        gradients = torch.autograd.grad((y, S), leaves, (dy, dS))
        return {"y": y.detach(), "S": S.detach(), **dict(zip(self.gradients, gradients, strict=True))}


def _limits(names: tuple[str, ...], **bf16: float) -> dict[torch.dtype, dict[str, float]]:
    return {torch.float32: dict.fromkeys(names, 5e-4), torch.bfloat16: {**dict.fromkeys(names, 5e-3), **bf16}}


WKV6 = Recurrence(
    *("wkv6", wkv6_forward, wkv6_backward, wkv6_reference, ("r", "k", "v", "w"), ("u",), 32),
    _limits(("y", "S", "dr", "dk", "dv", "dw", "du", "dstate"), dw=1e-2, du=1e-2),
)
WKV7 = Recurrence(
    *("wkv7", wkv7_forward, wkv7_backward, wkv7_reference, ("r", "w", "k", "v", "a", "b"), (), 64),
    _limits(("y", "S", "dr", "dw", "dk", "dv", "da", "db", "dstate"), dw=1e-2, da=7e-3, db=7e-3),
)


def assert_close(found, wanted, outputs=1e-6, gradients=1e-5, floor=1e-7, limits=None):
    """Relative L2 errors within `limits` by name, or within those of outputs and of gradients; `floor` per element where
    the true value vanishes.
    """
    assert found.keys() == wanted.keys()
    for name, want in wanted.items():
        limit = limits[name] if limits else gradients if name.startswith("d") else outputs
        error = (found[name].double() - want).norm()
        assert found[name].shape == want.shape
        assert error <= limit * want.norm() + floor * want.numel() ** 0.5, f"{name}: {error / want.norm():.1e}"


def assert_same(found, wanted):
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
