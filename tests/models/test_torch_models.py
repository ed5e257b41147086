"""Whole models built from torch alone, against reverse-over-reverse."""

import pytest
import torch

import fomoh_fx
from tests.models.checking import check
from tests.models.models import PROBLEMS

CASES = PROBLEMS

#: Compiling takes half a minute for a model, so one of each kind; ``--every`` compiles all.
COMPILED = [
    "mlp", "paper_cnn", "batch_norm_train", "unet", "dropout", "transformer_encoder_dropout",
    "transformer_encoder_eval", "transformer", "lstm", "tied_language_model", "graph_network",
    "fourier_operator", "gru_language_model", "experts_by_rows", "set_prediction", "variational_autoencoder",
    "normalising_flow", "burgers_residual_by_autograd", "equilibrium_by_while_loop",
]  # fmt: skip


@pytest.mark.parametrize("name", PROBLEMS)
def test_eager(name):
    check(PROBLEMS[name]())


@pytest.mark.slow
@pytest.mark.by_turns
def test_compiled(compiled):
    with torch._inductor.config.patch(fallback_random=True):
        check(PROBLEMS[compiled](), lower=fomoh_fx.compile)
