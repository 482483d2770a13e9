"""Reading files and matching answers to questions."""

import pytest
from questions import match, read_json, read_jsonl, read_object, read_objects, whole


def test_jsonl_ends_lines_on_newlines_only(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes('{"text": "a\u2028b\x85c"}\r\n\n{"text": "d"}'.encode())
    assert [row["text"] for row in read_jsonl(file)] == ["a\u2028b\x85c", "d"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(b'{"a": 1}\n{"a": ', "line 2"), (b'{"a": 1}\n[1]\n', "line 2: a list"), (b'{"a": "\xff"}', "UTF-8")],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, content, words):
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=words) as error:
        read_jsonl(file)
    assert str(file) in str(error.value)


def test_a_missing_or_broken_json_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_json(tmp_path / "nothing.json")
    (tmp_path / "a.json").write_text('{"a": ')
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    def write_half() -> None:
        with whole(tmp_path / "new/a.txt") as part:
            part.write_text("half")
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        write_half()
    assert list((tmp_path / "new").iterdir()) == []
    with whole(tmp_path / "new/a.txt") as part:
        part.write_text("all")
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["a.txt"]


def test_what_does_not_fit_is_counted():
    rows = [{"question_id": i, "text": str(n)} for n, i in enumerate([2, "3", 3, "x"])]
    found = match(rows, [1, 2, 3])
    assert found.answers == {"2": "0", "3": "2"}  # of a doubled id the last
    assert found.amiss() == (
        "1 of 3 questions have no answer (as 1), 1 ids have several answers (as 3), "
        "1 answers are to no question of this split (as x)"
    )
    assert match(rows[:1], [2]).amiss() == ""


@pytest.mark.parametrize("content", ["1", "[1]", '{"a": 1}', "[]"])
def test_what_a_json_file_holds_is_checked(tmp_path, content):
    file = tmp_path / "a.json"
    file.write_text(content)
    if content.startswith("{"):
        assert read_object(file) == {"a": 1}
    else:
        with pytest.raises(ValueError, match="stands where an object should"):
            read_object(file)
    if content == "[]":
        assert read_objects(file) == []
    else:
        with pytest.raises(ValueError, match="is not a list of objects"):
            read_objects(file)
