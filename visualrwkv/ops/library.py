"""Finds the compiled kernels: a library with a C interface, so it depends on no version of torch.

The decision is made once, at import: `COMPILED` says whether the ops use the library or their torch form. Importing
never compiles; `visualrwkv kernels build` does. `VISUALRWKV_KERNELS=0` forces the torch form.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
from pathlib import Path

FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"),
    # What -ffast-math would give and NaN and infinity survive.
    *("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"),
    "-Wno-psabi",  # vectors wider than the machine's are never passed between functions
)


def sources() -> list[Path]:
    """The C++ files, headers included: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parents[1]
    for folder in (package.parent / "cuda", package / "_cuda"):
        found = sorted(p for p in folder.glob("*") if p.suffix in (".cpp", ".h"))
        if found:
            return found
    raise FileNotFoundError(f"no kernel sources in {package.parent / 'cuda'} or {package / '_cuda'}")


def library_path() -> Path:
    """Where the library for these sources, flags and this processor belongs, whether or not it is there.

    The name holds a hash of all three, so a library made from other sources or for another machine is never loaded.
    """
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for source in sources():
        digest.update(source.name.encode() + source.read_bytes())
    digest.update(_processor().encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "visualrwkv" / f"kernels-{digest.hexdigest()[:16]}.so"


def _processor() -> str:
    """What `-march=native` depends on: the processor's name and instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "isa")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(wanted)}))


def _compiled() -> bool:
    if os.environ.get("VISUALRWKV_KERNELS") == "0":
        return False
    path = library_path()
    if not path.exists():
        logging.getLogger(__name__).warning(
            "no compiled kernels at %s: the slower torch form runs; make them with `visualrwkv kernels build`", path
        )
        return False
    return True


COMPILED: bool = _compiled()


@functools.cache
def function(name: str, *argtypes: type):  # -> a ctypes function returning nothing
    """The C function `name`. RuntimeError if the library is absent or does not load.

    Loading waits for the first use, so that a broken library does not stop the command that replaces it.
    """
    path = library_path()
    try:
        found = getattr(ctypes.CDLL(str(path)), name)
    except (OSError, AttributeError) as error:
        raise RuntimeError(
            f"the compiled kernels do not load ({error}); rebuild them with `visualrwkv kernels build`"
        ) from error
    found.argtypes, found.restype = argtypes, None
    return found
