"""VisualRWKV's own source, for machines that have not installed it."""

import importlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

FILES: dict[str, list[str]] = {}


def unpack() -> None:
    """Write the package beside this file, once, and let it be imported."""
    place = Path(__file__).with_name("source")
    if not place.exists():
        part = Path(tempfile.mkdtemp(dir=place.parent))
        for name, lines in FILES.items():
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            (part / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        part.chmod(0o755)  # a cache may be shared
        try:
            os.replace(part, place)
        except OSError:  # another process was first
            shutil.rmtree(part)
    sys.path.append(str(place))
    importlib.invalidate_caches()
