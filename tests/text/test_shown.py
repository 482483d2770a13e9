"""What is shown of an answer: whole characters, trimmed, and never a part of a stop string."""

import pytest

from visualrwkv.text.shown import Shown

BYTE = {b: b + 1 for b in range(256)}  # the vocabulary's first ids are the single bytes


def pieces(text, stop=()):
    shown = Shown(stop)
    found = [shown.push(BYTE[b]) for b in (text if isinstance(text, bytes) else text.encode())]
    return shown, [*filter(None, [*found, shown.flush()])]


def test_whole_characters_without_white_space_at_the_ends():
    shown, found = pieces(" \n 🦊 好\n\n")
    assert found == ["🦊", " 好"]
    assert shown.text == "🦊 好"
    assert pieces("好".encode()[:2])[1] == ["\ufffd"]


@pytest.mark.parametrize(
    ("text", "stop", "seen"),
    [
        ("one STOP two", ("STOP",), "one"),
        ("one STO two", ("STOP",), "one STO two"),
        ("one STO", ("STOP",), "one STO"),
        ("SSTOP", ("STOP",), "S"),
        ("ababac", ("abac",), "ab"),
        ("a\nb", ("\n",), "a"),
        ("\nab", ("\n",), ""),
        ("x好y", ("好",), "x"),
        ("abcd", ("bcd", "c"), "ab"),
        ("one", (), "one"),
    ],
)
def test_nothing_of_a_stop_string_is_shown(text, stop, seen):
    shown, found = pieces(text, stop)
    assert shown.text == "".join(found) == seen
    assert shown.stopped == any(s in text for s in stop)
    grown = ""
    for piece in found:
        grown += piece
        assert seen.startswith(grown)
