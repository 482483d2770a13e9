"""An exported directory is enough, also where this package is not installed."""

import json
import os
import subprocess
import sys

import pytest

from visualrwkv.chat import load
from visualrwkv.hf import export

ELSEWHERE = """
import sys
sys.meta_path = [f for f in sys.meta_path if "visualrwkv" not in getattr(f, "__module__", "")]  # an editable install's
try:
    import visualrwkv
    sys.exit("the package is still there")
except ImportError:
    pass
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
content = [{"type": "image", "image": Image.open(sys.argv[2])}, {"type": "text", "text": "What is this?"}]
inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True,
                                       return_tensors="pt", add_generation_prompt=True)
if sys.argv[3:]:
    model.save_pretrained(sys.argv[3])
    processor.save_pretrained(sys.argv[3])
out = model.generate(**inputs, max_new_tokens=8)
print(repr(processor.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True).strip()))
import visualrwkv
print(visualrwkv.__file__)
"""


@pytest.fixture(scope="module")
def exported(place, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "model"
    export(place, out)
    return out


def test_without_the_package(exported, vlm, picture, tmp_path):
    picture(0).save(tmp_path / "a.png")
    settings = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    again = tmp_path / "again"
    for words in ([exported, tmp_path / "a.png", again], [again, tmp_path / "a.png"]):  # exported, and saved from there
        done = subprocess.run(
            [sys.executable, "-c", ELSEWHERE, *map(str, words)],
            cwd=tmp_path,
            env=os.environ | settings,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        answer, package = done.stdout.splitlines()[-2:]
        assert answer == repr(vlm.answer(picture(0), "What is this?", max_new_tokens=8))
        assert package.startswith(str(tmp_path / "hub"))
    assert not (again / "processing.py").exists()


def test_it_is_a_directory_of_ours(exported, place, vlm, picture):
    assert load(exported).answer(picture(0), "What is this?", max_new_tokens=8) == vlm.answer(
        picture(0), "What is this?", max_new_tokens=8
    )
    assert (exported / "model.safetensors").read_bytes() == (place / "model.safetensors").read_bytes()
    assert not [p for p in exported.iterdir() if p.name.startswith(".")]
    classes = json.loads((exported / "config.json").read_text())["auto_map"]
    assert classes["AutoModelForImageTextToText"] == "modeling_visualrwkv.VisualRWKVForConditionalGeneration"


def test_a_file_is_no_directory(place, tmp_path):
    with pytest.raises(ValueError, match="a directory for transformers needs a name"):
        export(place, tmp_path / "model.pth")
    assert not list(tmp_path.iterdir())
