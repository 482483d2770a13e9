"""Multiple choice: how options are listed in a question, and which one an answer means.

`infer` is VLMEvalKit's exact matching, which asks no language model: what it cannot infer counts as wrong.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Mapping

LETTERS = string.ascii_uppercase
DIRECTLY = "Answer with the option's letter from the given choices directly."
"""What LLaVA asks for after the options; it stands on a line of its own."""
NONE_OF_THEM = "Z"
"""The letter of an answer that refuses, or that says itself that no option fits."""

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
NO_REPLY = "Failed to obtain answer via API"
SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
STATED = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)
NEAR_THE_END = 4
"""A letter counts where at most so many words are left, itself included: before that it may be an article."""


def listed(options: Iterable[str]) -> str:
    """Options as the lines that follow a question: "\\nA. first\\nB. second"."""
    return "".join(f"\n{letter}. {option}" for letter, option in zip(LETTERS, options))


def infer(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that an answer means, "Z" for a refusal, None where it cannot be inferred; options by their letters."""
    return named(answer, options) or told(answer, options)


def named(answer: str, options: Mapping[str, str]) -> str | None:
    """The one option whose letter stands among the answer's last words, or follows "answer is"."""
    if NO_REPLY in answer:
        return None
    if any(phrase in answer for phrase in REFUSALS):
        return NONE_OF_THEM
    words = answer.translate(SEPARATORS).split()
    letters = [letter for letter in options if letter in words]
    if len(letters) == 1 and len(words) - words.index(letters[0]) <= NEAR_THE_END:
        return letters[0]
    if not letters and NONE_OF_THEM in words:
        return NONE_OF_THEM
    stated = STATED.search(answer)
    letter = stated[1].upper() if stated else ""
    return letter if letter in options else None


def told(answer: str, options: Mapping[str, str]) -> str | None:
    """The one option whose text the answer holds, in any case; None if the answer is long enough to discuss them all."""
    answer = answer.lower()
    if len(answer) > 2 * sum(map(len, options.values())):
        return None
    letters = [letter for letter, text in options.items() if text.lower() in answer]
    return letters[0] if len(letters) == 1 else None
