"""How the next token is chosen. Each sequence has a sampler of its own, so that batch mates change nothing.

V vocabulary, S sequences.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """The settings: temperature 0 is greedy, and what is not named changes nothing.

    top_k: the k likeliest (0: all); top_p: the likeliest of that total; min_p: those at least this part as likely as the
    likeliest. The penalties count what the answer itself has said so far: repetition divides (or multiplies negative) logits
    of tokens said before, presence is taken off them once, frequency each time. stop: texts that end the answer and are
    not part of it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str) or not isinstance(self.stop, tuple):
            object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()))
        rules = (
            ("temperature", 0 <= self.temperature < math.inf, "must be a number of at least 0"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1"),
            ("top_k", self.top_k >= 0 and self.top_k == int(self.top_k), "must be a whole number, 0 for all tokens"),
            ("min_p", 0 <= self.min_p <= 1, "must be between 0 and 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "must be a number above 0"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "must be a number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "must be a number"),
            ("seed", self.seed is None or -(2**63) <= self.seed < 2**64, "must be a whole number of 64 bits"),
        )
        for name, good, rule in rules:
            if not good:
                raise ValueError(f"{name} is {getattr(self, name)}; it {rule}")
        if not all(isinstance(text, str) and text for text in self.stop):
            raise ValueError(f"stop is {list(self.stop)}; it must be texts of at least one character")

    @property
    def penalises(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


class Sampler:
    """Chooses the tokens of one sequence and remembers what penalties need."""

    def __init__(self, sampling: Sampling):
        self.sampling = sampling
        self._said: Counter[int] = Counter()
        # on the CPU, wherever the model is: a seed gives the same numbers everywhere
        self._generator = None if sampling.seed is None else torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: Tensor) -> int:
        """Logits (V,) -> the next id."""
        if self.sampling.penalises and self._said:
            logits = self._penalised(logits)
        token = self._draw(logits) if self.sampling.temperature else int(logits.argmax())
        if self.sampling.penalises:
            self._said[token] += 1
        return token

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is the choice."""
        return not (self.sampling.temperature or self.sampling.penalises)

    def _penalised(self, logits: Tensor) -> Tensor:
        s = self.sampling
        ids = torch.tensor(list(self._said), device=logits.device)
        counts = torch.tensor(list(self._said.values()), device=logits.device)
        x = logits[ids].float()
        x = torch.where(x > 0, x / s.repetition_penalty, x * s.repetition_penalty)
        return logits.float().index_copy(0, ids, x - s.presence_penalty - s.frequency_penalty * counts)

    def _draw(self, logits: Tensor) -> int:
        s, V = self.sampling, len(logits)
        ids = None
        x = (logits.double() - logits.max()) / s.temperature  # fp64: a tiny temperature overflows nothing
        if 0 < s.top_k < V:
            x, ids = x.topk(s.top_k)
        probs = torch.softmax(x, 0)
        if s.min_p > 0:
            probs = probs.masked_fill(probs < s.min_p * probs.max(), 0)
            probs = probs / probs.sum()
        if s.top_p < 1:  # what lies under the bound adds up to less than what may be left out, so none of it is needed
            some = (probs >= (1 - s.top_p) / len(probs)).nonzero()[:, 0]
            ids = some if ids is None else ids[some]
            probs, order = probs[some].sort(descending=True, stable=True)
            ids = ids[order]
            probs = probs.masked_fill(probs.cumsum(0) - probs >= s.top_p, 0)  # the likeliest always stays
        heap = probs.cumsum(0)
        mark = torch.rand((), dtype=torch.float64, generator=self._generator).item() * heap[-1]
        at = min(int(torch.searchsorted(heap, mark, right=True)), int(probs.nonzero()[-1]))
        return at if ids is None else int(ids[at])


def choose_tokens(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """Logits (S, V) -> the next id of each sequence."""
    likeliest = logits.argmax(-1).tolist() if any(s.plain for s in samplers) else []
    return [likeliest[row] if s.plain else s.choose(logits[row]) for row, s in enumerate(samplers)]
