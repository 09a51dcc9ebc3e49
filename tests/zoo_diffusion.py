"""Models of the zoo: diffusers, built from configs, unmodified. The user's own module around them predicts the noise."""

from __future__ import annotations

from typing import Any

import models
import torch
from torch import nn

Sample = tuple[nn.Module, dict[str, torch.Tensor]]


class Denoiser(nn.Module):
    """A training step as its user writes it: the network sees noisy images and the loss is its squared error in the noise."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, noisy: torch.Tensor, noise: torch.Tensor, **conditions: torch.Tensor) -> dict[str, torch.Tensor]:
        sample = self.network(noisy, return_dict=False, **conditions)[0]
        return {"loss": nn.functional.mse_loss(sample, noise), "sample": sample}


def _floats(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def unet2d_condition(dtype: torch.dtype) -> Sample:
    """Down and up with skips, group norms, attention across pixels and to a text of five words."""
    from diffusers import UNet2DConditionModel

    def make() -> nn.Module:
        network = UNet2DConditionModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 12),
            layers_per_block=1,
            norm_num_groups=4,
            cross_attention_dim=10,
            attention_head_dim=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        )
        return Denoiser(network)

    noisy, noise = (_floats(3, 3, 8, 8, dtype=dtype, seed=seed) for seed in (1, 2))
    words = _floats(3, 5, 10, dtype=dtype, seed=3)
    batch = {"noisy": noisy, "noise": noise, "timestep": torch.tensor([5, 400, 999]), "encoder_hidden_states": words}
    return models._build(make, dtype, "cpu"), batch


def unet2d_pixels(dtype: torch.dtype) -> Sample:
    """Without a text; attention over the pixels of one level, dropout."""
    from diffusers import UNet2DModel

    def make() -> nn.Module:
        network = UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=3,
            block_out_channels=(8, 8),
            layers_per_block=1,
            norm_num_groups=2,
            attention_head_dim=4,
            dropout=0.1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )
        return Denoiser(network)

    noisy, noise = (_floats(5, 3, 8, 8, dtype=dtype, seed=seed) for seed in (1, 2))
    return models._build(make, dtype, "cpu"), {"noisy": noisy, "noise": noise, "timestep": torch.tensor([0, 5, 400, 500, 999])}


def dit(dtype: torch.dtype) -> Sample:
    """A transformer over patches, its norms steered by time and class; classes are dropped at random while it trains."""
    from diffusers import DiTTransformer2DModel

    def make() -> nn.Module:
        network = DiTTransformer2DModel(
            num_attention_heads=3, attention_head_dim=8, in_channels=3, num_layers=2, sample_size=8, patch_size=2, num_embeds_ada_norm=11
        )
        return Denoiser(network)

    noisy, noise = (_floats(5, 3, 8, 8, dtype=dtype, seed=seed) for seed in (1, 2))
    batch = {
        "noisy": noisy,
        "noise": noise,
        "timestep": torch.tensor([0, 5, 400, 500, 999]),
        "class_labels": torch.tensor([0, 7, 10, 3, 3]),
    }
    return models._build(make, dtype, "cpu"), batch


# name -> (factory of a dtype, what it is there for[, options of capture])
MODELS: dict[str, Any] = {
    "unet2d_condition": (unet2d_condition, "group norm, skips, cross attention"),
    "unet2d_pixels": (unet2d_pixels, "group norm, attention over pixels, dropout"),
    "dit": (dit, "adaptive norms, random class dropout"),
}
