"""The embedded data set, `scenes`: drawn pictures with questions, in LLaVA's format, from a seed.

    python -m visualrwkv.training.scenes --out DIR --seed 0

One to four objects, one of them perhaps a real handwritten digit, lie on an uneven, noisy background. What is written
is ordinary LLaVA JSON beside PNG files, so that everything downstream takes the path that users' own data takes:

    train.json, val.json, test.json, test_unseen.json   records {id, image, conversations, types}, a type for each turn
    captions.json     the train pictures described thing by thing, or asked what a description tells
    mix.json          train.json, every second caption, and more questions of what is hard: what stage 2 learns from
    retell.json       text only: pictures never drawn, told in one sentence and then thing by thing
    language.json     text only: the same, and questions that the sentence answers
    <split>.objects.json                        what is where in each picture, in pixels
    images/<split>/000123.png

`test_unseen` asks only about pairs of kind and colour that no other picture contains. What is text only speaks
of all pairs: it stands for what a pretrained language model has read.
"""

import json
import math
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import numpy as np
import tyro
from PIL import Image, ImageDraw
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn

from visualrwkv.training.scene_questions import (
    HELD_OUT,
    OPENINGS,
    PAIRS,
    SEEN,
    TYPES,
    Scene,
    Thing,
    Turn,
    caption,
    dialogue,
    drill,
    remember,
    retell,
    told_dialogue,
)

__all__ = ["Scene", "Thing", "Turn", "arrange", "caption", "dialogue", "draw", "handwriting", "write"]

FORMAT = 4  # raise it when the same seed gives other data
CHUNK = 1000  # pictures that share one generator and one tally; fixed, so that the number of workers changes nothing
SPLITS = ("train", "val", "test", "test_unseen")
TEXTS = ("retell", "language")
DIGIT_SHARE = 0.36  # of the pictures not made for a digit question; about 45 % of all pictures then hold one
ASKED_SHARE = 0.7  # of `language`; the rest are retellings
RETOLD_SHARE = 0.5  # of the captions; the rest are dialogues
COUNTS = (1, 1, 2, 2, 3, 3, 3, 4, 4, 4)  # things in the pictures not made for a count: more things, more to ask
SUPERSAMPLE = 4
NOISE = 7.0  # standard deviation, of 255
PAINT = {
    "red": (222, 48, 42),
    "green": (48, 182, 70),
    "blue": (58, 104, 238),
    "yellow": (246, 222, 50),
    "purple": (166, 66, 206),
    "orange": (246, 138, 28),
    "white": (240, 240, 240),
}


@dataclass(frozen=True)
class Job:
    """Pictures `start` to `stop` of one split, or as many dialogues of one of `TEXTS`."""

    out: Path
    split: str
    start: int
    stop: int
    seed: int
    size: int


@lru_cache
def handwriting() -> tuple[np.ndarray, tuple[int, ...]]:
    """scikit-learn's handwritten digits: images (1797, 8, 8) with ink from 0 to 16, and the digit each shows."""
    from sklearn.datasets import load_digits  # slow to import, and only needed once data is made

    digits = load_digits()
    return digits.images, tuple(int(d) for d in digits.target)


@lru_cache
def glyphs(split: str) -> tuple[tuple[int, ...], ...]:
    """For each digit, the indices of the handwritten images that `split` may use: every fourth is kept for tests."""
    testing = split.startswith("test")
    allowed = [i for i in range(len(handwriting()[1])) if (i % 4 == 0) == testing]
    return tuple(tuple(i for i in allowed if handwriting()[1][i] == digit) for digit in range(10))


def pairs_of(split: str) -> list[tuple[str, str]]:
    """The pairs of kind and colour that a split speaks of."""
    return HELD_OUT if split == "test_unseen" else PAIRS if split in TEXTS else SEEN


def arrange(rng: Random, count: int, with_digit: bool, split: str = "train", size: int = 64) -> Scene:
    """A random scene of `count` things, exactly one of them a digit if `with_digit`, else none; nothing overlaps."""
    pairs = pairs_of(split)
    chosen = rng.sample([pair for pair in pairs if pair[0] != "digit"], count - with_digit)
    if with_digit:
        chosen.append(rng.choice([pair for pair in pairs if pair[0] == "digit"]))
    rng.shuffle(chosen)
    unit = size / 64
    while True:
        things: list[Thing] = []
        taken: list[tuple[float, float, float]] = []  # centres and extents, in pixels of a 64-pixel picture
        for kind, colour in chosen:
            digit = rng.randrange(10) if kind == "digit" else None
            glyph = None if digit is None else rng.choice(glyphs(split)[digit])
            # Nothing from 17 to 19: see LARGE_FROM. Digits stay large enough to be read.
            extent = rng.uniform(16, 24) if kind == "digit" else rng.choice((rng.uniform(12, 17), rng.uniform(19, 26)))
            for _ in range(20):
                x, y = (rng.uniform(extent / 2 + 1, 63 - extent / 2) for _ in range(2))
                # Bounding boxes stay 2 pixels apart.
                if all(max(abs(x - a), abs(y - b)) >= (extent + other) / 2 + 2 for a, b, other in taken):
                    taken.append((x, y, extent))
                    things.append(Thing(kind, colour, digit, glyph, *(round(v * unit, 2) for v in taken[-1])))
                    break
        if len(things) == count:
            return Scene(size, tuple(things))


def draw(scene: Scene, rng: Random) -> Image.Image:
    """The picture of a scene, RGB. Background, noise, tilt and exact tone of each colour come from `rng`."""
    return draw_with_masks(scene, rng)[0]


def draw_with_masks(scene: Scene, rng: Random) -> tuple[Image.Image, np.ndarray]:
    """The picture of a scene, and the pixels that show at least half of each thing: (things, size, size) bool."""
    noise = np.random.default_rng(rng.getrandbits(64))
    size = scene.size
    # Four by four dim, muted tones, blown up: an uneven light. It stays darker than every paint.
    tones = noise.uniform(18, 66, (4, 4, 1)) + noise.uniform(-12, 12, (4, 4, 3))
    image = Image.fromarray(tones.clip(0, 255).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    shown = np.zeros((len(scene.things), size, size), bool)
    for number, thing in enumerate(scene.things):
        tilt = math.radians(rng.uniform(-12, 12))
        mask, corner = glyph_mask(thing) if thing.kind == "digit" else shape_mask(thing, tilt)
        paint = tuple(max(0, min(255, channel + rng.randint(-14, 14))) for channel in PAINT[thing.colour])
        image.paste(paint, corner, mask)
        cover = Image.new("L", (size, size))
        cover.paste(mask, corner)
        shown[number] = np.asarray(cover) >= 128
        shown[:number] &= ~shown[number]  # what is drawn later lies over it
    grain = noise.standard_normal((size, size, 3), dtype=np.float32) * NOISE
    return Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8)), shown


def shape_mask(thing: Thing, tilt: float) -> tuple[Image.Image, tuple[int, int]]:
    """Coverage of a plain shape, tilted by `tilt` radians, and the pixel where its upper left corner goes."""
    left, top = math.floor(thing.x - thing.extent / 2) - 1, math.floor(thing.y - thing.extent / 2) - 1
    width = math.ceil(thing.extent) + 3
    mask = Image.new("L", (width * SUPERSAMPLE, width * SUPERSAMPLE))
    pen, half = ImageDraw.Draw(mask), thing.extent / 2
    x, y = thing.x - left, thing.y - top
    cos, sin = math.cos(tilt), math.sin(tilt)
    if thing.kind == "circle":
        pen.ellipse([SUPERSAMPLE * v for v in (x - half, y - half, x + half, y + half)], fill=255)
    else:
        corners = np.array(outline(thing.kind)) @ np.array([[cos, sin], [-sin, cos]])
        low, high = corners.min(0), corners.max(0)
        # The tilted shape's bounding box is what `x`, `y` and `extent` speak of.
        corners = (corners - (low + high) / 2) / (high - low).max() * thing.extent + (x, y)
        pen.polygon([tuple(corner) for corner in (corners * SUPERSAMPLE).tolist()], fill=255)
    return mask.resize((width, width), Image.Resampling.LANCZOS), (left, top)


def outline(kind: str) -> list[tuple[float, float]]:
    """Corners of a plain shape around the origin, at any scale."""
    if kind == "square":
        return [(-1, -1), (1, -1), (1, 1), (-1, 1)]
    if kind == "cross":
        arm = 0.36
        quarter = [(arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm), (arm, 1)]
        return quarter + [(-x, -y) for x, y in quarter]
    points, inner = {"triangle": (3, 0.5), "star": (5, 0.42)}[kind]  # inner 0.5 lies on the triangle's edges
    radii = (1, inner)
    return [
        (radii[i % 2] * math.sin(math.pi * i / points), -radii[i % 2] * math.cos(math.pi * i / points))
        for i in range(2 * points)
    ]


def glyph_mask(thing: Thing) -> tuple[Image.Image, tuple[int, int]]:
    """Coverage of a handwritten digit and the pixel where its upper left corner goes."""
    ink = handwriting()[0][thing.glyph]
    rows, columns = (np.flatnonzero(ink.max(axis)) for axis in (1, 0))
    # One empty cell around lets the strokes fade out on all sides.
    ink = np.pad(ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1], 1)
    scale = thing.extent / (max(ink.shape) - 2)
    height, width = (round(scale * side) for side in ink.shape)
    # Full ink already from two thirds on: strokes drawn at 8 by 8 are pale.
    mask = Image.fromarray((ink * (255 / 16)).astype(np.uint8)).resize((width, height), Image.Resampling.BICUBIC)
    return mask.point(lambda ink: min(255, ink * 3 // 2)), (round(thing.x - width / 2), round(thing.y - height / 2))


def converse(rng: Random, tally: Counter, first: str, split: str, size: int) -> tuple[Scene, list[Turn]]:
    """A scene that allows a dialogue of the wanted length to open with a turn of type `first`, and that dialogue."""
    while True:
        # Where two things are named at once, more must be left for the second turn.
        count = max(rng.choice(COUNTS), 3 if first in ("position", "larger") else 1)
        if first == "count":
            count = min(range(1, 5), key=lambda n: (tally["count", 0, str(n)], rng.random()))
        with_digit = first == "digit" or rng.random() < DIGIT_SHARE
        scene = arrange(rng, count, with_digit, split, size)
        turns = dialogue(scene, rng, tally, first, pairs_of(split))
        if len(turns) >= min(2, count):
            remember(turns, tally)
            return scene, turns


def work(job: Job) -> dict[str, list]:
    """Draws one job's pictures; returns its records, captions and objects, in order."""
    rng = Random(f"{FORMAT} {job.seed} {job.size} {job.split} {job.start}")
    tally: Counter = Counter()
    made: dict[str, list] = {"records": [], "captions": [], "drills": [], "objects": []}
    firsts: list[str] = []
    for number in range(job.start, job.stop):
        name = f"{job.split}-{number:06d}"
        if job.split in TEXTS:
            scene = arrange(rng, rng.choice(COUNTS), rng.random() < DIGIT_SHARE, job.split, job.size)
            before = f"{caption(scene, rng)}\n"
            asked = job.split == "language" and rng.random() < ASKED_SHARE
            turns = told_dialogue(scene, rng, PAIRS) if asked else [retell(scene, rng)]
            made["records"].append(record(name, turns, before))
            continue
        if not firsts:  # tests open with every type equally often
            firsts = (
                rng.sample(TYPES, len(TYPES)) if job.split.startswith("test") else rng.sample(OPENINGS, len(OPENINGS))
            )
        scene, turns = converse(rng, tally, firsts.pop(), job.split, job.size)
        # What stage 1 learns from is what the language model has read of a caption, with the picture in its place.
        described = (
            [retell(scene, rng)] if rng.random() < RETOLD_SHARE else told_dialogue(scene, rng, pairs_of(job.split))
        )
        image = f"images/{job.split}/{number:06d}.png"
        draw(scene, rng).save(job.out / image, compress_level=1)  # noise hardly compresses anyway
        made["records"].append(record(name, turns, before="<image>\n", image=image))
        made["captions"].append(record(f"caption-{name}", described, before="<image>\n", image=image))
        again = drill(scene, rng, pairs_of(job.split))
        made["drills"].append(record(f"drill-{name}", again, before="<image>\n", image=image))
        made["objects"].append((image, [asdict(thing) for thing in scene.things]))
    return made


def record(name: str, turns: list[Turn], before: str, **fields: str) -> dict:
    """A dialogue in LLaVA's format, `before` put in front of its first question."""
    said: list[dict[str, str]] = []
    for turn in turns:
        question = turn.question if said else before + turn.question
        said += [{"from": "human", "value": question}, {"from": "gpt", "value": turn.answer}]
    return {"id": name, **fields, "conversations": said, "types": [turn.type for turn in turns]}


class Speed(ProgressColumn):
    """Pictures and dialogues made per second."""

    def render(self, task: Task) -> str:
        return f"{task.speed:.0f}/s" if task.speed else ""


def write(
    out: Path,
    seed: int = 0,
    train: int = 12_000,
    val: int = 200,
    test: int = 1000,
    retell: int = 9000,
    language: int = 12_000,
    size: int = 64,
    workers: int = 2,
) -> None:
    """Writes the data set to `out`, or does nothing if it is there already with the same parameters.

    Args:
        out: the directory to make. It appears whole or not at all.
        seed: the same seed gives the same bytes, whatever the number of workers.
        train: pictures to train on.
        val: pictures to look at while training goes on; their digits are written by train's hands.
        test: pictures in each of `test` and `test_unseen`; 1000 give about 2,450 questions each.
        retell: text-only retellings.
        language: text-only dialogues.
        size: side of the square pictures, in pixels.
        workers: processes that draw.
    """
    parameters = {
        "format": FORMAT,
        "seed": seed,
        "train": train,
        "val": val,
        "test": test,
        "retell": retell,
        "language": language,
        "size": size,
    }
    if workers < 1:
        raise ValueError(f"workers must be at least 1, not {workers}.")
    if is_there(out, "scenes.json", parameters):
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        partial = Path(scratch) / "scenes"
        for split in SPLITS:
            (partial / "images" / split).mkdir(parents=True)
        counts = {"train": train, "val": val, "test": test, "test_unseen": test, "retell": retell, "language": language}
        jobs = [
            Job(partial, split, start, min(start + CHUNK, count), seed, size)
            for split, count in counts.items()
            for start in range(0, count, CHUNK)
        ]
        made = run_jobs(jobs, workers)
        for split in counts:
            done = [result for job, result in zip(jobs, made, strict=True) if job.split == split]
            records, captions, drills, objects = ([x for result in done for x in result[key]] for key in done[0])
            save_list(partial / f"{split}.json", records)
            if split == "train":
                save_list(partial / "captions.json", captions)
                save_list(partial / "mix.json", records + captions[::2] + drills)
            if split in SPLITS:
                (partial / f"{split}.objects.json").write_text(json.dumps(dict(objects)))
        (partial / "scenes.json").write_text(json.dumps(parameters) + "\n")
        partial.replace(out)


def is_there(out: Path, marker: str, parameters: dict[str, int]) -> bool:
    """Whether the data set was written to `out` before; ValueError where a parameter is too small, or where `out` is of others."""
    for name, value in parameters.items():
        least = {"format": 0, "seed": value, "size": 32}.get(name, 1)
        if value < least:
            raise ValueError(f"{name} must be at least {least}, not {value}.")
    if (out / marker).exists():
        found = json.loads((out / marker).read_text())
        if found != parameters:
            raise ValueError(f"{out} holds scenes made with {found}, not with {parameters}: choose another directory.")
        return True
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a scenes data set: choose another directory.")
    return False


def run_jobs(jobs: list[Job], workers: int) -> list[dict[str, list]]:
    """What `work` returns for each job, in order, with a progress bar; in this process if there is one worker."""
    handwriting()  # read once, before the processes part
    made = []
    with ProcessPoolExecutor(workers) as pool:
        results = pool.map(work, jobs) if workers > 1 else map(work, jobs)
        columns = (TextColumn("scenes"), BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
        with Progress(*columns) as progress:  # its thread starts only now that the processes have parted
            bar = progress.add_task("scenes", total=sum(job.stop - job.start for job in jobs))
            for job, result in zip(jobs, results, strict=True):
                made.append(result)
                progress.advance(bar, job.stop - job.start)
    return made


def save_list(path: Path, records: list[dict]) -> None:
    """Writes a JSON list with one record a line."""
    path.write_text("[\n" + ",\n".join(json.dumps(r) for r in records) + "\n]\n")


if __name__ == "__main__":
    tyro.cli(write)
