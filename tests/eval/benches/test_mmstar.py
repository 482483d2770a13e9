"""MMStar and RealWorldQA: tables in which every question stands once."""

import base64

import pytest
from benches import mmstar, realworldqa

PICTURE = base64.b64encode(b"x" * 100).decode()


@pytest.mark.parametrize(("bench", "name"), [(mmstar, "MMStar.tsv"), (realworldqa, "RealWorldQA.tsv")])
def test_every_question_counts_for_itself(bench, name, tmp_path, capsys):
    lines = [
        "index\tquestion\tA\tB\tanswer\tcategory\timage",
        f"0\tWhich?\tred\tblue\tA\tcolour\t{PICTURE}",
        f"1\tWhich way?\tleft\tright\tB\tplace\t{PICTURE}",
        f"1000000\tWhich place?\tleft\tright\tB\tplace\t{PICTURE}",
    ]
    (tmp_path / name).write_text("".join(line + "\n" for line in lines))
    rows = [{"question_id": 0, "text": "A."}, {"question_id": "1", "text": "to the right"}]
    assert bench.score(tmp_path, "test", rows) == {"split": "none", "Overall": 2 / 3, "colour": 1.0, "place": 0.5}
    assert "1 of 3" in capsys.readouterr().err
    assert bench.per_question(tmp_path, "test", rows) == {"0": 1.0, "1": 1.0, "1000000": 0.0}
    first = bench.load(tmp_path, "test")[0]
    assert first.text == "Which?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly."
    assert first.pictures == (b"x" * 100,)


def test_a_missing_file_is_shown(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"MMStar\.tsv"):
        mmstar.splits(tmp_path)
