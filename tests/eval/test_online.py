"""A bench without --data: fetched once, whole or not at all, by one process; else one sentence and the tree."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import finished
import online
import plan
import pytest

from visualrwkv.checkpoint import save_model

datasets = pytest.importorskip("datasets")

ROOT = Path(__file__).parents[2]
PART = (None, "test")
COLUMNS = dict.fromkeys(
    ("id", "question_id", "question", "answer", "image_source", "category"), datasets.Value("string")
) | {"image": datasets.Image()}


@pytest.fixture
def rows(column):
    """POPE's rows: in each category two questions about one picture, and one about another."""
    cells = {0: column("red"), 1: column("blue")}
    return [
        {
            "question_id": str(at + 1),
            "question": "Is there a cat?",
            "answer": "no" if at else "yes",
            "image_source": f"COCO_val2014_{at // 2}",
            "category": category,
            "image": cells[at // 2],
        }
        for category in ("adversarial", "popular", "random")
        for at in range(3)
    ]


@pytest.fixture
def pope(rows, hub):
    """What was loaded of POPE."""
    return hub("lmms-lab/POPE", {PART: (COLUMNS, rows)})


def files(place):
    return sorted(str(file.relative_to(place)) for file in place.rglob("*") if file.is_file())


def failing(monkeypatch, rows, error, count=4):
    """The Hub breaks off in the middle of a data set; without an error it just ends there."""

    class Table:
        info, split, features = SimpleNamespace(splits=None), "test", None

        def __iter__(self):
            yield from rows[:count]
            if error:
                raise error

    monkeypatch.setattr(online, "load", lambda name, parts: ([Table()], "5ca1ab1e"))


# Once ----------------------------------------------------------------------------------------------------------------


def test_the_files_lie_in_the_librarys_cache_and_are_fetched_once(pope, cache, capsys):
    for _ in range(2):
        (bench,) = plan.planned("pope", None, None)
        assert bench.data == cache / "pope/test"
    assert pope == [PART]
    assert files(bench.data) == [
        *(f"coco/coco_pope_{category}.json" for category in ("adversarial", "popular", "random")),
        "source.json",
        "val2014/COCO_val2014_0.jpg",
        "val2014/COCO_val2014_1.jpg",
    ]
    source = json.loads((bench.data / "source.json").read_text())
    parts = [{"config": None, "split": "test"}]
    assert source == {"repository": "lmms-lab/POPE", "revision": "5ca1ab1e", "parts": parts, "rows": [9]}
    said = capsys.readouterr().err
    assert said.count("note: pope: split test is taken from lmms-lab/POPE, whose files lie in") == 1
    assert str(cache / "pope/test") in said


def test_pictures_are_written_as_they_were_published(pope, rows):
    (bench,) = plan.planned("pope", None, None)
    assert (bench.data / "val2014/COCO_val2014_1.jpg").read_bytes() == rows[2]["image"]["bytes"]


def test_of_two_processes_one_fetches_and_the_other_waits(pope, cache):
    got = []
    threads = [threading.Thread(target=lambda: got.append(online.fetched("pope", None).place)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert got == [cache / "pope/test"] * 2
    assert pope == [PART]


def test_only_the_split_that_is_asked_for_is_fetched(hub, column, capsys):
    record = {
        "question_id": "VizWiz_1",
        "question": "What?",
        "image": column("red"),
        "answers": ["tea"],
        "category": "other",
    }
    features = dict.fromkeys(("question_id", "question", "category"), datasets.Value("string"))
    features |= {"image": datasets.Image(), "answers": datasets.Sequence(datasets.Value("string"))}
    loaded = hub("lmms-lab/VizWiz-VQA", {(None, "test"): (features, [record]), (None, "val"): (features, [record])})
    assert plan.planned("vizwiz", None, "test")[0].splits == ("test",)
    assert loaded == [(None, "test")]
    assert plan.planned("vizwiz", None, None)[0].splits == ("val",)
    assert loaded == [(None, "test"), (None, "val")]
    assert "there are also test (--split)" in capsys.readouterr().err


def test_a_model_is_asked_and_the_result_says_where_the_data_came_from(pope, here, tiny_model, tmp_path, cache):
    save_model(tiny_model(), tmp_path / "model")
    arguments = ["--bench", "pope", "--model", tmp_path / "model", "--out", tmp_path / "out", "--max-new-tokens", "2"]
    assert set(here(*arguments)["pope"]) >= {"mean_f1", "random"}
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["data"] is None
    assert result["settings"]["pope"] == {
        "splits": ["test"], "repository": "lmms-lab/POPE", "revision": "5ca1ab1e", "data": str(cache / "pope/test"),
    }  # fmt: skip
    (figure,) = finished.read_run(tmp_path / "out").figures.values()
    assert figure.accuracy is not None  # the report finds the files again


# Not at all ----------------------------------------------------------------------------------------------------------


def test_what_breaks_off_leaves_nothing(monkeypatch, rows, cache):
    failing(monkeypatch, rows, OSError("the line is dead"))
    with pytest.raises(FileNotFoundError, match=r"pope: lmms-lab/POPE cannot be reached \(the line is dead\); give"):
        plan.planned("pope", None, None)
    assert files(cache / "pope") == [".test.lock"]
    failing(monkeypatch, rows, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        plan.planned("pope", None, None)
    assert files(cache / "pope") == [".test.lock"]


def test_a_killed_process_leaves_no_half_and_holds_nobody_up(pope, cache):
    code = f"""
import sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "eval")!r}]
import online
class Table:
    class info: splits = None
    split, features = "test", None
    def __iter__(self):
        row = dict(question_id="1", question="?", answer="no", image_source="a", category="random", image=dict(bytes=b"x"))
        yield row
        print("half", flush=True)
        time.sleep(60)
online.load = lambda name, parts: ([Table()], "")
online.fetched("pope", None)
"""
    home = {"HF_HOME": str(cache.parents[1])}
    with subprocess.Popen([sys.executable, "-c", code], env=os.environ | home, stdout=subprocess.PIPE) as going:
        assert going.stdout.readline() == b"half\n"
        assert (cache / "pope/.test.part/val2014/a.jpg").exists()
        assert not (cache / "pope/test").exists()
        going.send_signal(signal.SIGKILL)
    place = online.fetched("pope", None).place
    assert "val2014/a.jpg" not in files(place)
    assert [file.name for file in cache.glob("pope/.*.part")] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_source": None}, "is not laid out as it was (a row lacks 'image_source')"),
        (
            {"category": "unpopular"},
            "its column category says 'unpopular', which is none of adversarial, popular, random",
        ),
        ({"answer": None}, "a row lacks 'answer'"),
    ],
)
def test_another_layout_is_said(change, words, rows, hub, cache):
    changed = [{k: v for k, v in (row | change).items() if v is not None} for row in rows]
    columns = {name: column for name, column in COLUMNS.items() if change.get(name, "") is not None}
    hub("lmms-lab/POPE", {PART: (columns, changed)})
    with pytest.raises(FileNotFoundError) as error:
        plan.planned("pope", None, None)
    sentence, _, tree = str(error.value).partition("\n")
    assert words in sentence
    assert "coco/coco_pope_adversarial.json" in tree
    assert files(cache / "pope") == [".test.lock"]


def test_a_row_without_a_picture_is_said(rows, hub):
    hub("lmms-lab/POPE", {PART: (COLUMNS, [row | {"image": None} for row in rows])})
    with pytest.raises(FileNotFoundError, match=r"is not laid out as it was \(a row has no picture\)"):
        plan.planned("pope", None, None)


def test_a_table_without_rows_is_said(monkeypatch):
    failing(monkeypatch, [], None)
    with pytest.raises(FileNotFoundError, match="it has no rows"):
        plan.planned("pope", None, None)


@pytest.mark.parametrize(
    ("bench", "words"),
    [("mmstar", "options inside the questions"), ("realworldqa", "mixes free answers"), ("scenes", "quickstart")],
)
def test_a_bench_that_is_not_on_the_hub_says_why(bench, words):
    with pytest.raises(FileNotFoundError, match=rf"^{bench}: .*{words}.*; give its files with --data\n"):
        plan.planned(bench, None, None)


def test_without_a_network_there_is_soon_one_sentence_and_the_tree(tmp_path):
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "eval/run.py", "--bench", "vqav2"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert time.monotonic() - began < 20
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    assert lines[0] == "DATA/"
    assert lines[-1].startswith("error: vqav2: lmms-lab/VQAv2 cannot be reached (")
    assert lines[-1].endswith("); give its files with --data")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_without_the_library_the_remedy_is_said(monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, timeout: SimpleNamespace(sha="1"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FileNotFoundError, match=r"pope: .*datasets.*pip install '\.\[eval\]'"):
        plan.planned("pope", None, None)


def test_one_revision_of_the_parts_that_are_needed_is_loaded(monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name, timeout: SimpleNamespace(sha="1f"))
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)))
    assert online.load("a/b", (("x", "val"), (None, "test")))[1] == "1f"
    options = {"revision": "1f", "streaming": True}
    assert asked == [(("a/b", "x"), {"split": "val", **options}), (("a/b", None), {"split": "test", **options})]
