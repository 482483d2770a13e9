"""RWKV-5 (x052): Eagle, arXiv 2404.05892. Parameter names are those of the public checkpoints.

T tokens of all sequences in one packed row, S sequences, C channels, H heads, N head size.
Mixes here say how much a token keeps of itself; in RWKV-6 and 7 they say how much it takes from the one before.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visualrwkv.config import RWKVConfig
from visualrwkv.ops import wkv6
from visualrwkv.ops.elementwise import relu_squared
from visualrwkv.ops.mix import token_mix
from visualrwkv.rwkv.network import RWKV


class TimeMix(nn.Module):
    """Mixes over time: the recurrence of `wkv6`, with one decay per channel whatever the data, and a gate."""

    def __init__(self, config: RWKVConfig, layer: int):
        super().__init__()
        C, H, N = config.n_embd, config.n_head, config.head_size
        self.n_head, self.head_size = H, N
        self.time_mix_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_v = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_r = nn.Parameter(torch.empty(1, 1, C))
        self.time_mix_g = nn.Parameter(torch.empty(1, 1, C))
        self.time_decay = nn.Parameter(torch.empty(H, N))
        self.time_faaaa = nn.Parameter(torch.empty(H, N))
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.gate = nn.Linear(C, C, bias=False)
        self.ln_x = nn.GroupNorm(H, C, eps=1e-5 * 8**2)  # 8: the family's head_size_divisor
        self.reset_parameters(layer, config.n_layer)

    @torch.no_grad()
    def reset_parameters(self, layer: int, n_layer: int) -> None:
        """The family's initial values: mixes and decays spread over channels and layers."""
        C = self.time_mix_k.numel()
        r0, r1 = layer / max(n_layer - 1, 1), 1 - layer / n_layer
        n = torch.arange(C)
        ramp = n / max(C - 1, 1)
        self.time_mix_k[0, 0] = (n / C) ** r1
        self.time_mix_v[0, 0] = (n / C) ** r1 + 0.3 * r0
        for mix in (self.time_mix_r, self.time_mix_g):
            mix[0, 0] = (n / C) ** (0.5 * r1)
        self.time_decay.copy_((-6 + 5 * ramp ** (0.7 + 1.3 * r0)).view_as(self.time_decay))
        self.time_faaaa.copy_((r0 * (1 - ramp) + 0.1 * ((n + 1) % 3 - 1)).view_as(self.time_faaaa))
        for linear, gain in ((self.receptance, 1.0), (self.value, 1.0), (self.key, 0.1), (self.gate, 0.1)):
            nn.init.orthogonal_(linear.weight, gain)
        nn.init.zeros_(self.output.weight)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, last: Tensor | None, wkv: Tensor | None, v_first: None
    ) -> tuple[Tensor, Tensor, None]:
        """x (T, C), last (S, C), wkv (S, H, N, N) -> out (T, C), new wkv."""
        T, C = x.shape
        H, N = self.n_head, self.head_size
        kept = torch.cat([self.time_mix_k, self.time_mix_v, self.time_mix_r, self.time_mix_g], 1)[0]
        xk, xv, xr, xg = (y.squeeze(0) for y in token_mix(x[None], last, 1 - kept, None, cu_seqlens))
        r, k, v = (t.view(1, T, H, N) for t in (self.receptance(xr), self.key(xk), self.value(xv)))
        w = self.time_decay.to(r.dtype).expand(1, T, H, N)
        y, wkv = wkv6(r, k, v, w, self.time_faaaa, wkv, cu_seqlens)
        return self.output(self.ln_x(y.view(T, C)) * F.silu(self.gate(xg))), wkv, None


class ChannelMix(nn.Module):
    """Mixes over channels: squared ReLU with a receptance gate."""

    def __init__(self, config: RWKVConfig, layer: int):
        super().__init__()
        C, wide = config.n_embd, config.dim_ffn
        kept = ((torch.arange(C) / C) ** (1 - layer / config.n_layer)).view(1, 1, C)
        self.time_mix_k = nn.Parameter(kept.clone())
        self.time_mix_r = nn.Parameter(kept.clone())
        self.key = nn.Linear(C, wide, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(wide, C, bias=False)
        nn.init.orthogonal_(self.key.weight, max(wide / C, 1) ** 0.5)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.receptance.weight)

    def forward(self, x: Tensor, cu_seqlens: Tensor, last: Tensor | None) -> Tensor:
        """x (T, C), last (S, C) -> (T, C)."""
        kept = torch.cat([self.time_mix_k, self.time_mix_r], 1)[0]
        xk, xr = (y.squeeze(0) for y in token_mix(x[None], last, 1 - kept, None, cu_seqlens))
        return torch.sigmoid(self.receptance(xr)) * self.value(relu_squared(self.key(xk)))


class RWKV5(RWKV):
    """The RWKV-5 language model."""

    time_mix, channel_mix = TimeMix, ChannelMix
