"""What rounded weights cost in right answers, on the quickstart's model: `python benchmarks/quality.py` (some three minutes).

The questions of `scenes`, of pairs of shape and colour that training showed (test) and never showed (test_unseen), asked as
eval/run.py asks them: the same prompts, batches and scoring. Against fp32, in two ways:

    rounded everywhere   the language model with every weight as the token step packs it (visualrwkv/ops/packed.py): matrices as
                         bf16, int8 or int4 with int8 for the head, low ranks, vectors and embeddings as bf16; what meets integers
                         is rounded to int8 as there. It runs as the ordinary module in fp32, prompts and answers alike
    --dtype ...          as `load(dtype=...)` gives it: prompts are read with bf16 weights, and only the answer's steps are
                         rounded; the vision encoder and the projector are in bf16

The first is the loss to expect where answers are long; with answers of a word the second hides most of it, since the word is chosen
by the prompt's last logits. Accuracies have 95 % intervals, clustered by picture; a difference to fp32 is taken question by
question, so its interval is narrower. `same` is the share of answers that are fp32's word for word.

Writes benchmarks/results/<machine>/quality.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import measure  # first: it pins threads

sys.path[:0] = [str(measure.ROOT / "eval")]

from asking import batches  # noqa: E402
from benches import scenes  # noqa: E402
from intervals import Mean, clustered, paired  # noqa: E402
from questions import Question  # noqa: E402

from visualrwkv.chat import VLM, load  # noqa: E402
from visualrwkv.ops import library  # noqa: E402
from visualrwkv.ops.packed import KINDS  # noqa: E402
from visualrwkv.ops.token_step import without_library  # noqa: E402

BATCH = 64  # as eval/run.py has it
EXACT = "fp32"


def opened(model: str, way: str) -> VLM:
    """The model in one of the ways."""
    how, _, kind = way.partition(" ")
    vlm = load(model, dtype=kind if how == "--dtype" else "float32")
    if how == "rounded":
        vlm.model.rwkv = without_library(vlm.model.rwkv, kind)
    return vlm


def answers(vlm: VLM, questions: list[Question], wanted: set[str]) -> dict[str, str]:
    """Each wanted question's answer, in the batches in which all would be asked."""
    found = {}
    for batch in batches(questions, BATCH):
        asked = [question for question in batch if question.id in wanted]
        if asked:
            pairs = [(question.pictures, question.text) for question in asked]
            texts = vlm.answer_batch(pairs, None, scenes.MAX_NEW_TOKENS)
            found |= {question.id: text for question, text in zip(asked, texts, strict=True)}
    return found


def percent(mean: Mean) -> dict[str, Any]:
    return asdict(mean.scaled(100)) | {"unit": "%"}


def compared(
    said: dict[str, dict[str, str]], data: Path, split: str, pictures: dict[str, str]
) -> dict[str, dict[str, Any]]:
    """Each way's accuracy, and its difference to fp32."""
    hits = {}
    for way, texts in said.items():
        rows = [{"question_id": name, "text": text} for name, text in texts.items()]
        hits[way] = scenes.per_question(data, split, rows, texts)
    exact, found = said[EXACT], {}
    for way, texts in said.items():
        found[way] = {
            "accuracy": percent(clustered(hits[way], pictures)),
            "against fp32": percent(paired(hits[EXACT], hits[way], pictures)),
            "same": sum(texts[name] == exact[name] for name in texts) / len(texts),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/quickstart/finetune")
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart/data"))
    parser.add_argument("--limit", type=int, default=1000, help="the first so many questions of each split; 0: all")
    parser.add_argument("--quick", action="store_true", help="forty questions; stores nothing")
    options = parser.parse_args()
    limit = 40 if options.quick else options.limit
    ways = [EXACT, *(f"rounded {kind}" for kind in KINDS), *(f"--dtype {kind}" for kind in KINDS)]
    results: dict[str, Any] = {}
    seconds = dict.fromkeys(ways, 0.0)
    vlms = {way: opened(options.model, way) for way in ways}
    for split in scenes.splits(options.data):
        questions = scenes.load(options.data, split)
        asked = questions[:limit] if limit else questions
        said = {}
        for way, vlm in vlms.items():
            began = time.perf_counter()
            said[way] = answers(vlm, questions, {question.id for question in asked})
            seconds[way] += time.perf_counter() - began
        pictures = {question.id: str(question.fields["image"]) for question in asked}
        results[split] = compared(said, options.data, split, pictures)
        for way, found in results[split].items():
            told = {
                key: f"{found[key]['mean']:+.2f} ± {found[key]['half']:.2f}" for key in ("accuracy", "against fp32")
            }
            print(f"{split}, {way:<17} {told['accuracy'][1:]} %, {told['against fp32']}, same {found['same']:.3f}")
    if options.quick:
        return
    measured = {
        "shapes": {"limit": limit, "batch": BATCH, "new tokens": scenes.MAX_NEW_TOKENS},
        "figures": results,
        "seconds": seconds,
        "kernels": library.variant().strip("_") if library.COMPILED else "torch",
        "model": options.model,
    }
    path = measure.record("quality", measured, ("visualrwkv", "torch"))
    print(json.dumps({"written": str(path.relative_to(measure.ROOT))}))


if __name__ == "__main__":
    main()
