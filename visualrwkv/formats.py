"""What is in a file, found out from the names and shapes of its tensors: their names in our terms, and every size.

Ours are the names of the public `.pth` files: `rwkv.` before a language model's, `vit.` before an encoder's, `proj.`
before a projector's. C channels, N head size, D vision width.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from visualrwkv.config import (
    MEET_PRESETS,
    SIGLIP,
    VISION_PRESETS,
    MeetPreset,
    ProjectorKind,
    RWKVConfig,
    TowersConfig,
    VisionConfig,
    ViTConfig,
    VRWKVConfig,
)

Tensors = dict[str, Tensor]

# Names ---------------------------------------------------------------------------------------------------------------

PARTS = ("rwkv.", "vit.", "proj.")
WORLD = "modality.world_encoder."  # what WorldRWKV's encoder and adapter lie under
FLA_MIXES = "rwkvg"  # flash-linear-attention's order of RWKV-6's mixes; the public files have wkvrg

# RWKV-org's directories for transformers: whole words where the public files abbreviate.
RWKV_ORG = {
    "rwkv.embeddings.": "emb.",
    ".pre_ln.": ".ln0.",
    ".attention.": ".att.",
    ".feed_forward.": ".ffn.",
    "_mix_key": "_mix_k",
    "_mix_value": "_mix_v",
    "_mix_receptance": "_mix_r",
    "_mix_gate": "_mix_g",
}

# flash-linear-attention's, once the layer's number is taken off; what is laid out otherwise: `_from_fla_layer`.
FLA = {
    "pre_norm.": "ln0.",
    "attn_norm.": "ln1.",
    "ffn_norm.": "ln2.",
    "attn.g_norm.": "att.ln_x.",
    "attn.r_proj.": "att.receptance.",
    "attn.k_proj.": "att.key.",
    "attn.v_proj.": "att.value.",
    "attn.o_proj.": "att.output.",
    "attn.g_proj.": "att.gate.",
    "attn.": "att.",
    "ffn.": "ffn.",
}


def public_names(weights: Tensors, path: Path) -> Tensors:
    """The tensors of any known file by our names; ValueError where none of the formats is recognised."""
    weights = {k.removeprefix("module."): v for k, v in weights.items()}
    if "model.embeddings.weight" in weights:
        return from_fla(weights)
    if "rwkv.embeddings.weight" in weights:
        return from_rwkv_org(weights)
    if any(k.startswith(WORLD) for k in weights):
        return from_world(weights)
    if "emb.weight" in weights:
        mixed = next((k for k in weights if k.startswith(PARTS)), None)
        if mixed:
            raise ValueError(f"{path} is a mix of two models: it has both emb.weight and {mixed}")
        return {f"rwkv.{k}": v for k, v in weights.items()}
    if any(k.startswith(PARTS) for k in weights):
        return plain_vit_names(weights)
    some = ", ".join(list(weights)[:3])
    raise ValueError(f"{path} is of no known format: neither emb.weight nor rwkv.emb.weight among its keys ({some}, …)")


def from_world(weights: Tensors) -> Tensors:
    """WorldRWKV's names to ours: the language model's bare, the encoder and its adapter below `WORLD`."""
    parts = {f"{WORLD}adapter.": "proj.", f"{WORLD}model.": "vit.vision_model.", "": "rwkv."}
    found = {}
    for name, tensor in weights.items():
        theirs = next(t for t in parts if name.startswith(t))
        found[parts[theirs] + name[len(theirs) :]] = tensor
    return found


def to_world(weights: Tensors) -> Tensors:
    """The inverse of `from_world`."""
    parts = {"proj.": f"{WORLD}adapter.", "vit.vision_model.": f"{WORLD}model.", "rwkv.": ""}
    return {ours + k[len(t) :]: v for k, v in weights.items() for t, ours in parts.items() if k.startswith(t)}


def plain_vit_names(weights: Tensors) -> Tensors:
    """CLIP's and SigLIP's names with their inner `vision_model.` level, which newer transformers leave out."""
    bare = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head.")
    if "vit.embeddings.patch_embedding.weight" not in weights:
        return weights
    return {
        f"vit.vision_model.{k[4:]}" if k.startswith("vit.") and k[4:].startswith(bare) else k: v
        for k, v in weights.items()
    }


def from_rwkv_org(weights: Tensors) -> Tensors:
    """RWKV-org's names (RWKV-5 and RWKV-6 directories) to ours."""
    found = {}
    for name, tensor in weights.items():
        for theirs, ours in RWKV_ORG.items():
            name = name.replace(theirs, ours)
        found[name if name.startswith("rwkv.") else f"rwkv.{name}"] = tensor
    return found


def from_fla(weights: Tensors) -> Tensors:
    """flash-linear-attention's names and layouts (RWKV-6 and RWKV-7 directories) to ours."""
    found = {}
    for name, tensor in weights.items():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            for inner, one in _from_fla_layer(rest, tensor):
                found[f"rwkv.blocks.{layer}.{inner}"] = one
        else:
            top = {"model.embeddings.": "emb.", "model.norm.": "ln_out.", "lm_head.": "head."}
            found["rwkv." + next((o + name[len(t) :] for t, o in top.items() if name.startswith(t)), name)] = tensor
    return found


def _from_fla_layer(name: str, x: Tensor) -> Iterable[tuple[str, Tensor]]:
    """One tensor of a layer, by our names: several where theirs is stacked."""
    ours = [FLA_MIXES.index(mix) for mix in "wkvrg"]
    row = x.reshape(1, 1, -1)
    if match := re.fullmatch(r"attn\.([wavg])_lora\.lora\.([02])\.(weight|bias)", name):
        letter, layer, kind = match.groups()
        yield (f"att.{letter}0", row) if kind == "bias" else (f"att.{letter}{1 + int(layer) // 2}", x.T)
    elif match := re.fullmatch(r"attn\.w_proj\.linear\.lora\.([02])\.(weight|bias)", name):
        layer, kind = match.groups()
        yield ("att.time_decay", row) if kind == "bias" else (f"att.time_decay_w{1 + int(layer) // 2}", x.T)
    elif name == "attn.x_bias":
        yield from ((f"att.time_maa_{mix}", x[i].reshape(1, 1, -1)) for i, mix in enumerate(FLA_MIXES))
    elif name == "attn.x_proj.0.mu":
        yield "att.time_maa_x", row
    elif name == "attn.x_proj.0.linear.weight":
        yield "att.time_maa_w1", x.unflatten(0, (5, -1))[ours].flatten(0, 1).T
    elif name == "attn.x_proj.2.weight":
        yield "att.time_maa_w2", x.T.unflatten(0, (5, -1))[ours]
    elif name == "attn.bonus":
        yield "att.time_faaaa", x
    elif match := re.fullmatch(r"ffn\.(key|receptance)\.mu", name):
        yield f"ffn.time_maa_{match[1][0]}", row
    else:
        vector = re.fullmatch(r"(attn|ffn)\.(x_[rwkvag]|k_k|k_a)", name)
        place = next((o + name[len(t) :] for t, o in FLA.items() if name.startswith(t)), name)
        yield place.replace(".linear.", "."), row if vector else x


# Language models -----------------------------------------------------------------------------------------------------


def infer_rwkv(weights: Tensors, path: Path) -> RWKVConfig:
    """Version and all sizes of a language model from the names and shapes of its tensors."""
    first = "rwkv.blocks.0."
    if f"{first}att.time_first" in weights:
        raise ValueError(f"{path} is an RWKV-4 or an early RWKV-5, which are not supported; x052, x060 and x070 are")
    version = 7 if f"{first}att.r_k" in weights else 5 if f"{first}att.time_mix_k" in weights else 6
    try:
        vocab_size, n_embd = weights["rwkv.emb.weight"].shape
        n_head, head_size = weights[f"{first}att.{'r_k' if version == 7 else 'time_faaaa'}"].shape
        layers = {int(k.split(".")[2]) for k in weights if k.startswith("rwkv.blocks.")}
        sizes: dict[str, Any] = {
            "n_layer": len(layers),
            "n_embd": n_embd,
            "head_size": head_size,
            "vocab_size": vocab_size,
            "dim_ffn": weights[f"{first}ffn.key.weight"].shape[0],
        }
        if version == 6:
            sizes["mix_rank"] = weights[f"{first}att.time_maa_w2"].shape[1]
            sizes["decay_rank"] = weights[f"{first}att.time_decay_w1"].shape[1]
        if version == 7:
            lows = {"decay_rank": "w1", "rate_rank": "a1", "gate_rank": "g1"}
            sizes |= {rank: weights[f"{first}att.{name}"].shape[1] for rank, name in lows.items()}
            sizes["first_value"] = f"{first}att.v0" in weights
            if len(layers) > 1:
                sizes["value_rank"] = weights["rwkv.blocks.1.att.v1"].shape[1]
    except KeyError as error:
        raise ValueError(f"{path} is no RWKV-{version}: it lacks {error.args[0]}") from error
    if n_head * head_size != n_embd:
        raise ValueError(f"{path}: {n_head} heads of {head_size} do not make a width of {n_embd}")
    return RWKVConfig(version=version, **sizes)


# Encoders ------------------------------------------------------------------------------------------------------------


def depth(weights: Iterable[str], before: str) -> int:
    """How many layers are numbered after `before`."""
    return len({k[len(before) :].split(".")[0] for k in weights if k.startswith(before)})


def infer_vision(weights: Tensors, path: Path, proj_in: int = 0) -> VisionConfig:
    """Kind and sizes of an encoder from its tensors, named as after `vit.`; proj_in: the width that its projector reads."""
    try:
        if "dino_featurizer.pos_embed" in weights:
            return _infer_towers(weights, proj_in)
        if "vision_model.embeddings.patch_embedding.weight" in weights:
            return _infer_vit(weights)
        if "patch_embed.projection.weight" in weights:
            return _infer_vrwkv(weights, path)
    except KeyError as error:
        raise ValueError(f"{path} holds a vision encoder that lacks {error.args[0]}") from error
    some = ", ".join(list(weights)[:3])
    raise ValueError(f"{path} holds a vision encoder of no known kind (its keys: {some}, …)")


def _infer_towers(weights: Tensors, proj_in: int) -> TowersConfig:
    dino, siglip, sam = (f"{name}_featurizer." for name in ("dino", "siglip", "sam"))
    patches, dino_width = weights[f"{dino}pos_embed"].shape[1:]
    one = TowersConfig(
        dino_depth=depth(weights, f"{dino}blocks."),
        dino_width=dino_width,
        siglip_depth=depth(weights, f"{siglip}blocks."),
        siglip_width=weights[f"{siglip}pos_embed"].shape[2],
        siglip_ffn=weights[f"{siglip}blocks.0.mlp.fc1.weight"].shape[0],
        sam_depth=depth(weights, f"{sam}blocks."),
        sam_width=weights[f"{sam}pos_embed"].shape[3],
        sam_out=weights[f"{sam}neck.0.weight"].shape[0],
        image_size=14 * round(patches**0.5),
        sam_size=32 * round(patches**0.5),
    )
    return TowersConfig(**{**vars(one), "tiles": proj_in == 2 * one.width})


def _infer_vit(weights: Tensors) -> ViTConfig:
    root = "vision_model."
    width, _, patch, _ = weights[f"{root}embeddings.patch_embedding.weight"].shape
    positions = weights[f"{root}embeddings.position_embedding.weight"].shape[0]
    clip = f"{root}embeddings.class_embedding" in weights
    sizes = {
        "depth": depth(weights, f"{root}encoder.layers."),
        "width": width,
        "heads": 16 if width == 1152 else width // 64,  # so400m alone has heads of 72
        "ffn": weights[f"{root}encoder.layers.0.mlp.fc1.weight"].shape[0],
        "image_size": patch * round((positions - clip) ** 0.5),
        "patch_size": patch,
    }
    if clip:
        return ViTConfig(**sizes)
    return ViTConfig(**sizes, **SIGLIP, activation="gelu_pytorch_tanh", eps=1e-6, pooled=f"{root}head.probe" in weights)


def _infer_vrwkv(weights: Tensors, path: Path) -> VRWKVConfig:
    """One of the family: pre- or post-norm leaves no trace in the tensors, so that the width must tell."""
    width = weights["patch_embed.projection.weight"].shape[0]
    kind = "vrwkv6" if "layers.0.att.time_faaaa" in weights else "vrwkv"
    known = {name: c for name, c in VISION_PRESETS.items() if c.kind == kind}
    fits = [c for c in known.values() if c.width == width]
    if not fits:
        sizes = ", ".join(f"{name} ({c.width})" for name, c in known.items())
        raise ValueError(f"{path} holds a {kind} of width {width}; known are {sizes}")
    last = weights.get("head.fc.weight", weights.get("head.2.weight"))
    changed = {"classes": 0 if last is None else last.shape[0]} | ({} if last is not None else {"head_width": 0})
    return VRWKVConfig(**{**vars(fits[0]), **changed})


# Whole models --------------------------------------------------------------------------------------------------------


def infer_meeting(rwkv: RWKVConfig, vision: VisionConfig, weights: Tensors) -> tuple[str, MeetPreset]:
    """Which release a model is like, by name, and what its file does not hold: image tokens, scan, image position."""
    if isinstance(vision, TowersConfig):
        name = "v7.00" if rwkv.version == 7 else "UHD" if vision.tiles else "HD"
    elif isinstance(vision, VRWKVConfig):
        name = "nano"
    elif vision.kind == "siglip":
        name = "WorldRWKV" if "proj.mlp.0.weight" in weights else "v7.01"
    else:
        name = "v6.0"
    meet = MEET_PRESETS[name]
    return name, replace(meet, projector=infer_projector(weights, meet))


def infer_projector(weights: Tensors, meet: MeetPreset) -> ProjectorKind:
    """The kind of a projector from its names; "output_gated" and "relu" share theirs, so that the release decides."""
    if "proj.mlp.0.weight" in weights:
        return "mlp"
    if "proj.ln_v.weight" in weights:
        return "gated"
    if "proj.proj.weight" in weights:
        return meet.projector if meet.projector == "relu" else "output_gated"
    return "linear"


def projector_input(weights: Tensors) -> int:
    """The width of the features that a projector reads; 0 without one."""
    for name in ("proj.gate.weight", "proj.proj.weight", "proj.weight", "proj.mlp.0.weight"):
        if name in weights and (name != "proj.gate.weight" or "proj.ln_v.weight" in weights):
            return weights[name].shape[1]
    return 0
