"""RWKV-6 (x060): Eagle and Finch, arXiv 2404.05892. Parameter names are those of the public checkpoints.

T tokens of all sequences in one packed row, S sequences, C channels, H heads, N head size, F channel-mix width, V vocabulary.
A row needs no padding: token shift and recurrence restart where a sequence starts.
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
    """Mixes over time: data-dependent token shift, data-dependent decay, the `wkv6` recurrence, a gate."""

    def __init__(self, config: RWKVConfig, layer: int):
        super().__init__()
        C, H, N = config.n_embd, config.n_head, config.head_size
        self.n_head, self.head_size = H, N
        self.time_maa_x = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_w = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_k = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_v = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_r = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_g = nn.Parameter(torch.empty(1, 1, C))
        self.time_maa_w1 = nn.Parameter(torch.empty(C, 5 * config.mix_rank))
        self.time_maa_w2 = nn.Parameter(torch.empty(5, config.mix_rank, C))
        self.time_decay = nn.Parameter(torch.empty(1, 1, C))
        self.time_decay_w1 = nn.Parameter(torch.empty(C, config.decay_rank))
        self.time_decay_w2 = nn.Parameter(torch.empty(config.decay_rank, C))
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
        C = self.time_maa_x.numel()
        r0, r1 = layer / max(n_layer - 1, 1), 1 - layer / n_layer
        n = torch.arange(C)
        ddd = n / C
        for maa in (self.time_maa_x, self.time_maa_w, self.time_maa_k):
            maa[0, 0] = 1 - ddd**r1
        self.time_maa_v[0, 0] = 1 - (ddd**r1 + 0.3 * r0)
        for maa in (self.time_maa_r, self.time_maa_g):
            maa[0, 0] = 1 - ddd ** (0.5 * r1)
        ramp = n / max(C - 1, 1)
        self.time_decay[0, 0] = -6 + 5 * ramp ** (0.7 + 1.3 * r0)
        self.time_faaaa.copy_((r0 * (1 - ramp) + 0.1 * ((n + 1) % 3 - 1)).view_as(self.time_faaaa))
        for w1, w2 in ((self.time_maa_w1, self.time_maa_w2), (self.time_decay_w1, self.time_decay_w2)):
            nn.init.zeros_(w1)
            nn.init.uniform_(w2, -0.01, 0.01)
        for linear, gain in ((self.receptance, 1.0), (self.value, 1.0), (self.key, 0.1), (self.gate, 0.1)):
            nn.init.orthogonal_(linear.weight, gain)
        nn.init.zeros_(self.output.weight)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, last: Tensor | None, wkv: Tensor | None, v_first: None
    ) -> tuple[Tensor, Tensor, None]:
        """x (T, C), last (S, C), wkv (S, H, N, N) -> out (T, C), new wkv."""
        T, C = x.shape
        H, N = self.n_head, self.head_size
        row = x[None]
        p = torch.tanh(token_mix(row, last, self.time_maa_x[0], None, cu_seqlens)[0].squeeze(0) @ self.time_maa_w1)
        delta = torch.bmm(p.view(T, 5, -1).transpose(0, 1), self.time_maa_w2)  # (5, T, C)
        maa = torch.cat([self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g], 1)[0]
        xw, xk, xv, xr, xg = (y.squeeze(0) for y in token_mix(row, last, maa, delta[:, None], cu_seqlens))
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        g = F.silu(self.gate(xg))
        w = self.time_decay[0] + torch.tanh(xw @ self.time_decay_w1) @ self.time_decay_w2
        r, k, v, w = (t.view(1, T, H, N) for t in (r, k, v, w.to(r.dtype)))
        y, wkv = wkv6(r, k, v, w, self.time_faaaa, wkv, cu_seqlens)
        return self.output(self.ln_x(y.view(T, C)) * g), wkv, None


class ChannelMix(nn.Module):
    """Mixes over channels: squared ReLU with a receptance gate."""

    def __init__(self, config: RWKVConfig, layer: int):
        super().__init__()
        C, wide = config.n_embd, config.dim_ffn
        r1 = 1 - layer / config.n_layer
        maa = (1 - (torch.arange(C) / C) ** r1).view(1, 1, C)
        self.time_maa_k = nn.Parameter(maa.clone())
        self.time_maa_r = nn.Parameter(maa.clone())
        self.key = nn.Linear(C, wide, bias=False)
        self.receptance = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(wide, C, bias=False)
        nn.init.orthogonal_(self.key.weight, max(wide / C, 1) ** 0.5)
        nn.init.zeros_(self.value.weight)
        nn.init.zeros_(self.receptance.weight)

    def forward(self, x: Tensor, cu_seqlens: Tensor, last: Tensor | None) -> Tensor:
        """x (T, C), last (S, C) -> (T, C)."""
        maa = torch.cat([self.time_maa_k, self.time_maa_r], 1)[0]
        xk, xr = (y.squeeze(0) for y in token_mix(x[None], last, maa, None, cu_seqlens))
        k = relu_squared(self.key(xk))
        r = torch.sigmoid(self.receptance(xr))
        return r * self.value(k)


class RWKV6(RWKV):
    """The RWKV-6 language model."""

    time_mix, channel_mix = TimeMix, ChannelMix
