"""The CUDA kernels on a real GPU: `bash benchmarks/gpu.sh` builds them and calls this.

    check   every op against float64, forward and backward, and that two runs agree in every bit
    touch   each kernel once on small ragged shapes, for compute-sanitizer
    time    medians against flash-linear-attention and the plain recurrence, peak memory, share of the byte floor

Writes benchmarks/results/<gpu>/kernels.json and kernels.md.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import measure  # first: it pins threads
import torch
from torch import Tensor

from visualrwkv.ops import bi_wkv, decode, library, token_mix, wkv6, wkv7
from visualrwkv.ops.biwkv import bi_wkv_torch
from visualrwkv.ops.gates7 import (
    after_wkv7,
    after_wkv7_torch,
    before_wkv7,
    before_wkv7_torch,
    mix_values,
    mix_values_torch,
)
from visualrwkv.ops.mix import token_mix_torch
from visualrwkv.ops.wkv6 import wkv6_torch
from visualrwkv.ops.wkv7 import wkv7_torch

SIZE = 64
SHAPES = ((8, 2048, 32), (8, 4096, 64), (16, 1024, 12), (1, 2048, 32), (1, 640, 32))
"""B, T, H. The last two are one prompt read at once."""
PICTURES = ((8, 576, 1024), (1, 4096, 384), (1, 16384, 192))
"""B, T, C of bi_wkv."""
STEPS = (1, 64, 512)
"""Sequences decoded side by side."""
CACHE = 256 << 20
"""Inputs are taken in turn from sets that together are larger than any cache."""


@dataclass(frozen=True)
class Op:
    """A recurrence, its torch form, and what its byte floor counts."""

    name: str
    ours: Callable[..., Any]
    torch_form: Callable[..., Any]
    tensors: int  # big inputs: each read once, and in training once more, with a gradient each


OPS = (Op("wkv6", wkv6, wkv6_torch, 4), Op("wkv7", wkv7, wkv7_torch, 6))


@dataclass(frozen=True)
class Gate:
    """A step around wkv7, of `rows` tensors (T, C) and `weights` (C) and then the number of heads, and its torch form."""

    ours: Callable[..., Any]
    torch_form: Callable[..., Any]
    rows: int
    weights: int
    results: int


GATES = {
    "mix_values": Gate(mix_values, lambda *x: mix_values_torch(*x[:4]), 3, 1, 1),
    "before_wkv7": Gate(before_wkv7, before_wkv7_torch, 3, 4, 4),
    "after_wkv7": Gate(lambda *x: after_wkv7(*x, 64e-5), lambda *x: after_wkv7_torch(*x, 64e-5), 5, 3, 1),
}


def inputs(op: str, B: int, T: int, H: int, dtype: torch.dtype, seed: int = 0, N: int = SIZE) -> list[Tensor]:
    """Random inputs as trained models have them."""
    g = torch.Generator("cuda").manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device="cuda")

    if op == "wkv6":
        big = [noise(B, T, H, N), noise(B, T, H, N) * 0.3, noise(B, T, H, N), noise(B, T, H, N) - 2]
        return [*(x.to(dtype) for x in big), noise(H, N)]
    a = torch.nn.functional.normalize(noise(B, T, H, N), dim=-1)
    w = torch.log(0.6065 * torch.sigmoid(noise(B, T, H, N)))
    big = [noise(B, T, H, N), w, noise(B, T, H, N) * 0.3, noise(B, T, H, N), -a, a * torch.sigmoid(noise(B, T, H, N))]
    return [x.to(dtype) for x in big]


def picture_inputs(B: int, T: int, C: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    g = torch.Generator("cuda").manual_seed(seed)
    w, u = (torch.randn(C, generator=g, device="cuda") / T for _ in range(2))
    k, v = (torch.randn(B, T, C, generator=g, device="cuda").to(dtype) for _ in range(2))
    return [w.abs() * 8, u, k, v]


def gate_inputs(gate: Gate, T: int, H: int, dtype: torch.dtype, seed: int = 0, N: int = SIZE) -> list[Tensor]:
    g = torch.Generator("cuda").manual_seed(seed)
    rows = [torch.randn(T, H * N, generator=g, device="cuda").to(dtype) for _ in range(gate.rows)]
    return rows + [torch.randn(H * N, generator=g, device="cuda") for _ in range(gate.weights)]


def whole(results: Tensor | tuple[Tensor, ...]) -> Tensor:
    """All that a step gives, side by side."""
    return torch.cat(results, -1) if isinstance(results, tuple) else results


def first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


def gradients(run: Callable[..., Any], given: Sequence[Tensor], dy: Tensor) -> list[Tensor]:
    """y and the gradient of every input."""
    leaves = [x.detach().clone().requires_grad_() for x in given]
    y = first(run(*leaves))
    return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(y.dtype))]


def error(ours: Tensor, true: Tensor) -> float:
    return float((ours.double() - true.double()).norm() / true.double().norm().clamp(min=1e-30))


# check ---------------------------------------------------------------------------------------------------------------


def check() -> None:
    """Errors against float64; SystemExit where one is above its bound."""
    failed = []
    for name, run, torch_form, makers in (
        ("wkv6", wkv6, wkv6_torch, [(1, 1, 2), (2, 33, 3), (1, 196, 2), (2, 1023, 4), (4, 640, 40)]),
        ("wkv7", wkv7, wkv7_torch, [(1, 1, 2), (2, 33, 3), (1, 196, 2), (2, 1023, 4), (4, 640, 40)]),
        ("bi_wkv", bi_wkv, bi_wkv_torch, [(1, 1, 5), (2, 33, 48), (1, 196, 192), (2, 1023, 200), (1, 16384, 64)]),
    ):
        for shape in makers:
            for dtype, bound in ((torch.bfloat16, 5e-3), (torch.float32, 5e-4)):
                given = picture_inputs(*shape, dtype) if name == "bi_wkv" else inputs(name, *shape, dtype)
                dy = torch.randn_like(given[2])
                got = gradients(run, given, dy)
                again = gradients(run, given, dy)
                true = gradients(torch_form, [x.double() for x in given], dy.double())
                errors = [error(a, b) for a, b in zip(got, true, strict=True)]
                same = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
                good = same and all(e <= 2 * bound for e in errors) and errors[0] <= bound
                print(
                    f"{'ok  ' if good else 'FAIL'} {name} {shape} {str(dtype)[6:]}: "
                    + " ".join(f"{e:.1e}" for e in errors)
                    + ("" if same else " (two runs differ)")
                )
                if not good:
                    failed.append(f"{name} {shape} {dtype}")
    failed += check_steps()
    if failed:
        raise SystemExit(f"wrong: {', '.join(failed)}")


def check_steps() -> list[str]:
    """The decode kernels, token_mix and the steps around wkv7 against their references in float64; names of what is wrong."""
    failed = []

    def judge(name: str, got: Tensor, true: Tensor, bound: float) -> None:
        wrong = error(got, true)
        print(f"{'ok  ' if wrong <= bound else 'FAIL'} {name}: {wrong:.1e}")
        failed.extend([name] if wrong > bound else [])

    for dtype, bound in ((torch.bfloat16, 5e-3), (torch.float32, 5e-4)):
        for name in ("wkv6", "wkv7"):
            flat, (state, weight, bias, g) = step_inputs(name, 3, 5, dtype)
            twin = [x.double() for x in flat], [x.double() for x in (state, weight, bias, g)]
            got = getattr(decode, f"{name}_step")(*flat, state, weight, bias, 64e-5, g)
            out = torch.empty_like(g, dtype=torch.float64)
            (state64, weight64, bias64, g64) = twin[1]
            true = getattr(decode, f"{name}_step_reference")(*twin[0], state64, weight64, bias64, 64e-5, g64, out)
            judge(f"{name} step {str(dtype)[6:]}", got, true, bound)
            judge(f"{name} step {str(dtype)[6:]}, state", state, state64, bound)
        x = torch.randn(2, 77, 96, device="cuda").to(dtype)
        mix, delta = torch.rand(5, 96, device="cuda"), torch.randn(5, 2, 77, 96, device="cuda").to(dtype) * 0.1
        judge(
            f"token_mix {str(dtype)[6:]}",
            torch.stack(token_mix(x, None, mix, delta)),
            torch.stack(token_mix_torch(x.double(), None, mix.double(), delta.double())),
            bound,
        )
        for name, gate in GATES.items():
            given = gate_inputs(gate, 301, 3, dtype)
            dy = torch.randn(301, gate.results * 3 * SIZE, device="cuda")
            got = gradients(lambda *x, gate=gate: whole(gate.ours(*x, 3)), given, dy)
            true = [x.double() for x in given]
            true = gradients(lambda *x, gate=gate: whole(gate.torch_form(*x, 3)), true, dy.to(dtype).double())
            for i, (a, b) in enumerate(zip(got, true, strict=True)):
                judge(f"{name} {str(dtype)[6:]}, {i}", a, b, bound)
        W, row = torch.randn(72, 256, device="cuda").bfloat16(), torch.randn(3, 256, device="cuda").to(dtype)
        [y] = decode.gemv_step([decode.Product(W, row, "relu_squared")])
        judge(f"gemv step {str(dtype)[6:]}", y, torch.relu(row.double() @ W.double().T).square(), bound)
    return failed


def touch() -> None:
    """Each kernel once, on shapes whose ends are not full; also head size 32 and ragged rows."""
    for dtype in (torch.bfloat16, torch.float32):
        for op in OPS:
            for N in (32, SIZE):
                given = inputs(op.name, 1, 83, 2, dtype, N=N)
                bounds = torch.tensor([0, 17, 82, 83], device="cuda")
                leaves = [x.requires_grad_() for x in given]
                y, S = op.ours(*leaves, cu_seqlens=bounds)
                (y.float().sum() + S.sum()).backward()
        leaves = [x.requires_grad_() for x in picture_inputs(2, 83, 37, dtype)]
        bi_wkv(*leaves).float().sum().backward()
        x = torch.randn(1, 83, 36, device="cuda", requires_grad=True)
        mixed = token_mix(x.to(dtype), None, torch.rand(3, 36, device="cuda", requires_grad=True))
        torch.stack(mixed).float().sum().backward()
    failed = check_steps()
    assert not failed
    torch.cuda.synchronize()
    print("touched")


# time ----------------------------------------------------------------------------------------------------------------


def milliseconds(run: Callable[[int], object], sets: int, repeats: int = 30) -> list[float]:
    """Times of single calls, by events, after a warm-up; each call takes the next set of inputs."""
    for i in range(3):
        run(i % sets)
    torch.cuda.synchronize()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for i, (begin, end) in enumerate(marks):
        begin.record()
        run(i % sets)
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in marks]


def bandwidth() -> float:
    """Bytes per second of a device-to-device copy, read and written counted."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() / (statistics.median(milliseconds(lambda _: y.copy_(x), 1)) * 1e-3)


def peers(name: str) -> dict[str, Callable[..., Any]]:
    """flash-linear-attention's kernels, taking what ours take."""
    try:
        from fla.ops.rwkv6 import chunk_rwkv6, fused_recurrent_rwkv6
        from fla.ops.rwkv7 import chunk_rwkv7, fused_recurrent_rwkv7
    except ImportError:
        return {}
    if name == "wkv6":

        def six(kernel: Callable) -> Callable:
            return lambda r, k, v, w, u: kernel(r, k, v, -torch.exp(w.float()), u.to(r.dtype), scale=1.0)

        return {"fla chunk": six(chunk_rwkv6), "fla recurrent": six(fused_recurrent_rwkv6)}

    def seven(kernel: Callable) -> Callable:
        return lambda r, w, k, v, a, b: kernel(r, -torch.exp(w.float()), k, v, a, b, scale=1.0)

    return {"fla chunk": seven(chunk_rwkv7), "fla recurrent": seven(fused_recurrent_rwkv7)}


def plain(name: str) -> Callable[..., Any]:
    """Our kernel that walks step by step, without tensor cores."""
    force = getattr(library.load("cuda"), f"visualrwkv_cuda_{name}_plain")
    op = {"wkv6": wkv6, "wkv7": wkv7}[name]

    def run(*given: Tensor) -> Any:
        force(ctypes.c_int64(1))
        try:
            return op(*given)
        finally:
            force(ctypes.c_int64(0))

    return run


def compare(candidates: dict[str, Callable[[int], object]], sets: int, floor: float) -> dict[str, Any]:
    """Medians of candidates that take turns, three times each; a candidate that fails is reported by its error."""
    times: dict[str, list[float]] = {}
    result: dict[str, Any] = {}
    for _ in range(3):
        for name, run in candidates.items():
            if name in result:
                continue
            try:
                times.setdefault(name, []).extend(milliseconds(run, sets))
            except Exception as error:  # a peer's kernel may not support a shape: say so and go on
                if name == "ours":
                    raise
                result[name] = {"error": f"{type(error).__name__}: {str(error)[:200]}"}
                times.pop(name, None)
    for name, values in times.items():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        candidates[name](0)
        torch.cuda.synchronize()
        low, median, high = statistics.quantiles(values, n=4)
        result[name] = {
            "median": median,
            "spread": [low, high],
            "unit": "ms",
            "floor_share": floor * 1e3 / median,
            "peak_bytes": torch.cuda.max_memory_allocated() - before,
        }
    for name in result:
        if "median" in result[name]:
            result["ours"].setdefault("ratio", {})[name] = result[name]["median"] / result["ours"]["median"]
    return result


def time_recurrences(copy: float, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for op in OPS:
        for B, T, H in SHAPES:
            size = B * T * H * SIZE * dtype.itemsize
            sets = max(1, min(8, math.ceil(2 * CACHE / (op.tensors * size))))
            given = [inputs(op.name, B, T, H, dtype, seed) for seed in range(sets)]
            leaves = [[x.detach().clone().requires_grad_() for x in one] for one in given]
            dy = torch.randn(B, T, H, SIZE, device="cuda", dtype=dtype)
            runs = {"ours": op.ours, **peers(op.name), "plain": plain(op.name), "torch form": op.torch_form}
            state = B * H * SIZE * SIZE * 4

            def forward(run: Callable, given: list = given) -> Callable[[int], object]:
                def call(i: int) -> None:
                    with torch.no_grad():
                        run(*given[i])

                return call

            def both(run: Callable, leaves: list = leaves, dy: Tensor = dy) -> Callable[[int], object]:
                return lambda i: torch.autograd.grad(first(run(*leaves[i])), leaves[i], dy)

            shape = f"B {B}, T {T}, H {H}"
            print(f"{op.name}, {shape} …")
            forward_bytes = (op.tensors + 1) * size + 2 * state
            # forward, then: inputs and dy read, gradients written, states every 64 steps written and read
            both_bytes = forward_bytes + (2 * op.tensors + 1) * size + 2 * state * math.ceil(T / 64)
            figures[f"{op.name} forward, {shape}"] = compare(
                {n: forward(f) for n, f in runs.items()}, sets, forward_bytes / copy
            )
            figures[f"{op.name} forward+backward, {shape}"] = compare(
                {n: both(f) for n, f in runs.items()}, sets, both_bytes / copy
            )
            del given, leaves
            gc.collect()
            torch.cuda.empty_cache()
    return figures


def time_pictures(copy: float, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for B, T, C in PICTURES:
        sets = max(1, min(16, math.ceil(2 * CACHE / (2 * B * T * C * dtype.itemsize))))
        given = [picture_inputs(B, T, C, dtype, seed) for seed in range(sets)]
        leaves = [[x.detach().clone().requires_grad_() for x in one] for one in given]
        dy = torch.randn(B, T, C, device="cuda", dtype=dtype)
        q = torch.randn(B, C // 64, T, 64, device="cuda", dtype=dtype)
        runs: dict[str, Callable[[int], object]] = {
            "ours": lambda i, given=given: bi_wkv(*given[i]),
            "torch form": lambda i, given=given: bi_wkv_torch(*given[i]),
            "attention": lambda i, q=q: torch.nn.functional.scaled_dot_product_attention(q, q, q),
        }
        both: dict[str, Callable[[int], object]] = {
            "ours": lambda i, leaves=leaves, dy=dy: torch.autograd.grad(bi_wkv(*leaves[i]), leaves[i], dy),
            "torch form": lambda i, leaves=leaves, dy=dy: torch.autograd.grad(bi_wkv_torch(*leaves[i]), leaves[i], dy),
        }
        size = B * T * C * dtype.itemsize
        print(f"bi_wkv, B {B}, T {T}, C {C} …")
        figures[f"bi_wkv forward, B {B}, T {T}, C {C}"] = compare(runs, sets, 3 * size / copy)
        figures[f"bi_wkv forward+backward, B {B}, T {T}, C {C}"] = compare(both, sets, 8 * size / copy)
    return figures


def time_gates(copy: float, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """The steps around wkv7, forward and backward."""
    figures: dict[str, Any] = {}
    for name, gate in GATES.items():
        for B, T, H in SHAPES[:2]:
            given = [x.requires_grad_() for x in gate_inputs(gate, B * T, H, dtype)]
            dy = torch.randn(B * T, gate.results * H * SIZE, device="cuda", dtype=dtype)
            runs: dict[str, Callable[[int], object]] = {
                kind: lambda _, run=run, given=given, dy=dy, H=H: torch.autograd.grad(whole(run(*given, H)), given, dy)
                for kind, run in (("ours", gate.ours), ("torch form", gate.torch_form))
            }
            size = B * T * H * SIZE * dtype.itemsize
            print(f"{name}, {B * T} rows, H {H} …")
            floor = (3 * gate.rows + 2 * gate.results) * size / copy
            figures[f"{name} forward+backward, {B * T} rows, H {H}"] = compare(runs, 1, floor)
    return figures


def graphed(step: Callable[[], object]) -> Callable[[int], object]:
    """The step as a CUDA graph."""
    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return lambda _: graph.replay()


def step_inputs(name: str, B: int, H: int, dtype: torch.dtype, N: int = SIZE) -> tuple[list[Tensor], list[Tensor]]:
    """What decode.wkv6_step and wkv7_step take: (r, k, v, w, u | r, w, k, v, a, b, bonus), (state, weight, bias, g)."""
    flat = [x.flatten(0, 1).flatten(1) if x.dim() == 4 else x for x in inputs(name, B, 1, H, dtype, N=N)]
    if name == "wkv7":
        flat.append(torch.randn(H, N, device="cuda"))
    C = H * N
    weight, bias = torch.ones(C, device="cuda"), torch.zeros(C, device="cuda")
    return flat, [torch.randn(B, H, N, N, device="cuda"), weight, bias, torch.randn(B, C, device="cuda").to(dtype)]


def time_steps(copy: float, dtype: torch.dtype = torch.bfloat16, heads: int = 32) -> dict[str, Any]:
    """One token for each of B sequences, and the products of one, as CUDA graphs."""
    figures: dict[str, Any] = {}
    for name in ("wkv6", "wkv7"):
        ours, reference = getattr(decode, f"{name}_step"), getattr(decode, f"{name}_step_reference")
        for B in STEPS:
            flat, (state, weight, bias, g) = step_inputs(name, B, heads, dtype)
            out = torch.empty_like(g)
            runs = {
                n: graphed(lambda run=run: run(*flat, state, weight, bias, 64e-5, g, out))  # noqa: B023
                for n, run in (("ours", ours), ("torch form", reference))
            }
            figures[f"{name} step, B {B}, H {heads}"] = compare(runs, 1, 2 * state.numel() * 4 / copy)
    C, count, sets = heads * SIZE, 5, 16
    for B in (1, 8):
        weights = [[torch.randn(C, C, device="cuda").bfloat16() for _ in range(count)] for _ in range(sets)]
        x = torch.randn(B, C, device="cuda").bfloat16()
        out = torch.empty(count * B * C, device="cuda", dtype=torch.bfloat16)
        runs = {
            "ours": [graphed(lambda w=w: decode.gemv_step([decode.Product(m, x) for m in w], out)) for w in weights],  # noqa: B023
            "torch form": [graphed(lambda w=w: [x @ m.T for m in w]) for w in weights],  # noqa: B023
        }
        taken = {n: (lambda i, all_=all_: all_[i](i)) for n, all_ in runs.items()}
        figures[f"gemv step, B {B}, {count} of {C} x {C}"] = compare(taken, sets, count * C * C * 2 / copy)
    return figures


def table(figures: dict[str, Any]) -> str:
    lines = ["| | ours ms | of the byte floor | peak MB | others: times slower (peak MB) |", "|---|---|---|---|---|"]
    for name, group in figures.items():
        ours = group["ours"]
        others = ", ".join(
            f"{n} {g['median'] / ours['median']:.1f} ({g['peak_bytes'] / 1e6:.0f})" if "median" in g else f"{n} failed"
            for n, g in group.items()
            if n != "ours"
        )
        lines.append(
            f"| {name} | {ours['median']:.3f} | {100 * ours['floor_share']:.0f} % | {ours['peak_bytes'] / 1e6:.0f} | {others} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("act", choices=("check", "touch", "time"))
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("error: this needs a GPU that torch can use")
    if not library.CUDA:
        raise SystemExit("error: there is no CUDA library; `visualrwkv kernels build` makes it where nvcc is")
    if options.act == "check":
        return check()
    if options.act == "touch":
        return touch()
    copy = bandwidth()
    print(f"copy: {copy / 1e9:.0f} GB/s")
    figures = {**time_recurrences(copy), **time_pictures(copy), **time_gates(copy), **time_steps(copy)}
    name = torch.cuda.get_device_name().lower()
    folder = next((part for part in ("h200", "h100", "a100") if part in name), name.replace(" ", "-"))
    about = {"gpu": torch.cuda.get_device_name(), "copy_bytes_per_second": copy, "shapes": {"N": SIZE, "dtype": "bf16"}}
    path = measure.record(
        "kernels", {**about, "figures": figures}, ("torch", "flash-linear-attention", "triton"), folder
    )
    path.with_suffix(".md").write_text(table(figures))
    print(table(figures) + f"\nwritten: {path.relative_to(measure.ROOT)}")


if __name__ == "__main__":
    main()
