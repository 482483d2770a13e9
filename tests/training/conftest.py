"""The embedded data set, made once for all tests that read it."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def scenes_data(tmp_path_factory) -> Path:
    """A data set with tests of the default size and a smaller training split."""
    pytest.importorskip("sklearn")
    from visualrwkv.training import scenes

    out = tmp_path_factory.mktemp("scenes") / "data"
    scenes.write(out, seed=3, train=2500, val=300, retell=300, language=1000)
    return out
