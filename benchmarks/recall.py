"""What is left of a picture after others, and after talk: `python benchmarks/recall.py` (an hour; it goes on where it stopped).

Albums show picture after picture, each with its number, and then ask for the colour or the shape of the thing in one of
them. Talks show one picture, go on for some turns about something else, and then ask. Each kind of model of claims.py learns
both from the same records, albums of up to 16 pictures and talks of up to 24 turns, from its stage 2 on (seed 0), and is asked
at up to 64 pictures and 200 turns. An answer counts if the model says it word for word, greedily.

Beside it: what a model keeps between two tokens there, and how long the next one takes, with the Llama's cache in transformers.
Writes benchmarks/results/<machine>/recall.json and .png.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import measure  # first: it pins threads
import torch
from claims import QUICKSTART, material
from claims_job import Trial, learn, stage
from claims_models import model
from rich.progress import track

from visualrwkv.checkpoint import load_vision
from visualrwkv.model import Encoded, VisualRWKV
from visualrwkv.text.prompt import IGNORE, IMAGE_TAG, encode_conversation
from visualrwkv.training.engine import join_world
from visualrwkv.training.loss import shift_labels
from visualrwkv.training.recipes import RECIPES
from visualrwkv.vision.processor import make_processor

KINDS = ("RWKV-6", "RWKV-7", "Llama")
PICTURES, TURNS = (1, 2, 4, 8, 16, 32, 64), (1, 2, 5, 10, 20, 50, 100, 200)
LEARNED_PICTURES, LEARNED_TURNS = (1, 1, 2, 2, 3, 4, 6, 8, 8, 12, 16), (1, 2, 4, 8, 12, 24)
ASKED = 8  # questions of an album that is learned from
WORDS = ("apple", "river", "seven", "music", "cloud", "paper", "horse", "winter", "bread", "stone", "lamp", "garden")

Turn = dict[str, str]
Thing = dict[str, Any]


# What is asked -------------------------------------------------------------------------------------------------------


def single(data: Path, split: str) -> list[tuple[str, Thing]]:
    """The pictures of a split that show one thing, no digit: (file, thing)."""
    scenes = json.loads((data / f"{split}.objects.json").read_text())
    return [(name, things[0]) for name, things in scenes.items() if len(things) == 1 and things[0]["kind"] != "digit"]


def human(text: str) -> Turn:
    return {"from": "human", "value": text}


def gpt(text: str) -> Turn:
    return {"from": "gpt", "value": text}


def question(number: int, thing: Thing, draw: random.Random) -> list[Turn]:
    """A question about picture `number` and its answer."""
    if draw.random() < 0.5:
        return [human(f"What colour is the object in picture {number}?"), gpt(thing["colour"])]
    return [human(f"What shape is the object in picture {number}?"), gpt(thing["kind"])]


def shown(count: int) -> list[Turn]:
    return [t for k in range(1, count + 1) for t in (human(f"{IMAGE_TAG}\nPicture {k}."), gpt("ok"))]


def talk(turns: int, draw: random.Random) -> list[Turn]:
    """So many turns less one about nothing of the picture."""
    words = [draw.choice(WORDS) for _ in range(turns - 1)]
    return [t for word in words for t in (human(f"Say {word}."), gpt(word))]


def write_records(data: Path, out: Path, count: int) -> Path:
    """What is learned from, as LLaVA JSON."""
    draw, pictures, records = random.Random(0), single(data, "train"), []
    for i in range(count):
        if i % 3:
            some = draw.sample(pictures, draw.choice(LEARNED_PICTURES))
            asked = draw.sample(range(len(some)), min(ASKED, len(some)))
            turns = shown(len(some)) + [t for k in asked for t in question(k + 1, some[k][1], draw)]
        else:
            some = [draw.choice(pictures)]
            turns = shown(1) + talk(draw.choice(LEARNED_TURNS), draw) + question(1, some[0][1], draw)
        records.append({"id": str(i), "image": [name for name, _ in some], "conversations": turns})
    out.mkdir(parents=True, exist_ok=True)
    part = out / ".records.part"
    part.write_text(json.dumps(records))
    part.replace(out / "records.json")
    return out / "records.json"


# Learning and asking ---------------------------------------------------------------------------------------------------


def trained(kind: str, home: Path, data: Path, encoder: Path, records: Path, steps: int) -> VisualRWKV:
    """A model that has seen albums and talks."""
    trial, out = Trial(kind=kind), home / "recall" / kind
    if (out / "model.safetensors").exists():
        return stage(model(kind, load_vision(encoder)), "finetune", out, records, RECIPES["nano"]["finetune"], trial)
    made = learn(trial, home, data, encoder)
    recipe = replace(RECIPES["nano"]["finetune"], steps=steps)
    return stage(made, "finetune", out, records, recipe, trial, images=data)


@torch.inference_mode()
def right(made: VisualRWKV, rows: list[list[Turn]], pictures: list[torch.Tensor]) -> Iterator[bool]:
    """Whether each conversation's last answer is what the model would say, token for token: then each of its tokens is
    the likeliest one after those before it. pictures: of each row its image features (I, M, D).
    """
    config = made.config
    made_of = {"image_position": config.image_position, "image_tokens": config.image_tokens}
    for turns, features in zip(rows, pictures):
        ids, labels = (torch.tensor(x) for x in encode_conversation(turns, **made_of))  # type: ignore[arg-type]
        open_, _ = encode_conversation(turns[:-1], **made_of)  # type: ignore[arg-type]
        labels[: len(open_)] = IGNORE  # earlier answers are given
        bounds = torch.tensor([0, len(ids)])
        targets = shift_labels(labels, bounds)
        hidden = made.hidden(ids[None], Encoded(features), cu_seqlens=bounds)[0][0, targets != IGNORE]
        yield bool((made.rwkv.head(hidden).argmax(-1) == targets[targets != IGNORE]).all())


@torch.inference_mode()
def asked(made: VisualRWKV, data: Path, albums: int, talks: int) -> dict[str, Any]:
    """Accuracy by the number of pictures, by how many came after the one that is asked for, and by turns of talk."""
    config, pictures = made.config, single(data, "test")
    assert config.vision is not None
    read = make_processor(config.vision)
    known = {name: made.encode(read(data / name)[None])[0] for name, _ in pictures}
    by_count: dict[int, list[bool]] = {}
    by_age: dict[int, dict[int, list[bool]]] = {}
    for count in track(PICTURES, "albums", transient=True):
        draw = random.Random(count)
        by_count[count], ages = [], defaultdict(list)
        for _ in range(max(albums // count, 24)):
            some = draw.sample(pictures, count)
            for k in draw.sample(range(count), min(count, 8)):
                turns = shown(count) + question(k + 1, some[k][1], draw)
                hit = next(right(made, [turns], [torch.stack([known[name] for name, _ in some])]))
                by_count[count].append(hit)
                ages[count - 1 - k].append(hit)
        by_age[count] = ages
    by_turn: dict[int, list[bool]] = {}
    for turns in track(TURNS, "talks", transient=True):
        draw = random.Random(turns)
        by_turn[turns] = []
        for name, thing in draw.sample(pictures, min(talks, len(pictures))):
            whole = shown(1) + talk(turns, draw) + question(1, thing, draw)
            by_turn[turns].append(next(right(made, [whole], [known[name][None]])))
    share = {count: sum(hits) / len(hits) for count, hits in by_count.items()}
    return {
        "pictures": {count: {"accuracy": share[count], "questions": len(hits)} for count, hits in by_count.items()},
        "pictures after it, of 16": {age: sum(h) / len(h) for age, h in sorted(by_age[16].items())},
        "turns": {turns: {"accuracy": sum(h) / len(h), "questions": len(h)} for turns, h in by_turn.items()},
        "at 8 of single": share[8] / share[1],
    }


# What it costs -----------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def costs(ours: dict[str, VisualRWKV], llama: VisualRWKV, tokens: dict[int, int]) -> dict[int, Any]:
    """After an album: bytes kept between tokens, and the time of the next one, all taking turns."""
    from transformers import DynamicCache

    found, one = {}, torch.tensor([[11]])
    for count, length in tokens.items():
        ids = torch.randint(1, 60000, (1, length))
        states = {kind: made(ids)[1] for kind, made in ours.items()}
        cache = DynamicCache()
        step_of(llama.rwkv, cache, ids)
        calls: dict[str, Any] = {kind: partial(made, one, state=states[kind]) for kind, made in ours.items()}
        calls["Llama"] = partial(step_of, llama.rwkv, cache, one, -1)
        times = measure.figures(measure.take_turns(calls, 3.0))
        kept = {kind: sum(x.nbytes for x in vars(state).values()) for kind, state in states.items()}
        kept["Llama"] = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        found[count] = {"tokens": length, "kept, bytes": kept, "next token": times}
    return found


def step_of(language: Any, cache: Any, ids: torch.Tensor, back: int = 0) -> None:
    """The Llama's next tokens after its cache, of which the last `-back` are then dropped, so that each call is the same."""
    out = language.model(inputs_embeds=language.emb(ids), past_key_values=cache, use_cache=True)
    language.head(out.last_hidden_state[:, -1])
    if back:
        cache.crop(back)


def draw(found: dict[str, Any], path: Path) -> None:
    """Recall over pictures and over turns, and what is kept."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 3, figsize=(13, 4))
    for kind, figures in found["recall"].items():
        for panel, by in zip(panels, ("pictures", "turns")):
            rows = figures[by]
            panel.plot(list(rows), [100 * r["accuracy"] for r in rows.values()], marker="o", markersize=4, label=kind)
        kept = [row["kept, bytes"][kind] / 1e6 for row in found["cost"].values()]
        panels[2].plot(list(found["cost"]), kept, marker="o", markersize=4, label=kind)
    for panel, title, seen in zip(panels, ("one picture of so many", "so many turns ago"), (16, 24)):
        panel.set(xscale="log", title=title, ylabel="right answers, %", ylim=(0, 102))
        panel.axvline(seen, color="grey", linestyle=":", linewidth=1)
        panel.annotate("longest learned", (seen, 3), fontsize=7, rotation=90, color="grey")
    panels[2].set(xscale="log", yscale="log", title="kept between two tokens", ylabel="MB", xlabel="pictures")
    panels[0].set_xticks(PICTURES, PICTURES)
    panels[1].set_xticks(TURNS, TURNS)
    panels[2].set_xticks(PICTURES, PICTURES)
    for panel in panels:
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize=8, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, default=QUICKSTART.parent / "claims")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--records", type=int, default=24_000)
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument(
        "--albums", type=int, default=400, help="at least so many questions for each number of pictures"
    )
    parser.add_argument("--train", action="store_true", help="only train these kinds")
    options = parser.parse_args()
    data, encoder = material(options.home)
    records = options.home / "recall/records.json"
    if not records.exists():
        write_records(data, records.parent, options.records)
    join_world()
    models = {kind: trained(kind, options.home, data, encoder, records, options.steps).eval() for kind in options.kinds}
    if options.train:
        return
    if set(options.kinds) != set(KINDS):
        sys.exit("error: --kinds names some of the models, and the result compares all; leave it out, or give --train")
    found: dict[str, Any] = {"recall": {}}
    for kind, made in models.items():
        found["recall"][kind] = asked(made, data, options.albums, 100)
        told = ", ".join(f"{n} {100 * r['accuracy']:.0f}" for n, r in found["recall"][kind]["pictures"].items())
        turns = ", ".join(f"{n} {100 * r['accuracy']:.0f}" for n, r in found["recall"][kind]["turns"].items())
        print(f"{kind}: of so many pictures: {told}; so many turns ago: {turns}", flush=True)
    lengths = {count: len(encode_conversation(shown(count), image_tokens=16)[0]) for count in PICTURES}
    ours = {kind: made for kind, made in models.items() if kind != "Llama"}
    found["cost"] = costs(ours, models["Llama"], lengths)
    shapes = {"image tokens": 16, "learned": {"pictures": max(LEARNED_PICTURES), "turns": max(LEARNED_TURNS)}}
    results = {"shapes": shapes | {"records": options.records, "steps": options.steps}, "figures": found}
    path = measure.record("recall", results, ("visualrwkv", "torch", "transformers"))
    draw(found, path.with_suffix(".png"))
    print(json.dumps({"written": str(path.relative_to(measure.ROOT))}))


if __name__ == "__main__":
    main()
