"""Which data set on the Hub each bench comes from, and what is different there from the official files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import recipes

Part = tuple[str | None, str]
"""A configuration of a data set and a split of it."""


@dataclass(frozen=True)
class Recipe:
    """Where a bench's rows come from, and what writes them down."""

    repository: str
    parts: Mapping[str, tuple[Part, ...]]  # our splits, the first with public answers, and what they are made of
    write: Callable[..., None]  # (folder, our split, the rows of each part)
    differs: str = ""  # from the official files


def plain(config: str | None = None, **splits: str) -> dict[str, tuple[Part, ...]]:
    """Splits of one configuration: ours and the Hub's names."""
    return {ours: ((config, theirs),) for ours, theirs in splits.items()}


def tiers(*names: str) -> dict[str, tuple[Part, ...]]:
    """GQA's: questions and pictures are configurations apart."""
    return {
        tier: tuple((f"{tier}_{what}", tier.split("_")[0]) for what in ("instructions", "images")) for tier in names
    }


RECIPES = {
    "vqav2": Recipe(
        "lmms-lab/VQAv2",
        plain(**{"val2014": "validation", "test-dev2015": "testdev", "test2015": "test"}),
        recipes.vqav2,
    ),
    "gqa": Recipe("lmms-lab/GQA", tiers("testdev_balanced", "testdev_all", "val_balanced"), recipes.gqa),
    "textvqa": Recipe(
        "lmms-lab/textvqa",
        plain(val="validation", test="test"),
        recipes.textvqa,
        "the prompts have no OCR tokens, as it does not say whether its own are Rosetta's, and LLaVA reports scores with those",
    ),
    "vizwiz": Recipe("lmms-lab/VizWiz-VQA", plain(val="val", test="test"), recipes.vizwiz),
    "scienceqa": Recipe(
        "lmms-lab/ScienceQA",
        plain("ScienceQA-FULL", test="test", val="validation"),
        recipes.scienceqa,
        "it has no problem ids, so the problems are numbered, and answers under the official ids fit none",
    ),
    "pope": Recipe(
        "lmms-lab/POPE",
        plain(test="test"),
        recipes.pope,
        "it has 3,000 random questions, where LLaVA reports the 2,910 of May 2023",
    ),
    "mme": Recipe("lmms-lab/MME", plain(test="test"), recipes.mme),
    "mmbench": Recipe(
        "lmms-lab/MMBench",
        plain("en", dev_en="dev", test_en="test"),
        recipes.mmbench,
        "it is the later version with 1,164 questions, where LLaVA reports dev_20230712 with 1,176",
    ),
    "mmbench_cn": Recipe("lmms-lab/MMBench", plain("cn", dev_cn="dev", test_cn="test"), recipes.mmbench),
    "seed": Recipe(
        "lmms-lab/SEED-Bench",
        plain(all="test"),
        recipes.seed,
        "it lacks some of the videos: about 18,000 questions of 19,242",
    ),
    "mm_vet": Recipe("lmms-lab/MMVet", plain(test="test"), recipes.mm_vet),
    "llava_bench": Recipe("lmms-lab/llava-bench-in-the-wild", plain(**{"in-the-wild": "train"}), recipes.llava_bench),
    "mmmu": Recipe("lmms-lab/MMMU", plain(val="validation", dev="dev", test="test"), recipes.mmmu),
    "ai2d": Recipe("lmms-lab/ai2d", plain(test="test"), recipes.ai2d, "the labels in its diagrams are masked"),
    "chartqa": Recipe("lmms-lab/ChartQA", plain(test="test"), recipes.chartqa),
    "docvqa": Recipe("lmms-lab/DocVQA", plain("DocVQA", val="validation", test="test"), recipes.docvqa),
    "infographicvqa": Recipe(
        "lmms-lab/DocVQA",
        plain("InfographicVQA", val="validation", test="test"),
        recipes.infographicvqa,
        "it does not say where the evidence stands, so there is no ANLS by that",
    ),
    "ocrbench": Recipe("echo840/OCRBench", plain(test="test"), recipes.ocrbench),
}
ELSEWHERE = {
    "mmstar": "its data set on the Hub has the options inside the questions, from where VLMEvalKit's columns cannot be told",
    "realworldqa": "its data set on the Hub mixes free answers with choices, other than VLMEvalKit's table",
    "scenes": "it is drawn by scripts/quickstart.sh into runs/quickstart/data",
}
"""Why a bench is not taken from the Hub."""
