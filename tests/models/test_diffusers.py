"""Whole models of the diffusers package, random weights and tiny configurations, against reverse-over-reverse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import fomoh_fx
from tests.models.checking import Problem, check

diffusers = pytest.importorskip("diffusers")


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


TIMES = torch.tensor([7, 400])
BLOCKS = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
LATENT = {"in_channels": 2, "out_channels": 2}
UNET = {
    **BLOCKS, **LATENT, "sample_size": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 8,
}  # fmt: skip
CONDITIONED = {
    **BLOCKS, "in_channels": 2, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 6,
    "attention_head_dim": 4,
}  # fmt: skip
SMALL_UNET = {
    **LATENT, "sample_size": 4, "block_out_channels": (4,), "layers_per_block": 1, "norm_num_groups": 2,
    "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "attention_head_dim": 2,
}  # fmt: skip
UNET_CONDITIONED = {
    **CONDITIONED, "out_channels": 2, "sample_size": 8, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
CODER = {
    **BLOCKS, **LATENT, "latent_channels": 2, "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
DIFFUSION_TRANSFORMER = {
    **LATENT, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2,
    "num_embeds_ada_norm": 10, "norm_num_groups": 4,
}  # fmt: skip
CONTROL = {**CONDITIONED, "conditioning_embedding_out_channels": (4, 8)}


@dataclass
class Case:
    """One model: its class, its configuration and its inputs."""

    model: str
    options: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]

    def problem(self) -> Problem:
        torch.manual_seed(0)
        model = getattr(diffusers, self.model)(**self.options).double().eval()
        for parameter in model.parameters():  # away from zero biases, unit scales and outputs that start at zero
            parameter.data += 0.05 * torch.randn_like(parameter)
        return Problem(model, (), {**self.inputs(), "return_dict": False})


def noisy() -> dict[str, Any]:
    return {"sample": r(2, 2, 8, 8), "timestep": TIMES}


def noisy_with_text() -> dict[str, Any]:
    return {**noisy(), "encoder_hidden_states": r(2, 3, 6)}


CASES = {
    "unet": Case("UNet2DModel", UNET, noisy),
    "unet-conditioned": Case("UNet2DConditionModel", UNET_CONDITIONED, noisy_with_text),
    "autoencoder": Case("AutoencoderKL", CODER, lambda: {"sample": r(1, 2, 8, 8)}),
    "dit": Case(
        "DiTTransformer2DModel", DIFFUSION_TRANSFORMER,
        lambda: {"hidden_states": r(2, 2, 8, 8), "timestep": TIMES, "class_labels": torch.tensor([1, 9])},
    ),
    "control-net": Case(
        "ControlNetModel", CONTROL, lambda: {**noisy_with_text(), "controlnet_cond": r(2, 3, 16, 16)}
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_eager(name: str) -> None:
    check(CASES[name].problem())


@pytest.mark.slow
def test_compiled() -> None:
    """The blocks of all U-Nets, once each: compiling takes time with depth.

    The model embeds the time in float32, with sines that Inductor rounds in its own way.
    """
    inputs = {"sample": r(1, 2, 4, 4), "timestep": TIMES[:1]}
    problem = Case("UNet2DModel", SMALL_UNET, lambda: inputs).problem()
    check(replace(problem, tolerance=1e-5), directions=1, lower=fomoh_fx.compile)
