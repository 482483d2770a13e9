"""What every door shares: arguments parsed strictly, and errors said in one sentence.

The command line of a dataclass or function comes from tyro; whatever a user gets wrong ends in exit status 1 without a
traceback.
"""

from __future__ import annotations

import contextlib
import errno
import io
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

EXPECTED = (ValueError, FileNotFoundError, OSError)
"""Errors that a user can cause; anything else is ours and keeps its traceback."""


def parse(target: Callable[..., Any], args: Sequence[str] | None = None, **options: Any) -> Any:
    """`tyro.cli(target)`, with a wrong argument as a ValueError of one sentence."""
    import tyro

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(target, args=args, **options)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        words = re.sub(r"\x1b\[[0-9;]*m|[─-╿]+", " ", said.getvalue())
        lines = [line.strip() for line in words.splitlines() if line.strip()]
        text = " ".join(lines).split("For full helptext")[0]
        text = re.sub(r"^(Parsing error|Unrecognized options|Required options|Missing.*?)\s+", r"\1: ", text)
        raise ValueError(re.sub(r"\s+", " ", text).strip() or "wrong arguments; --help lists the right ones") from None


def run(main: Callable[[], Any]) -> None:
    """Run a door's main function; what the user can put right becomes one sentence and exit status 1."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except EXPECTED as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(1)


def explain(error: Exception) -> str:
    """An error in one sentence."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full while writing {error.filename or 'the output'}; free some space and run the same command again"
    if isinstance(error, OSError) and error.errno is not None and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
