"""What is in a scene and what can be said about it: things, captions and dialogues.

A `dialogue` about a picture never answers itself: it is a list of turns, each of another of seven types. Candidates for
every type are collected from the facts of the scene; a running tally over many scenes picks the one asked least so far,
so that types and answers come out even and a guess without the picture stays poor. A `told_dialogue` follows a caption,
which gives its answers away. Everything is deterministic in the given random generator.
"""

from collections import Counter
from dataclasses import dataclass, replace
from random import Random

KINDS = ("circle", "square", "triangle", "star", "cross", "digit")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "white")
PAIRS = [(kind, colour) for kind in KINDS for colour in COLOURS]
# Two colours of every kind never occur in training: the test of whether colour and shape are understood apart.
HELD_OUT = [(kind, COLOURS[(i + step) % len(COLOURS)]) for i, kind in enumerate(KINDS) for step in (0, 3)]
SEEN = [pair for pair in PAIRS if pair not in HELD_OUT]

TYPES = ("count", "colour", "shape", "exists", "digit", "position", "larger")
OPENINGS = (*TYPES, "position")  # it has the most to learn: two axes, asked in two ways
TOLD = tuple(type for type in TYPES if type not in ("position", "larger"))
# What is asked of captions. Comparisons are left to pictures: asked in text, too, they hold up all that is learned there.
DRILLED = ("exists", "position", "position", "position", "larger", "larger")
# What is asked of pictures once more, as these take the longest to learn: one bit an answer, in many forms.

# The share each outcome should have inside its type. "first" and "second" say where the question mentions the right
# one of two. `exists` asks for a kind, for a colour, or for both; its last "no" comes with the right kind or the right
# colour in view, so that neither alone means "yes".
OUTCOMES = {
    "count": {str(n): 1 / 4 for n in range(1, 5)},
    "colour": {colour: 1 / len(COLOURS) for colour in COLOURS},
    "shape": {kind: 1 / 5 for kind in KINDS if kind != "digit"},
    "exists": {
        "kind: yes": 1 / 8,
        "kind: no": 1 / 8,
        "colour: yes": 1 / 8,
        "colour: no": 1 / 8,
        "both: yes": 1 / 4,
        "both: no, the kind is there": 1 / 8,
        "both: no, the colour is there": 1 / 8,
    },
    "digit": {str(d): 1 / 10 for d in range(10)},
    "position": {"yes": 1 / 8, "no": 1 / 8, "first": 3 / 8, "second": 3 / 8},
    "larger": {"first": 1 / 2, "second": 1 / 2},
}
PHRASINGS = {
    "count": (
        "How many objects are there?",
        "How many objects can you see?",
        "Count the objects.",
        "What is the number of objects in the picture?",
    ),
    "colour": (
        "What colour is the {0}?",
        "What color is the {0}?",
        "Which colour does the {0} have?",
        "Which color does the {0} have?",
        "Name the colour of the {0}.",
        "Name the color of the {0}.",
    ),
    "shape": (
        "What shape is the {0} object?",
        "Which shape does the {0} object have?",
        "What is the {0} object?",
        "Name the shape of the {0} object.",
    ),
    "exists": ("Is there {0}?", "Can you see {0}?", "Does the picture contain {0}?", "Is {0} in the picture?"),
    "digit": (
        "Which digit is written here?",
        "What number can you read?",
        "Read the digit.",
        "What digit does the picture show?",
    ),
    "left": ("Is {0} left of {1}?", "Is {0} to the left of {1}?", "Does {0} lie to the left of {1}?"),
    "above": ("Is {0} above {1}?", "Is {0} higher up than {1}?", "Does {0} lie above {1}?"),
    "leftmost": (
        "Which is further left, {0} or {1}?",
        "Which one is further left, {0} or {1}?",
        "{0} or {1}: which one lies further left?",
    ),
    "highest": (
        "Which is higher up, {0} or {1}?",
        "Which one is higher up, {0} or {1}?",
        "{0} or {1}: which one lies higher up?",
    ),
    "larger": (
        "Which is larger, {0} or {1}?",
        "Which one is bigger, {0} or {1}?",
        "{0} or {1}: which is the larger one?",
    ),
}
PLACES = (
    ("at the top left", "at the top", "at the top right"),
    ("on the left", "in the middle", "on the right"),
    ("at the bottom left", "at the bottom", "at the bottom right"),
)
RETELL = ("Say it in other words.", "What is known of each object?", "Describe every object.")
CAPTIONS = ("{0}.", "There is {0}.", "The picture shows {0}.", "In the picture there is {0}.")

LARGE_FROM = 18.0  # pixels of 64. No plain shape measures 17 to 19, so that small and large are never a matter of taste
APART = 12.0  # pixels of 64 that centres lie apart along an axis before a question compares them there
RATIO = 1.35  # of extents, before a question compares sizes


@dataclass(frozen=True)
class Thing:
    """One object: its kind and colour, the `digit` it shows and the handwritten image `glyph` it is drawn with (None
    for plain shapes), its centre `x`, `y` and its `extent` (the longer side of its bounding box), in pixels."""

    kind: str
    colour: str
    digit: int | None
    glyph: int | None
    x: float
    y: float
    extent: float


@dataclass(frozen=True)
class Scene:
    """One to four things in a square picture of `size` pixels. No two share kind and colour; at most one is a digit."""

    size: int
    things: tuple[Thing, ...]


@dataclass(frozen=True)
class Turn:
    """A question and its answer, with what the no-give-away rule and the tally need to know.

    `things` are the indices of the objects the question is about, `said` the kinds and colours it speaks of,
    `outcome` a key of `OUTCOMES[type]`, `phrasing` a key of `PHRASINGS` and `blanks` the words filled in there.
    """

    type: str
    outcome: str
    answer: str
    things: tuple[int, ...] = ()
    said: tuple[str, ...] = ()
    phrasing: str = ""
    blanks: tuple[str, ...] = ()
    question: str = ""


def article(words: str) -> str:
    """`words` after "a" or "an"."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def cell(scene: Scene, thing: Thing) -> tuple[int, int]:
    """Row and column (each 0, 1 or 2) of a thing's centre in a 3 by 3 grid over the picture."""
    return min(2, int(3 * thing.y / scene.size)), min(2, int(3 * thing.x / scene.size))


def is_large(scene: Scene, thing: Thing) -> bool:
    """Whether captions call the thing large; otherwise they call it small."""
    return thing.extent >= LARGE_FROM * scene.size / 64


def caption(scene: Scene, rng: Random) -> str:
    """One sentence that names every thing with size, colour, kind and place, in reading order. Digits have no size."""
    parts = []
    for thing in sorted(scene.things, key=lambda t: (cell(scene, t), t.x)):
        row, column = cell(scene, thing)
        what = (
            f"{thing.colour} digit {thing.digit}"
            if thing.kind == "digit"
            else (f"{'large' if is_large(scene, thing) else 'small'} {thing.colour} {thing.kind}")
        )
        parts.append(f"{article(what)} {PLACES[row][column]}")
    listed = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return sentence(rng.choice(CAPTIONS).format(listed))


def sentence(words: str) -> str:
    """`words` with a capital letter in front."""
    return words[0].upper() + words[1:]


def candidates(scene: Scene, rng: Random, pairs: list[tuple[str, str]]) -> list[Turn]:
    """Every turn that can be asked of `scene` on its own, questions not yet worded.

    `pairs` are the (kind, colour) pairs a question may speak of.
    """
    things, unit = scene.things, scene.size / 64
    kinds, colours = Counter(t.kind for t in things), Counter(t.colour for t in things)
    turns = [Turn("count", str(len(things)), str(len(things)), phrasing="count")]
    for i, t in enumerate(things):
        if kinds[t.kind] == 1:
            turns.append(Turn("colour", t.colour, t.colour, (i,), (t.kind,), "colour", (t.kind,)))
        if colours[t.colour] == 1 and t.kind != "digit":
            turns.append(Turn("shape", t.kind, t.kind, (i,), (t.colour,), "shape", (t.colour,)))
        if t.digit is not None:
            turns.append(Turn("digit", str(t.digit), str(t.digit), (i,), (t.kind,), "digit"))
        named = (article(f"{t.colour} {t.kind}"),)
        turns.append(Turn("exists", "both: yes", "yes", (i,), (t.kind, t.colour), "exists", named))
    present = {(t.kind, t.colour) for t in things}
    for kind, colour in pairs:
        half = [word for word, there in (("kind", kinds[kind]), ("colour", colours[colour])) if there]
        if half and (kind, colour) not in present:
            named = (article(f"{colour} {kind}"),)
            outcome = f"both: no, the {rng.choice(half)} is there"
            turns.append(Turn("exists", outcome, "no", (), (kind, colour), "exists", named))
    if pairs is not HELD_OUT:  # one word is no pair
        for attribute, words in (("kind", KINDS), ("colour", COLOURS)):
            for word in words:
                those = tuple(i for i, t in enumerate(things) if getattr(t, attribute) == word)
                answer = "yes" if those else "no"
                named = (article(word if attribute == "kind" else f"{word} object"),)
                turns.append(Turn("exists", f"{attribute}: {answer}", answer, those, (word,), "exists", named))

    for i, a in enumerate(things):
        for j, b in enumerate(things[:i]):
            said, names = (*called(scene, a), *called(scene, b)), (the(scene, a), the(scene, b))
            for apart, relation, superlative in ((a.x - b.x, "left", "leftmost"), (a.y - b.y, "above", "highest")):
                if abs(apart) < APART * unit:
                    continue
                for answer in ("yes", "no"):
                    blanks = names if (apart < 0) == (answer == "yes") else names[::-1]
                    turns.append(Turn("position", answer, answer, (i, j), said, relation, blanks))
                winner, other = (a, b) if apart < 0 else (b, a)
                turns += pick(scene, winner, other, (i, j), "position", superlative)
            small, large = sorted((a.extent, b.extent))
            if "digit" in (a.kind, b.kind) or large < RATIO * small:
                continue
            winner, other = (a, b) if a.extent > b.extent else (b, a)
            turns += pick(scene, winner, other, (i, j), "larger", "larger")
    return turns


def called(scene: Scene, thing: Thing) -> tuple[str, ...]:
    """The words that single a thing out: its kind, with its colour where others are of that kind too."""
    alone = sum(t.kind == thing.kind for t in scene.things) == 1
    return (thing.kind,) if alone else (thing.colour, thing.kind)


def the(scene: Scene, thing: Thing) -> str:
    """What a question calls a thing."""
    return " ".join(("the", *called(scene, thing)))


def pick(scene: Scene, winner: Thing, other: Thing, things: tuple[int, ...], type: str, phrasing: str) -> list[Turn]:
    """The two turns, one for each order of mention, that ask which of two `things` it is: it is `winner`."""
    answer = winner.kind if winner.kind != other.kind else winner.colour
    said, names = (*called(scene, winner), *called(scene, other)), (the(scene, winner), the(scene, other))
    return [
        Turn(type, "first", answer, things, said, phrasing, names),
        Turn(type, "second", answer, things, said, phrasing, names[::-1]),
    ]


def gives_away(scene: Scene, history: list[Turn], turn: Turn) -> bool:
    """Whether `turn`'s answer follows, even in part, from the questions and answers before it."""
    if not history:
        return False
    named = {i for earlier in history for i in earlier.things}
    said = {word for earlier in history for word in (*earlier.said, earlier.answer)}
    denied = {word for earlier in history if earlier.type == "exists" and not earlier.things for word in earlier.said}
    if not named.isdisjoint(turn.things):
        return True
    if turn.type == "count":
        return len(named) > 1
    if turn.type == "exists":
        # Once all counted objects are known, nothing else can be there.
        counted_out = any(earlier.type == "count" for earlier in history) and len(named) == len(scene.things)
        return counted_out or not said.isdisjoint(turn.said)
    # "There is no red star" narrows down the colour of the star and the shape of the red object, "no star" any shape.
    return turn.type in ("colour", "shape") and (
        not denied.isdisjoint(turn.said) or any(e.outcome in ("kind: no", "colour: no") for e in history)
    )


def crowding(turn: Turn, place: int, tally: Counter) -> tuple[float, int]:
    """How much `turn` has been asked so far: by its outcome as turn number `place`, relative to the share due to it,
    then by what it says. Without the place, the later "how many?" would mostly mean one or two."""
    outcome = tally[turn.type, place, turn.outcome] / OUTCOMES[turn.type][turn.outcome]
    words = tally[turn.said, turn.type, turn.answer]
    if turn.type == "exists":  # a pair that was mostly there so far should now be missing, and the other way round
        words -= tally[turn.said, turn.type, "no" if turn.answer == "yes" else "yes"]
    return outcome, words


def remember(turns: list[Turn], tally: Counter) -> None:
    """Adds a dialogue to the running tally that `dialogue` steers by."""
    for place, turn in enumerate(turns):
        tally[turn.type, place, turn.outcome] += 1
        tally[turn.said, turn.type, turn.answer] += 1


def dialogue(scene: Scene, rng: Random, tally: Counter, first: str, pairs: list[tuple[str, str]]) -> list[Turn]:
    """Three or four turns about `scene` (one or two if it holds one thing), all of different types, none given away.

    The first is of type `first`. There are fewer turns, or none, where the scene has no more to ask. `tally` (see
    `remember`) says what was asked so far; `pairs` as in `candidates`.
    """
    wanted = rng.randint(1, 2) if len(scene.things) == 1 else rng.randint(3, 4)
    open_turns = candidates(scene, rng, pairs)
    turns: list[Turn] = []
    while len(turns) < wanted:
        types = {turn.type for turn in turns}
        open_turns = [t for t in open_turns if t.type not in types and not gives_away(scene, turns, t)]
        if len({t.answer for t in open_turns if t.type == "exists"}) == 1:  # asked only where "yes" and "no" are open
            open_turns = [t for t in open_turns if t.type != "exists"]
        choices = open_turns if turns else [t for t in open_turns if t.type == first]
        if not choices:
            break
        chosen = min(choices, key=lambda turn: (*crowding(turn, len(turns), tally), rng.random()))
        turns.append(worded(chosen, rng))
    return turns


def by_outcome(turns: list[Turn]) -> dict[str, dict[str, list[Turn]]]:
    """Turns by their type and by their outcome."""
    found: dict[str, dict[str, list[Turn]]] = {}
    for turn in turns:
        found.setdefault(turn.type, {}).setdefault(turn.outcome, []).append(turn)
    return found


def any_of(turns: dict[str, dict[str, list[Turn]]], types: tuple[str, ...], rng: Random) -> Turn:
    """One of the turns `by_outcome`, worded: its type one of `types`, its outcome as often as it should be."""
    kind = rng.choice([type for type in types if type in turns])
    outcomes = sorted(turns[kind])
    (outcome,) = rng.choices(outcomes, [OUTCOMES[kind][o] for o in outcomes])
    return worded(rng.choice(turns[kind][outcome]), rng)


def told_dialogue(scene: Scene, rng: Random, pairs: list[tuple[str, str]], count: int = 4) -> list[Turn]:
    """`count` turns that the caption of `scene` answers, each of any of the types `TOLD`: all is given away already.

    `pairs` as in `candidates`.
    """
    turns = by_outcome(candidates(scene, rng, pairs))
    return [any_of(turns, TOLD, rng) for _ in range(count)]


def drill(scene: Scene, rng: Random, pairs: list[tuple[str, str]], count: int = 4) -> list[Turn]:
    """Up to `count` turns about `scene` of the types `DRILLED`, never two of one type about the same things.

    `pairs` as in `candidates`.
    """
    turns = by_outcome(candidates(scene, rng, pairs))
    drawn = [any_of(turns, DRILLED, rng) for _ in range(count)]
    about = {(turn.type, turn.things, turn.said if turn.type == "exists" else ()): turn for turn in reversed(drawn)}
    return list(reversed(about.values()))


def retell(scene: Scene, rng: Random) -> Turn:
    """An answer of a short sentence or two on each thing of `scene`, in any order: which colour and which shape go together."""
    kinds, colours = Counter(t.kind for t in scene.things), Counter(t.colour for t in scene.things)
    told = []
    for t in rng.sample(scene.things, len(scene.things)):
        row, column = cell(scene, t)
        sentences = [f"The {t.kind} is {t.colour}."] if kinds[t.kind] == 1 else []
        if colours[t.colour] == 1:
            sentences.append(f"The {t.colour} object is a {t.kind}.")
        told += rng.sample(sentences or [f"The {t.colour} {t.kind} is {PLACES[row][column]}."], max(1, len(sentences)))
    return Turn("retell", "", " ".join(told), question=rng.choice(RETELL))


def worded(turn: Turn, rng: Random) -> Turn:
    """The turn with one of its phrasings filled in."""
    return replace(turn, question=sentence(rng.choice(PHRASINGS[turn.phrasing]).format(*turn.blanks)))
