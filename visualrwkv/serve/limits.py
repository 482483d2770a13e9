"""What one server takes on."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Limits:
    """Bounds on requests; a request beyond one is refused with the bound in the sentence."""

    slots: int = 64  # answers that grow at the same time
    queue: int = 64  # further requests that wait; beyond them 429
    body_mb: int = 32
    pictures: int = 8  # of a request
    picture_mb: int = 16
    megapixels: int = 50
    prompt_tokens: int = 32768  # of a request, image tokens included
    max_new_tokens: int = 4096  # the most that may be asked for
    timeout_s: float = 300.0  # of a request, from its arrival to its last token
    fetch_timeout_s: float = 10.0  # of a picture's URL
    states: int = 256  # kept for previous_response_id; the one longest unused goes first

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) >= (0 if field.name in ("queue", "pictures", "states") else 1e-9):
                raise ValueError(f"{field.name} is {getattr(self, field.name)}; it must be above 0")
