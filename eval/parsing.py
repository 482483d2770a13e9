"""What MMMU's own evaluator reads out of a model's answer: a letter, or for an open question strings and numbers.

Its rules are kept with their quirks, as they decide the published numbers: a letter is looked for between spaces, an
unreadable answer is drawn by lot, and a number without a digit before its point loses the point.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence

SEED = 42
OPEN_PARTS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
"""An open answer's key part is what follows the last of one of these, or in its last line also what follows "="."""
NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),  # 1,000
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),  # 1e3
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),  # 1 or 1.0, unless part of the above
)
LONG = 5
"""Only an answer of more words than this is searched for an option's text."""

Value = str | float


def read_letter(answer: str, options: Mapping[str, str], lot: random.Random) -> str:
    """The option an answer names, the last of several; one drawn by lot where it names none."""
    for mark in ",.!?;:'":
        answer = answer.strip(mark)
    answer = f" {answer} "
    lower = answer.lower()

    def bracketed(letter: str) -> int:
        return answer.rfind(f"({letter})")

    def alone(letter: str) -> int:
        return answer.rfind(f" {letter} ")

    def spelt(letter: str) -> int:
        return lower.rfind(options[letter].lower())

    ways: list[Callable[[str], int]] = [bracketed, alone]
    if len(answer.split()) > LONG:
        ways.append(spelt)
    for way in ways:
        places = {letter: place for letter in options if (place := way(letter)) >= 0}
        if places:
            return max(places, key=places.__getitem__)
    return lot.choice(list(options))


def read_open(answer: str) -> set[Value]:
    """The strings and numbers that an open answer may mean."""
    parts = key_parts(answer)
    numbers = [number for part in parts for pattern in NUMBERS for number in pattern.findall(part)]
    return {value for text in (*parts, *numbers) for value in normalise(text)}


def key_parts(answer: str) -> list[str]:
    """Of every line the shortest text that follows an indicator; the whole answer if there is none."""
    answer = answer.strip().strip(".").lower()
    lines = answer.split("\n")
    parts = []
    for at, line in enumerate(lines):
        indicators = (*OPEN_PARTS, "=") if at == len(lines) - 1 else OPEN_PARTS
        shortest = ""
        for indicator in indicators:
            if indicator in line:
                tail = line.split(indicator)[-1].strip()
                if not shortest or len(tail) < len(shortest):
                    shortest = tail
        if shortest and shortest not in list(":,.!?;'"):
            parts.append(shortest)
    return parts or [answer]


def normalise(text: str) -> list[Value]:
    """A number to two decimals; other text in lower case, a single character with a space before or after it."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [f" {text}", f"{text} "] if len(text) == 1 else [text]


def fits(meant: set[Value], answers: Sequence[str]) -> bool:
    """Whether something that was meant holds an answer's text, or is its number."""
    right = [value for answer in answers for value in normalise(answer)]
    texts = [value for value in right if isinstance(value, str)]
    return any(any(text in value for text in texts) if isinstance(value, str) else value in right for value in meant)
