"""One model of the claims, from nothing to its score: `python benchmarks/claims_job.py '<trial as JSON>' HOME DATA ENCODER`.

Each stage leaves a directory under HOME and is not done again; a killed one goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "eval"), str(Path(__file__).parent)]

import torch  # noqa: E402
from benches import scenes  # noqa: E402
from claims_models import fill, model  # noqa: E402
from questions import Question  # noqa: E402

from visualrwkv.checkpoint import WEIGHTS, load_vision  # noqa: E402
from visualrwkv.model import Encoded, VisualRWKV  # noqa: E402
from visualrwkv.text.prompt import IGNORE, IMAGE_TAG, encode_conversation  # noqa: E402
from visualrwkv.text.tokenizer import decode  # noqa: E402
from visualrwkv.training import loss  # noqa: E402
from visualrwkv.training.checkpoints import Run  # noqa: E402
from visualrwkv.training.engine import join_world  # noqa: E402
from visualrwkv.training.loop import train  # noqa: E402
from visualrwkv.training.quickstart import RETELL  # noqa: E402
from visualrwkv.training.recipes import RECIPES, Recipe  # noqa: E402
from visualrwkv.vision.processor import make_processor  # noqa: E402

NANO = RECIPES["nano"]
BATCH, LONGEST = 64, 6  # questions that are read together; tokens of an answer


@dataclass(frozen=True)
class Trial:
    """One training run: what is varied."""

    kind: str = "RWKV-6"
    position: str = "middle"
    scan: str = "bi"
    tokens: int = 16  # of a picture
    loss: str = "sample"  # the mean over a sample's tokens, or over all tokens of a batch
    rate: float = 1.0  # times the recipe's learning rates, in all stages
    steps: int = 400  # of stage 2
    seed: int = 0

    @property
    def name(self) -> str:
        words = {k: v for k, v in asdict(self).items() if v != getattr(Trial, k) or k in ("kind", "seed")}
        return " ".join(str(v) if k == "kind" else f"{k}-{v}" for k, v in words.items())

    @property
    def language(self) -> Trial:
        """The trial whose language model this one starts from."""
        return Trial(kind=self.kind, rate=self.rate, seed=self.seed)


def stage(
    made: VisualRWKV, which: str, out: Path, data: Path, recipe: Recipe, trial: Trial, images: Path | None = None
) -> VisualRWKV:
    """Train one stage, unless it is there, and fill the model with what it left."""
    if not (out / WEIGHTS).exists():
        scaled = {k: getattr(recipe, k) * trial.rate for k in ("lr", "lr_final", "muon_lr")}
        run = Run(which, data, images or data.parent, out, trial.name)  # type: ignore[arg-type]
        if not train(made, run, replace(recipe, seed=trial.seed, **scaled)):
            sys.exit(130)
    return fill(made, out)


def learn_language(trial: Trial, home: Path, data: Path) -> Path:
    """A language model that has only read, as the quickstart's."""
    out = home / "language" / trial.language.name
    torch.manual_seed(trial.seed)
    made = model(trial.kind)
    made = stage(made, "language", out / "retell", data / "retell.json", replace(NANO["language"], **RETELL), trial)
    stage(made, "language", out / "language", data / "language.json", NANO["language"], trial)
    return out / "language"


def learn(trial: Trial, home: Path, data: Path, encoder: Path) -> VisualRWKV:
    """The whole of it: language, projector, both."""
    words = learn_language(trial, home, data)
    torch.manual_seed(trial.seed)
    meeting = {"image_position": trial.position, "scan": trial.scan, "image_tokens": trial.tokens}
    made = fill(model(trial.kind, load_vision(encoder), **meeting), words)
    place, out = {"image_position": trial.position}, home / "vision" / trial.name
    made = stage(made, "pretrain", out / "pretrain", data / "captions.json", replace(NANO["pretrain"], **place), trial)
    if trial.loss == "token":
        loss.sample_weights = per_token
    finetune = replace(NANO["finetune"], steps=trial.steps, **place)
    return stage(made, "finetune", out / "finetune", data / "mix.json", finetune, trial)


def per_token(targets: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """In place of `sample_weights`: every labelled token of a batch counts the same."""
    valid = (targets != IGNORE).float()
    return valid * (len(cu_seqlens) - 1) / valid.sum().clamp(min=1)


# Asking --------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def answers(made: VisualRWKV, questions: list[Question], blind: bool = False) -> Iterator[str]:
    """Greedy answers. Rows are read anew for each token, so that every kind of model is asked in the same way."""
    config = made.config
    assert config.vision is not None
    read = make_processor(config.vision)
    for start in range(0, len(questions), BATCH):
        some = questions[start : start + BATCH]
        tag = "" if blind else f"{IMAGE_TAG}\n"
        rows = [
            encode_conversation(
                [{"from": "human", "value": tag + q.text}, {"from": "gpt", "value": ""}],
                image_position=config.image_position,
                image_tokens=config.image_tokens,
            )[0]
            for q in some
        ]
        features = None if blind else made.encode(torch.stack([read(q.pictures[0]) for q in some]))
        said: list[list[int]] = [[] for _ in some]
        for _ in range(LONGEST):
            still = [i for i, words in enumerate(said) if config.end_of_turn not in words]
            if not still:
                break
            full = [rows[i] + said[i] for i in still]
            bounds = torch.tensor([0, *(len(row) for row in full)]).cumsum(0)
            ids = torch.tensor([i for row in full for i in row])
            pictures = None if features is None else Encoded(features[still])
            hidden = made.hidden(ids[None], pictures, cu_seqlens=bounds)[0][0, bounds[1:] - 1]
            for i, best in zip(still, made.rwkv.head(hidden).argmax(-1).tolist()):
                said[i].append(best)
        for words in said:
            end = words.index(config.end_of_turn) if config.end_of_turn in words else len(words)
            yield decode(words[:end])


def score(made: VisualRWKV, data: Path, split: str, blind: bool = False) -> dict[str, float]:
    """The bench's own score."""
    questions = scenes.load(data, split)
    rows = [{"question_id": q.id, "text": text} for q, text in zip(questions, answers(made, questions, blind))]
    return scenes.score(data, split, rows)


def main() -> None:
    trial = Trial(**json.loads(sys.argv[1]))
    home, data, encoder = (Path(word) for word in sys.argv[2:5])
    join_world()
    if len(sys.argv) > 5:  # the language model alone, which several trials start from
        learn_language(trial, home, data)
        return
    made = learn(trial, home, data, encoder).eval()
    found = {split: score(made, data, split) for split in ("test", "test_unseen")}
    found["blind"] = score(made, data, "test", blind=True)
    result = home / "vision" / trial.name / "result.json"
    part = result.with_suffix(".part")
    part.write_text(json.dumps({"trial": asdict(trial), "scores": found}, indent=1) + "\n")
    part.replace(result)


if __name__ == "__main__":
    main()
