"""The official normalisers of short answers, with their quirks: VQAv2's, m4c's (TextVQA, submissions) and VizWiz's.

All share three steps: punctuation, full stops, words. They differ in what comes before and in one table.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from decimal import ROUND_HALF_UP, Decimal

PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
ANY_PUNCTUATION = re.compile(f"[{re.escape(PUNCTUATION)}]")
ARTICLES = ("a", "an", "the")
NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
MOST_STOPS = 32
"""The official code passes a flag where the number of replacements goes, and the flag's value is 32."""

# Pairs of a word and what it becomes. Those that begin with a capital are never met: words are lower-cased before.
_PAIRS = """
aint ain't arent aren't cant can't couldve could've couldnt couldn't couldn'tve couldn't've couldnt've couldn't've didnt didn't
doesnt doesn't dont don't hadnt hadn't hadnt've hadn't've hadn'tve hadn't've hasnt hasn't havent haven't hed he'd hed've he'd've
he'dve he'd've hes he's howd how'd howll how'll hows how's Id've I'd've I'dve I'd've Im I'm Ive I've isnt isn't itd it'd itd've
it'd've it'dve it'd've itll it'll let's let's maam ma'am mightnt mightn't mightnt've mightn't've mightn'tve mightn't've mightve
might've mustnt mustn't mustve must've neednt needn't notve not've oclock o'clock oughtnt oughtn't ow's'at 'ow's'at 'ows'at
'ow's'at 'ow'sat 'ow's'at shant shan't shed've she'd've she'dve she'd've she's she's shouldve should've shouldnt shouldn't
shouldnt've shouldn't've shouldn'tve shouldn't've somebody'd somebodyd somebodyd've somebody'd've somebody'dve somebody'd've
somebodyll somebody'll somebodys somebody's someoned someone'd someoned've someone'd've someone'dve someone'd've someonell
someone'll someones someone's somethingd something'd somethingd've something'd've something'dve something'd've somethingll
something'll thats that's thered there'd thered've there'd've there'dve there'd've therere there're theres there's theyd they'd
theyd've they'd've they'dve they'd've theyll they'll theyre they're theyve they've twas 'twas wasnt wasn't wed've we'd've we'dve
we'd've weve we've werent weren't whatll what'll whatre what're whats what's whatve what've whens when's whered where'd wheres
where's whereve where've whod who'd whod've who'd've who'dve who'd've wholl who'll whos who's whove who've whyll why'll whyre
why're whys why's wont won't wouldve would've wouldnt wouldn't wouldnt've wouldn't've wouldn'tve wouldn't've yall y'all yall'll
y'all'll y'allll y'all'll yall'd've y'all'd've y'alld've y'all'd've y'all'dve y'all'd've youd you'd youd've you'd've you'dve
you'd've youll you'll youre you're youve you've
"""
CONTRACTIONS = dict(re.findall(r"(\S+)\s+(\S+)", _PAIRS))

_STRAIGHT = ("aint", "arent", "cant", "couldve", "couldnt", "weve", "wheres", "whove")
_STRAIGHT_KEYS = ("couldn'tve", "hadn'tve")
CURLY_CONTRACTIONS = {
    (key if key in _STRAIGHT_KEYS else key.replace("'", "’")): (value if key in _STRAIGHT else value.replace("'", "’"))
    for key, value in CONTRACTIONS.items()
}
"""VizWiz's table: curly but for a few, so that most repaired words cannot equal an answer with a straight apostrophe."""


def trim(text: str) -> str:
    """Newlines and tabs become spaces, and the ends are stripped: what the official code does before all else."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def punctuation(text: str, digits: str = "0-9") -> str:
    """Drop punctuation, or put a space in its place, as the official code does.

    A mark is dropped if anywhere in the text it stands beside a space; else it becomes a space. But where a comma
    stands between two digits, all marks of the text are dropped. Then full stops go that no digit follows. `digits`:
    what a digit is (Python 2, which VQAv2's scorer runs on, knows only ten, Python 3 many).
    """
    given = text
    if ANY_PUNCTUATION.search(text):
        drop_all = "," in text and re.search(f"[{digits}],[{digits}]", text) is not None
        for mark in PUNCTUATION:
            if mark in given:
                text = text.replace(mark, "" if drop_all or f"{mark} " in given or f" {mark}" in given else " ")
    return re.sub(rf"\.(?![{digits}])", "", text, count=MOST_STOPS) if "." in text else text


def words(text: str, contractions: Mapping[str, str] = CONTRACTIONS) -> str:
    """Lower case, numbers up to ten as digits, no articles, contractions with their apostrophes, single spaces."""
    numbered = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(contractions.get(word, word) for word in numbered if word not in ARTICLES)


def vqa(text: str) -> str:
    """VQAv2's official scorer, as it treats a trimmed text."""
    return words(punctuation(text))


def m4c(text: str) -> str:
    """What TextVQA's scorer does to both sides, and LLaVA to every answer that it submits to VQAv2 and VizWiz."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return words(punctuation(trim(text), r"\d"))


def vizwiz(text: str) -> str:
    """What VizWiz's API does to an answer; what people answered it leaves as it is."""
    return words(punctuation(trim(text), r"\d"), CURLY_CONTRACTIONS)


# Arithmetic as theirs ------------------------------------------------------------------------------------------------


def total(values: Iterable[float]) -> float:
    """The sum from left to right: Python 3.12 adds more exactly, which can tip a rounding."""
    found = 0.0
    for value in values:
        found += value
    return found


def percent(values: list[float]) -> float:
    """The mean as a percentage with two decimals, halves away from zero, as Python 2 rounds."""
    mean = Decimal(100 * total(values) / len(values))
    return float(mean.quantize(Decimal("0.01"), ROUND_HALF_UP))


def agreement(prediction: str, answers: list[str]) -> float:
    """Leave one out: the mean over annotators of min(1, others who answered so / 3)."""
    same = answers.count(prediction)
    if not same:
        return 0.0
    as_one, as_none = min(1.0, (same - 1) / 3), min(1.0, same / 3)
    return total(as_one if answer == prediction else as_none for answer in answers) / len(answers)
