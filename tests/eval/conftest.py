"""What lies in eval/ is imported as eval/run.py imports it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "eval"))


@pytest.fixture(autouse=True)
def no_notes():
    """Every test hears what is said once a process."""
    import questions

    questions.NOTES.clear()
