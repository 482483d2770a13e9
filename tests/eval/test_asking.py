"""Batches, and answers kept through crashes at any moment and over ranks: one file, the same whatever happened."""

import json
import random
import threading
from pathlib import Path

import pytest
from asking import Kept, Rank, ask, batches, digest
from questions import Question

SETTINGS = {"image_position": "first", "model_hash": "abc"}


def questions(count=23, pictures=5):
    """Several about each picture, some without one, in no order."""
    drawn = random.Random(0)
    seen = [(Path(f"{drawn.randrange(pictures)}.png"),) if drawn.random() < 0.8 else () for _ in range(count)]
    return [Question(str(i), f"q{i}\u2028é?", seen[i], {"image": str(i)}) for i in range(count)]


class Answerer:
    """Answers with what was asked beside it, so that another batch would give another answer; may fail on the way."""

    def __init__(self, fail_at=None):
        self.fail_at, self.asked = fail_at, []

    def __call__(self, batch):
        if len(self.asked) == self.fail_at:
            raise KeyboardInterrupt
        self.asked.append([q.id for q in batch])
        return [f"{q.id} of {[other.id for other in batch]}" for q in batch]


def run(out, answerer=None, limit=0, rank=None, settings=SETTINGS, asked=None):
    return ask(asked or questions(), limit, answerer or Answerer(), 4, out, "b-test", settings, rank or Rank())


@pytest.fixture
def wanted(tmp_path):
    """The file that an uninterrupted run leaves."""
    run(tmp_path / "whole")
    return (tmp_path / "whole/b-test.jsonl").read_bytes()


@pytest.mark.parametrize("size", [1, 3, 4, 100])
def test_batches_hold_each_question_once_and_pictures_together(size):
    asked = questions(60)
    made = batches(asked, size)
    assert sorted(q.id for batch in made for q in batch) == sorted(q.id for q in asked)
    assert max(map(len, made)) <= size
    about = [q for q in asked if q.pictures == (Path("1.png"),)]
    holding = [batch for batch in made if about[0].pictures in [q.pictures for q in batch]]
    assert len(holding) == -(-len(about) // size)  # no more batches than it must be
    assert batches([], size) == []


def test_rows_lie_in_the_order_of_the_questions(tmp_path, wanted):
    rows = [json.loads(line) for line in wanted.decode().split("\n")[:-1]]
    assert [row["question_id"] for row in rows] == [q.id for q in questions()]
    assert list(rows[3]) == ["question_id", "prompt", "text", "image"]
    assert run(tmp_path / "whole", Answerer(fail_at=0)) == rows  # nothing is asked again
    assert sorted(f.name for f in (tmp_path / "whole").iterdir()) == ["b-test.jsonl", "b-test.settings.json"]


@pytest.mark.parametrize("fail_at", range(6))
def test_after_a_crash_only_what_is_left_is_asked(tmp_path, wanted, fail_at):
    first, second = Answerer(fail_at), Answerer()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", first)
    run(tmp_path / "out", second)
    assert (tmp_path / "out/b-test.jsonl").read_bytes() == wanted
    together = first.asked + second.asked
    assert len(together) == len({tuple(batch) for batch in together})


def test_a_file_cut_at_any_byte_ends_the_same(tmp_path, wanted):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "out", Answerer(fail_at=3))
    file = tmp_path / "out/b-test.rank0.jsonl"
    content = file.read_bytes()
    for length in random.Random(0).sample(range(len(content)), 60):
        file.write_bytes(content[:length])
        run(tmp_path / "out")
        assert (tmp_path / "out/b-test.jsonl").read_bytes() == wanted
        (tmp_path / "out/b-test.jsonl").unlink()


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_leave_the_same_file_as_one(tmp_path, wanted, count):
    answerers = [Answerer() for _ in range(count)]
    others = [
        threading.Thread(target=run, args=(tmp_path / "out", answerers[i]), kwargs={"rank": Rank(i, count)})
        for i in range(1, count)
    ]
    late = threading.Timer(0.3, lambda: [thread.start() for thread in others])
    late.start()
    rows = run(tmp_path / "out", answerers[0], rank=Rank(0, count))
    for thread in [late, *others]:
        thread.join()
    assert len(rows) == len(questions())
    assert (tmp_path / "out/b-test.jsonl").read_bytes() == wanted
    assert all(answerer.asked for answerer in answerers)
    assert run(tmp_path / "out", rank=Rank(1, count)) == []


def test_what_other_ranks_left_is_not_asked_again(tmp_path, wanted):
    run(tmp_path / "out", rank=Rank(2, 3))
    alone = Answerer()
    run(tmp_path / "out", alone)
    assert (tmp_path / "out/b-test.jsonl").read_bytes() == wanted
    assert len(alone.asked) == len(batches(questions(), 4)) - len(batches(questions(), 4)[2::3])


def test_a_limited_run_is_the_start_of_a_whole_one(tmp_path):
    first = Answerer()
    rows = run(tmp_path, first, limit=5)
    assert [row["question_id"] for row in rows] == ["0", "1", "2", "3", "4"]
    assert sum(map(len, first.asked)) == 5
    assert len(run(tmp_path)) == 23
    assert [row["question_id"] for row in run(tmp_path, Answerer(fail_at=0), limit=3)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"settings": SETTINGS | {"image_position": "last"}}, "image_position first instead of last"),
        ({"asked": questions(24)}, "questions "),
    ],
)
def test_answers_under_other_settings_are_not_mixed(tmp_path, other, words):
    run(tmp_path)
    with pytest.raises(ValueError, match="holds answers under other settings") as error:
        run(tmp_path, **other)
    assert words in str(error.value)
    for file in tmp_path.iterdir():
        file.unlink()
    run(tmp_path, **other)


def test_settings_without_answers_give_way(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Answerer(fail_at=0))
    run(tmp_path, settings=SETTINGS | {"model_hash": "def"})
    assert json.loads((tmp_path / "b-test.settings.json").read_text())["model_hash"] == "def"


def test_questions_are_named_by_what_is_asked(tmp_path):
    asked = questions()
    moved = [Question(q.id, q.text, tuple(Path("elsewhere") / p for p in q.pictures)) for q in asked]
    assert digest(asked) == digest(moved)
    assert digest(asked) != digest(asked[:-1])
    assert digest([Question("1", "?", (b"a",))]) != digest([Question("1", "?", (b"b",))])


def test_a_line_in_pieces_is_left_out(tmp_path):
    (tmp_path / "b-test.jsonl").write_bytes(b'{"question_id": "1", "te\n\xff\n{"question_id": "2", "text": "a"}\n[1]\n')
    assert list(Kept(tmp_path, "b-test").rows) == ["2"]
