"""Opens a public file as a user would, compares its language model with the `rwkv` package, and asks about a picture.

    bash scripts/verify_public.sh howard-hou/visualrwkv-6:VisualRWKV-v060-1B6-v1.0-20240612.pth

FILE is on the Hub ("name/model:file") or here. In turn: the file's SHA-256 is that which the Hub states; every name and shape
fits; logits of a text, in fp32, are those of the `rwkv` package on the same tensors, and so are eight greedy tokens; three
questions about a picture are answered. The last line is for the table in docs/models.md. Exit 1 at the first that fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

BAR = 1e-3  # of the logits' spread
TEXT = "The Eiffel tower is in the city of"
QUESTIONS = ("What is in the picture?", "What colours can you see?", "Is there a person?")
PEER = """
import os, sys, torch
os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": sys.argv[2]}
from rwkv.model import RWKV
model = RWKV(sys.argv[1], "cpu fp32")
with torch.no_grad():
    logits, state = model.forward(eval(sys.argv[3]), None)
    first, said = logits.float(), []
    for _ in range(8):
        said.append(int(logits.argmax()))
        logits, state = model.forward(said[-1:], state)
torch.save((first, said), sys.argv[4])
"""


def sha256(path: Path) -> str:
    """The file's SHA-256, with a bar while it is read."""
    found = hashlib.sha256()
    with open(path, "rb") as file, Progress(transient=True) as bar:
        task = bar.add_task("reading", total=path.stat().st_size)
        while chunk := file.read(1 << 24):
            found.update(chunk)
            bar.advance(task, len(chunk))
    return found.hexdigest()


def stated(name: str) -> str | None:
    """What the Hub says the SHA-256 of "name/model:file" is; None for a file here."""
    if Path(name).exists():
        return None
    from huggingface_hub import HfApi

    repository, _, file = name.partition(":")
    if not file:
        sys.exit(f"{name} is a whole repository: give one of its files, {name}:FILE")
    (info,) = HfApi().get_paths_info(repository, [file])
    return info.lfs.sha256 if info.lfs else None


def peer(weights: dict[str, Tensor], version: int, ids: list[int]) -> tuple[Tensor, list[int]]:
    """Logits (V,) after ids and eight greedy tokens, as the `rwkv` package computes them."""
    with tempfile.TemporaryDirectory() as folder:
        model, out = Path(folder, "model"), Path(folder, "out.pt")
        torch.save(weights, model.with_suffix(".pth"))
        command = [sys.executable, "-c", PEER, str(model), str(int(version == 7)), str(ids), str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the rwkv package failed: {done.stderr.strip().splitlines()[-1]}")
        return torch.load(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--vision", help="the second file of a release in two parts")
    parser.add_argument("--picture", help="what is asked about; a photograph of matplotlib's unless given")
    parser.add_argument("--sha256", help="what the file's must be, where no Hub states it")
    options = parser.parse_args()
    logging.basicConfig(format="%(message)s")

    from visualrwkv.chat import VLM
    from visualrwkv.checkpoint import describe, load_model
    from visualrwkv.files import locate
    from visualrwkv.generate import Sampling, generate, prefill
    from visualrwkv.text.tokenizer import decode, encode

    wanted = options.sha256 or stated(options.file)
    place = locate(options.file)
    if place.is_dir():
        sys.exit(f"{options.file} is a directory: give a file, as it was published")
    found = sha256(place)
    if wanted and found != wanted:
        sys.exit(f"{options.file} has SHA-256 {found}, and {wanted} is stated: it is another file, or was cut off")
    print(f"SHA-256 {found} ({'as stated' if wanted else 'nothing to compare it with'})")

    for name, fact in describe(options.file, options.vision).items():
        print(f"{name:<20}{fact}")
    model = load_model(options.file, vision=options.vision)
    ids = encode(TEXT)
    first, said = peer(model.rwkv.state_dict(), model.config.rwkv.version, ids)
    logits, state = prefill(model, [ids])
    off = float((logits[0] - first).abs().max() / first.std())
    ours = generate(model, logits, state, 8, Sampling())[0]
    same = sum(a == b for a, b in zip(ours, said))
    print(
        f"logits differ from the rwkv package's by {off:.1e} of their spread (bar {BAR}); greedy, ours: {decode(ours)!r}"
    )
    if off > BAR or ours != said[: len(ours)]:
        sys.exit(f"the language model is not the rwkv package's, which goes on with {decode(said)!r}")

    if model.vit is not None:
        vlm, picture = VLM(model), options.picture
        if picture is None:
            from matplotlib.cbook import get_sample_data

            picture = get_sample_data("grace_hopper.jpg", asfileobj=False)
        for question in QUESTIONS:
            print(f"{question}\n  {vlm.answer(picture, question, max_new_tokens=64)}")
    print(f"| `{options.file}` | {found[:12]} | logits within {off:.0e}, {same} of {len(ours)} greedy tokens |")
    print(json.dumps({"file": options.file, "sha256": found, "logits": off, "greedy": same}))


if __name__ == "__main__":
    from visualrwkv.commandline import run

    run(main)
