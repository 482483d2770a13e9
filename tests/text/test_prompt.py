"""Prompts and labels: the reference's golden vectors, and what our own protocol promises."""

import pytest

from visualrwkv.text.prompt import IGNORE, encode_conversation
from visualrwkv.text.tokenizer import decode, encode

SHORT = "Answer the question using a single word or phrase."
QUESTION = f"What is this?\n{SHORT}"
QUESTION_IDS = [4600, 32234, 64, 11, 40301, 22590, 57009, 40085, 332, 47289, 32497, 4715, 46808, 47]


def talk(*values):
    """human, gpt, human, … in turn."""
    return [{"from": "gpt" if i % 2 else "human", "value": value} for i, value in enumerate(values)]


def read(ids, image_tokens=1):
    """Ids as text again, each picture's placeholders as one <image>."""
    pieces, count = [[]], 0
    for i in ids:
        if i != 65535:
            pieces[-1].append(i)
            continue
        count += 1
        if count % image_tokens == 0:
            pieces.append([])
    assert count % image_tokens == 0
    return "<image>".join(decode(piece) for piece in pieces)


# Golden vectors, made with the reference's own code ------------------------------------------------------------------


def test_v7_training():
    turns = talk("What is this?\n<image>", "A cat.", "Why?", "It meows.")
    ids, labels = encode_conversation(turns, protocol="v7.00", image_tokens=4)
    golden = (
        "24281 59 33 65535 65535 65535 65535 11 24326 4600 32234 64 261 5585 41693 59 300 21417 47 261 "
        "24281 59 21152 64 261 5585 41693 59 3918 4660 8454 47 261"
    )
    assert ids == [int(i) for i in golden.split()]
    assert labels == [i if at in {*range(16, 20), *range(28, 33)} else -100 for at, i in enumerate(ids)]


@pytest.mark.parametrize(
    ("question", "image_tokens", "golden"),
    [
        (
            "<image>\nWhat is this?\n\n\nAnswer.",
            2,
            "24281 59 33 65535 65535 11 24326 4600 32234 64 11 40301 47 261 5585 41693 59",
        ),
        ("<image>\n<image>\nCompare", 1, "24281 59 33 65535 11 65535 11 48424 261 5585 41693 59"),
    ],
)
def test_v7_inference(question, image_tokens, golden):
    ids, labels = encode_conversation(talk(question, ""), protocol="v7.00", image_tokens=image_tokens)
    assert ids == [int(i) for i in golden.split()]
    assert set(labels) == {IGNORE}


SANDWICH = {
    "first": [24281, 59, 33, -200, 11, 24326, *QUESTION_IDS],
    "middle": [24281, 59, 30031, 4600, 32234, 64, 11, -200, 11, 24326, *QUESTION_IDS],
    "last": [24281, 59, 30031, *QUESTION_IDS, 11, -200],
}


@pytest.mark.parametrize("position", SANDWICH)
def test_v6_inference(position):
    ids, labels = encode_conversation(talk(f"<image>\n{QUESTION}", ""), "v6.0", position, image_tokens=577)
    assert ids == [*SANDWICH[position], 261, 5585, 41693, 59]
    assert set(labels) == {IGNORE}


@pytest.mark.parametrize("position", SANDWICH)
def test_ours_is_v6_for_one_turn(position):
    ids, _ = encode_conversation(talk(f"<image>\n{QUESTION}", ""), image_position=position, image_tokens=3)
    opening = [i for s in SANDWICH[position] for i in ([65535] * 3 if s == -200 else [s])]
    assert ids == [*opening, 261, 5585, 41693, 59]


def test_v6_training():
    turns = talk(f"<image>\n{QUESTION}", "Cat", "What color?", "Black")
    ids, labels = encode_conversation(turns, "v6.0", "middle")
    golden = [24281, 59, 30031, 4600, 32234, 64, 11, 24326, 38083, 64, 11, -200, 11, 24326, *QUESTION_IDS, 261]
    golden += [5585, 41693, 59, 19621, 261, 24281, 59, 30031, 38083, 64, 261, 5585, 41693, 59, 36368, 261]
    assert ids == golden
    assert [i for i in labels if i != IGNORE] == [19621, 261, 36368, 261]
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels))


def test_the_references_treatment_of_space_is_kept_by_its_protocols_only():
    turns = talk("Look at <image> now", "Yes", "One\n\ntwo", "No")
    assert read(encode_conversation(turns, "v7.00")[0]).startswith("User: <image>\nLook at  now\n\n")
    v6 = [65535 if i == -200 else i for i in encode_conversation(turns, "v6.0")[0]]
    assert read(v6).startswith("User: Look at  now\nOne\n\ntwo\n<image>\nLook at  now\n\n")
    assert read(encode_conversation(turns)[0]).startswith("User: Look at\nnow\n<image>\nLook at\nnow\n\n")


# Our own protocol ----------------------------------------------------------------------------------------------------

POSITIONS = {
    "first": "User: {images}\nWhich?\n\nAssistant:",
    "middle": "User: Which?\n{images}\nWhich?\n\nAssistant:",
    "last": "User: Which?\n{images}\n\nAssistant:",
}


@pytest.mark.parametrize("pictures", [1, 3])
@pytest.mark.parametrize("position", POSITIONS)
def test_pictures_of_one_turn(position, pictures):
    turns = talk("<image>\n" * pictures + "Which?", "")
    ids, _ = encode_conversation(turns, image_position=position, image_tokens=4)
    assert read(ids, 4) == POSITIONS[position].format(images="\n".join(["<image>"] * pictures))
    assert ids.count(65535) == 4 * pictures


@pytest.mark.parametrize(
    ("position", "first", "third"),
    [
        ("first", "<image>\nA?", "<image>\n<image>\nC?"),
        ("middle", "A?\n<image>\nA?", "C?\n<image>\n<image>\nC?"),
        ("last", "A?\n<image>", "C?\n<image>\n<image>"),
    ],
)
def test_pictures_over_several_turns(position, first, third):
    turns = talk("A?\n<image>", "a", "B?", "b", "<image>C?<image>", "c")
    ids, _ = encode_conversation(turns, image_position=position, image_tokens=4)
    wanted = f"User: {first}\n\nAssistant: a\n\nUser: B?\n\nAssistant: b\n\nUser: {third}\n\nAssistant: c\n\n"
    assert read(ids, 4) == wanted


def test_no_later_question_leaks_into_the_sandwich():
    turns = talk(f"<image>\nWhat is this?\n{SHORT}", "Cat", "What color?", "Black", "<image>\nAnd this?", "Dog")
    whole = encode_conversation(turns, image_tokens=4)
    for end in (2, 4):
        part = encode_conversation(turns[:end], image_tokens=4)
        assert whole[0][: len(part[0])] == part[0]
        assert whole[1][: len(part[1])] == part[1]
    assert read(whole[0], 4).startswith(f"User: What is this?\n<image>\nWhat is this?\n{SHORT}\n\n")
    assert "color" in read([i for i in encode_conversation(turns, "v6.0")[0] if i > 0]).split("\n\n")[0]


def test_a_picture_without_a_question():
    for position in POSITIONS:
        assert read(encode_conversation(talk("<image>", ""), image_position=position)[0]) == (
            "User: <image>\n\nAssistant:"
        )


def test_empty_lines_are_collapsed_and_only_a_turn_ends_in_two_newlines():
    turns = talk("  One\n\n\ntwo\n \t\nthree  ", "\nfour\n\nfive\n\n")
    ids, _ = encode_conversation(turns)
    assert decode(ids) == "User: One\ntwo\nthree\n\nAssistant: four\nfive\n\n"
    assert ids.count(261) == 2


def test_chinese_closes_without_261_and_learns_its_end():
    ids, labels = encode_conversation(talk("这是什么？\n\n请回答。", "猫。\n\n黑色。"))
    assert decode(ids) == "User: 这是什么？\n请回答。\n\nAssistant: 猫。\n黑色。\n\n"
    assert 261 not in ids
    assert ids[-2:] == labels[-2:] == [28329, 11]


def test_only_answers_and_what_closes_them_are_learned():
    turns = talk("<image>\nOne?", "Yes it is.", "Two?", "No.", "Three?", "Perhaps")
    ids, labels = encode_conversation(turns, image_tokens=4)
    assert len(ids) == len(labels)
    assert all(label in (IGNORE, i) for i, label in zip(ids, labels))
    assert decode([i for i in labels if i != IGNORE]) == " Yes it is.\n\n No.\n\n Perhaps\n\n"
    runs = [at for at in range(1, len(labels)) if labels[at] != IGNORE and labels[at - 1] == IGNORE]
    assert [ids[at - 3 : at] for at in runs] == [[5585, 41693, 59]] * 3


def test_turns_are_tokenised_apart():
    whole = encode_conversation(talk("One?", "Yes", "Two?", "No"))[0]
    parts = ("User: One?\n\n", "Assistant: Yes\n\n", "User: Two?\n\n", "Assistant: No\n\n")
    assert whole == [i for part in parts for i in encode(part)]


def test_roles_in_any_case():
    assert encode_conversation([{"from": "Human", "value": "a"}, {"from": "GPT", "value": "b"}]) == (
        encode_conversation(talk("a", "b"))
    )


@pytest.mark.parametrize(
    ("turns", "settings", "words"),
    [
        ([{"from": "system", "value": "x"}], {}, ("'system'", "human, gpt")),
        (talk("x"), {"protocol": "v8"}, ("protocol", "'v8'", "visualrwkv, v6.0, v7.00")),
        (talk("x"), {"image_position": "centre"}, ("image_position", "'centre'", "first, middle, last")),
    ],
)
def test_errors_name_the_value_and_the_allowed_ones(turns, settings, words):
    with pytest.raises(ValueError) as caught:
        encode_conversation(turns, **settings)
    assert all(word in str(caught.value) for word in words)
