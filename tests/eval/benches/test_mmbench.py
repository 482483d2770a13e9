"""MMBench: rotations, prompts, the Excel file."""

import base64

import pytest
from benches import mmbench, mmbench_cn

COLUMNS = ["index", "question", "hint", *"ABCD", "answer", "category", "image", "source", "l2-category", "comment"]
COLUMNS.append("split")
PICTURE = base64.b64encode(b"x" * 100).decode()


@pytest.fixture
def place(tmp_path):
    def write(name, rows):
        lines = [COLUMNS, *([str(row.get(column, "")) for column in COLUMNS] for row in rows)]
        (tmp_path / name).write_text("".join("\t".join(line) + "\n" for line in lines), encoding="utf-8")
        return tmp_path

    return write


def question(index, options, answer, **more):
    given = {"question": f"q{index % 10**6}", "image": PICTURE, "split": "dev", "category": "c", "l2-category": "l"}
    return given | {"index": index, "answer": answer} | dict(zip("ABCD", options)) | more


ROWS = [
    question(1, ["red", "blue"], "A"),
    question(2, ["one", "two"], "B"),
    question(1_000_001, ["blue", "red"], "B"),
    question(1_000_002, ["two", "one"], "A"),
]


def answers(*texts):
    return [{"question_id": row["index"], "text": text} for row, text in zip(ROWS, texts)]


def test_a_question_counts_if_all_its_rotations_are_right(place):
    data = place("mmbench_dev_20230712.tsv", ROWS)
    figures = mmbench.score(data, "dev_20230712", answers("A", "B", "B", "B"))
    assert figures["circular"] == {"split": "dev", "Overall": 0.5, "l": 0.5, "c": 0.5}
    assert figures["vanilla_pass0"]["Overall"] == 1.0
    assert figures["vanilla_all_rows"]["Overall"] == 0.75
    assert mmbench.per_question(data, "dev_20230712", answers("A", "B", "B", "B")) == {"1": 1.0, "2": 0.0}


def test_a_missing_answer_is_told_and_wrong(place, capsys):
    data = place("mmbench_dev_20230712.tsv", ROWS)
    assert mmbench.score(data, "dev_20230712", answers("A", "B", "B"))["circular"]["Overall"] == 0.5
    assert "1 of 4 questions have no answer" in capsys.readouterr().err


def test_prompts_are_llavas(place):
    rows = [question(1, ["red", "nan", "blue"], "A", hint="Look."), question(2, ["red", "blue"], "A", hint="none")]
    data = place("mmbench_dev_20230712.tsv", rows)
    first, second = mmbench.load(data, "dev_20230712")
    assert first.text == "Look.\nq1\nA. red\nAnswer with the option's letter from the given choices directly."
    assert second.text.startswith("q2\nA. red\nB. blue\n")
    assert first.pictures == (b"x" * 100,)
    place("mmbench_dev_cn_20231003.tsv", rows)
    assert mmbench_cn.load(data, "dev_cn_20231003")[1].text == "q2\nA. red\nB. blue\n请直接回答选项字母。"


def test_languages_and_splits_are_told_apart(place):
    for name in ("mmbench_test_20230712.tsv", "MMBench_DEV_EN.tsv", "mmbench_dev_cn_20231003.tsv", "MMStar.tsv"):
        data = place(name, ROWS)
    assert mmbench.splits(data) == ["dev_en", "test_20230712"]
    assert mmbench_cn.splits(data) == ["dev_cn_20231003"]


def test_files_may_lie_in_a_folder_of_their_own(place, tmp_path):
    (tmp_path / "mmbench").mkdir()
    place("mmbench/mmbench_dev_20230712.tsv", ROWS)
    assert mmbench.splits(tmp_path) == ["dev_20230712"]
    with pytest.raises(FileNotFoundError, match="mmbench_dev_cn_20231003"):
        mmbench_cn.splits(tmp_path)


def test_a_test_split_is_for_the_server(place):
    data = place("mmbench_test_20230712.tsv", [row | {"answer": ""} for row in ROWS])
    with pytest.raises(ValueError, match="submission"):
        mmbench.score(data, "test_20230712", answers("A"))


def test_the_excel_file_holds_every_row(place, tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    data = place("mmbench_dev_20230712.tsv", ROWS)
    file = mmbench.submit(data, "dev_20230712", answers("A", "=1+1", "bell\x07", "B"), tmp_path / "out")
    assert file.suffix == ".xlsx"
    assert not list(file.parent.glob(".*"))
    rows = list(openpyxl.load_workbook(file).active.values)
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction", "answer", "split")
    assert rows[1] == (1, "q1", "red", "blue", None, None, "A", "A", "dev")
    assert [row[6] for row in rows[1:]] == ["A", "=1+1", "bell", "B"]
    assert openpyxl.load_workbook(file).active["G3"].data_type == "s"
