"""Compiles `cuda/*.cpp` into the user's cache: `python -m visualrwkv.ops.build` prints the path of the library."""

import os
import subprocess
from pathlib import Path

from visualrwkv.ops.library import FLAGS, library_path, sources

COMPILER = "g++"


def build() -> Path:
    """Compile the kernels for this machine (a few seconds) and return the library's path; an older one is replaced.

    Raises RuntimeError without a compiler, or with the compiler's own words when it refuses.
    """
    path = library_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")  # renamed when whole: nobody loads half a library
    command = [COMPILER, *FLAGS, *(str(s) for s in sources() if s.suffix == ".cpp"), "-o", str(unfinished)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(unfinished, path)
    except FileNotFoundError as error:
        raise RuntimeError(f"the kernels need a C++ compiler and there is no {COMPILER!r} on the PATH") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{COMPILER} could not compile the kernels:\n{error.stderr}") from error
    finally:
        unfinished.unlink(missing_ok=True)
    return path


if __name__ == "__main__":
    print(build())
