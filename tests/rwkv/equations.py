"""The language models written from their equations, in numpy and float64: one sequence x (T, C), no packing.

`p` holds the parameters by the names of the public checkpoints. `start` (H, N, N), [value, key]: what a layer remembers
before the first token, zeros unless given.
"""

import numpy as np


class Weights(dict):
    """Parameters by name; `under` gives those below a name."""

    def under(self, name):
        return Weights({k[len(name) + 1 :]: v for k, v in self.items() if k.startswith(f"{name}.")})


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def layer_norm(x, p):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * p["weight"] + p["bias"]


def group_norm(x, heads, p):
    grouped = x.reshape(len(x), heads, -1)
    centred = grouped - grouped.mean(-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 6.4e-4)
    return normal.reshape(x.shape) * p["weight"] + p["bias"]


def mix(x, maa):
    """x, and as much of what came before it as maa says."""
    return x + (np.concatenate([np.zeros_like(x[:1]), x[:-1]]) - x) * maa


def wkv(r, k, v, decay, bonus, heads, start):
    """S_t = diag(decay_t) S_{t-1} + k_t v_t^T, read by r_t before the step but for the own token, which has a bonus."""
    (T, C), N = r.shape, r.shape[1] // heads
    y = np.zeros((T, C))
    for h in range(heads):
        part = slice(h * N, (h + 1) * N)
        S = start[h]  # [value i, key j]
        for t in range(T):
            now = np.outer(v[t, part], k[t, part])
            y[t, part] = (S + bonus[h] * now) @ r[t, part]
            S = S * decay[t, part] + now
    return y


def time_mix5(x, p, heads, v_first, start):
    xk, xv, xr, xg = (mix(x, 1 - p[f"time_mix_{name}"][0, 0]) for name in "kvrg")
    r, k, v = xr @ p["receptance.weight"].T, xk @ p["key.weight"].T, xv @ p["value.weight"].T
    g = xg @ p["gate.weight"].T
    decay = np.tile(np.exp(-np.exp(p["time_decay"].reshape(-1))), (len(x), 1))
    y = wkv(r, k, v, decay, p["time_faaaa"], heads, start)
    return group_norm(y, heads, p.under("ln_x")) * g * sigmoid(g) @ p["output.weight"].T, None


def channel_mix5(x, p):
    k = np.maximum(mix(x, 1 - p["time_mix_k"][0, 0]) @ p["key.weight"].T, 0) ** 2
    return sigmoid(mix(x, 1 - p["time_mix_r"][0, 0]) @ p["receptance.weight"].T) * (k @ p["value.weight"].T)


def time_mix6(x, p, heads, v_first, start):
    low = np.tanh(mix(x, p["time_maa_x"][0, 0]) @ p["time_maa_w1"]).reshape(len(x), 5, -1)
    xw, xk, xv, xr, xg = (
        mix(x, p[f"time_maa_{name}"][0, 0] + low[:, i] @ p["time_maa_w2"][i]) for i, name in enumerate("wkvrg")
    )
    r, k, v = xr @ p["receptance.weight"].T, xk @ p["key.weight"].T, xv @ p["value.weight"].T
    g = xg @ p["gate.weight"].T
    decay = np.exp(-np.exp(p["time_decay"][0, 0] + np.tanh(xw @ p["time_decay_w1"]) @ p["time_decay_w2"]))
    y = wkv(r, k, v, decay, p["time_faaaa"], heads, start)
    return group_norm(y, heads, p.under("ln_x")) * g * sigmoid(g) @ p["output.weight"].T, None


def channel_mix6(x, p):
    k = np.maximum(mix(x, p["time_maa_k"][0, 0]) @ p["key.weight"].T, 0) ** 2
    return sigmoid(mix(x, p["time_maa_r"][0, 0]) @ p["receptance.weight"].T) * (k @ p["value.weight"].T)


def time_mix7(x, p, heads, v_first, start):
    (T, C), N = x.shape, x.shape[1] // heads
    xr, xw, xk, xv, xa, xg = (mix(x, p[f"x_{name}"][0, 0]) for name in "rwkvag")
    r, k, v = xr @ p["receptance.weight"].T, xk @ p["key.weight"].T, xv @ p["value.weight"].T
    decay = np.exp(-np.exp(-0.5) * sigmoid(p["w0"][0, 0] + np.tanh(xw @ p["w1"]) @ p["w2"]))
    if v_first is None:
        v_first = v
    else:
        v = v + (v_first - v) * sigmoid(p["v0"][0, 0] + xv @ p["v1"] @ p["v2"])
    a = sigmoid(p["a0"][0, 0] + xa @ p["a1"] @ p["a2"])
    g = sigmoid(xg @ p["g1"]) @ p["g2"]
    kk = k * p["k_k"][0, 0]
    k = k * (1 + (a - 1) * p["k_a"][0, 0])
    y, own = np.zeros((T, C)), np.zeros((T, C))
    for h in range(heads):
        part = slice(h * N, (h + 1) * N)
        S = start[h]  # [value i, key j]
        for t in range(T):
            unit = kk[t, part] / np.linalg.norm(kk[t, part])
            S = S * decay[t, part] - np.outer(S @ unit, unit * a[t, part]) + np.outer(v[t, part], k[t, part])
            y[t, part] = S @ r[t, part]
            own[t, part] = (r[t, part] * k[t, part] * p["r_k"][h]).sum() * v[t, part]
    return (group_norm(y, heads, p.under("ln_x")) + own) * g @ p["output.weight"].T, v_first


def channel_mix7(x, p):
    return np.maximum(mix(x, p["x_k"][0, 0]) @ p["key.weight"].T, 0) ** 2 @ p["value.weight"].T


MIXERS = {5: (time_mix5, channel_mix5), 6: (time_mix6, channel_mix6), 7: (time_mix7, channel_mix7)}


def language_model(x, p, config, start=None):
    """Embeddings (T, C) -> the hidden states after ln_out; start (L, H, N, N)."""
    N = config.head_size
    start = np.zeros((config.n_layer, config.n_head, N, N)) if start is None else start
    time_mix, channel_mix = MIXERS[config.version]
    x, v_first = layer_norm(x, p.under("blocks.0.ln0")), None
    for i in range(config.n_layer):
        block = p.under(f"blocks.{i}")
        h = layer_norm(x, block.under("ln1"))
        out, v_first = time_mix(h, block.under("att"), config.n_head, v_first, start[i])
        x = x + out
        x = x + channel_mix(layer_norm(x, block.under("ln2")), block.under("ffn"))
    return layer_norm(x, p.under("ln_out"))
