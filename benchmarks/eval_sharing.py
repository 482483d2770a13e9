"""What questions about one picture share: `python benchmarks/eval_sharing.py` (about two minutes, on the quickstart's model).

Asks six questions a picture (as POPE does) and thirty (as GQA does), the picture first, in three ways that take turns: one by
one; in batches of at most 64 in which nothing is shared; and in the same batches as eval/run.py asks, where a picture is opened,
encoded and read once. All three must give the same answers.

Writes benchmarks/results/<machine>/eval_sharing.json.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path

import measure  # first: it pins threads
import torch

BATCH = 64
THINGS = ("circle", "square", "triangle", "star", "cross", "ring", "digit", "line", "heart", "house")
ASKED = ("Is there a {} in the image?", "What colour is the {}?", "How many {}s are there?")
SUFFIX = "\nAnswer the question using a single word or phrase."


def questions(count: int) -> list[str]:
    """So many short questions, each of its own wording, as long as POPE's and GQA's."""
    return [ASKED[i // len(THINGS)].format(THINGS[i % len(THINGS)]) + SUFFIX for i in range(count)]


def main() -> None:
    from PIL import Image

    from visualrwkv.chat import load

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="runs/quickstart/finetune")
    parser.add_argument("--pictures", type=Path, default=Path("runs/quickstart/data/images/test"))
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--name", default="eval_sharing", help="of the file of results")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vlm = load(options.model, device=device, dtype=options.dtype)
    files = sorted(options.pictures.glob("*.png"))
    shapes, results = {}, {}
    for each in (6, 30):
        together = BATCH // each  # pictures in a batch
        shown = files[: 4 * together]
        asked = [(file, text) for file in shown for text in questions(each)]
        step = together * each

        def one_by_one(asked: list = asked) -> list[str]:
            return [vlm.answer(file, text, "first", options.new_tokens) for file, text in asked]

        def apart(asked: list = asked, step: int = step) -> list[str]:
            """Pictures are the same only if they are the same object or have the same name; these have neither."""
            own = [(Image.open(file), text) for file, text in asked]
            batches = (own[i : i + step] for i in range(0, len(own), step))
            return [a for batch in batches for a in vlm.answer_batch(batch, "first", options.new_tokens)]

        def shared(asked: list = asked, step: int = step) -> list[str]:
            batches = (asked[i : i + step] for i in range(0, len(asked), step))
            return [a for batch in batches for a in vlm.answer_batch(batch, "first", options.new_tokens)]

        ways: dict[str, Callable[[], list[str]]] = {
            "one by one": one_by_one,
            "batched": apart,
            "batched, shared": shared,
        }
        answers = {name: way() for name, way in ways.items()}
        assert answers["one by one"] == answers["batched"] == answers["batched, shared"], "sharing changed an answer"
        times = measure.take_turns(ways, options.seconds)
        found = measure.figures(times)
        for name, figure in found.items():
            rate = len(asked) / figure["median"]
            print(f"{each:>2} a picture, {name:<16} {rate:8.1f} questions/s")
            results[f"{each} a picture, {name}"] = figure | {"questions_per_second": rate}
        gain = statistics.median(a / b for a, b in zip(times["one by one"], times["batched, shared"]))
        print(
            f"{each:>2} a picture: {gain:.1f} × as fast as one by one, {len(set(answers['batched']))} different answers"
        )
        shapes[f"{each} a picture"] = {"pictures": len(shown), "questions": len(asked), "batch": step}
    measured = {"shapes": shapes | {"new_tokens": options.new_tokens}, "figures": results, "device": device}
    path = measure.record(options.name, measured | {"model": options.model, "dtype": options.dtype}, ("torch",))
    print(path)


if __name__ == "__main__":
    main()
