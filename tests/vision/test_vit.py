"""CLIP and SigLIP: tiny random models made with transformers' and open_clip's own classes, saved, opened by us."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from visualrwkv.checkpoint import load_vision
from visualrwkv.vision.processor import make_processor

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def made(randomise):
    """made(family, folder, whole, sizes): transformers' own model, saved to a folder -> its vision part."""

    def make(family, folder, whole=False, **sizes):
        sizes = {**SIZES, **sizes}
        if whole:
            text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
            config = getattr(transformers, f"{family}Config")
            theirs = getattr(transformers, f"{family}Model")(
                config(vision_config=sizes, text_config=text | {"vocab_size": 9})
            )
        else:
            theirs = getattr(transformers, f"{family}VisionModel")(
                getattr(transformers, f"{family}VisionConfig")(**sizes)
            )
        randomise(theirs, deviation=0.05).eval().save_pretrained(folder)
        return theirs.vision_model if whole else theirs

    return make


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip_equals_transformers(made, tmp_path, pixels, whole, activation):
    net = made("CLIP", tmp_path, whole, hidden_act=activation)
    ours = load_vision(tmp_path)
    with torch.no_grad():
        wanted = net(pixel_values=pixels, output_hidden_states=True)
        torch.testing.assert_close(ours(pixels), wanted.last_hidden_state.roll(-1, 1), rtol=0, atol=1e-5)
        assert (ours.config.grid, ours.config.width, ours.config.activation) == (4, 128, activation)
        ours.config = replace(ours.config, layer=-2, cls_token=False)
        torch.testing.assert_close(ours(pixels), wanted.hidden_states[-2][:, 1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("whole", [True, False])
def test_siglip_equals_transformers(made, tmp_path, pixels, whole):
    net = made("Siglip", tmp_path, whole)
    ours = load_vision(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), net(pixel_values=pixels).last_hidden_state, rtol=0, atol=1e-5)
    assert ours.config.pooled
    assert not ours.config.cls_token


@pytest.mark.parametrize("inner", [True, False])
def test_both_spellings_open(made, tmp_path, pixels, inner):
    """Files of older transformers have one level of names more."""
    theirs = made("CLIP", tmp_path)
    bare = {k.removeprefix("vision_model."): v for k, v in theirs.state_dict().items()}
    weights = {f"vision_model.{k}": v for k, v in bare.items()} if inner else bare
    if inner:
        weights["vision_model.embeddings.position_ids"] = torch.arange(17)[None]  # and a buffer
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_vision_model", **SIZES}))
    with torch.no_grad():
        wanted = theirs(pixel_values=pixels).last_hidden_state.roll(-1, 1)
        torch.testing.assert_close(load_vision(tmp_path)(pixels), wanted, rtol=0, atol=1e-5)


def test_open_clip_equals_open_clip_and_transformers(randomise, tmp_path, pixels, monkeypatch):
    """The same weights give the same features by open_clip's names and by transformers'."""
    open_clip = pytest.importorskip("open_clip")
    tiny = {
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": 128, "patch_size": 8, "mlp_ratio": 2.0},
        "text_cfg": {"context_length": 5, "vocab_size": 9, "width": 32, "heads": 2, "layers": 1},
    }
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: tiny if name == "tiny" else None)
    theirs = randomise(open_clip.CLIP(**tiny), deviation=0.05).eval()
    torch.save(theirs.state_dict(), tmp_path / "tiny.pt")
    ours = load_vision(f"open_clip:tiny:{tmp_path / 'tiny.pt'}")
    seen = []
    theirs.visual.transformer.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        theirs.visual(pixels)
        found = ours(pixels)
    torch.testing.assert_close(found, seen[0].roll(-1, 1), rtol=0, atol=1e-5)
    transformers.CLIPVisionModel(ours.vision_model.config).save_pretrained(tmp_path)
    names = {k.removeprefix("vision_model."): v.contiguous() for k, v in ours.state_dict().items()}
    save_file(names, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        torch.testing.assert_close(load_vision(tmp_path)(pixels), found, rtol=0, atol=0)
    with pytest.raises(ValueError, match="open_clip has no model 'huge'"):
        load_vision("open_clip:huge:openai")
    with pytest.raises(ValueError, match="names no weights"):
        load_vision("open_clip:tiny")


def test_the_public_clip_in_open_clip_has_the_public_sizes():
    pytest.importorskip("open_clip")
    from visualrwkv.vision.encoder import make_encoder
    from visualrwkv.vision.openclip import open_clip_config

    config = open_clip_config("ViT-L-14-336-quickgelu")
    assert (config.width, config.depth, config.heads, config.ffn, config.grid) == (1024, 24, 16, 4096, 24)
    assert config.activation == "quick_gelu"
    with torch.device("meta"):
        assert sum(p.numel() for p in make_encoder(config).parameters()) == 303_507_456
    with pytest.raises(ValueError, match="no plain ViT"):
        open_clip_config("ViT-SO400M-14-SigLIP")


@pytest.mark.parametrize("size", [(50, 32), (32, 51), (500, 333), (32, 32), (640, 31)])
def test_pictures_are_prepared_as_transformers_does(made, tmp_path, picture, size):
    """The middle of the picture, as the processor of CLIP's files cuts it; pixel by pixel."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    theirs = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    made("CLIP", tmp_path)
    image = picture().resize(size)
    wanted = theirs(image, return_tensors="pt")["pixel_values"][0]
    found = make_processor(load_vision(tmp_path).config)(image)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_another_model_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="model_type is 'bert'; known are clip and siglip"):
        load_vision(tmp_path)
