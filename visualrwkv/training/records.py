"""A training record in whatever form it is stored, as turns with <image> tags and the pictures that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visualrwkv.text.prompt import IMAGE_TAG, Turn
from visualrwkv.training.sources import Readable
from visualrwkv.training.tables import Cell

VIDEO_TAG = "<video>"
PICTURE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
ROLES = {"user": "human", "assistant": "gpt"}
Stored = Path | Cell


@dataclass(frozen=True)
class Record:
    """A checked record: its turns, with as many <image> tags as pictures."""

    turns: tuple[Turn, ...]
    pictures: tuple[Stored, ...]


def read_record(source: Readable, index: int, frames: int = 8) -> Record:
    """A record's turns and pictures, checked; ValueError names the record and what is wrong.

    Turns stand under "conversations" (LLaVA), "messages" (chat) or "texts" (pairs of user and assistant). Without any tag
    the pictures come before the first turn of the last two forms. A picture that is a directory is a video: up to `frames`
    of its pictures, evenly spread, for one tag <video> or <image>.
    """
    raw = source[index]
    raw = raw if isinstance(raw, dict) else {}
    if "conversations" in raw or not ("messages" in raw or "texts" in raw):
        turns = _conversations(raw.get("conversations"), source, index)
    else:
        turns = _chat(raw, source, index)
    shown: list[list[Stored]] = []
    for key in ("image", "images", "video"):
        value = raw.get(key)
        for item in [] if value is None else value if isinstance(value, list) else [value]:
            if isinstance(item, str):
                place = source.images(index) / item
                shown.append(_frames(place, frames, source, index) if place.is_dir() else [place])
            elif isinstance(item, Cell):
                shown.append([item])
            else:
                raise ValueError(f"{source.name(index)} has an image that is no path or list of paths: {value!r:.80}")
    turns = _tags(turns, shown, "conversations" not in raw)
    pictures = tuple(picture for group in shown for picture in group)
    tags = sum(t["value"].count(IMAGE_TAG) for t in turns if t["from"].lower() == "human")
    if tags != len(pictures):
        raise ValueError(f"{source.name(index)} has {tags} {IMAGE_TAG} tags for {len(pictures)} pictures")
    return Record(tuple(turns), pictures)


def _conversations(turns: Any, source: Readable, index: int) -> list[Turn]:
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"{source.name(index)} has no conversations")
    for turn in turns:
        if not (isinstance(turn, dict) and isinstance(turn.get("from"), str) and isinstance(turn.get("value"), str)):
            raise ValueError(f"{source.name(index)} has a turn without the texts 'from' and 'value': {turn!r:.80}")
    return turns


def _chat(raw: dict[str, Any], source: Readable, index: int) -> list[Turn]:
    """Turns of {"role", "content"} messages, where a content may be a list of parts, or of {"user", "assistant"} pairs."""
    turns: list[Turn] = []
    system = ""
    for turn in raw.get("messages") or raw.get("texts") or []:
        if isinstance(turn, dict) and all(isinstance(turn.get(k), str) for k in ROLES):
            turns += [{"from": ROLES[k], "value": turn[k]} for k in ROLES]
            continue
        role = turn.get("role") if isinstance(turn, dict) else None
        content = turn.get("content") if isinstance(turn, dict) else None
        if isinstance(content, list):
            parts = [p if isinstance(p, dict) else {} for p in content]
            content = "\n".join(IMAGE_TAG if p.get("type") == "image" else p.get("text") or "" for p in parts)
        if not isinstance(content, str) or role not in (*ROLES, "system"):
            raise ValueError(
                f"{source.name(index)} has a turn without a 'content' or a 'role' of user, assistant or system: {turn!r:.80}"
            )
        if role == "system":  # RWKV's template has no such role: it opens the first question
            system = content
            continue
        if role == "user" and system:
            content, system = f"{system}\n{content}", ""
        turns.append({"from": ROLES[role], "value": content})
    if not turns:
        raise ValueError(f"{source.name(index)} has no conversations")
    return turns


def _frames(folder: Path, most: int, source: Readable, index: int) -> list[Stored]:
    found = sorted(f for f in folder.iterdir() if f.suffix.lower() in PICTURE_FILES)
    if not found:
        raise ValueError(f"{source.name(index)}: {folder} is a directory without pictures; a video is one of frames")
    if len(found) <= most:
        return list(found)
    return [found[round(i * (len(found) - 1) / max(most - 1, 1))] for i in range(most)]


def _tags(turns: list[Turn], shown: list[list[Stored]], may_lack: bool) -> list[Turn]:
    """The turns with one <image> tag for each picture or frame, where they had one for each picture or video."""
    tags = sum(t["value"].count(IMAGE_TAG) + t["value"].count(VIDEO_TAG) for t in turns if t["from"].lower() == "human")
    if not tags and may_lack and shown and turns:
        first = turns[0]
        opening = f"{IMAGE_TAG}\n" * len(shown) + first["value"]
        turns = [{"from": first["from"], "value": opening}, *turns[1:]]
        tags = len(shown)
    if tags != len(shown) or (
        all(len(group) == 1 for group in shown) and not any(VIDEO_TAG in t["value"] for t in turns)
    ):
        return turns
    groups = iter(shown)
    done: list[Turn] = []
    for turn in turns:
        if turn["from"].lower() != "human":
            done.append(turn)
            continue
        opening, *rest = turn["value"].replace(VIDEO_TAG, IMAGE_TAG).split(IMAGE_TAG)
        value = opening + "".join("\n".join([IMAGE_TAG] * len(next(groups))) + piece for piece in rest)
        done.append({"from": turn["from"], "value": value})
    return done
