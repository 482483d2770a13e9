"""Files: every format that is opened, and one sentence for each that is not."""

import errno
import json
import pickle
from collections import OrderedDict
from copy import deepcopy
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from visualrwkv import files
from visualrwkv.checkpoint import CONFIG, WEIGHTS, compose, load_model, load_vision, model_hash, save_model, save_vision
from visualrwkv.config import ModelConfig

IDS = torch.tensor([[5, 6, 7, 8, 9]])


@pytest.fixture(scope="module")
def language(tiny_model):
    """A language model whose weights bf16 holds exactly."""
    return tiny_model(vision=None, vocab_size=300).bfloat16().float().requires_grad_(False)


@pytest.fixture(scope="module")
def whole(tiny_model):
    return tiny_model(scan="multi", projector="linear", image_tokens=4, position="last", vocab_size=300)


def public(model, prefix=""):
    """A language model's weights as a public file holds them: bf16, public names."""
    return OrderedDict((prefix + k, v.bfloat16()) for k, v in model.rwkv.state_dict().items())


def assert_same(found, wanted):
    assert found.config == wanted.config
    torch.testing.assert_close(found.state_dict(), wanted.state_dict(), rtol=0, atol=0)


# What can be opened --------------------------------------------------------------------------------------------------


WRITERS = {
    "model.pth": torch.save,
    "weights.safetensors": save_file,
    "no_suffix": torch.save,
    "old.pth": partial(torch.save, _use_new_zipfile_serialization=False),
}


@pytest.mark.parametrize("prefix", ["", "rwkv."])
@pytest.mark.parametrize("name", WRITERS)
def test_a_language_model_file(language, tmp_path, name, prefix):
    file = tmp_path / name
    WRITERS[name](public(language, prefix), file)
    found = load_model(file)
    assert found.config == ModelConfig(language.config.rwkv)
    torch.testing.assert_close(found.state_dict(), language.state_dict(), rtol=0, atol=0)
    assert not found.training
    assert {p.dtype for p in found.parameters()} == {torch.float32}
    torch.testing.assert_close(found(IDS)[0], language(IDS)[0], rtol=0, atol=1e-5)
    found = load_model(str(file), dtype="bfloat16")
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}


def test_our_directory_there_and_back(whole, pixels, tmp_path):
    save_model(whole, tmp_path / "a" / "model")
    assert sorted(p.name for p in (tmp_path / "a" / "model").iterdir()) == [CONFIG, WEIGHTS]
    found = load_model(tmp_path / "a" / "model")
    assert_same(found, whole)
    ids = torch.tensor([[5, *[65535] * 4, 8]])
    torch.testing.assert_close(found(ids, pixels(1))[0], whole(ids, pixels(1))[0], rtol=0, atol=1e-5)


def test_saved_in_half_the_size(whole, tmp_path):
    save_model(whole, tmp_path, dtype="bfloat16")
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    rounded = deepcopy(whole).bfloat16().float().state_dict()
    torch.testing.assert_close(load_model(tmp_path).state_dict(), rounded, rtol=0, atol=0)


def test_a_vision_encoder_alone_and_out_of_a_whole_model(whole, tmp_path):
    save_vision(whole.vit, tmp_path / "vit")
    save_model(whole, tmp_path / "model")
    for name in ("vit", "model"):
        found = load_vision(tmp_path / name)
        assert found.config == whole.config.vision
        torch.testing.assert_close(found.state_dict(), whole.vit.state_dict(), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"holds a vrwkv of width 16; known are vrwkv_nano \(128\), vrwkv_t \(192\)"):
        load_vision(tmp_path / "vit" / WEIGHTS)


def test_compose(language, whole, tmp_path):
    torch.save(public(language), tmp_path / "lm.pth")
    save_vision(whole.vit, tmp_path / "vit")
    model = compose(tmp_path / "lm.pth", tmp_path / "vit", "nano", image_tokens=16, scan=None)
    settings = {"projector": "gated", "image_tokens": 16, "scan": "bi", "image_position": "middle"}
    assert model.config == ModelConfig(language.config.rwkv, whole.config.vision, **settings)
    torch.testing.assert_close(model.rwkv.state_dict(), language.rwkv.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(model.vit.state_dict(), whole.vit.state_dict(), rtol=0, atol=0)
    save_model(model, tmp_path / "out")
    assert_same(load_model(tmp_path / "out"), model)
    with pytest.raises(ValueError, match="preset is 'huge'; allowed are nano"):
        compose(tmp_path / "lm.pth", tmp_path / "vit", "huge")


def test_a_hash_names_the_weights(whole, language, tmp_path):
    save_model(whole, tmp_path / "a")
    save_model(whole, tmp_path / "b")
    save_model(language, tmp_path / "c")
    assert model_hash(tmp_path / "a") == model_hash(tmp_path / "b") == model_hash(tmp_path / "a" / WEIGHTS)
    assert model_hash(tmp_path / "a") != model_hash(tmp_path / "c")


# What cannot ---------------------------------------------------------------------------------------------------------


def refusal(path, error=ValueError, **settings):
    """The one sentence in which a path is refused."""
    with pytest.raises(error) as caught:
        load_model(path, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def changed(language, tmp_path, name, value):
    weights = public(language)
    if value is None:
        del weights[name]
    else:
        weights[name] = value
    torch.save(weights, tmp_path / "model.pth")
    return refusal(tmp_path / "model.pth")


def test_keys_that_do_not_fit_are_named(language, tmp_path):
    key = "blocks.2.att.time_maa_w1"
    assert f"missing rwkv.{key}" in changed(language, tmp_path, key, None)
    assert "unexpected rwkv.blocks.1.att.extra" in changed(language, tmp_path, "blocks.1.att.extra", torch.ones(1))
    said = changed(language, tmp_path, key, torch.ones(32, 19))
    assert f"rwkv.{key} is [32, 19] instead of [32, 20]" in said
    assert str(tmp_path / "model.pth") in said


def test_many_problems_are_counted(language, tmp_path):
    torch.save({k: v for k, v in public(language).items() if not k.endswith("bias")}, tmp_path / "model.pth")
    said = refusal(tmp_path / "model.pth")  # 4 × (ln1, ln2, ln_x) + ln0 + ln_out are missing
    assert said.count("missing") == 5
    assert said.endswith("and 9 more")


def test_a_file_of_another_model(tmp_path):
    torch.save({"conv1.weight": torch.ones(3)}, tmp_path / "model.pth")
    assert "of no known format" in refusal(tmp_path / "model.pth")
    torch.save({"emb.weight": torch.ones(30, 32)}, tmp_path / "model.pth")
    assert "is no RWKV-6: it lacks rwkv.blocks.0.att.time_faaaa" in refusal(tmp_path / "model.pth")


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"these are words, not a checkpoint", bytes(range(256)) * 8])
def test_no_checkpoint_at_all(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_download_that_broke_off(language, tmp_path, name):
    file = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(public(language), file)
    file.write_bytes(file.read_bytes()[:-1000])
    assert "cannot be read as a checkpoint" in refusal(file)


def test_tensors_in_another_shape_of_file(tmp_path):
    torch.save([torch.ones(2)], tmp_path / "list.pth")
    assert "holds no table of tensors" in refusal(tmp_path / "list.pth")


class Burglar:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('stolen').touch()",)


@pytest.mark.parametrize("write", [torch.save, lambda data, file: file.write_bytes(pickle.dumps(data, 2))])
def test_a_file_that_holds_code_is_not_run(tmp_path, monkeypatch, write):
    monkeypatch.chdir(tmp_path)
    write({"emb.weight": Burglar()}, tmp_path / "model.pth")
    said = refusal(tmp_path / "model.pth")
    assert "not a plain file of tensors" in said
    assert not (tmp_path / "stolen").exists()


def test_missing_paths(language, tmp_path):
    for path in (tmp_path / "nothing", "nothing.pth", "./no/such", "runs/a/b/c"):
        assert f"{path}: there is no such model file" in refusal(path, FileNotFoundError)
    assert "has no config.json" in refusal(tmp_path)
    save_model(language, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    assert f"{tmp_path / WEIGHTS}: there is no such file" in refusal(tmp_path, FileNotFoundError)


def test_unknown_dtype(tmp_path):
    assert refusal(tmp_path, dtype="int2") == "dtype is 'int2'; allowed are float32, bfloat16, int8, int4"
    assert "dtype is 'int8', which runs on a cpu, and the device is 'cuda'" in refusal(
        tmp_path, dtype="int8", device="cuda"
    )


def test_integer_weights_are_the_steps_alone(whole, tmp_path):
    save_model(whole, tmp_path)
    found = load_model(tmp_path, dtype="int4")
    assert {p.dtype for p in found.parameters()} == {torch.bfloat16}
    assert found.rwkv.step_dtype == "int4"
    assert load_model(tmp_path).rwkv.step_dtype == "bfloat16"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.update(colour="red"), "ModelConfig has no setting 'colour'"),
        (lambda c: c["rwkv"].update(n_heads=2), "RWKVConfig has no setting 'n_heads'"),
        (lambda c: c["rwkv"].pop("n_embd"), "RWKVConfig lacks 'n_embd'"),
        (lambda c: c["vision"].update(kind="clip"), "ViTConfig has no setting"),
        (lambda c: c["rwkv"].update(n_layer="four"), "a setting of RWKVConfig is of the wrong type"),
        (lambda c: c.update(rwkv=[1]), "the settings of RWKVConfig are [1]"),
        (lambda c: c.update(scan="spiral"), "scan is 'spiral'; allowed are uni, bi, multi"),
        (lambda c: c.update(image_tokens=5), "image_tokens is 5"),
        (lambda c: c["rwkv"].update(n_layer=5), "missing rwkv.blocks.4."),
    ],
)
def test_a_wrong_setting_is_named(whole, tmp_path, change, words):
    save_model(whole, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    change(config)
    (tmp_path / CONFIG).write_text(json.dumps(config))
    said = refusal(tmp_path)
    assert words in said
    assert str(tmp_path) in said
    (tmp_path / CONFIG).write_text("{")
    assert "is not valid JSON" in refusal(tmp_path)


# A full disk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["weights", "config"])
def test_a_failed_save_leaves_what_was_there(language, whole, tmp_path, monkeypatch, failing):
    save_model(language, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*arguments, **settings):
        if failing == "weights":
            arguments[1].write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    where, name = (files, "save_file") if failing == "weights" else (files.json, "dumps")
    monkeypatch.setattr(where, name, full)
    with pytest.raises(OSError, match=r"could not be written.*what was there is unchanged"):
        save_model(whole, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
