"""The headline at length: reading long prompts and saying the next token, against a LLaVA. `python benchmarks/length.py`

VisualRWKV with RWKV-6 and RWKV-7 of 190 M against transformers' LLaVA with a Llama of as many parameters (within 3 %), all in
bf16 with random weights and the same small CLIP encoder. A prompt is one picture (576 image tokens) and random text up to
the length. Times: all models in one process, taking turns, ours by generate.py's prefill and step, the LLaVA with the
quicker of transformers' two caches at each length. Memory: a process for every model and length.

Goes on where an interrupted run left off. Writes benchmarks/results/<machine>/length.json and .png.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fresh  # first: it pins threads
import measure
import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StaticCache,
)

from visualrwkv.config import RWKV_PRESETS, ModelConfig, RWKVConfig, ViTConfig
from visualrwkv.generate import prefill, step
from visualrwkv.model import IMAGE_PLACEHOLDER, VisualRWKV

LENGTHS = (1024, 2048, 4096, 8192, 16384, 24576)
ENCODER = ViTConfig(12, 384, 6, 1536, image_size=336, patch_size=14, cls_token=False)
IMAGE_TOKENS = 576
LANGUAGE = {"RWKV-6": RWKVConfig(12, 768), "RWKV-7": RWKV_PRESETS["rwkv7-0b1"]}
LLAMA = {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 2368}
MODELS = (*LANGUAGE, "LLaVA")
STEPS = 24  # most tokens that are timed at a length
QUICKER = "cache that is quicker for LLaVA"
PAPER = "VisualRWKV-7B against LLaVA-1.5-7B at 24,576 tokens, an L20: 3.98 times as fast, 54 % less memory"


class Ours:
    """A VisualRWKV that reads a prompt and says tokens as generate.py has it."""

    def __init__(self, name: str):
        config = LANGUAGE[name]
        scan = "bi" if config.version == 6 else "uni"  # as in the releases
        model = VisualRWKV(ModelConfig(config, ENCODER, "linear", IMAGE_TOKENS, scan))  # type: ignore[arg-type]
        nn.init.normal_(model.rwkv.head.weight, std=0.02)
        self.model = model.to(DEVICE, torch.bfloat16).eval().requires_grad_(False)

    def language(self) -> int:
        return sum(p.numel() for p in self.model.rwkv.parameters())

    def read(self, ids: Tensor, pixels: Tensor) -> Tensor:
        logits, self.state = prefill(self.model, [ids.tolist()], pixels)
        return logits

    def say(self) -> Tensor:
        logits, self.state = step(self.model, torch.tensor([5], device=DEVICE), self.state)
        return logits

    def kept(self) -> int:
        return self.state.nbytes()


class Llava:
    """The same of transformers' LLaVA. `static`: the next tokens' cache is laid out for the whole length at once."""

    def __init__(self) -> None:
        clip = CLIPVisionConfig(
            hidden_size=ENCODER.width,
            intermediate_size=ENCODER.ffn,
            num_hidden_layers=ENCODER.depth,
            num_attention_heads=ENCODER.heads,
            image_size=ENCODER.image_size,
            patch_size=ENCODER.patch_size,
        )
        llama = LlamaConfig(vocab_size=65536, max_position_embeddings=32768, **LLAMA)
        config = LlavaConfig(
            vision_config=clip, text_config=llama, image_token_index=IMAGE_PLACEHOLDER, vision_feature_layer=-1
        )
        config._attn_implementation = "sdpa"
        self.model = LlavaForConditionalGeneration(config).to(DEVICE, torch.bfloat16).eval().requires_grad_(False)
        self.caches: dict[str, Any] = {}

    def language(self) -> int:
        return sum(
            p.numel() for part in (self.model.model.language_model, self.model.lm_head) for p in part.parameters()
        )

    def read(self, ids: Tensor, pixels: Tensor) -> Tensor:
        self.caches.clear()
        cache = DynamicCache(config=self.model.config.text_config)
        out = self.model(ids[None], pixels, past_key_values=cache, use_cache=True, logits_to_keep=1)
        self.caches["dynamic"] = cache
        return out.logits[:, 0]

    def lay_out(self) -> None:
        """Beside the cache that grew, a static one of the same content."""
        cache = self.caches["dynamic"]
        static = StaticCache(self.model.config.text_config, max_cache_len=cache.get_seq_length() + STEPS + 2)
        for layer, old in zip(static.layers, cache.layers, strict=True):
            layer.update(old.keys, old.values)
        self.caches["static"] = static

    def say(self, kind: str = "dynamic") -> Tensor:
        token = torch.full((1, 1), 5, device=DEVICE)
        return self.model(token, past_key_values=self.caches[kind], use_cache=True, logits_to_keep=1).logits[:, 0]

    def kept(self) -> int:
        return sum(t.nbytes for layer in self.caches["dynamic"].layers for t in (layer.keys, layer.values))


DEVICE = "cpu"


def build(name: str) -> Ours | Llava:
    torch.manual_seed(0)
    return Llava() if name == "LLaVA" else Ours(name)


def prompt(length: int) -> tuple[Tensor, Tensor]:
    """Ids (length,) of one picture among random text, and its pixels."""
    g = torch.Generator().manual_seed(length)
    ids = torch.randint(1, 60000, (length,), generator=g)
    ids[16 : 16 + IMAGE_TOKENS] = IMAGE_PLACEHOLDER
    side = ENCODER.image_size
    return ids.to(DEVICE), torch.randn(1, 3, side, side, generator=g).to(DEVICE, torch.bfloat16)


def finished(run: Callable[[], Tensor]) -> Callable[[], None]:
    """The call, with what it started on a GPU waited for."""

    def call() -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return call


# What is measured ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def times(length: int, seconds: float) -> dict[str, Any]:
    """Seconds of a prefill and of a next token after it, of all models in turns."""
    models = {name: build(name) for name in MODELS}
    sizes = {name: model.language() for name, model in models.items()}
    for name in LANGUAGE:
        assert abs(sizes["LLaVA"] / sizes[name] - 1) < 0.03, sizes
    short = prompt(IMAGE_TOKENS + 64)
    for model in models.values():  # weights are packed and libraries opened before anything is timed
        model.read(*short)
        model.say()
    whole = prompt(length)
    reads = {name: finished(lambda model=model: model.read(*whole)) for name, model in models.items()}  # type: ignore[misc]
    found = {"prefill": measure.figures(measure.take_turns(reads, seconds, 3, warm=True))}
    llava = models["LLaVA"]
    assert isinstance(llava, Llava)
    llava.lay_out()
    says = {name: finished(models[name].say) for name in LANGUAGE}
    says |= {f"LLaVA, {kind} cache": finished(lambda kind=kind: llava.say(kind)) for kind in ("dynamic", "static")}  # type: ignore[misc]
    found["next token"] = measure.figures(measure.take_turns(says, seconds, 8, STEPS))
    for model in models.values():
        assert bool(model.say().isfinite().all())
    return {**found, "parameters": sizes}


@torch.inference_mode()
def memory(name: str, length: int) -> dict[str, int]:
    """Bytes: what is kept between tokens, by its tensors; what the process grew by, and had at most."""
    Peak = fresh.CudaPeak if DEVICE == "cuda" else fresh.Peak
    with Peak() as building:
        model = build(name)
    with Peak() as packing:  # the first token lays the weights out anew
        model.read(*prompt(IMAGE_TOKENS + 64))
        model.say()
    whole = prompt(length)
    with Peak() as reading:
        model.read(*whole)
    kept = model.kept()
    with Peak() as saying:
        for _ in range(8):
            model.say()
    return {
        "kept": kept,
        "prefill growth": reading.most - reading.before,
        "next token growth": saying.most - reading.before,
        "weights laid out anew": max(0, packing.after - packing.before),
        "model, prefill": reading.most - building.before,
        "model, next token": saying.most - building.before,
    }


# What it comes to ----------------------------------------------------------------------------------------------------


def gather(found: dict[str, Any], lengths: list[int]) -> dict[str, Any]:
    """By length: seconds of each model, bytes of each, and how many times ours the LLaVA's are."""
    result: dict[str, Any] = {}
    for length in lengths:
        cases = [f"times {length}", *(f"memory {name} {length}" for name in MODELS)]
        if failed := {case: found[case]["failed"] for case in cases if "failed" in found[case]}:
            print(f"{length} tokens left out: {failed}")
            continue
        timed = found[cases[0]]
        tokens = timed["next token"]
        cache = min(("dynamic", "static"), key=lambda kind: tokens[f"LLaVA, {kind} cache"]["median"])
        row: dict[str, Any] = {"times": timed, "memory": {n: found[f"memory {n} {length}"] for n in MODELS}}
        row[QUICKER] = cache
        row["LLaVA over ours"] = {
            name: {
                "prefill": timed["prefill"][name]["ratio"]["LLaVA"],
                "next token": tokens[name]["ratio"][f"LLaVA, {cache} cache"],
                **{key: row["memory"]["LLaVA"][key] / max(1, value) for key, value in row["memory"][name].items()},
            }
            for name in LANGUAGE
        }
        result[str(length)] = row
    return result


def draw(rows: dict[str, Any], path: Path) -> None:
    """Next token, prefill and memory over the length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lengths = [int(length) for length in rows]
    figure, panels = plt.subplots(1, 3, figsize=(13, 4))
    for name, colour in zip(MODELS, plt.get_cmap("tab10").colors):
        style = {"color": colour, "marker": "o", "markersize": 4}
        tokens = [
            row["times"]["next token"][name if name in LANGUAGE else f"LLaVA, {row[QUICKER]} cache"]
            for row in rows.values()
        ]
        panels[0].plot(lengths, [t["median"] * 1e3 for t in tokens], label=name, **style)
        spread = [[t["spread"][end] * 1e3 for t in tokens] for end in (0, 1)]
        panels[0].fill_between(lengths, *spread, color=colour, alpha=0.15, linewidth=0)
        panels[1].plot(lengths, [row["times"]["prefill"][name]["median"] for row in rows.values()], **style)
        used = [row["memory"][name] for row in rows.values()]
        panels[2].plot(lengths, [m["kept"] / 1e6 for m in used], label=f"{name}, kept", **style)
        growth = [max(m["prefill growth"], m["next token growth"]) / 1e6 for m in used]
        panels[2].plot(lengths, growth, linestyle=":", label=f"{name}, growth", **style)
    for panel, title, unit in zip(panels, ("next token", "prefill", "memory beside the weights"), ("ms", "s", "MB")):
        panel.set(xscale="log", yscale="log", title=title, ylabel=unit, xlabel="tokens in the prompt")
        panel.set_xticks(lengths, [f"{length:,}" for length in lengths], fontsize=7)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    panels[2].legend(fontsize=6, loc="lower left", bbox_to_anchor=(0, 0.08))
    panels[0].set_yticks([10, 20, 50, 100], ["10", "20", "50", "100"])
    figure.suptitle("190 M, bf16, " + ("two CPU cores" if measure.machine_name() == "cpu-2core" else "this machine"))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    global DEVICE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS))
    parser.add_argument("--seconds", type=float, default=10.0, help="about so long for each of a length's two measures")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda was never tried")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    DEVICE = options.device
    if DEVICE == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if min(options.lengths) <= IMAGE_TOKENS + 16:
        parser.error(
            f"--lengths: a prompt holds a picture of {IMAGE_TOKENS} tokens; {min(options.lengths)} is too short"
        )
    if options.only:
        what, *words = options.only.split()
        done = times(int(words[0]), options.seconds) if what == "times" else memory(words[0], int(words[1]))
        print(json.dumps(done))
        return
    cases = [f"times {length}" for length in options.lengths]
    cases += [f"memory {name} {length}" for length in options.lengths for name in MODELS]
    name = "length" if DEVICE == "cpu" else "length_cuda"
    settings = ["--seconds", str(options.seconds), "--device", DEVICE]
    rows = gather(fresh.each(name, __file__, cases, settings), options.lengths)
    shapes = {
        "ours": {n: f"{c.n_layer} layers of {c.n_embd}" for n, c in LANGUAGE.items()},
        "LLaVA": LLAMA,
        "encoder": str(ENCODER),
        "prompt": f"one picture of {IMAGE_TOKENS} tokens, then random text",
        "dtype": "bf16, ours with states in fp32",
    }
    results = {"shapes": shapes, "paper": PAPER, "figures": rows}
    path = measure.record(name, results, ("visualrwkv", "torch", "transformers"))
    draw(rows, path.with_suffix(".png"))
    fresh.partial_file(name).unlink()
    for length, row in rows.items():
        for model, ratios in row["LLaVA over ours"].items():
            print(f"{length} tokens, LLaVA over {model}: " + ", ".join(f"{k} {v:.2f}" for k, v in ratios.items()))
    print(f"paper: {PAPER}")
    print(json.dumps({"written": str(path.relative_to(measure.ROOT))}))


if __name__ == "__main__":
    main()
