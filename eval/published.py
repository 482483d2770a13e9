"""What others have published, and which of our figures stands beside it.

The figures are quoted: VisualRWKV's paper (arXiv 2406.13362v3, table 2), its HD and UHD paper (2410.11665), its README (v7),
and LLaVA's model zoo. None was measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Column:
    """One figure of a bench: where its scores hold it, by what to multiply it, and by what protocol it is measured."""

    bench: str
    title: str
    path: tuple[str, ...]
    protocol: str
    scale: float = 1.0
    decimals: int = 1
    further: bool = False  # among a result's further figures, not its scores


@dataclass(frozen=True)
class Published:
    """A row of published figures, by columns."""

    name: str
    source: str
    figures: Mapping[str, float] = field(default_factory=dict)


SUBMITTED = ("llava_submission", "overall")
EXACT = ("visualrwkv_exact",)
COLUMNS = {
    "vqav2": Column("vqav2", "VQAv2 val", ("overall",), "val2014, official scorer of 2021, answers as they stand"),
    "vqav2-submitted": Column(
        "vqav2",
        "VQAv2",
        SUBMITTED,
        "answers normalised as LLaVA submits them; ours on val2014, published ones on test-dev2015 by the server",
        further=True,
    ),
    "gqa": Column("gqa", "GQA", ("accuracy",), "testdev_balanced, exact match"),
    "textvqa": Column(
        "textvqa", "TextVQA", ("accuracy",), "val 0.5.1, OCR tokens in the prompt, m4c's normaliser, leave-one-out"
    ),
    "vizwiz": Column("vizwiz", "VizWiz val", ("overall",), "val, the VizWiz API's scorer, answers as they stand"),
    "vizwiz-submitted": Column(
        "vizwiz",
        "VizWiz",
        SUBMITTED,
        "answers normalised as LLaVA submits them; ours on val, published ones on test by the server",
        further=True,
    ),
    "scienceqa": Column("scienceqa", "SQA-IMG", ("img_accuracy",), "test, questions with a picture, LLaVA's reading"),
    "pope": Column(
        "pope",
        "POPE",
        ("mean_f1",),
        "mean F1 of the three categories; VisualRWKV's papers do not say what theirs is",
        100,
    ),
    "mme": Column("mme", "MME", ("perception",), "perception, 0 to 2,000"),
    "mmbench": Column(
        "mmbench",
        "MMB",
        ("circular", "Overall"),
        "dev, circular; ours by exact matching, published ones by the server, which asks GPT what it cannot match",
        100,
    ),
    "mmbench_cn": Column("mmbench_cn", "MMB-CN", ("circular", "Overall"), "as MMB, in Chinese", 100),
    "seed": Column("seed", "SEED", ("Total accuracy",), "pictures and videos, the bare letter"),
    "mm-vet": Column("mm-vet", "MM-Vet", ("capability", "total"), "graded by GPT-4"),
    "llava-bench": Column(
        "llava-bench", "LLaVA-W", ("all", "relative"), "rated by GPT-4; published: mean of 3 reviews"
    ),
    "mmmu": Column("mmmu", "MMMU", ("overall",), "val, the benchmark's own evaluator", 100),
    "ai2d": Column("ai2d", "AI2D", ("accuracy",), "test, lmms-eval's exact match"),
    "chartqa": Column("chartqa", "ChartQA", ("relaxed_overall",), "test, relaxed accuracy"),
    "chartqa-exact": Column(
        "chartqa", "ChartQA exact", EXACT, "test, the exact word, as VisualRWKV counts", further=True
    ),
    "docvqa": Column("docvqa", "DocVQA", ("anls",), "val, ANLS"),
    "docvqa-exact": Column("docvqa", "DocVQA exact", EXACT, "val, the exact word, as VisualRWKV counts", further=True),
    "infographicvqa": Column("infographicvqa", "InfoVQA", ("anls",), "val, ANLS"),
    "infographicvqa-exact": Column(
        "infographicvqa", "InfoVQA exact", EXACT, "val, the exact word, as VisualRWKV counts", further=True
    ),
    "ocrbench": Column("ocrbench", "OCRBench", ("sum_correct",), "right answers of 1,000", decimals=0),
    "mmstar": Column("mmstar", "MMStar", ("Overall",), "VLMEvalKit's exact matching", 100),
    "realworldqa": Column("realworldqa", "RealWorldQA", ("Overall",), "VLMEvalKit's exact matching", 100),
    "scenes": Column("scenes", "scenes", ("test", "accuracy"), "the quickstart's own test pictures", 100),
}
"""Published figures stand in the columns of their own protocol, beside ours by the same."""


def paper(name: str, *figures: float) -> Published:
    """A row of the paper's second table."""
    columns = ("vqav2-submitted", "gqa", "scienceqa", "textvqa", "pope", "mme", "mmbench", "mmbench_cn")
    return Published(name, "VisualRWKV paper", dict(zip(columns, figures)))


def second_paper(name: str, *figures: float) -> Published:
    columns = ("scienceqa", "textvqa", "gqa", "vizwiz-submitted", "mme", "pope", "mmbench", "mmbench_cn")
    documents = ("docvqa-exact", "infographicvqa-exact", "chartqa-exact")
    return Published(name, "VisualRWKV-HD paper", dict(zip((*columns, *documents), figures)))


def readme(name: str, *figures: float) -> Published:
    return Published(name, "VisualRWKV README", dict(zip(("vqav2-submitted", "scienceqa", "textvqa", "gqa"), figures)))


PUBLISHED = (
    paper("VisualRWKV-6 1.6B", 69.4, 55.2, 59.1, 43.6, 83.2, 1204.9, 55.8, 53.2),
    paper("VisualRWKV-6 3B", 71.5, 59.6, 65.3, 48.7, 83.1, 1369.2, 59.5, 56.3),
    paper("VisualRWKV-6 7B", 75.8, 64.3, 68.2, 51.0, 84.7, 1387.8, 65.8, 63.7),
    second_paper("VisualRWKV-HD 1.6B", 54.39, 54.71, 60.84, 54.97, 1378.62, 86.0, 60.31, 55.41, 29.11, 15.53, 33.04),
    second_paper("VisualRWKV-UHD 1.6B", 56.97, 56.31, 59.52, 49.88, 1321.33, 85.3, 58.42, 52.84, 35.37, 16.82, 40.28),
    readme("VisualRWKV-7 0.1B", 75.22, 50.62, 37.90, 59.92),
    readme("VisualRWKV-7 0.4B", 77.85, 54.98, 41.05, 62.30),
    readme("VisualRWKV-7 1.5B", 79.84, 59.74, 49.49, 63.20),
    paper("LLaVA-1.5 7B", 78.5, 62.0, 66.8, 58.2, 85.9, 1510.7, 64.3, 30.5),
    Published(
        "LLaVA-1.5 13B",
        "LLaVA model zoo",
        {
            "vqav2-submitted": 80.0,
            "gqa": 63.3,
            "vizwiz-submitted": 53.6,
            "scienceqa": 71.6,
            "textvqa": 61.3,
            "pope": 85.9,
            "mme": 1531.3,
            "mmbench": 67.7,
            "mmbench_cn": 63.6,
            "seed": 61.6,
            "llava-bench": 72.5,
            "mm-vet": 36.1,
        },
    ),
)
