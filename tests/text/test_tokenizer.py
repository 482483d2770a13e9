"""The World tokenizer: known ids, any script there and back, and decoding that survives what a model may produce."""

import pytest

from visualrwkv.text.tokenizer import END, StreamDecoder, decode, decode_bytes, encode

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "小猫在沙发上睡觉。\n是的，没错…\n",
    "猫はソファで眠っています。",
    "고양이가 소파에서 자고 있어요.",
    "Кошка спит на диване",
    "القطة نائمة على الأريكة",
    "बिल्ली सोफ़े पर सो रही है",
    "แมวนอนอยู่บนโซฟา",
    "Η γάτα κοιμάται — «ήσυχα»",
    "👩‍👩‍👧‍👦 🦊 🏳️‍🌈 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 e\u0301",
    "def f(x):\n\treturn {'a': x ** 2}\r\n\n\n    # done\n\n",
    "\x00\x01\x7f \u00a0\u200b\ufeff",
]
KNOWN = {
    "\n\n": [261],
    "\n": [11],
    " ": [33],
    "User:": [24281, 59],
    "User: ": [24281, 59, 33],
    "User: What": [24281, 59, 30031],
    "Assistant:": [5585, 41693, 59],
    " A": [300],
    "Yes": [6831],
    " Yes": [21186],
    "<image>": [61, 34733, 63],
    " \n\n": [3336],
    " \n": [265],
    "Hello.\n\n": [33155, 47, 261],
    "。\n": [28329],
    "，\n": [28331],
    "…\n": [28324],
    "": [],
}


@pytest.mark.parametrize("text", TEXTS)
def test_there_and_back(text):
    ids = encode(text)
    assert decode(ids) == text
    assert len(ids) <= len(text.encode())
    assert all(0 < i < 65530 for i in ids)


@pytest.mark.parametrize("text", KNOWN)
def test_known_ids(text):
    assert encode(text) == KNOWN[text]
    assert decode(KNOWN[text]) == text


def test_every_single_byte_has_an_id():
    assert [decode_bytes([b + 1]) for b in range(256)] == [bytes([b]) for b in range(256)]


def test_a_cut_character_spoils_only_itself():
    cut = [b + 1 for b in "🦊".encode()[:2]]
    assert decode([*encode("A fox "), *cut, *encode("!")]) == "A fox \ufffd!"


def test_ids_without_an_entry_give_nothing():
    assert decode([END, 65530, 65535, 70000, -200]) == ""
    assert decode([6831, END, 65535, *encode(" sir")]) == "Yes sir"


def single_bytes(text):
    return [b + 1 for b in text.encode()]


@pytest.mark.parametrize("split", [encode, single_bytes])
@pytest.mark.parametrize("text", TEXTS)
def test_stream_gives_whole_characters_only(text, split):
    decoder = StreamDecoder()
    pieces = [decoder.push(i) for i in split(text)]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert decoder.flush() == ""


def test_stream_holds_back_a_character_until_it_is_whole():
    decoder = StreamDecoder()
    assert [decoder.push(i) for i in single_bytes("a🦊b")] == ["a", "", "", "", "🦊", "b"]


def test_stream_flushes_a_cut_character_as_one_mark():
    decoder = StreamDecoder()
    assert [decoder.push(i) for i in single_bytes("a🦊")[:3]] == ["a", "", ""]
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""
