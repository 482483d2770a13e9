"""A task's file: written and read back in every version, files of others, and refusals that say what is wrong."""

import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from visualrwkv.checkpoint import convert, load_model, save_model
from visualrwkv.config import RWKVConfig
from visualrwkv.files import fingerprint
from visualrwkv.model import LANGUAGE_MODELS
from visualrwkv.task import TASK, load_task, save_task

RANKS = {"mix_rank": 4, "decay_rank": 8, "rate_rank": 8, "value_rank": 8, "gate_rank": 8}


def language(randomise, version=6, seed=0, **sizes):
    config = RWKVConfig(
        **{"n_layer": 3, "n_embd": 128, "head_size": 64, "vocab_size": 70, "version": version, **RANKS, **sizes}
    )
    torch.manual_seed(seed)
    return randomise(LANGUAGE_MODELS[version](config), seed).requires_grad_(False)


@pytest.fixture(scope="module")
def net(randomise):
    return language(randomise)


def matrices(net, seed=0):
    c = net.config
    return torch.randn(c.n_layer, c.n_head, c.head_size, c.head_size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("version", LANGUAGE_MODELS)
def test_there_and_back(randomise, tmp_path, version):
    net = language(randomise, version)
    wkv = matrices(net)
    save_task(tmp_path / TASK, wkv, net.config, fingerprint(net))
    for path in (tmp_path / TASK, str(tmp_path / TASK), tmp_path):
        state = load_task(path, net)
        assert len(state) == 1
        assert torch.equal(state.wkv[:, 0], wkv)
        assert not state.att_shift.any()
    assert [p.name for p in tmp_path.iterdir()] == [TASK]
    with safe_open(tmp_path / TASK, "pt") as file:
        about = file.metadata()
    assert about == {
        "format": "visualrwkv-task",
        "format_version": "1",
        "model": fingerprint(net),
        "version": str(version),
        "n_layer": "3",
        "n_embd": "128",
        "head_size": "64",
    }


PEER = """
import os, sys, torch
os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": sys.argv[1]}
from rwkv.model import RWKV
model = RWKV(sys.argv[2], "cpu fp32")
state = None  # of RWKV-5 and 6 the package takes time_state out of the model's file
if sys.argv[1] == "1":
    state, task = model.generate_zero_state(), torch.load(sys.argv[3])
    for i in range(model.args.n_layer):
        state[3 * i + 1] = task[f"blocks.{i}.att.time_state"].float()
logits, _ = model.forward([5, 6, 69, 0, 7], state, full_output=True)
torch.save(logits, sys.argv[4])
"""


@pytest.mark.parametrize("version", LANGUAGE_MODELS)
def test_a_file_of_others_starts_as_the_rwkv_package_starts(randomise, tmp_path, version):
    pytest.importorskip("rwkv")
    net = language(randomise, version)
    theirs = {f"blocks.{i}.att.time_state": x.bfloat16() for i, x in enumerate(matrices(net))}
    torch.save(theirs, tmp_path / "task.pth")
    torch.save(net.state_dict() | ({} if version == 7 else theirs), tmp_path / "model.pth")
    files = [tmp_path / "model", tmp_path / "task.pth", tmp_path / "logits.pt"]
    command = [sys.executable, "-c", PEER, str(int(version == 7)), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted = torch.load(tmp_path / "logits.pt").float()
    ids, bounds = torch.tensor([5, 6, 69, 0, 7]), torch.tensor([0, 5])
    found = net.head(net(net.emb(ids), bounds, load_task(tmp_path / "task.pth", net))[0])
    without = net.head(net(net.emb(ids), bounds)[0])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3 * float(wanted.std()))
    assert not torch.allclose(without, wanted, atol=0.1 * float(wanted.std()))


def test_a_model_is_known_by_its_numbers_whatever_its_file_and_dtype(tiny_model, tmp_path):
    model = tiny_model(vision=None)
    save_model(model, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "public.pth")
    mark = fingerprint(model.rwkv)
    assert fingerprint(load_model(tmp_path / "ours").rwkv) == mark
    assert fingerprint(load_model(tmp_path / "ours", dtype="bfloat16").rwkv) == mark
    assert fingerprint(load_model(tmp_path / "public.pth").rwkv) == mark
    with torch.no_grad():
        model.rwkv.blocks[2].ffn.value.weight.mul_(1.01)
    assert fingerprint(model.rwkv) != mark


def changed(file, **about):
    """The same file with other things said of it."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata() | about
    save_file(load_file(file), file, metadata=metadata)


def test_a_task_for_another_model_is_refused(randomise, net, tmp_path):
    file = tmp_path / TASK
    save_task(file, matrices(net), net.config, fingerprint(net))
    sizes = "RWKV-6 of 3 layers of 128 with heads of 64"
    with pytest.raises(ValueError, match=r"tuned for a model with other weights .*; load the model it is for"):
        load_task(file, language(randomise, seed=1))
    for other, words in (
        (language(randomise, n_layer=2), "RWKV-6 of 2 layers of 128 with heads of 64"),
        (language(randomise, 7), "RWKV-7 of 3 layers of 128 with heads of 64"),
        (language(randomise, head_size=32), "RWKV-6 of 3 layers of 128 with heads of 32"),
    ):
        with pytest.raises(ValueError, match=f"was tuned for an {sizes}, not for this {words}"):
            load_task(file, other)
    changed(file, format_version="2")
    with pytest.raises(
        ValueError, match=r"format version 2, and this package reads 1; open it with the version that made"
    ):
        load_task(file, net)


def test_files_that_are_no_task(net, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors: there is no such file"):
        load_task(tmp_path / "none.safetensors", net)
    with pytest.raises(FileNotFoundError, match=r"state\.safetensors: there is no such file"):
        load_task(tmp_path, net)
    whole = {f"blocks.{i}.att.time_state": x.clone() for i, x in enumerate(matrices(net))}
    first = "blocks.0.att.time_state"
    for tensors, words in (
        (net.state_dict(), r"is no task for a model of 3 layers: it lacks blocks.0.att.time_state \(it has emb.weight"),
        ({k: x for k, x in whole.items() if k != "blocks.2.att.time_state"}, "it lacks blocks.2.att.time_state"),
        (whole | {"blocks.3.att.time_state": whole[first]}, "it has blocks.3.att.time_state"),
        (whole | {first: whole[first][:1]}, r"blocks.0.att.time_state is \[1, 64, 64\] instead of \[2, 64, 64\]"),
        (whole | {first: whole[first] / 0}, "not finite: blocks.0.att.time_state"),
    ):
        torch.save(tensors, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=words):
            load_task(tmp_path / "other.pth", net)
