"""From a conversation to token ids and labels.

A sandwich is a placement: the question stands before the picture, so that the RNN knows what to look for, and again after it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from visualrwkv.config import IMAGE_POSITIONS, ImagePosition, choose
from visualrwkv.text.tokenizer import encode

IGNORE = -100
"""The label of a position that is not learned."""
IMAGE_TAG = "<image>"
LITERAL_TAG = "<\0image>"
"""An image tag that a person wrote as text: it is read as one, and no picture takes its place."""
SHORT_ANSWER = "Answer the question using a single word or phrase."
PROTOCOLS = ("visualrwkv", "v6.0", "v7.00", "world")
PLACEHOLDER = {"visualrwkv": 65535, "v7.00": 65535, "v6.0": -200, "world": 65535}
"""The id that stands for a picture: one for each image token, but in v6.0 one for the whole picture."""
TURN_BYTES = dict.fromkeys((0x16, 0x17))
"""What opens and closes WorldRWKV's turns, and is never part of a text."""

Turn = Mapping[str, str]


def clean(text: str) -> str:
    """Strip, and collapse empty lines, so that two newlines occur only where a turn ends."""
    text = text.strip()
    return re.sub(r"\n(\s*\n)+", "\n", text) if "\n" in text else text


def literal(text: str) -> str:
    """Text that a person typed, as text: image tags stand for no picture, and the bytes that open and close turns are gone."""
    return text.replace(IMAGE_TAG, LITERAL_TAG).translate(TURN_BYTES)


def as_typed(text: str) -> str:
    """What `literal` made, as a person reads it."""
    return text.replace(LITERAL_TAG, IMAGE_TAG)


def encode_text(text: str) -> list[int]:
    """Text -> ids, with the tags in it that are only text."""
    return encode(as_typed(text))


def without_tags(text: str) -> str:
    """The text of a turn without its image tags."""
    return clean(re.sub(rf"\s*{IMAGE_TAG}\s*", "\n", text) if IMAGE_TAG in text else text)


def question_copy(text: str) -> str:
    """The copy of a question that opens a sandwich: how to answer is said once, after the picture."""
    return clean(text.replace(SHORT_ANSWER, ""))


def place_images(text: str, copy: str, tags: int, position: str) -> str:
    """A human turn with its tags where `position` wants them; `copy` opens the sandwich."""
    images = "\n".join([IMAGE_TAG] * tags)
    parts = {"first": (images, text), "middle": (copy, images, text), "last": (text, images)}[position]
    return "\n".join(part for part in parts if part).strip()


def encode_conversation(
    conversations: Sequence[Turn],
    protocol: str = "visualrwkv",
    image_position: ImagePosition = "middle",
    image_tokens: int = 1,
) -> tuple[list[int], list[int]]:
    """LLaVA turns -> (ids, labels), of equal length; labels are −100 but for the answers and what closes them.

    conversations: [{"from": "human" | "gpt", "value": str}, …]; a last gpt turn with an empty value leaves "Assistant:"
    open for the model to go on. protocol "visualrwkv": each sandwich opens with its own turn's question only; "v6.0" and
    "v7.00": exactly the ids and labels of the reference, "v6.0" with one placeholder −200 and all questions in the
    sandwich; "world": WorldRWKV's turns, pictures before all whatever the position. image_tokens: how many ids stand for
    a picture. ValueError for other roles, protocols or positions.
    """
    choose("protocol", protocol, PROTOCOLS)
    choose("image_position", image_position, IMAGE_POSITIONS)
    if protocol == "world":
        return encode_world(conversations, image_tokens)
    slots = [PLACEHOLDER[protocol]] * (1 if protocol == "v6.0" else image_tokens)
    bare = without_tags if protocol == "visualrwkv" else lambda text: clean(text.replace(IMAGE_TAG, ""))
    questions = [t["value"] for t in conversations if t["from"].lower() == "human"]
    ids: list[int] = []
    labels: list[int] = []
    for turn in conversations:
        role, value = turn["from"].lower(), turn["value"]
        if role == "human":
            text, tags = bare(value), value.count(IMAGE_TAG)
            if tags:
                copy = question_copy(text)
                if protocol == "v6.0":  # the reference joins every question, uncleaned where it has no picture
                    copy = "\n".join(question_copy(bare(q)) if IMAGE_TAG in q else q.strip() for q in questions)
                text = place_images(text, copy, tags, "first" if protocol == "v7.00" else image_position)
            new = encode_tagged(f"User: {text}\n\n", slots)
            masked = len(new)
        elif role == "gpt":
            new = encode_text(f"Assistant: {clean(value)}\n\n") if value.strip() else encode("Assistant:")
            masked = 3  # "Assistant", ":" and what the two make with the rest: given, not learned
        else:
            raise ValueError(f"a turn is from {turn['from']!r}; allowed are human, gpt")
        ids += new
        labels += [IGNORE] * masked + new[masked:]
    return ids, labels


def encode_world(conversations: Sequence[Turn], image_tokens: int) -> tuple[list[int], list[int]]:
    """Ids and labels of turns that byte 0x17 closes; a turn's pictures come before it."""
    ids: list[int] = []
    labels: list[int] = []
    for turn in conversations:
        role, value = turn["from"].lower(), turn["value"]
        if role == "human":
            text = value.replace(IMAGE_TAG, "").strip()
            new = [PLACEHOLDER["world"]] * (image_tokens * value.count(IMAGE_TAG)) + encode_text(
                f"\x16User: {text}\x17"
            )
            masked = len(new)
        elif role == "gpt":
            new = encode_text(f"Assistant: {value.strip()}\x17") if value.strip() else encode("Assistant:")
            masked = len(encode("Assistant:"))
        else:
            raise ValueError(f"a turn is from {turn['from']!r}; allowed are human, gpt")
        ids += new
        labels += [IGNORE] * masked + new[masked:]
    return ids, labels


def encode_tagged(text: str, slots: list[int]) -> list[int]:
    """Text whose image tags become `slots`; the pieces between are tokenised apart."""
    first, *rest = text.split(IMAGE_TAG)
    ids = encode_text(first)
    for piece in rest:
        ids += slots + encode_text(piece)
    return ids
