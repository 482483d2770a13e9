"""RWKV-7 (x070): Goose, arXiv 2503.14456. Parameter names are those of the public checkpoints.

T tokens of all sequences in one packed row, S sequences, C channels, H heads, N head size, F channel-mix width, V vocabulary.
A row needs no padding: token shift and recurrence restart where a sequence starts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from visualrwkv.config import RWKVConfig
from visualrwkv.ops import wkv7
from visualrwkv.ops.elementwise import relu_squared
from visualrwkv.ops.gates7 import after_wkv7, before_wkv7, mix_values
from visualrwkv.ops.mix import token_mix
from visualrwkv.rwkv.network import RWKV


class TimeMix(nn.Module):
    """Mixes over time: the `wkv7` recurrence, which rewrites what its state holds at a key, with a learned rate `a`."""

    def __init__(self, config: RWKVConfig, layer: int):
        super().__init__()
        C, H, N = config.n_embd, config.n_head, config.head_size
        self.n_head, self.head_size = H, N
        self.x_r = nn.Parameter(torch.empty(1, 1, C))
        self.x_w = nn.Parameter(torch.empty(1, 1, C))
        self.x_k = nn.Parameter(torch.empty(1, 1, C))
        self.x_v = nn.Parameter(torch.empty(1, 1, C))
        self.x_a = nn.Parameter(torch.empty(1, 1, C))
        self.x_g = nn.Parameter(torch.empty(1, 1, C))
        self.w0 = nn.Parameter(torch.empty(1, 1, C))
        self.w1 = nn.Parameter(torch.empty(C, config.decay_rank))
        self.w2 = nn.Parameter(torch.empty(config.decay_rank, C))
        self.a0 = nn.Parameter(torch.empty(1, 1, C))
        self.a1 = nn.Parameter(torch.empty(C, config.rate_rank))
        self.a2 = nn.Parameter(torch.empty(config.rate_rank, C))
        if layer > 0:  # the first layer's values are what the others mix in
            self.v0 = nn.Parameter(torch.empty(1, 1, C))
            self.v1 = nn.Parameter(torch.empty(C, config.value_rank))
            self.v2 = nn.Parameter(torch.empty(config.value_rank, C))
        elif config.first_value:  # some public files hold them; kept so that nothing of a file is lost, and not trained
            self.register_buffer("v0", torch.zeros(1, 1, C))
            self.register_buffer("v1", torch.zeros(C, config.value_rank))
            self.register_buffer("v2", torch.zeros(config.value_rank, C))
        self.g1 = nn.Parameter(torch.empty(C, config.gate_rank))
        self.g2 = nn.Parameter(torch.empty(config.gate_rank, C))
        self.k_k = nn.Parameter(torch.empty(1, 1, C))
        self.k_a = nn.Parameter(torch.empty(1, 1, C))
        self.r_k = nn.Parameter(torch.empty(H, N))
        self.receptance = nn.Linear(C, C, bias=False)
        self.key = nn.Linear(C, C, bias=False)
        self.value = nn.Linear(C, C, bias=False)
        self.output = nn.Linear(C, C, bias=False)
        self.ln_x = Readout(H, C, eps=1e-5 * 8**2)  # 8: the family's head_size_divisor
        self.reset_parameters(layer, config.n_layer)

    @torch.no_grad()
    def reset_parameters(self, layer: int, n_layer: int) -> None:
        """The family's initial values: mixes and decays spread over channels and layers."""
        C = self.x_r.numel()
        r0, r1 = layer / max(n_layer - 1, 1), 1 - layer / n_layer
        n = torch.arange(C)
        ddd = n / C
        for x in (self.x_r, self.x_g):
            x[0, 0] = 1 - ddd ** (0.2 * r1)
        for x in (self.x_w, self.x_a):
            x[0, 0] = 1 - ddd ** (0.9 * r1)
        self.x_k[0, 0] = 1 - (ddd ** (0.9 * r1) + 0.4 * r0)
        self.x_v[0, 0] = 1 - (ddd ** (0.4 * r1) + 0.6 * r0)
        self.w0[0, 0] = -6.5 + 5 * (n / max(C - 1, 1)) ** (0.85 + r0**0.5)
        pairs = [(self.w1, self.w2), (self.a1, self.a2), (self.g1, self.g2)]
        for constant, value in ((self.a0, 0.0), (self.k_k, 0.85), (self.k_a, 1.0), (self.r_k, 0.0)):
            nn.init.constant_(constant, value)
        if layer > 0:
            nn.init.constant_(self.v0, 1.0)
            pairs.append((self.v1, self.v2))
        for low, high in pairs:
            nn.init.zeros_(low)
            nn.init.orthogonal_(high, 0.1 * max(high.shape[0] / high.shape[1], 1) ** 0.5)
        for linear, bound in ((self.receptance, 0.5), (self.key, 0.05), (self.value, 0.5)):
            nn.init.uniform_(linear.weight, -bound / C**0.5, bound / C**0.5)
        nn.init.zeros_(self.output.weight)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor, last: Tensor | None, wkv: Tensor | None, v_first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (T, C), last (S, C), wkv (S, H, N, N), v_first (T, C) the first layer's values (None in it) -> out (T, C), new
        wkv, v_first.
        """
        T, C = x.shape
        H, N = self.n_head, self.head_size
        mixes = torch.cat([self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g], 1)[0]
        xr, xw, xk, xv, xa, xg = (y.squeeze(0) for y in token_mix(x[None], last, mixes, None, cu_seqlens))
        r, k, v = self.receptance(xr), self.key(xk), self.value(xv)
        decay, rate = torch.tanh(xw @ self.w1) @ self.w2, (xa @ self.a1) @ self.a2
        gate = torch.sigmoid(xg @ self.g1) @ self.g2
        if v_first is None:
            v_first = v
        else:
            v = mix_values(v, (xv @ self.v1) @ self.v2, v_first, self.v0, H)
        w, k, a, b = before_wkv7(k, decay, rate, self.w0, self.a0, self.k_k, self.k_a, H)
        R, W, K, V, A, B = (t.view(1, T, H, N) for t in (r, w, k, v, a, b))
        y, wkv = wkv7(R, W, K, V, A, B, wkv, cu_seqlens)
        return self.output(self.ln_x(y.view(T, C), r, k, v, gate, self.r_k)), wkv, v_first


class Readout(nn.GroupNorm):
    """Normalises per head what was read of the state, adds the current token's own value, and gates both."""

    def forward(self, y: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor, bonus: Tensor) -> Tensor:  # type: ignore[override]
        """y, r, k, v, gate (T, C), bonus (H, N) -> (T, C)."""
        return after_wkv7(y, r, k, v, gate, bonus, self.weight, self.bias, self.num_groups, self.eps)


class ChannelMix(nn.Module):
    """Mixes over channels: squared ReLU."""

    def __init__(self, config: RWKVConfig, layer: int):
        super().__init__()
        C = config.n_embd
        r1 = 1 - layer / config.n_layer
        self.x_k = nn.Parameter((1 - (torch.arange(C) / C) ** r1**4).view(1, 1, C))
        self.key = nn.Linear(C, config.dim_ffn, bias=False)
        self.value = nn.Linear(config.dim_ffn, C, bias=False)
        nn.init.uniform_(self.key.weight, -0.5 / C**0.5, 0.5 / C**0.5)
        nn.init.zeros_(self.value.weight)

    def forward(self, x: Tensor, cu_seqlens: Tensor, last: Tensor | None) -> Tensor:
        """x (T, C), last (S, C) -> (T, C)."""
        return self.value(relu_squared(self.key(token_mix(x[None], last, self.x_k[0], None, cu_seqlens)[0].squeeze(0))))


class RWKV7(RWKV):
    """The RWKV-7 language model."""

    time_mix, channel_mix = TimeMix, ChannelMix
