"""`python eval/run.py --bench scenes --data DIR`: ask a model a bench's questions and score the answers.

The last line on stdout is one JSON object, bench → scores. Answers are appended to OUT/<bench>-<split>[-blind].jsonl as they
come, so the same command after a crash asks only what is left; OUT/result.json says under which settings.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]  # a checkout needs no installation

from questions import Question, Row, whole  # noqa: E402

from visualrwkv.commandline import parse, run  # noqa: E402
from visualrwkv.config import ImagePosition, choose  # noqa: E402

BENCHES = tuple(sorted(p.stem for p in (Path(__file__).parent / "benches").glob("*.py")))


@dataclass(frozen=True)
class Options:
    """Ask a model a bench's questions and score the answers."""

    bench: str  # one or several, separated by commas
    data: Path  # the bench's files
    model: str | None = None  # default: the newest model under runs/
    out: Path | None = None  # default: eval/ in the model's directory
    split: str | None = None  # one of the bench's splits; default: all
    limit: int = 0  # the first so many questions of each split; 0: all
    blind: bool = False  # also ask without the picture
    image_position: ImagePosition | None = None  # default: the model's
    batch_size: int = 64
    max_new_tokens: int = 32


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


def read_answers(file: Path) -> dict[str, Row]:
    """The rows that an earlier run left; a last line that a crash cut is taken out of the file."""
    kept = []
    for line in file.read_text(encoding="utf-8").split("\n") if file.exists() else []:
        try:
            kept.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    with whole(file) as part:
        part.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
    return {row["question_id"]: row for row in kept}


def ask(vlm: Any, questions: list[Question], file: Path, options: Options, blind: bool) -> list[Row]:
    """All rows, the missing ones asked in batches and appended to `file`."""
    from visualrwkv.training.progress import Bar

    rows = read_answers(file)
    left = [q for q in questions if q.id not in rows]
    with Bar(file.stem, len(questions), len(rows)) as bar, open(file, "a", encoding="utf-8") as out:
        for start in range(0, len(left), options.batch_size):
            batch = left[start : start + options.batch_size]
            asked = [(() if blind else q.pictures, q.text) for q in batch]
            texts = vlm.answer_batch(asked, options.image_position, options.max_new_tokens)
            for question, text in zip(batch, texts):
                row = {"question_id": question.id, "prompt": question.text, "text": text, **question.fields}
                rows[question.id] = row
                out.write(json.dumps(row, ensure_ascii=False) + "\n")
            out.flush()
            bar.advance(len(batch))
    return list(rows.values())


def evaluate(vlm: Any, name: str, options: Options, out: Path) -> dict[str, Any]:
    """One bench: scores of each split, and under "blind" the same without the picture."""
    bench = importlib.import_module(f"benches.{name}")
    splits = bench.splits(options.data)
    if options.split:
        choose("split", options.split, tuple(splits))
    scores: dict[str, Any] = {}
    for blind in (False, True) if options.blind else (False,):
        part = scores.setdefault("blind", {}) if blind else scores
        for split in [options.split] if options.split else splits:
            questions = bench.load(options.data, split)
            questions = questions[: options.limit] if options.limit else questions
            file = out / f"{name}-{split}{'-blind' if blind else ''}.jsonl"
            part[split] = bench.score(options.data, split, ask(vlm, questions, file, options, blind))
    return scores


def main() -> None:
    options = parse(Options)
    names = options.bench.split(",")
    for name in names:
        choose("bench", name.replace("-", "_"), BENCHES)

    import torch

    from visualrwkv.chat import load
    from visualrwkv.checkpoint import model_hash

    began = time.monotonic()
    model = options.model or newest_model()
    vlm = load(model, device="cuda" if torch.cuda.is_available() else "cpu")
    mark = model_hash(model)
    out = options.out or (Path(model) if Path(model).is_dir() else Path("runs")) / f"eval-{mark}"
    out.mkdir(parents=True, exist_ok=True)
    scores = {name: evaluate(vlm, name.replace("-", "_"), options, out) for name in names}
    result = {
        "scores": scores,
        "model": model,
        "model_hash": mark,
        "data": str(options.data),
        "image_position": options.image_position or vlm.model.config.image_position,
        "scan": vlm.model.config.scan,
        "image_tokens": vlm.model.config.image_tokens,
        "limit": options.limit,
        "torch": torch.__version__,
        "seconds": time.monotonic() - began,
    }
    part = out / ".result.part"
    part.write_text(json.dumps(result, indent=2) + "\n")
    part.replace(out / "result.json")
    print(json.dumps(scores))


if __name__ == "__main__":
    run(main)
