"""VLMEvalKit's tables: cells, pictures, accuracies."""

import base64

import pytest
from tables import accuracies, decode_pictures, options_of, read_table, right

PICTURE = base64.b64encode(b"a picture of some length, so that its cell is longer than a reference").decode()


def write(place, *lines):
    file = place / "table.tsv"
    file.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return file


def test_cells_are_unquoted_and_missing_ones_known(tmp_path):
    file = write(tmp_path, "index\tquestion\tA\tB\tC\timage", '7\t"a ""b"",\nc"\tNone\tnone\t\t' + PICTURE)
    (row,) = read_table(file)
    assert row == {"index": "7", "question": 'a "b",\nc', "A": None, "B": "none", "C": None}
    assert options_of(row) == {"B": "none"}
    assert read_table(file, pictures=True)[0]["image"] == PICTURE


def test_a_mark_at_the_start_is_no_part_of_a_name(tmp_path):
    file = tmp_path / "table.tsv"
    file.write_bytes("\ufeffindex\tquestion\r\n7\tq\u2028r\r\n".encode())
    assert read_table(file) == [{"index": "7", "question": "q\u2028r"}]


def test_rows_share_pictures_and_may_point_to_them(tmp_path):
    file = write(tmp_path, "index\tquestion\timage", f"1\tq\t{PICTURE}", "1000001\tq\t1", f"2\tq\t{PICTURE}")
    pictures = decode_pictures(file, read_table(file, pictures=True))
    assert pictures == [base64.b64decode(PICTURE)] * 3
    assert pictures[0] is pictures[1] is pictures[2]


def test_a_picture_that_is_nowhere_is_named(tmp_path):
    file = write(tmp_path, "index\tquestion\timage", "1\tq\t5")
    with pytest.raises(ValueError, match="index 1"):
        decode_pictures(file, read_table(file, pictures=True))


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["question\tA", "q\tx"], "index"),
        (["index\tquestion", "1\tq\tmore"], "line 2"),
    ],
)
def test_another_kind_of_file_is_refused(tmp_path, lines, words):
    with pytest.raises(ValueError, match=words):
        read_table(write(tmp_path, *lines))


def test_a_missing_answer_is_scored_as_nan():
    row = {"index": "1", "A": "an", "B": "b", "answer": "A"}
    assert right(row, None)  # "nan" holds "an": the official code says so too
    assert right(row, "NULL")
    assert not right(row | {"A": "x"}, None)


def test_accuracies_by_group():
    rows = [
        {"l2-category": "relation_reasoning", "category": "kin", "split": "dev"},
        {"l2-category": "coarse_perception", "category": "scene", "split": "dev"},
        {"l2-category": "coarse_perception", "category": "style", "split": "dev"},
    ]
    wanted = {"split": "dev", "Overall": 2 / 3, "CP": 0.5, "RR": 1.0, "kin": 1.0, "scene": 0.0, "style": 1.0}
    assert accuracies(rows, [True, False, True]) == wanted
    assert list(accuracies(rows, [True, False, True])) == list(wanted)
    rows[0]["split"] = "test"
    assert accuracies(rows, [True, False, True])["Overall"] == [0.5, 1.0]
    assert accuracies([{}], [True]) == {"split": "none", "Overall": 1.0}
