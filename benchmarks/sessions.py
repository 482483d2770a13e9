"""What a long conversation costs, and many questions about one picture: `python benchmarks/sessions.py` (about three minutes).

Two hundred turns in one Session, each with a picture of its own to describe. A turn's step is the median of the times between
two pieces of its answer, so neither the picture nor the prompt counts. `late / early` compares turns 191 to 200 with turns 6
to 15, which came minutes before; what else the machine did in between is in it. Therefore the conversations as they stood
after turn 10 and at the end also take turns at describing the same pictures, as forks, which leaves them as they are.

Twenty questions about one picture, the picture first, by `ask_many`. It is compared with what cannot be saved: to open and
encode the picture once, and to read the questions' own tokens, and generate the answers, from a state that has read the picture
already. So what `ask_many` pays above 1 is that it reads the picture and sorts out what the questions share. With answers
of one token no step is taken, which is the harder case. Beside it, the same questions one by one. All give the same answers.

Writes benchmarks/results/<machine>/sessions.json and sessions.png.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import measure  # first: it pins threads
import psutil
import torch

from visualrwkv.chat import VLM, Session, load
from visualrwkv.generate import answer_all, prefill
from visualrwkv.model import IMAGE_PLACEHOLDER, Encoded

DESCRIBE = "Describe every object."
LONGEST = 32  # tokens of a description
EARLY, LATE = slice(5, 15), slice(190, 200)  # turns 6 to 15, and 191 to 200
FORK = 10
QUESTIONS = 20
BARS = {"late / early": [0.95, 1.05], "ask_many / what cannot be saved": 1.3}


# A long conversation -------------------------------------------------------------------------------------------------


def describe(session: Session, picture: Path) -> list[float]:
    """Seconds between the pieces of one more answer."""
    times = []
    for _ in session.stream(DESCRIBE, picture, max_new_tokens=LONGEST):
        times.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(times)]


def converse(vlm: VLM, pictures: Sequence[Path], turns: int) -> tuple[dict[str, list[float]], Session, Session]:
    """What each turn cost, and the conversation after a few turns and after all."""
    session, process = vlm.session(), psutil.Process()
    early = session
    found: dict[str, list[float]] = {"step": [], "resident": [], "state": [], "tokens": []}
    for turn in range(turns):
        steps = describe(session, pictures[turn % len(pictures)])
        assert session.state is not None
        found["step"].append(statistics.median(steps) if steps else float("nan"))
        found["resident"].append(process.memory_info().rss)
        found["state"].append(session.state.nbytes())
        found["tokens"].append(session.tokens)
        if turn + 1 == FORK:
            early = session.fork()
    return found, early, session


def late_by_early(turns: dict[str, list[float]]) -> dict[str, float]:
    """Of each figure, the median of the late turns as a multiple of the early ones'."""

    def middle(values: list[float], part: slice) -> float:
        return statistics.median(v for v in values[part] if v == v)  # a turn of one piece has no step

    return {what: middle(turns[what], LATE) / middle(turns[what], EARLY) for what in ("step", "resident", "state")}


def in_turns(early: Session, late: Session, pictures: Sequence[Path], seconds: float) -> dict[str, list[float]]:
    """A step after a few turns and after all, taking turns: medians of a description each."""
    times: dict[str, list[float]] = {"early": [], "late": []}
    end = time.perf_counter() + seconds
    for number, picture in enumerate(pictures):
        if time.perf_counter() > end and number > 4:
            break
        found = {who: describe(session.fork(), picture) for who, session in (("early", early), ("late", late))}
        if all(found.values()):
            for who, steps in found.items():
                times[who].append(statistics.median(steps))
    return times


# Many questions ------------------------------------------------------------------------------------------------------


def distinct_questions(data: Path, count: int) -> list[str]:
    """The first so many different questions of the test split."""
    records = json.loads((data / "test.json").read_text())
    said = (turn["value"] for record in records for turn in record["conversations"] if turn["from"] == "human")
    return list(dict.fromkeys(text.replace("<image>\n", "") for text in said))[:count]


def ways(vlm: VLM, picture: Path, questions: list[str], most: int) -> dict[str, Callable[[], list[str]]]:
    """ask_many, what of it cannot be saved, and the questions one by one."""
    prompts = [vlm.prompt(1, text, "first") for text in questions]
    after = len(prompts[0]) - prompts[0][::-1].index(IMAGE_PLACEHOLDER)  # where the picture ends
    _, ready = prefill(vlm.model, [prompts[0][:after]], vlm.pixels([picture]))

    def bare() -> list[str]:
        with torch.inference_mode():
            pixels = vlm.pixels([picture])
            assert pixels is not None
            vlm.model.embed_image(Encoded(vlm.model.encode(pixels)))
        logits, state = prefill(vlm.model, [p[after:] for p in prompts], None, ready.select([0] * len(prompts)))
        return [answer.text for answer in answer_all(vlm.model, logits, state, most)]

    return {
        "ask_many": lambda: vlm.ask_many(picture, questions, "first", most),
        "what cannot be saved": bare,
        "one by one": lambda: [vlm.answer(picture, text, "first", most) for text in questions],
    }


# The command ---------------------------------------------------------------------------------------------------------


def draw(turns: dict[str, list[float]], path: Path) -> None:
    """A step, the memory and the tokens read, turn by turn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = (("step", "a step, ms", 1e3), ("resident", "resident memory, MB", 1e-6), ("tokens", "tokens read", 1))
    figure, axes = plt.subplots(len(rows), figsize=(8, 6), sharex=True)
    for axis, (what, label, factor) in zip(axes, rows, strict=True):
        axis.plot(range(1, len(turns[what]) + 1), [factor * value for value in turns[what]], linewidth=1)
        axis.set(ylabel=label, ylim=(0, 1.2 * factor * max(turns[what])))
    axes[-1].set_xlabel("turn, each with a picture")
    axes[0].set_title(f"One conversation; its state has {int(turns['state'][-1]):,} bytes at every turn")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/quickstart/finetune")
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart/data"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seconds", type=float, default=30.0, help="about so long a comparison")
    parser.add_argument("--quick", action="store_true", help="thirty turns, two seconds each; stores nothing")
    options = parser.parse_args()
    count, seconds = (30, 2.0) if options.quick else (200, options.seconds)
    vlm = load(options.model, dtype=options.dtype)
    pictures = sorted((options.data / "images/test").glob("*.png"))
    turns, early, late = converse(vlm, pictures, count)
    found = {} if options.quick else {f"late / early, {what}": r for what, r in late_by_early(turns).items()}
    taken = in_turns(early, late, pictures, seconds)
    ratio: dict[str, Any] = {"a step taken in turns, late / early": measure.ratio(taken, "late", "early")}
    figures = {"a step": measure.figures(taken)}
    questions = distinct_questions(options.data, QUESTIONS)
    for most in (32, 1):
        case = f"{QUESTIONS} questions, answers of up to {most} tokens"
        candidates = ways(vlm, pictures[0], questions, most)
        answers = {name: way() for name, way in candidates.items()}
        assert len(set(map(tuple, answers.values()))) == 1, f"the ways do not give the same answers: {answers}"
        times = measure.take_turns(candidates, seconds)
        figures[case] = measure.figures(times)
        for other in ("ask_many", "one by one"):
            ratio[f"{case}: {other} / what cannot be saved"] = measure.ratio(times, other, "what cannot be saved")
    for name, value in found.items():
        print(f"{name}: {value:.3f}")
    for name, each in ratio.items():
        print(f"{name}: {each['median']:.3f} ({each['of the fastest']:.3f})")
    if options.quick:
        return
    own = [len(vlm.prompt(1, text, "first")) - vlm.model.config.image_tokens for text in questions]
    shapes = {"turns": count, "image tokens": vlm.model.config.image_tokens, "tokens of the questions": own}
    measured = {"shapes": shapes, "bars": BARS, "late by early": found, "ratios": ratio, "figures": figures}
    kept = {what: [None if v != v else v for v in values] for what, values in turns.items()}  # JSON has no NaN
    more = {"turns": kept, "model": options.model, "dtype": options.dtype, "threads": torch.get_num_threads()}
    path = measure.record("sessions", measured | more, ("visualrwkv", "torch"))
    draw(turns, path.with_suffix(".png"))
    print(json.dumps({"written": str(path.relative_to(measure.ROOT))}))


if __name__ == "__main__":
    main()
