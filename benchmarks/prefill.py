"""Reading a prompt and going on from it, against the `rwkv` package and a Llama: `python benchmarks/prefill.py` (some ten minutes).

RWKV-6 and RWKV-7 of 190 M with random weights, bf16, on the CPU, through `visualrwkv.generate` as every answer goes:

    600 tokens     prefill by ours, by the package (`forward` with the list of ids), and by a Llama of as many parameters
    3,000 tokens   prefill by ours and by the Llama (transformers, sdpa, logits of the last position, its cache kept);
                   then eight tokens one by one from there, the most likely each time
    without state  600 tokens read and 100 said, against reading the whole row again for each of the 100

The row is read again in three ways: by our own prefill, which is the quickest there is and computes logits of the last position
alone; by our forward, which computes them everywhere, as the reference's `generate` does; and by the package. A pass is timed
at a few lengths between 600 and 699, and the hundred are summed along straight lines between these.

Ours and the package have the same numbers: `checks` holds the largest difference of their log-probabilities after 600 tokens,
and of each to our fp32. `--large` adds RWKV-6 of 1.6 B, without state only and without the package (four minutes, 7 GB).
Each model has a process of its own, since the package is imported for one version.

Writes benchmarks/results/<machine>/prefill.json and prefill.png.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure  # first: it pins threads
import torch
from decode import MODELS, package
from torch import nn

from visualrwkv.config import ModelConfig, RWKVConfig
from visualrwkv.generate import prefill, step
from visualrwkv.model import VisualRWKV
from visualrwkv.ops import library

SMALL, LARGE = ("rwkv6-190m", "rwkv7-190m"), "rwkv6-1b6"
QUICK = {"n_layer": 2, "n_embd": 128}
STEPS = 8  # tokens of a measurement of single steps
BARS = {"prefill 600: package / ours": 1.8, "prefill 3000: Llama / ours": 1.4, "step at 3000: Llama / ours": 4.0}
Run = Callable[[], object]


def random_model(config: RWKVConfig) -> VisualRWKV:
    """A language model of bf16 noise, its norms at 1, so that what it says depends on all of it."""
    with torch.device("meta"):
        model = VisualRWKV(ModelConfig(config)).to(torch.bfloat16)
    model = model.to_empty(device="cpu").requires_grad_(False).eval()
    noise = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(0, 0.02, generator=noise)
    for module in model.modules():
        if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            module.weight.fill_(1)
    return model


def llama(config: RWKVConfig, count: int) -> Any:
    """A Llama of as many parameters within 3 %: the same layers and width, its feed-forward as wide as that takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    layers, width, words = config.n_layer, config.n_embd, config.vocab_size
    inner = ((count - 2 * words * width) // layers - 4 * width**2) // (3 * width)
    sizes = {
        "vocab_size": words,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": width // 64,
        "intermediate_size": inner // 32 * 32,
        "max_position_embeddings": 32768,
    }
    net = LlamaForCausalLM._from_config(LlamaConfig(**sizes), dtype=torch.bfloat16, attn_implementation="sdpa")
    off = sum(p.numel() for p in net.parameters()) / count - 1
    assert abs(off) < 0.03, f"the Llama has {off:+.1%} parameters"
    return net.eval()


def ours_says(model: VisualRWKV, prompt: list[int], count: int) -> Run:
    """Read a prompt and say so many tokens."""

    def run() -> None:
        logits, state = prefill(model, [prompt])
        for _ in range(count):
            logits, state = step(model, logits.argmax(-1), state)

    return run


def ours_goes_on(model: VisualRWKV, prompt: list[int]) -> Run:
    """STEPS tokens after a prompt that was read before."""
    first, read = prefill(model, [prompt])

    def run() -> None:
        logits, state = first, read
        for _ in range(STEPS):
            logits, state = step(model, logits.argmax(-1), state)

    return run


def llama_goes_on(net: Any, prompt: list[int]) -> Run:
    """The same of a Llama with its cache, which is cut back to the prompt afterwards."""
    read = net(torch.tensor([prompt]), use_cache=True, logits_to_keep=1)
    cache, first = read.past_key_values, read.logits

    def run() -> None:
        logits = first
        for _ in range(STEPS):
            logits = net(logits[:, -1].argmax(-1)[None], past_key_values=cache, use_cache=True).logits
        cache.crop(-STEPS)

    return run


def again(times: dict[str, list[float]], way: str, lengths: Sequence[int]) -> list[float]:
    """Of each round, what reading at every length from the first to the last takes: lines between the measured ones."""
    sums = []
    for each in zip(*(times[f"{way}, {length}"] for length in lengths), strict=True):
        total = 0.0
        for (a, b), (low, high) in zip(itertools.pairwise(lengths), itertools.pairwise(each)):
            total += sum(low + (high - low) * i / (b - a) for i in range(b - a))
        sums.append(total + each[-1])
    return sums


def without_state(model: VisualRWKV, theirs: Any, sizes: Sizes) -> dict[str, list[float]]:
    """Seconds of each round: an answer by ours, and the same with every token's row read again."""
    ids, length = row(sizes.short + sizes.said), sizes.short
    few = [length, length + sizes.said - 1]
    lengths = sorted({*few, *(few if theirs is None else (length + sizes.said * i // 3 for i in (1, 2)))})
    candidates: dict[str, Run] = {"ours": ours_says(model, ids[:length], sizes.said)}
    for n in lengths:
        candidates[f"prefill again, {n}"] = lambda n=n: prefill(model, [ids[:n]])
        candidates[f"forward again, {n}"] = lambda n=n: model(torch.tensor([ids[:n]]))[0][:, -1]
    times = measure.take_turns(candidates, sizes.seconds, least=3)
    found = {"ours": times["ours"]}
    found |= {way: again(times, way, lengths) for way in ("prefill again", "forward again")}
    if theirs is not None:
        both: dict[str, Run] = {"ours": candidates["ours"]}
        both |= {f"package again, {n}": lambda n=n: theirs.forward(ids[:n], None) for n in few}
        times = measure.take_turns(both, sizes.seconds, least=3)
        found |= {"ours, beside the package": times["ours"], "package again": again(times, "package again", few)}
    return found


def row(length: int) -> list[int]:
    """Random words."""
    return torch.randint(1, 60000, (length,), generator=torch.Generator().manual_seed(1)).tolist()


def difference(model: VisualRWKV, theirs: Any, length: int) -> dict[str, float]:
    """Largest differences of log-probabilities after a prompt; `spread` is what there is to tell apart."""
    prompt = row(length)
    exact = copy.deepcopy(model).float()
    said = {
        "ours": prefill(model, [prompt])[0][0],
        "package": theirs.forward(prompt, None)[0],
        "fp32": prefill(exact, [prompt])[0][0],
    }
    logs = {name: logits.float().log_softmax(-1) for name, logits in said.items()}
    pairs = (("ours", "package"), ("ours", "fp32"), ("package", "fp32"))
    found = {f"{a} against {b}": (logs[a] - logs[b]).abs().max().item() for a, b in pairs}
    return found | {"spread": logs["fp32"].std().item()}


class Sizes:
    """How much is measured."""

    def __init__(self, quick: bool, seconds: float):
        self.short, self.long, self.said = (60, 300, 10) if quick else (600, 3000, 100)
        self.seconds = 1.0 if quick else seconds


@torch.inference_mode()
def one(name: str, sizes: Sizes, quick: bool) -> dict[str, Any]:
    """All that is measured of a model."""
    config = MODELS[name]
    if quick:
        config = RWKVConfig(**QUICK, version=config.version)
    model = random_model(config)
    count = sum(p.numel() for p in model.parameters())
    result: dict[str, Any] = {"parameters": {"ours": count}, "checks": {}, "times": {}}
    theirs = None
    if name != LARGE:
        with tempfile.TemporaryDirectory() as folder:
            theirs = package(model.rwkv, config.version, folder)
        result["checks"] = difference(model, theirs, sizes.short)
        other = llama(config, count)
        result["parameters"]["Llama"] = sum(p.numel() for p in other.parameters())
        short, long = row(sizes.short), row(sizes.long)

        def reads(ids: list[int]) -> dict[str, Run]:
            return {
                "ours": lambda: prefill(model, [ids]),
                "Llama": lambda: other(torch.tensor([ids]), use_cache=True, logits_to_keep=1),
            }

        result["times"]["prefill 600"] = measure.take_turns(
            {**reads(short), "package": lambda: theirs.forward(short, None)}, sizes.seconds
        )
        result["times"]["prefill 3000"] = measure.take_turns(reads(long), sizes.seconds)
        steps = {"ours": ours_goes_on(model, long), "Llama": llama_goes_on(other, long)}
        times = measure.take_turns(steps, sizes.seconds)
        result["times"]["step at 3000"] = {who: [t / STEPS for t in each] for who, each in times.items()}
        del other, steps
    result["times"]["without state"] = without_state(model, theirs, sizes)
    return result | {"kernels": library.variant().strip("_"), "threads": torch.get_num_threads()}


def summary(times: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """The ratios that are asked about."""
    found = {}
    for case, each in times.items():
        if case != "without state":
            found |= {f"{case}: {who} / ours": measure.ratio(each, who, "ours") for who in each if who != "ours"}
            continue
        for who in each:
            if who.endswith("again"):
                beside = "ours, beside the package" if who.startswith("package") else "ours"
                found[f"{case}: {who} / ours"] = measure.ratio(each, who, beside)
    return found


def draw(bars: dict[str, dict[str, Any]], path: Path) -> None:
    """The ratios, a group for each of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cases = list(dict.fromkeys(case for each in bars.values() for case in each))
    figure, axes = plt.subplots(figsize=(9, 0.5 * len(cases) + 1.5))
    height = 0.8 / len(bars)
    for i, (model, each) in enumerate(bars.items()):
        rows = [cases.index(case) + (i + 0.5) * height - 0.4 for case in each]
        middles = [value["median"] for value in each.values()]
        axes.barh(rows, middles, height, label=model)
        for at, middle in zip(rows, middles, strict=True):
            axes.text(middle, at, f" {middle:.3g}", va="center", fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", xlabel="times as long as ours", yticks=range(len(cases)), yticklabels=cases)
    axes.invert_yaxis()
    axes.legend(fontsize=7)
    axes.set_title("Reading a prompt and going on from it, bf16, CPU")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="RWKV-6 of 1.6 B as well")
    parser.add_argument("--seconds", type=float, default=40.0, help="about so long a case")
    parser.add_argument("--quick", action="store_true", help="tiny models and short rows; stores nothing")
    parser.add_argument("--only", choices=[*SMALL, LARGE], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not library.COMPILED:
        sys.exit("error: there are no compiled kernels to measure; `visualrwkv kernels build` makes them")
    if options.only:
        print(json.dumps(one(options.only, Sizes(options.quick, options.seconds), options.quick)))
        return
    measured = {}
    for name in (*SMALL, LARGE) if options.large else SMALL:
        command = [sys.executable, __file__, "--only", name, "--seconds", str(options.seconds)]
        command += ["--quick"] * options.quick
        os.sched_setaffinity(0, range(os.cpu_count() or 1))  # torch bound this thread to one core
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = measured[name] = json.loads(done.stdout.splitlines()[-1])
        found["bars"] = summary(found["times"])
        for bar, value in found["bars"].items():
            wanted = f", at least {BARS[bar]}" if bar in BARS else ""
            print(f"{name}: {bar}: {value['median']:.2f} ({value['of the fastest']:.2f}{wanted})", flush=True)
        for check, number in found["checks"].items():
            print(f"{name}: log-probabilities, {check}: {number:.4f}", flush=True)
    bars = {name: m["bars"] for name, m in measured.items()}
    if options.quick:
        return
    figures = {name: {case: measure.figures(t) for case, t in m["times"].items()} for name, m in measured.items()}
    shapes = {
        "weights": {name: f"{c.n_layer} layers of {c.n_embd}, RWKV-{c.version}" for name, c in MODELS.items()},
        "batch": 1,
        "without state": "600 tokens read and 100 said; a row read again is timed at 600 and 699 (ours at 190 M also at "
        "633 and 666), and the hundred lengths are summed along lines between these",
    }
    results = {"shapes": shapes, "figures": figures, "bars": bars} | {
        key: {name: m[key] for name, m in measured.items()} for key in ("parameters", "checks", "kernels", "threads")
    }
    path = measure.record("prefill", results, ("visualrwkv", "torch", "rwkv", "transformers"))
    draw(bars, path.with_suffix(".png"))
    print(json.dumps({"written": str(path.relative_to(measure.ROOT))}))


if __name__ == "__main__":
    main()
