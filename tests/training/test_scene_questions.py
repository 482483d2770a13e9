"""The questions of the embedded data set: balanced, true of the pictures, and no turn tells a later one's answer."""

import inspect
import re
from collections import Counter, defaultdict

import pytest

pytest.importorskip("sklearn")

from tests.training.written_scenes import (
    COLOUR,
    KIND,
    NAMED,
    SPLITS,
    TYPES,
    all_turns,
    is_choice,
    load,
    outcome,
    things_in,
    turns_of,
)
from visualrwkv.training import scenes
from visualrwkv.training.scene_questions import KINDS, OUTCOMES, PHRASINGS, Scene, Thing, Turn, gives_away

pytestmark = pytest.mark.xdist_group("scenes")  # made once


# Balance -------------------------------------------------------------------------------------------------------------


def test_sizes_shares_and_first_turns(scenes_data):
    assert inspect.signature(scenes.write).parameters["test"].default == len(load(scenes_data, "test"))
    for name in SPLITS:
        records, objects = load(scenes_data, name), load(scenes_data, f"{name}.objects")
        turns, firsts = Counter(), Counter(record["types"][0] for record in records)
        for record in records:
            turns.update(record["types"])
            things = len(objects[record["image"]])
            assert min(2, things) <= len(record["types"]) <= (2 if things == 1 else 4)
            assert len(set(record["types"])) == len(record["types"])
        if name in ("test", "test_unseen"):
            assert turns.total() >= 2350
        for type_ in TYPES:
            assert 0.08 <= turns[type_] / turns.total() <= 0.20, (name, type_)
            twice = type_ == "position" and not name.startswith("test")
            assert (0.2 if twice else 0.08) <= firsts[type_] / len(records) <= (0.27 if twice else 0.18), (name, type_)


def plain(type_: str) -> set[str]:
    """The answers, or places of the right one, that a type's outcomes stand for."""
    return {re.split(": |, ", key)[1] if ": " in key else key for key in OUTCOMES[type_]}


def test_language_asks_every_type_but_comparisons_for_every_answer(scenes_data):
    assert all(record["types"] == ["retell"] for record in load(scenes_data, "retell"))
    records = load(scenes_data, "language")
    assert 0.65 < sum(record["types"] != ["retell"] for record in records) / len(records) < 0.75
    turns = [turn for turn in all_turns(scenes_data, "language") if turn[0] in TYPES]
    assert {turn[0] for turn in turns} == set(TYPES) - {"position", "larger"}
    for type_ in {turn[0] for turn in turns}:
        outcomes = Counter(outcome(question, answer) for t, question, answer in turns if t == type_)
        assert outcomes.total() / len(turns) >= 0.05, type_
        assert set(outcomes) == plain(type_), type_
        for one, other in (("first", "second"), ("yes", "no")):
            if one in outcomes:
                assert abs(outcomes[one] / (outcomes[one] + outcomes[other]) - 0.5) < 0.1, type_


def test_answers_are_balanced_within_each_type(scenes_data):
    for split in ("train", "test", "test_unseen"):
        answers, phrased = defaultdict(Counter), Counter()
        for type_, question, answer in all_turns(scenes_data, split):
            answers[type_][outcome(question, answer)] += 1
            assert re.fullmatch("[a-z]+|[0-9]", answer)
            if type_ == "position":
                phrased[is_choice(question), axis_of(question)] += 1
        assert set(answers["position"]) == {"yes", "no", "first", "second"}
        position = answers["position"]
        assert abs((position["yes"] + position["no"]) / position.total() - 1 / 4) < 0.02, split
        for type_, one, other in (
            ("exists", "yes", "no"),
            ("position", "yes", "no"),
            ("position", "first", "second"),
            ("larger", "first", "second"),
        ):
            assert {one, other} <= set(answers[type_]) <= plain(type_)
            both = answers[type_][one] + answers[type_][other]
            assert abs(answers[type_][one] / both - 0.5) < 0.02, (split, type_, one)
        assert len(phrased) == 4  # both axes, each in both forms
        for (choice, axis), times in phrased.items():
            other_axis = phrased[choice, "y" if axis == "x" else "x"]
            assert abs(times / (times + other_axis) - 0.5) < 0.15, (split, phrased)
        limits = (("count", 0.2, 0.3), ("colour", 0.11, 0.18), ("shape", 0.16, 0.24), ("digit", 0.05, 0.15))
        for type_, least, most in limits:
            assert set(answers[type_]) == set(OUTCOMES[type_])
            shares = [n / answers[type_].total() for n in answers[type_].values()]
            assert least <= min(shares), (split, type_)
            assert max(shares) <= most, (split, type_)


def masked(question: str) -> str:
    return re.sub(f"\\b(an?|{KIND}|{COLOUR})\\b", "_", question.lower())


@pytest.mark.parametrize("read", [str.lower, masked], ids=["exact", "masked"])
def test_guessing_without_the_picture_stays_low(scenes_data, read):
    seen, overall = defaultdict(Counter), defaultdict(Counter)
    for type_, question, answer in all_turns(scenes_data, "train"):
        seen[read(question)][answer] += 1
        overall[type_][answer] += 1
    for split in ("test", "test_unseen"):
        turns = all_turns(scenes_data, split)
        right = sum((seen[read(q)] or overall[t]).most_common(1)[0][0] == a for t, q, a in turns)
        assert right / len(turns) <= 0.45


def test_the_course_of_a_dialogue_does_not_tell_the_answer(scenes_data):
    """A guesser that knows which turn it is, and the train answers to the same types before, gains next to nothing."""
    guesses = defaultdict(Counter)
    for record in load(scenes_data, "train"):
        for place, type_ in enumerate(record["types"]):
            _, question, answer = turns_of(record)[place]
            asked = (type_, is_choice(question) and type_ in ("position", "larger"))
            guesses[asked, place, tuple(record["types"][:place])][outcome(question, answer)] += 1
    for type_, choice, chance in (
        ("count", False, 0.25),
        ("exists", False, 0.5),
        ("position", False, 0.5),
        ("position", True, 0.5),
        ("larger", True, 0.5),
        ("colour", False, 1 / 7),
        ("shape", False, 0.2),
    ):
        # Rare courses are left out: the most frequent of few answers is frequent by chance.
        counters = [c for (asked, *_), c in guesses.items() if asked == (type_, choice) and c.total() >= 60]
        right, total = sum(c.most_common(1)[0][1] for c in counters), sum(c.total() for c in counters)
        assert right / total < chance + 0.08, (type_, choice)


def test_every_type_has_three_phrasings_and_color_is_spelled_both_ways(scenes_data):
    for type_, phrasings in PHRASINGS.items():
        assert len(set(phrasings)) >= 3, type_
    forms = Counter(
        "color" in question.lower() for type_, question, _ in all_turns(scenes_data, "train") if type_ == "colour"
    )
    assert 0.4 < forms[True] / forms.total() < 0.6


# Truth ---------------------------------------------------------------------------------------------------------------


def axis_of(question: str) -> str:
    """The axis along which the question looks for the smaller coordinate."""
    words = {"left": "x", "above": "y", "higher": "y"}
    (found,) = [words[word] for word in re.findall("[a-z]+", question.lower()) if word in words]
    return found


def only(things: list[dict], **wanted) -> dict:
    """The one thing with these properties; fails if the question is ambiguous."""
    (found,) = [t for t in things if all(t[key] == value for key, value in wanted.items())]
    return found


def distinct(winner: dict, other: dict) -> str:
    """The one word that tells the winner from the other."""
    return winner["kind"] if winner["kind"] != other["kind"] else winner["colour"]


def solve(type_: str, question: str, things: list[dict]) -> str:
    """The answer, from the words of the question and the objects."""
    if type_ == "count":
        return str(len(things))
    if type_ == "digit":
        return str(only(things, kind="digit")["digit"])
    if type_ == "colour":
        return only(things, kind=re.search(KIND, question)[0])["colour"]
    if type_ == "shape":
        found = only(things, colour=re.search(COLOUR, question)[0])["kind"]
        assert found != "digit"
        return found
    named = things_in(question)
    if type_ == "exists":
        (wanted,) = named
        hits = [[thing[key] == word for key, word in wanted.items()] for thing in things]
        assert len(wanted) == 1 or any(map(any, hits))  # a "no" to both is always a near miss
        return "yes" if any(map(all, hits)) else "no"
    a, b = (only(things, **words) for words in named)
    for words in named:  # the colour is said only where the kind alone would not do
        assert ("colour" in words) == (sum(t["kind"] == words["kind"] for t in things) > 1)
    if type_ == "position":
        axis = axis_of(question)
        assert abs(a[axis] - b[axis]) >= 9
        if is_choice(question):
            return distinct(*sorted((a, b), key=lambda thing: thing[axis]))
        return "yes" if a[axis] < b[axis] else "no"
    assert type_ == "larger"
    assert "digit" not in (a["kind"], b["kind"])
    assert max(a["extent"], b["extent"]) >= 1.35 * min(a["extent"], b["extent"])
    return distinct(*sorted((a, b), key=lambda thing: -thing["extent"]))


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_true_of_the_picture(scenes_data, split):
    objects = load(scenes_data, f"{split}.objects")
    for record in load(scenes_data, split):
        for type_, question, answer in turns_of(record):
            assert solve(type_, question, objects[record["image"]]) == answer, (record["id"], question)


PLACES = {
    "at the top left": (0, 0),
    "at the top right": (0, 2),
    "at the top": (0, 1),
    "on the left": (1, 0),
    "in the middle": (1, 1),
    "on the right": (1, 2),
    "at the bottom left": (2, 0),
    "at the bottom right": (2, 2),
    "at the bottom": (2, 1),
}
PHRASE = re.compile(f"(?:(small|large) )?{COLOUR} {KIND}(?: ([0-9]))? ({'|'.join(PLACES)})")


def read_caption(text: str) -> list[dict]:
    """What a reader knows after a caption. Sizes and coordinates are one per word, far enough apart for `solve`."""
    found = [
        {
            "kind": kind,
            "colour": colour,
            "digit": digit,
            "extent": {"small": 1, "large": 9, "": 0}[size],
            "y": 10 + 21.5 * PLACES[place][0],
            "x": 10 + 21.5 * PLACES[place][1],
        }
        for size, colour, kind, digit, place in PHRASE.findall(text.lower())
    ]
    assert len(found) == len(NAMED.findall(text.lower())) > 0
    return found


def retold(answer: str, things: list[dict]) -> set[int]:
    """The things that a retelling speaks of; fails where it says what is not so."""
    about = set()
    for words in answer.lower().rstrip(".").split(". "):
        if found := re.fullmatch(f"the {KIND} is {COLOUR}", words):
            thing = only(things, kind=found[1])
            assert thing["colour"] == found[2]
        elif found := re.fullmatch(f"the {COLOUR} object is a {KIND}", words):
            thing = only(things, colour=found[1])
            assert thing["kind"] == found[2]
        else:
            found = re.fullmatch(f"the {COLOUR} {KIND} is ({'|'.join(PLACES)})", words)
            thing = only(things, kind=found[2], colour=found[1])
            assert tuple(int(thing[axis] // (64 / 3)) for axis in "yx") == PLACES[found[3]]
        about.add(id(thing))
    return about


def test_captions_are_true_of_the_pictures(scenes_data):
    objects = load(scenes_data, "train.objects")
    records = load(scenes_data, "captions")
    assert [record["image"] for record in records] == list(objects)
    for record in records:
        assert record["conversations"][0]["value"].startswith("<image>\n")
        things = objects[record["image"]]
        if record["types"] == ["retell"]:
            assert len(retold(record["conversations"][1]["value"], things)) == len(things)
        else:
            assert len(record["types"]) == 4
            assert all(solve(type_, q, things) == answer for type_, q, answer in turns_of(record))
    assert 0.4 < sum(record["types"] == ["retell"] for record in records) / len(records) < 0.6


def test_the_mix_is_train_every_second_caption_and_a_drill_for_each_picture(scenes_data):
    before = load(scenes_data, "train") + load(scenes_data, "captions")[::2]
    mix = load(scenes_data, "mix")
    assert mix[: len(before)] == before
    assert [record["id"] for record in mix[len(before) :]] == [f"drill-train-{i:06d}" for i in range(2500)]


def test_drills_are_true_balanced_and_never_ask_twice_about_the_same(scenes_data):
    objects = load(scenes_data, "train.objects")
    answers = defaultdict(Counter)
    for record in load(scenes_data, "mix"):
        if not record["id"].startswith("drill"):
            continue
        about = []
        for type_, question, answer in turns_of(record):
            assert solve(type_, question, objects[record["image"]]) == answer, (record["id"], question)
            answers[type_][outcome(question, answer)] += 1
            names = sorted(str(sorted(words.items())) for words in things_in(question))
            about.append((type_, *names))
        assert 1 <= len(set(about)) == len(about) <= 4
    assert set(answers) == {"exists", "position", "larger"}
    for type_, one, other in (
        ("exists", "yes", "no"),
        ("position", "yes", "no"),
        ("position", "first", "second"),
        ("larger", "first", "second"),
    ):
        both = answers[type_][one] + answers[type_][other]
        assert abs(answers[type_][one] / both - 0.5) < 0.06, (type_, one)


def test_language_questions_follow_from_the_caption(scenes_data):
    records = load(scenes_data, "retell") + load(scenes_data, "language")
    assert len(records) == 1300
    for record in records:
        assert set(record) == {"id", "conversations", "types"}
        told = read_caption(record["conversations"][0]["value"].split("\n")[0])
        for type_, question, answer in turns_of(record):
            if type_ in TYPES:
                assert solve(type_, question, told) == answer, (record["id"], question)
            else:
                assert (type_, len(retold(answer, told))) == ("retell", len(told))


# Dialogues -----------------------------------------------------------------------------------------------------------


def test_the_tag_opens_the_first_human_turn_only(scenes_data):
    for split in SPLITS:
        for record in load(scenes_data, split):
            first, *rest = [message["value"] for message in record["conversations"]]
            assert first.startswith("<image>\n")
            assert "<image>" not in first[1:] + "".join(rest)
    assert "<image>" not in (scenes_data / "language.json").read_text()


def hinted(turns: list[tuple[str, str, str]]) -> str | None:
    """The first question whose answer the turns before it tell or narrow down, as far as can be inferred; else None."""
    known: list[dict] = []  # what is certainly there, each thing once
    absent: list[dict] = []
    count = None

    def met(key: str, word: str) -> bool:
        return any(one.get(key) == word for one in known + absent)

    for type_, question, answer in turns:
        named = things_in(question)
        if type_ == "count":
            told = len(known) > 1
            count = int(answer)
        elif type_ == "digit":
            told = False
            known.append({"kind": "digit"})
        elif type_ in ("colour", "shape"):
            asked, given = ("colour", "kind") if type_ == "colour" else ("kind", "colour")
            told = met(given, named[0][given]) or any(set(one) == {asked} for one in absent)
            known.append({given: named[0][given], asked: answer})
        elif type_ == "exists":
            # A kind or colour met before may be known to be the only one of its sort.
            told = any(met(key, word) for key, word in named[0].items()) or len(known) == count
            (known if answer == "yes" else absent).append(named[0])
        else:
            told = any(
                one.get("kind") == thing["kind"] and thing.get("colour") in (None, one.get("colour"))
                for one in known
                for thing in named
            )
            known += named
        if told:
            return question
    return None


def test_no_turn_gives_away_a_later_one(scenes_data):
    for name in SPLITS:
        for record in load(scenes_data, name):
            assert hinted(turns_of(record)) is None, record["id"]


STAR = Thing("star", "red", None, None, 10, 10, 20)
CIRCLE = Thing("circle", "blue", None, None, 40, 40, 12)
BAD = [
    [("exists", "Is there a red star?", "yes"), ("colour", "What colour is the star?", "red")],
    [("exists", "Is there a green star?", "no"), ("colour", "What colour is the star?", "red")],
    [("colour", "What colour is the star?", "red"), ("exists", "Is there a green star?", "no")],
    [("shape", "What shape is the red object?", "star"), ("exists", "Is there a red cross?", "no")],
    [("position", "Is the red star left of the blue circle?", "yes"), ("count", "How many objects are there?", "2")],
    [
        ("position", "Which is further left, the red star or the blue circle?", "star"),
        ("colour", "What colour is the circle?", "blue"),
    ],
    [
        ("exists", "Is there a blue circle?", "yes"),
        ("position", "Which is higher up, the red star or the blue circle?", "star"),
    ],
    [
        ("larger", "Which is larger, the red star or the blue circle?", "star"),
        ("colour", "What colour is the star?", "red"),
    ],
    [("exists", "Is there a cross?", "no"), ("shape", "What shape is the red object?", "star")],
    [("exists", "Is there a green object?", "no"), ("colour", "What colour is the star?", "red")],
    [("exists", "Is there a star?", "yes"), ("colour", "What colour is the star?", "red")],
    [("position", "Is the star left of the circle?", "yes"), ("exists", "Is there a star?", "yes")],
    [("position", "Is the star left of the circle?", "yes"), ("colour", "What colour is the star?", "red")],
    [
        ("count", "How many objects are there?", "1"),
        ("colour", "What colour is the star?", "red"),
        ("exists", "Is there a green cross?", "no"),
    ],
]


@pytest.mark.parametrize("turns", BAD, ids=lambda turns: "-".join(turn[0] for turn in turns))
def test_both_rules_catch_what_gives_away(turns):
    """The rule the generator goes by and the one these tests go by refuse the same dialogues."""
    assert hinted(turns) == turns[-1][1]
    assert hinted(turns[-1:]) is None
    scene = Scene(64, (STAR,) if turns[0][2] == "1" else (STAR, CIRCLE))
    made = []
    for type_, question, answer in turns:
        words = tuple(re.findall(f"{KIND}|{COLOUR}", question))
        said = tuple(word for groups in words for word in groups if word)
        about = tuple(i for i, t in enumerate(scene.things) if (t.kind in said or t.colour in said) and answer != "no")
        alone = type_ == "exists" and len(said) == 1
        outcome = f"{'kind' if said[0] in KINDS else 'colour'}: {answer}" if alone else ""
        made.append(Turn(type_, outcome, answer, about, said))
    assert gives_away(scene, made[:-1], made[-1])
    assert not gives_away(scene, [], made[-1])
