"""What lies in eval/ is imported as eval/run.py imports it, and nothing is asked of the Hub."""

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))


@pytest.fixture(autouse=True)
def no_notes():
    """Every test hears what is said once a process."""
    import questions

    questions.NOTES.clear()


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory):
    """Where fetched files would lie; the Hub itself is out of reach."""
    place = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr("huggingface_hub.constants.HF_HOME", str(place))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return place / "visualrwkv/benches"


@pytest.fixture
def here(monkeypatch, capsys):
    """here(arguments…): the last line of a run in this process, as JSON."""
    import run

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["eval/run.py", *map(str, arguments)])
        run.main()
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


@pytest.fixture(scope="session")
def column():
    """column(colour, format): a cell of an image column, as a table holds it."""

    def make(colour, kind="JPEG"):
        content = io.BytesIO()
        Image.new("RGB", (8, 8), colour).save(content, kind)
        return {"bytes": content.getvalue(), "path": None}

    return make


@pytest.fixture
def hub(monkeypatch):
    """hub(repository, {(configuration, split): (features, rows)}): what the Hub holds; returns the list of what was loaded."""
    datasets = pytest.importorskip("datasets")
    import online

    def table(features, rows):
        filled = {column: [row.get(column) for row in rows] for column in features}
        return datasets.Dataset.from_dict(filled, features=datasets.Features(features)).to_iterable_dataset()

    def hold(repository, tables):
        loaded = []
        made = {part: table(*held) for part, held in tables.items()}

        def load(name, parts):
            assert name == repository
            loaded.extend(parts)
            return [made[part] for part in parts], "5ca1ab1e"

        monkeypatch.setattr(online, "load", load)
        return loaded

    return hold
