"""Public layouts: files made as the public codes make them are opened without sizes, and give what those codes compute."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

from visualrwkv.checkpoint import convert, describe, load_model, load_vision, save_model
from visualrwkv.config import (
    MEET_PRESETS,
    RWKV_PRESETS,
    VISION_PRESETS,
    ModelConfig,
    RWKVConfig,
    TowersConfig,
    ViTConfig,
)
from visualrwkv.files import read_tensors
from visualrwkv.formats import from_fla
from visualrwkv.model import IMAGE_PLACEHOLDER, LANGUAGE_MODELS, VisualRWKV
from visualrwkv.vision.encoder import make_encoder

RANKS = {"decay_rank": 8, "rate_rank": 8, "value_rank": 8, "gate_rank": 8}
CONFIGS = {
    5: RWKVConfig(3, 128, 64, 70, version=5),
    6: RWKVConfig(3, 128, 64, 70, mix_rank=8, decay_rank=16),
    7: RWKVConfig(3, 128, 64, 70, version=7, **RANKS),
}
IDS = [5, 6, 69, 0, 7, 7, 12, 33, 4]


def language(randomise, version, **sizes):
    torch.manual_seed(0)
    config = CONFIGS[version] if not sizes else RWKVConfig(**{**vars(CONFIGS[version]), **sizes})
    return randomise(LANGUAGE_MODELS[version](config)).requires_grad_(False)


# Language models against the `rwkv` package --------------------------------------------------------------------------

PEER = """
import os, sys, torch
os.environ |= {"RWKV_JIT_ON": "0", "RWKV_CUDA_ON": "0", "RWKV_V7_ON": sys.argv[2]}
from rwkv.model import RWKV
model = RWKV(sys.argv[1], "cpu fp32")
ids = eval(sys.argv[3])
with torch.no_grad():
    logits, state = model.forward(ids, None)
    said = []
    for _ in range(8):
        said.append(int(logits.argmax()))
        logits, state = model.forward(said[-1:], state)
    every, _ = model.forward(ids + said, None, full_output=True)
torch.save((every, said), sys.argv[4])
"""


@pytest.mark.parametrize("version", CONFIGS)
def test_language_models_equal_the_rwkv_package(randomise, tmp_path, version):
    """Logits of a whole row, and eight greedy tokens after it."""
    pytest.importorskip("rwkv")
    weights = language(randomise, version).state_dict()
    torch.save(weights, tmp_path / "model.pth")
    command = [sys.executable, "-c", PEER, tmp_path / "model", str(int(version == 7)), str(IDS), tmp_path / "out.pt"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    every, said = torch.load(tmp_path / "out.pt")
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "model.safetensors")
    for suffix in ("pth", "safetensors"):
        model = load_model(tmp_path / f"model.{suffix}")
        with torch.no_grad():
            logits, _ = model(torch.tensor([IDS + said]))
            spread = every.std()
            assert spread > 0.1
            assert (logits[0] - every.float()).abs().max() / spread < 1e-3
            answer, state = [], None
            step = torch.tensor([IDS])
            for _ in range(8):
                out, state = model(step, state=state)
                answer.append(int(out[0, -1].argmax()))
                step = torch.tensor([answer[-1:]])
        assert answer == said


# Directories for transformers ----------------------------------------------------------------------------------------


def org_name(name):
    """RWKV-org's names, as its converter makes them."""
    if name == "head.weight":
        return name
    name = name.replace("emb.", "embeddings.").replace(".ln0.", ".pre_ln.")
    name = name.replace(".att.", ".attention.").replace(".ffn.", ".feed_forward.")
    for short, word in (("k", "key"), ("v", "value"), ("r", "receptance"), ("g", "gate")):
        if name.endswith(f"time_mix_{short}"):
            name = name[:-1] + word
    return f"rwkv.{name}"


@pytest.mark.parametrize("version", [5, 6])
@pytest.mark.parametrize("parts", [1, 3])
def test_rwkv_org_directories(randomise, tmp_path, version, parts):
    net = language(randomise, version)
    weights = {org_name(k): v.contiguous() for k, v in net.state_dict().items()}
    (tmp_path / "config.json").write_text(f'{{"model_type": "rwkv{version}"}}')
    if parts == 1:
        save_file(weights, tmp_path / "model.safetensors")
    else:
        names = sorted(weights)
        index = {}
        for i in range(parts):
            file = f"model-0000{i + 1}-of-0000{parts}.safetensors"
            save_file({k: weights[k] for k in names[i::parts]}, tmp_path / file)
            index |= dict.fromkeys(names[i::parts], file)
        (tmp_path / "model.safetensors.index.json").write_text(str({"weight_map": index}).replace("'", '"'))
    model = load_model(tmp_path)
    assert model.config.rwkv == net.config
    torch.testing.assert_close(model.rwkv.state_dict(), net.state_dict(), rtol=0, atol=0)


FLA = """
import sys, torch, warnings
from importlib import import_module
from torch.nn.functional import pad
warnings.filterwarnings("ignore")
version, out = int(sys.argv[1]), sys.argv[2]
from visualrwkv.ops.wkv6 import wkv6_reference
from visualrwkv.ops.wkv7 import wkv7_reference

def shift(x, cu_seqlens=None, cache=None, output_cache=False):
    delta = pad(x, (0, 0, 1, -1)) - x
    return (delta, None) if output_cache else delta

def six(r, k, v, w, u, **options):
    return wkv6_reference(r, k, v, torch.log(-w), u)[0], None

def seven(r, w, k, v, a, b, **options):
    return wkv7_reference(r, torch.log(-w), k, v, a, b)[0], None

class Norm(torch.nn.GroupNorm):
    def forward(self, x):
        return super().forward(x.flatten(0, -2)).view_as(x)

layer, model = (import_module(f"fla.{room}.rwkv{version}{more}") for room, more in (("layers", ""), ("models", f".modeling_rwkv{version}")))
for module in (layer, model):
    if hasattr(module, "token_shift"):
        module.token_shift = shift
sizes = dict(hidden_size=128, num_hidden_layers=3, vocab_size=70, fuse_norm=False, fuse_cross_entropy=False, attn_mode="chunk")
import fla.models as models
if version == 6:
    layer.chunk_rwkv6 = layer.fused_recurrent_rwkv6 = six
    more = dict(num_heads=2, proj_low_rank_dim=8, gate_low_rank_dim=16, expand_k=1.0, expand_v=1.0, intermediate_size=448)
    net = models.RWKV6ForCausalLM(models.RWKV6Config(**sizes, **more))
else:
    from fla.ops.rwkv7.fused_addcmul import torch_addcmul_rwkv7
    from fla.ops.rwkv7.fused_k_update import k_update_ref
    layer.chunk_rwkv7 = layer.fused_mul_recurrent_rwkv7 = seven
    layer.fused_addcmul_rwkv7, layer.fused_k_rwkv7 = torch_addcmul_rwkv7, k_update_ref
    from fla.ops.rwkv7.gate_output_correction import gate_output_correction_ref
    layer.gate_output_correction = gate_output_correction_ref
    ranks = dict.fromkeys(("decay_low_rank_dim", "gate_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim"), 8)
    net = models.RWKV7ForCausalLM(models.RWKV7Config(**sizes, **ranks, head_dim=64, intermediate_size=512))
generator = torch.Generator().manual_seed(0)
for parameter in net.parameters():
    parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
if version == 6:
    for block in net.model.layers:  # what runs without a GPU; the norm with the eps of the public code
        mine = Norm(2, 128, eps=64e-5)
        mine.load_state_dict(block.attn.g_norm.state_dict())
        block.attn.g_norm = mine
        block.attn.gate_fn, block.ffn.act_fn = torch.nn.functional.silu, lambda x: x.relu().square()
net.save_pretrained(out)
with torch.enable_grad():
    torch.save(net(torch.tensor([eval(sys.argv[3])]), use_cache=False).logits.detach(), out + "/logits.pt")
"""


@pytest.mark.parametrize("version", [6, 7])
def test_fla_directories(tmp_path, version):
    """Made and computed by flash-linear-attention's own modules, with the reference recurrence in place of its kernels."""
    pytest.importorskip("fla", exc_type=ImportError)
    command = [sys.executable, "-c", textwrap.dedent(FLA), str(version), str(tmp_path), str(IDS)]
    settings = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}  # fla compiles some of its functions, for a minute
    done = subprocess.run(command, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    wanted = torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        logits, _ = load_model(tmp_path)(torch.tensor([IDS]))
    assert (logits - wanted).abs().max() / wanted.std() < 1e-3


def test_an_unknown_name_of_fla_is_kept_and_refused(randomise):
    weights = {"model.embeddings.weight": torch.ones(2), "model.layers.1.attn.new_thing": torch.ones(3)}
    assert "rwkv.blocks.1.att.new_thing" in from_fla(weights)


# Released VisualRWKV -------------------------------------------------------------------------------------------------

CLIP = ViTConfig(2, 64, 1, 96, image_size=32, patch_size=8)
TOWERS = TowersConfig(3, 64, 2, 72, 80, 3, 64, 24, image_size=112, sam_size=256)
SIGLIP = ViTConfig(
    *(2, 64, 1, 96, 32, 8, "siglip", "gelu_pytorch_tanh", 1e-6),
    cls_token=False,
    pooled=True,
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
    crop=0.0,
)
RELEASES = {  # version, encoder, projector's tensors, settings
    "v060": (6, CLIP, "linear", (17, "bi", "middle", "linear")),
    "HD": (6, TOWERS, "A", (64, "bi", "middle", "output_gated")),
    "UHD": (6, TowersConfig(**{**vars(TOWERS), "tiles": True}), "A", (64, "bi", "middle", "relu")),
    "v0700": (7, TOWERS, "B", (64, "uni", "first", "gated")),
    "v0700-linear": (7, TOWERS, "linear", (64, "uni", "first", "linear")),
    "v7.01": (7, SIGLIP, "B", (16, "uni", "first", "gated")),
    "WorldRWKV": (7, SIGLIP, "mlp", (16, "uni", "first", "mlp")),
}


def released(randomise, name):
    """The tensors of such a file."""
    version, vision, projector, _ = RELEASES[name]
    rwkv = language(randomise, version, vocab_size=65536)
    torch.manual_seed(1)
    weights = {f"rwkv.{k}": v for k, v in rwkv.state_dict().items()}
    weights |= {f"vit.{k}": v for k, v in randomise(make_encoder(vision), 1).state_dict().items()}
    D, C = vision.width, 128
    shapes = {
        "linear": {"weight": (C, D)},
        "A": {"proj.weight": (C, D), "gate.weight": (C, C), "o_proj.weight": (C, C)},
        "B": {"gate.weight": (D, D), "o_proj.weight": (C, D), "ln_v.weight": (C,), "ln_v.bias": (C,)},
        "mlp": {
            **{"pre_norm.weight": (C,), "pre_norm.bias": (C,), "mlp.0.weight": (4 * C, D), "mlp.0.bias": (4 * C,)},
            **{"mlp.2.weight": (C, 4 * C), "mlp.2.bias": (C,)},
        },
    }[projector]
    generator = torch.Generator().manual_seed(2)
    weights |= {f"proj.{k}": 0.1 * torch.randn(shape, generator=generator) for k, shape in shapes.items()}
    return world_names(weights) if name == "WorldRWKV" else weights


def world_names(weights):
    """As WorldRWKV's code names them: a bare language model, SigLIP's inner module as `model`, the projector as `adapter`."""
    places = {"rwkv.": "", "vit.vision_model.": "model.", "proj.": "adapter."}
    found = {}
    for name, x in weights.items():
        ours = next(o for o in places if name.startswith(o))
        before = "" if ours == "rwkv." else "modality.world_encoder."
        found[before + places[ours] + name[len(ours) :]] = x
    return found


def reference_forward(weights, name, model, ids, features, start):
    """The public code's way: projector, splice, then block after block on one row, odd ones with the patches turned round."""
    _, vision, kind, _ = RELEASES[name]
    places = ("proj.", "modality.world_encoder.adapter.")
    p = {k.removeprefix(place): v for k, v in weights.items() for place in places if k.startswith(place)}
    if kind == "linear":
        tokens = features @ p["weight"].T
    elif kind == "A":
        h = features @ p["proj.weight"].T
        tokens = (torch.relu(h) if name == "UHD" else h * torch.sigmoid(h @ p["gate.weight"].T)) @ p["o_proj.weight"].T
    elif kind == "mlp":
        h = torch.relu(features @ p["mlp.0.weight"].T + p["mlp.0.bias"]) @ p["mlp.2.weight"].T + p["mlp.2.bias"]
        tokens = h + torch.nn.functional.layer_norm(h, (128,), p["pre_norm.weight"], p["pre_norm.bias"])
    else:
        gated = features * torch.sigmoid(features @ p["gate.weight"].T)
        tokens = torch.nn.functional.layer_norm(gated @ p["o_proj.weight"].T, (128,), p["ln_v.weight"], p["ln_v.bias"])
    embedded = model.rwkv.emb(torch.tensor(ids))
    x = torch.cat((embedded[:start], tokens, embedded[start:]))
    end = start + vision.grid**2  # without the class token
    v_first = None
    for i, block in enumerate(model.rwkv.blocks):
        turn = i % 2 == 1 and name in ("v060", "HD", "UHD")
        if turn:
            x = torch.cat((x[:start], x[start:end].flip(0), x[end:]))
        x, _, v_first = block(x, torch.tensor([0, len(x)]), None, v_first)
        if turn:
            x = torch.cat((x[:start], x[start:end].flip(0), x[end:]))
    return model.rwkv.head(model.rwkv.ln_out(x))


@pytest.mark.parametrize("name", RELEASES)
def test_released_files_open_and_give_the_reference_numbers(randomise, tmp_path, caplog, name):
    weights = released(randomise, name)
    torch.save(weights, tmp_path / "release.pth")
    model = load_model(tmp_path / "release.pth")
    config = model.config
    tokens, scan, position, projector = RELEASES[name][3]
    assert f"{tokens} image tokens, scan {scan}, image position {position}, projector {projector}" in caplog.text
    assert (config.vision, config.projector) == (RELEASES[name][1], projector)
    assert (config.image_tokens, config.scan, config.image_position) == (tokens, scan, position)
    generator = torch.Generator().manual_seed(3)
    if isinstance(config.vision, TowersConfig):
        pixels = torch.randn(1, (2 * 3 * 112**2 + 3 * 256**2) * (5 if name == "UHD" else 1), generator=generator)
    else:
        pixels = torch.randn(1, 3, 32, 32, generator=generator)
    before, after = [24281, 59, 5], [47, 261, 5585]
    ids = torch.tensor([[*before, *[IMAGE_PLACEHOLDER] * tokens, *after]])
    with torch.no_grad():
        logits, _ = model(ids, pixels)
        wanted = reference_forward(weights, name, model, before + after, model.vit(pixels)[0], len(before))
    assert (logits[0] - wanted).abs().max() / wanted.std() < 1e-4


def test_a_release_in_two_parts(randomise, tmp_path):
    weights = {k: v.half() for k, v in released(randomise, "v060").items()}
    inner = {k.replace("vit.vision_model.", "vit."): v for k, v in weights.items() if not k.startswith("rwkv.")}
    torch.save(inner, tmp_path / "x_visual.pth")  # as newer transformers spell it
    torch.save({k[5:]: v for k, v in weights.items() if k.startswith("rwkv.")}, tmp_path / "x_rwkv.pth")
    found = load_model(tmp_path / "x_rwkv.pth", vision=tmp_path / "x_visual.pth")
    torch.testing.assert_close(found.state_dict(), {k: v.float() for k, v in weights.items()}, rtol=0, atol=0)
    assert found.config.image_tokens == 17
    vit = load_vision(tmp_path / "x_visual.pth")
    assert vit.config == CLIP
    with pytest.raises(ValueError, match=r"no two parts of one model: both have rwkv\."):
        load_model(tmp_path / "x_rwkv.pth", vision=tmp_path / "x_rwkv.pth")


def test_worldrwkv_without_its_encoder_takes_siglips_directory(randomise, tmp_path):
    weights = released(randomise, "WorldRWKV")
    torch.save({k: v for k, v in weights.items() if ".model." not in k}, tmp_path / "rwkv-0.pth")
    inner = {k.split(".model.")[1]: v for k, v in weights.items() if ".model." in k}
    (tmp_path / "siglip").mkdir()
    save_file(
        {f"vision_model.{k}": v.contiguous() for k, v in inner.items()}, tmp_path / "siglip" / "model.safetensors"
    )
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    values = {"model_type": "siglip", "vision_config": {**sizes, "image_size": 32, "patch_size": 8}}
    (tmp_path / "siglip" / "config.json").write_text(json.dumps(values))
    model = load_model(tmp_path / "rwkv-0.pth", vision=tmp_path / "siglip")
    torch.save(weights, tmp_path / "whole.pth")
    whole = load_model(tmp_path / "whole.pth")
    assert model.config.vision.heads == 2  # which the file alone does not tell
    assert dataclasses.replace(model.config, vision=whole.config.vision) == whole.config
    assert model.config.template == "world"
    torch.testing.assert_close(model.state_dict(), whole.state_dict(), rtol=0, atol=0)


def test_what_a_file_does_not_hold_can_be_told(randomise, tmp_path):
    torch.save(released(randomise, "v0700"), tmp_path / "model.pth")
    model = load_model(tmp_path / "model.pth", image_tokens=16, scan="multi", image_position="last")
    assert (model.config.image_tokens, model.config.scan, model.config.image_position) == (16, "multi", "last")
    with pytest.raises(ValueError, match="colour is no setting of a released model"):
        load_model(tmp_path / "model.pth", colour="red")


# What does not fit ---------------------------------------------------------------------------------------------------


def test_bad_files_are_one_sentence(randomise, tmp_path):
    file = tmp_path / "bad.pth"

    def refused(weights):
        torch.save(weights, file)
        with pytest.raises(ValueError) as said:
            load_model(file)
        assert str(file) in str(said.value)
        return str(said.value)

    bare = language(randomise, 6).state_dict()
    assert "is a mix of two models" in refused({**bare, "vit.pos_embed": torch.ones(1)})
    assert "RWKV-4" in refused({"emb.weight": torch.ones(2, 2), "blocks.0.att.time_first": torch.ones(2)})
    whole = released(randomise, "v060")
    assert "vision encoder of no known kind" in refused({k: v for k, v in whole.items() if "patch_embedding" not in k})
    wrong = {**whole, "proj.weight": torch.ones(128, 63)}
    assert "proj.weight is [128, 63] instead of [128, 64]" in refused(wrong)
    assert "holds numbers that are not finite: rwkv.blocks.1.ln1.bias" in refused(
        {**whole, "rwkv.blocks.1.ln1.bias": torch.full((128,), torch.nan)}
    )


# Facts and conversion ------------------------------------------------------------------------------------------------


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("name", RELEASES)
def test_there_and_back_is_bit_exact(randomise, tmp_path, name):
    weights = {k: v.bfloat16() for k, v in released(randomise, name).items()}
    torch.save(weights, tmp_path / "release.pth")
    config = convert(tmp_path / "release.pth", tmp_path / "ours", image_tokens=4 + (name == "v060"))
    assert config.token_grid == 2
    assert convert(tmp_path / "ours", tmp_path / "back.pth") == config
    same(read_tensors(tmp_path / "back.pth"), weights)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back.pth", "ours", "release.pth"]


def test_a_quickstart_model_there_and_back(randomise, tmp_path):
    """No release has its encoder, but its `.pth` opens all the same."""
    vision = VISION_PRESETS["vrwkv_nano"]
    config = ModelConfig(RWKV_PRESETS["rwkv6-nano"], vision, **MEET_PRESETS["nano"].settings(vision))
    model = randomise(VisualRWKV(config))
    save_model(model, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "model.pth")
    again = load_model(tmp_path / "model.pth")
    assert dataclasses.replace(again.config, rwkv=config.rwkv) == config
    same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize("version", CONFIGS)
def test_language_models_there_and_back(randomise, tmp_path, version):
    weights = {k: v.bfloat16() for k, v in language(randomise, version).state_dict().items()}
    if version == 7:  # as some files have them
        weights |= {f"blocks.0.att.v{i}": torch.randn_like(weights[f"blocks.1.att.v{i}"]) for i in range(3)}
    torch.save(weights, tmp_path / "lm.pth")
    convert(tmp_path / "lm.pth", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back.pth")
    same(read_tensors(tmp_path / "back.pth"), weights)


def test_nothing_is_written_of_what_does_not_fit(randomise, tmp_path):
    weights = language(randomise, 6).state_dict()
    weights["blocks.1.ln1.bias"] = torch.ones(5)
    torch.save(weights, tmp_path / "lm.pth")
    with pytest.raises(ValueError, match=r"rwkv\.blocks\.1\.ln1\.bias is \[5\] instead of \[128\]"):
        convert(tmp_path / "lm.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_facts(randomise, tmp_path):
    weights = {k: v.bfloat16() for k, v in released(randomise, "v060").items()}
    torch.save(weights, tmp_path / "release.pth")
    facts = describe(tmp_path / "release.pth")
    count = {part: sum(v.numel() for k, v in weights.items() if k.startswith(part)) for part in ("rwkv", "vit", "proj")}
    assert facts["language model"] == (
        f"RWKV-6, 3 layers of 128, 2 heads of 64, vocabulary 65,536, {count['rwkv']:,} parameters"
    )
    assert facts["vision encoder"] == f"clip, 4 x 4 patches of width 64, {count['vit']:,} parameters"
    assert facts["projector"] == f"linear, {count['proj']:,} parameters"
    assert facts["pictures"] == "17 image tokens, scan bi, position middle, as in v6.0"
    assert facts["stored as"] == "bfloat16"
    assert (
        facts["memory"]
        == f"{4e-6 * sum(count.values()):.3g} MB in float32, {2e-6 * sum(count.values()):.3g} MB in bfloat16"
    )
    assert facts["state of a session"] == f"{4e-3 * 3 * (2 * 128 + 128 * 64):.3g} kB"
    done = subprocess.run(
        [sys.executable, "-m", "visualrwkv.cli", "info", str(tmp_path / "release.pth"), "--scan", "uni"],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "17 image tokens, scan uni, position middle" in done.stdout
    out = tmp_path / "ours"
    done = subprocess.run(
        [sys.executable, "-m", "visualrwkv.cli", "convert", str(tmp_path / "release.pth"), str(out)],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert load_model(out).config == load_model(tmp_path / "release.pth").config
