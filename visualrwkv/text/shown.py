"""What of an answer may be shown while it grows."""

from __future__ import annotations

from collections.abc import Sequence

from visualrwkv.text.tokenizer import StreamDecoder


class Shown:
    """Ids in, text out: whole characters only, no white space at the ends, nothing from a stop string on, not even its start."""

    def __init__(self, stop: Sequence[str] = ()):
        self.text = ""
        self.stopped = False
        self._stop = tuple(stop)
        self._decoder = StreamDecoder()
        self._held = ""

    def push(self, token: int) -> str:
        """What this id lets be seen; often empty."""
        return self._take(self._decoder.push(token), last=False)

    def flush(self) -> str:
        """What was held back, now that nothing follows."""
        return self._take(self._decoder.flush(), last=True)

    def _take(self, new: str, last: bool) -> str:
        if self.stopped:
            return ""
        held = self._held + new
        found = [at for stop in self._stop if (at := held.find(stop)) >= 0]
        if found:
            self.stopped, held, free = True, held[: min(found)], min(found)
        else:
            free = len(held) - (0 if last else max((begun(held, stop) for stop in self._stop), default=0))
        seen = held[:free].rstrip()
        self._held = held[len(seen) :]
        if not self.text:
            seen = seen.lstrip()
        self.text += seen
        return seen


def begun(text: str, stop: str) -> int:
    """How many characters at the end of the text begin the stop string."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
