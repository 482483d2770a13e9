"""A written `scenes` data set, read back as a user's data would be.

Questions are understood here by regular expressions of their own, so that the generator is not asked about itself.
"""

import json
import re
from pathlib import Path

SPLITS = ("train", "val", "test", "test_unseen")
TYPES = ("count", "colour", "shape", "exists", "digit", "position", "larger")
KIND, COLOUR = "(circle|square|triangle|star|cross|digit)", "(red|green|blue|yellow|purple|orange|white)"
NAMED = re.compile(f"{COLOUR} {KIND}")
REFERENCE = re.compile(f"\\b(?:the|an?) (?:{COLOUR} )?(?:{KIND}|object)")


def load(data: Path, name: str):
    return json.loads((data / f"{name}.json").read_text())


def turns_of(record: dict) -> list[tuple[str, str, str]]:
    """(type, question without tag or caption, answer) of each turn."""
    said = [message["value"] for message in record["conversations"]]
    assert [message["from"] for message in record["conversations"]] == ["human", "gpt"] * len(record["types"])
    return [(t, said[2 * i].split("\n")[-1], said[2 * i + 1]) for i, t in enumerate(record["types"])]


def all_turns(data: Path, name: str) -> list[tuple[str, str, str]]:
    return [turn for record in load(data, name) for turn in turns_of(record)]


def pairs_in(question: str) -> list[tuple[str, str]]:
    """(kind, colour) of every full name in a question, in the order of mention."""
    return [(kind, colour) for colour, kind in NAMED.findall(question.lower())]


def things_in(question: str) -> list[dict]:
    """What every "the star", "a red object" or "the red star" of a question says: kind, colour or both."""
    found = [{"kind": kind, "colour": colour} for colour, kind in REFERENCE.findall(question.lower())]
    return [{key: word for key, word in one.items() if word} for one in found if any(one.values())]


def is_choice(question: str) -> bool:
    """Whether a question of type `position` or `larger` asks which of two things it is, rather than yes or no."""
    return "which" in question.lower()


def outcome(question: str, answer: str) -> str:
    """The answer or, where a question leaves the choice between two things, which of them is the right one."""
    if not is_choice(question) or len(things_in(question)) != 2:
        return answer
    named = [thing.values() for thing in things_in(question)]
    (right,) = [place for place, words in zip(("first", "second"), named, strict=True) if answer in words]
    return right
