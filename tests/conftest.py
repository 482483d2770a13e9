"""Small random models. Every parameter is moved off its initial value, so that nothing passes because it is zero."""

import pytest
import torch
from PIL import Image
from torch import nn

from visualrwkv.config import ModelConfig, RWKVConfig, VRWKVConfig
from visualrwkv.model import VisualRWKV

VISION = VRWKVConfig(depth=2, width=16, patch_size=8, image_size=32, pos_grid=4)


@pytest.fixture(scope="session")
def randomise():
    """randomise(module, seed, deviation): noise on every parameter; returns the module."""

    def noise(module: nn.Module, seed: int = 0, deviation: float = 0.2) -> nn.Module:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(deviation * torch.randn(parameter.shape, generator=generator))
        return module

    return noise


@pytest.fixture(scope="session")
def tiny_model(randomise):
    """tiny_model(scan=, projector=, image_tokens=, position=, vocab_size=, vision=, version=, template=): a whole model in eval mode."""

    def make(
        scan="bi",
        projector="gated",
        image_tokens=16,
        position="middle",
        vocab_size=65536,
        vision=VISION,
        seed=0,
        version=6,
        template="visualrwkv",
    ) -> VisualRWKV:
        ranks = ("mix_rank", "decay_rank") if version == 6 else ("decay_rank", "rate_rank", "value_rank", "gate_rank")
        sizes = dict.fromkeys(ranks, 4)
        language = RWKVConfig(4, 32, head_size=16, vocab_size=vocab_size, version=version, **sizes)
        torch.manual_seed(seed)
        return randomise(
            VisualRWKV(ModelConfig(language, vision, projector, image_tokens, scan, position, template)), seed
        ).eval()

    return make


@pytest.fixture(scope="session")
def pixels():
    """pixels(count): normalised random pictures (count, 3, 32, 32)."""

    def make(count: int, seed: int = 0) -> torch.Tensor:
        return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture(scope="session")
def picture():
    """picture(seed): a noisy PIL picture of 40 × 32 pixels."""

    def make(seed: int = 0) -> Image.Image:
        generator = torch.Generator().manual_seed(seed)
        return Image.fromarray(torch.randint(256, (32, 40, 3), generator=generator, dtype=torch.uint8).numpy())

    return make
