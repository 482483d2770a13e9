"""`python eval/run.py --bench NAME[,NAME]`: ask a model a bench's questions, or take saved answers, and score them.

The last line on stdout is one JSON object, bench → scores. Answers are appended in OUT as they come, so the same command after a
crash asks only what is left; OUT/result.json says what came out under which settings.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]  # a checkout needs no installation

from asking import Rank, ask  # noqa: E402
from plan import Bench, arranged, planned, published  # noqa: E402
from questions import NOTES, Question, Row, note, read_jsonl  # noqa: E402
from result import BY_BENCH, surroundings, write_result  # noqa: E402

from visualrwkv.commandline import parse, run  # noqa: E402
from visualrwkv.config import ImagePosition  # noqa: E402

MAX_NEW_TOKENS = 128
"""For an answer, where a bench does not say otherwise."""


@dataclass(frozen=True)
class Options:
    """Ask a model a bench's questions, or take saved answers, and score them."""

    bench: str  # one or several, separated by commas
    data: Path | None = None  # the bench's files, or folders of several benches' names; left out, the Hub's are fetched
    model: str | None = None  # default: the newest model under runs/
    predictions: Path | None = None  # score these answers (JSONL with question_id and text) and load no model
    out: Path | None = (
        None  # default: eval-<hashes of model and task>/ in the model's directory; none with --predictions
    )
    split: str | None = None  # one of the bench's splits; default: what its files are for
    limit: int = 0  # the first so many questions of each split; 0: all
    blind: bool = False  # also ask without the picture
    image_position: ImagePosition | None = None  # default: the model's
    batch_size: int = 64
    max_new_tokens: int | None = None  # default: the bench's
    dtype: str = "float32"
    task: Path | None = None  # what state tuning made of this model: where every question starts


# Scores --------------------------------------------------------------------------------------------------------------


def judged(bench: Bench, split: str, rows: list[Row], only: Sequence[Question] | None) -> tuple[Any, dict[str, Any]]:
    """The score as the official code has it, and further figures; `only`: of these questions alone."""
    some: dict[str, Any] = {}
    if only is not None:
        if "only" not in inspect.signature(bench.code.score).parameters:
            note(f"{bench.name}: its score is of a whole split, so there is none with --limit")
            return None, {}
        some = {"only": {question.id for question in only}}
    if empty := sum(not row.get("text", "a review").strip() for row in rows):
        note(f"{bench.name} {split}: {empty} of {len(rows)} answers are empty, and scored as they are")
    with published(bench):
        score = bench.code.score(bench.data, split, rows, **some)
        more = bench.code.more(bench.data, split, rows, **some) if hasattr(bench.code, "more") else {}
    return score, more


def score_saved(bench: Bench, options: Options) -> tuple[Any, dict[str, Any], int]:
    """Scores of a file of answers, further figures, and the number of answers."""
    assert options.predictions is not None
    if len(bench.splits) > 1:
        raise ValueError(
            f"{bench.name} has several splits; say which one the answers are of: {', '.join(bench.splits)}"
        )
    rows = read_jsonl(options.predictions)
    if not rows:
        raise ValueError(f"{options.predictions} holds no answer, so there is nothing to score")
    reviews = getattr(bench.code, "TAKES_REVIEWS", False) and not any("text" in row for row in rows)
    for number, row in enumerate(() if reviews else rows, 1):
        if not isinstance(row.get("question_id"), (int, str)) or not isinstance(row.get("text"), str):
            raise ValueError(f"{options.predictions}, answer {number} has no question_id or no text")
        if not isinstance(row.get("prompt"), str | None):
            raise ValueError(
                f"{options.predictions}, answer {number}: its prompt is {row['prompt']!r}, which is no text"
            )
    (split,) = bench.splits
    if options.out and not reviews:
        submit(bench, split, rows, options.out)
    score, more = judged(bench, split, rows, None)
    return arranged(bench, {split: score}), arranged(bench, {split: more}), len(rows)


# Answers -------------------------------------------------------------------------------------------------------------


def newest_model() -> str:
    """The model directory under runs/ that was written last."""
    found = sorted(Path("runs").glob("**/model.safetensors"), key=lambda p: p.stat().st_mtime)
    found = [
        p
        for p in found
        if json.loads((p.parent / "config.json").read_text()).get("vision") and "encoder" not in p.parts
    ]
    if not found:
        raise FileNotFoundError(
            "there is no model under runs/; give one with --model, or run scripts/quickstart.sh first"
        )
    return str(found[-1].parent)


def evaluate(
    bench: Bench, vlm: Any, settings: dict[str, Any], options: Options, out: Path
) -> tuple[Any, dict[str, Any], int]:
    """Scores, and under "blind" those without the picture; further figures; the number of questions."""
    scores: dict[str, Any] = {}
    further: dict[str, Any] = {}
    count = 0
    new_tokens = options.max_new_tokens or getattr(bench.code, "MAX_NEW_TOKENS", MAX_NEW_TOKENS)
    for split in bench.splits:
        with published(bench):
            questions = bench.code.load(bench.data, split)
        asked = questions[: options.limit] if options.limit else questions
        count += len(asked)
        for blind in (False, True) if options.blind else (False,):

            def answer(batch: list[Question], blind: bool = blind) -> list[str]:
                pairs = [(() if blind else question.pictures, question.text) for question in batch]
                return vlm.answer_batch(pairs, options.image_position, new_tokens)

            stem = f"{bench.stem}-{split}{'-blind' if blind else ''}"
            under = settings | bench_settings(bench, split) | {"max_new_tokens": new_tokens, "blind": blind}
            rows = ask(questions, options.limit, answer, options.batch_size, out, stem, under, Rank.here())
            if Rank.here().number:
                continue
            if not blind and not options.limit:
                submit(bench, split, rows, out)
            try:
                score, more = judged(bench, split, rows, asked if options.limit else None)
            except (ValueError, FileNotFoundError) as error:  # the answers are there, whatever became of the score
                note(str(error).partition("\n")[0])
                score, more = None, {}
            (scores.setdefault("blind", {}) if blind else scores)[split] = score
            if more and not blind:
                further[split] = more
    if Rank.here().number:
        return None, {}, count
    without = scores.pop("blind", None)
    seen = arranged(bench, scores)
    if without is not None:
        seen = (seen or {}) | {"blind": arranged(bench, without)}
    return seen, arranged(bench, further) if further else {}, count


def bench_settings(bench: Bench, split: str) -> dict[str, Any]:
    """What a bench says of its prompts, such as whether they hold OCR tokens."""
    return bench.code.settings(bench.data, split) if hasattr(bench.code, "settings") else {}


def data_of(options: Options) -> str | None:
    """DATA, as a result says it; where it was fetched the settings of each bench say where it lies."""
    return str(options.data) if options.data else None


def submit(bench: Bench, split: str, rows: list[Row], out: Path) -> None:
    """Write the official submission file, where there is one."""
    if not hasattr(bench.code, "submit"):
        return
    try:
        print(f"{bench.name}: to submit: {bench.code.submit(bench.data, split, rows, out)}", file=sys.stderr)
    except ValueError as error:
        note(str(error))


# The command ---------------------------------------------------------------------------------------------------------


def say(scores: dict[str, Any], more: dict[str, Any]) -> None:
    if any(more.values()):
        print("further figures:", json.dumps({name: figures for name, figures in more.items() if figures}))
    print(json.dumps(scores))


def main() -> None:
    options = parse(Options, [a for a in sys.argv[1:] if not a.startswith("--local_rank")])  # deepspeed adds that
    if options.limit < 0 or options.batch_size < 1:
        raise ValueError(f"limit is {options.limit} and batch_size {options.batch_size}; they must be at least 0 and 1")
    try:
        benches = planned(options.bench, options.data, options.split)
        (saved if options.predictions else fresh)(options, benches)
    except FileNotFoundError as error:
        sentence, _, tree = str(error).partition("\n")
        if not tree:
            raise
        print(tree, file=sys.stderr)
        raise FileNotFoundError(sentence) from None


def saved(options: Options, benches: list[Bench]) -> None:
    """Score saved answers."""
    began = time.monotonic()
    if len(benches) > 1:
        raise ValueError(f"--predictions holds the answers to one bench, and {len(benches)} are asked for")
    if options.limit or options.blind or options.task:
        raise ValueError("--limit, --blind and --task are for asking a model; saved answers are scored as they are")
    (bench,) = benches
    score, more, count = score_saved(bench, options)
    if options.out:
        named = {"predictions": str(options.predictions), "data": data_of(options), "limit": 0}
        figures = {"scores": score, "more": more, "questions": count, "seconds": time.monotonic() - began}
        by_bench = {name: {bench.name: figure} for name, figure in figures.items()}
        settings = {bench.name: bench_settings(bench, bench.splits[0]) | {"splits": bench.splits, **bench.source}}
        write_result(options.out, by_bench | {"settings": settings} | named | surroundings() | {"notes": NOTES})
    say({bench.name: score}, {bench.name: more})


def fresh(options: Options, benches: list[Bench]) -> None:
    """Ask a model, then score."""
    import torch

    from visualrwkv.chat import load
    from visualrwkv.files import model_hash

    model, rank = options.model or newest_model(), Rank.here()
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
    vlm = load(model, device=device, dtype=options.dtype, task=options.task)
    config, mark = vlm.model.config, model_hash(model)
    name = f"eval-{mark}" + (f"-{model_hash(options.task)}" if options.task else "")
    out = options.out or (Path(model) if Path(model).is_dir() else Path("runs")) / name
    settings = {
        "model_hash": mark,
        "image_position": options.image_position or config.image_position,
        "template": config.template,
        "scan": config.scan,
        "image_tokens": config.image_tokens,
        "dtype": options.dtype,
    }
    if options.task:
        settings["task"] = model_hash(options.task)
    by_bench: dict[str, dict[str, Any]] = {name: {} for name in BY_BENCH}
    for bench in benches:
        began = time.monotonic()
        score, more, count = evaluate(bench, vlm, settings, options, out)
        told = [bench_settings(bench, split) for split in bench.splits]
        figures = {
            "scores": score,
            "more": more,
            "questions": count,
            "settings": {key: value for part in told for key, value in part.items()}
            | {"splits": bench.splits, **bench.source},
            "seconds": time.monotonic() - began,
        }
        for name, figure in figures.items():
            by_bench[name][bench.name] = figure
        if rank.number == 0:
            named = {"model": model, "data": data_of(options), "limit": options.limit, "device": device}
            write_result(out, by_bench | settings | named | surroundings() | {"ranks": rank.count, "notes": NOTES})
    if rank.number == 0:
        say(by_bench["scores"], by_bench["more"])


if __name__ == "__main__":
    run(main)
