"""Compiles the kernels into the user's cache, with ninja: `python -m visualrwkv.ops.build` prints the libraries' paths.

For the CPU each source is compiled once per instruction set and the library chooses at run time. For CUDA there is one
fat binary, for the GPUs of this machine or for all.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from visualrwkv.commandline import parse, run
from visualrwkv.ops.library import library_path, sources

COMPILER, CUDA_COMPILER = "g++", "nvcc"
CPU_FLAGS = (
    *("-std=c++17", "-O3", "-fopenmp", "-fPIC"),
    # What -ffast-math would give and NaN and infinity survive.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    "-Wno-psabi",  # vectors wider than the machine's are never passed between functions
)
VARIANTS = {
    "x86_64": {
        "avx512vnni": "-DISA=avx512vnni -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma",
        "avx512": "-DISA=avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma",
        "avx2": "-DISA=avx2 -mavx2 -mfma",
        "baseline": "-DISA=baseline",
    }
}
"""Instruction sets of a processor and how to compile for them; cuda/cpu.cpp chooses among them. Elsewhere there is one."""
STATIC = "-static-libstdc++ -static-libgcc -Wl,--exclude-libs,ALL"  # without a compiler its libraries may be missing
CUDA_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC")
GENERATIONS = {"75": "75", "80": "80", "86": "80", "89": "80", "90": "90", "100": "90", "120": "80"}
"""GPUs that the fat binary holds code for, and the PTX that it is made of: the slow half of the work, so it is done once for
all that gain nothing from their own. That of "80" is also kept, for the driver to compile for later GPUs.
"""


def build(cuda: str = "auto", into: Path | None = None) -> list[Path]:
    """Compile the kernels (seconds) and return the libraries' paths; older ones are replaced.

    cuda: the GPUs to compile CUDA kernels for: "auto" (this machine's, if nvcc is there), "none", "all", or
    architectures ("80,90"). into: a directory other than the cache, as a wheel has it. Raises RuntimeError without a
    compiler, or with the compiler's own words when it refuses.
    """
    if shutil.which(COMPILER) is None:
        raise RuntimeError(f"the kernels need a C++ compiler and there is no {COMPILER!r} on the PATH")
    architectures = _architectures(cuda)
    built = [_ninja(cpu_plan(), into / "cpu.so" if into else library_path("cpu"))]
    if architectures:
        built.append(_ninja(cuda_plan(architectures), into / "cuda.so" if into else library_path("cuda")))
    return built


def _architectures(cuda: str) -> Sequence[str]:
    found = shutil.which(CUDA_COMPILER)
    if cuda == "none" or (cuda == "auto" and not found):
        return ()
    if not found:
        raise RuntimeError(f"the CUDA kernels need CUDA's compiler and there is no {CUDA_COMPILER!r} on the PATH")
    if cuda == "auto":
        return local_architectures()
    wanted = tuple(GENERATIONS) if cuda == "all" else tuple(cuda.split(","))
    if not all(re.fullmatch(r"\d{2,3}", a) for a in wanted):
        raise ValueError(f"cuda is {cuda!r}; allowed are auto, none, all, or architectures such as 80,90")
    return wanted


def local_architectures() -> list[str]:
    """The compute capabilities of this machine's GPUs, as "90"; none without a driver."""
    command = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return []
    return sorted({line.strip().replace(".", "") for line in out.splitlines() if line.strip()}, key=int)


def cpu_plan() -> str:
    """What ninja is to do for the CPU library, `library.so`: every kernel once per instruction set."""
    variants = VARIANTS.get(platform.machine(), {"": ""})
    edges, objects = [], []
    for source in sources("cpu"):
        if source.suffix != ".cpp":
            continue
        chooses = source.name == "cpu.cpp"
        for variant, flags in {"": "-DVARIANTS" if len(variants) > 1 else ""}.items() if chooses else variants.items():
            objects.append(f"{source.stem}.{variant or 'plain'}.o")
            edges += [f"build {objects[-1]}: compile {_path(source)}", f"  flags = {flags}"]
    return _plan(f"{COMPILER} {' '.join(CPU_FLAGS)}", edges, objects, f"{COMPILER} -shared -fopenmp {STATIC}")


def cuda_plan(architectures: Sequence[str]) -> str:
    """What ninja is to do for the CUDA library, `library.so`."""
    codes: dict[str, list[str]] = {}
    for a in architectures:
        codes.setdefault(GENERATIONS.get(a, a), []).append(f"sm_{a}")
    if set(architectures) == set(GENERATIONS):
        codes["80"].append("compute_80")
    targets = [f"-gencode 'arch=compute_{ptx},code=[{','.join(code)}]'" for ptx, code in codes.items()]
    names = ", ".join(f"sm_{a}" for a in architectures)
    edges, objects = [], []
    for source in sources("cuda"):
        if source.suffix == ".cu":
            objects.append(f"{source.stem}.o")
            edges += [f"build {objects[-1]}: compile {_path(source)}", "  flags ="]
    flags = f"""{" ".join(CUDA_FLAGS)} {" ".join(targets)} -DARCHITECTURES='"{names}"'"""
    return _plan(f"{CUDA_COMPILER} {flags}", edges, objects, f"{CUDA_COMPILER} -shared -cudart static")


def _plan(compiler: str, edges: list[str], objects: list[str], linker: str) -> str:
    return "\n".join(
        (
            "rule compile",
            f"  command = {compiler} $flags -c $in -o $out",
            "rule link",
            f"  command = {linker} $in -o $out",
            *edges,
            f"build library.so: link {' '.join(objects)}",
            "",
        )
    )


def _path(path: Path) -> str:
    """A path as ninja reads it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def _ninja(plan: str, path: Path) -> Path:
    """Carry out a plan and put its library at `path` when it is whole: nobody loads half a library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        Path(folder, "build.ninja").write_text(plan)
        done = subprocess.run([sys.executable, "-m", "ninja", "-C", folder], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the kernels could not be compiled:\n{done.stdout}{done.stderr}")
        os.replace(Path(folder, "library.so"), path)
    return path


@dataclass(frozen=True)
class Options:
    """Compile the kernels: for the CPU, and for CUDA where nvcc is."""

    cuda: str = "auto"  # auto: for this machine's GPUs; none; all: for every GPU since sm_75; or "80,90"
    into: Path | None = None  # a directory; default: the user's cache


def main(args: list[str] | None = None) -> None:
    """`python -m visualrwkv.ops.build`, and `visualrwkv kernels build`."""
    options = parse(Options, args)
    try:
        print(*build(options.cuda, options.into), sep="\n")
    except RuntimeError as error:  # the compiler's words keep their lines
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    run(main)
