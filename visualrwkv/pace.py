"""How fast a model answers here: `visualrwkv bench`.

The prompt is random words of its vocabulary; speed does not depend on what they say. All times are medians.
"""

from __future__ import annotations

import statistics
import time

import torch

from visualrwkv.checkpoint import DTYPES, STEP_DTYPES, check_dtype, load_model
from visualrwkv.config import RWKV_PRESETS, ModelConfig
from visualrwkv.generate import prefill, step
from visualrwkv.model import VisualRWKV
from visualrwkv.ops import library
from visualrwkv.ops.token_step import TokenStep, packed_step

PREFILLS, WARM_UP = 3, 2


def open_model(name: str, device: str, dtype: str) -> VisualRWKV:
    """A model, or a language model of a preset's sizes with random weights. Errors as `load_model`."""
    if name not in RWKV_PRESETS:
        return load_model(name, device, dtype)
    check_dtype(dtype, device)
    with torch.device("meta"):
        model = VisualRWKV(ModelConfig(RWKV_PRESETS[name])).to(DTYPES.get(dtype, torch.bfloat16))
    model = model.to_empty(device=device).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.02)
    if dtype in STEP_DTYPES:
        model.rwkv.step_dtype = dtype
    return model


def measure(model: str, device: str, dtype: str, prompt: int, tokens: int, batch: int) -> dict[str, str]:
    """Facts by their names: weights, time to the first token, tokens per second, state."""
    for name, value in (("prompt", prompt), ("tokens", tokens), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name} is {value}; prompt, tokens and batch must be at least 1")
    opened = open_model(model, device, dtype)
    config = opened.config.rwkv
    prompts = torch.randint(1, config.vocab_size - 1, (batch, prompt), generator=torch.Generator().manual_seed(0))
    first, each = [], []
    logits, state = prefill(opened, [[1]] * batch)
    for _ in range(PREFILLS):
        began = time.perf_counter()
        logits, state = prefill(opened, prompts.tolist())
        chosen = logits.argmax(-1)
        chosen.tolist()  # waits for a GPU
        first.append(time.perf_counter() - began)
    for turn in range(WARM_UP + tokens):
        began = time.perf_counter()
        logits, state = step(opened, chosen, state)
        chosen = logits.argmax(-1)
        chosen.tolist()
        if turn >= WARM_UP:
            each.append(time.perf_counter() - began)
    packed = packed_step(opened.rwkv, opened.rwkv.step_dtype)
    middle = statistics.median(each)
    facts = {
        "model": f"{model}, RWKV-{config.version}, {config.n_layer} layers of {config.n_embd}",
        "weights": dtype,
        "kernels": library.variant().strip("_") or "compiled" if library.COMPILED else "none: the torch form runs",
        "first token": f"{statistics.median(first) * 1e3:.1f} ms after {batch} prompt{'s' * (batch > 1)} of {prompt} tokens",
        "tokens/s": f"{batch / middle:.1f} ({middle * 1e3:.2f} ms a step, slowest {max(each) * 1e3:.2f})",
        "state": f"{state.nbytes() // batch:,} bytes each",
    }
    if isinstance(packed, TokenStep):
        facts["weights"] += (
            f", {packed.nbytes() / 1e6:,.0f} MB a step, read at {packed.nbytes() / middle / 1e9:.1f} GB/s"
        )
    return facts
