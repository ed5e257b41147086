"""Whole models of the transformers package, random weights and tiny configurations, against reverse-over-reverse."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import fomoh_fx
from fomoh_fx.errors import CaptureError
from tests.models.checking import Problem, check, truth_of

transformers = pytest.importorskip("transformers")

BATCH, LENGTH, VOCABULARY = 2, 6, 48
TOLERANCES = {"reverse": 1e-8, "difference": 1e-5}


def loss(output: Any) -> Tensor:
    """The cross entropy of the logits against fixed labels, or the mean square of the first output."""
    logits = output.get("logits", output.get("logits_per_image"))
    if logits is None:
        return output[0].square().mean()
    rows = logits.reshape(-1, logits.shape[-1])
    return cross_entropy(rows, torch.arange(rows.shape[0]) % rows.shape[1])


#: What most text models call their sizes.
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**SIZES, "num_attention_heads": 4, "num_key_value_heads": 2}
STATE_SPACE = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "expand": 2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@dataclass
class Case:
    """One model: its class, its configuration and its inputs.

    ``internals`` are attributes of the configuration that its constructor does not take; ``train`` is for models with
    batch statistics; ``output`` names what the loss reads where that is not the logits, or what comes first.
    """

    model: str
    config: str
    options: dict[str, Any]
    inputs: Callable[[], dict[str, Any]]
    internals: dict[str, Any] = field(default_factory=dict)
    train: bool = False
    truth: str = "reverse"
    output: str = ""

    def problem(self) -> Problem:
        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options)
        for name, value in self.internals.items():
            setattr(config, name, value)
        model = getattr(transformers, self.model)(config).double().train(self.train)
        for parameter in model.parameters():  # away from zero biases and unit scales
            parameter.data += 0.05 * torch.randn_like(parameter)
        read = (lambda output: output[self.output].square().mean()) if self.output else loss
        return Problem(model, (), self.inputs(), read, truth=self.truth, tolerance=TOLERANCES[self.truth], step=3e-5)


def tokens() -> dict[str, Any]:
    return {"input_ids": torch.randint(3, VOCABULARY, (BATCH, LENGTH))}


def uncached() -> dict[str, Any]:
    return {**tokens(), "use_cache": False}


def masked() -> dict[str, Any]:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.int64)
    mask[1, 4:] = 0
    return {**tokens(), "attention_mask": mask}


def masked_uncached() -> dict[str, Any]:
    return {**masked(), "use_cache": False}


def translation() -> dict[str, Any]:
    return {**masked_uncached(), "decoder_input_ids": torch.randint(3, VOCABULARY, (BATCH, 4))}


def pixels(size: int) -> Callable[[], dict[str, Any]]:
    return lambda: {"pixel_values": torch.randn(BATCH, 3, size, size, dtype=torch.float64)}


def text_and_pixels() -> dict[str, Any]:
    return {**tokens(), **pixels(8)()}


def speech_features() -> dict[str, Any]:
    return {
        "input_features": torch.randn(BATCH, 8, 12, dtype=torch.float64),
        "decoder_input_ids": torch.randint(3, VOCABULARY, (BATCH, 4)),
        "use_cache": False,
    }


def waveform() -> dict[str, Any]:
    return {"input_values": torch.randn(BATCH, 200, dtype=torch.float64)}


def text_around_an_image() -> dict[str, Any]:
    ids = torch.randint(3, 40, (BATCH, 7))  # no size of the image, with which it would vary
    is_image = torch.zeros_like(ids)
    ids[:, 1:5], is_image[:, 1:5] = 47, 1
    return {"input_ids": ids, "token_type_ids": is_image, "use_cache": False, **pixels(8)()}


def patches(*shapes: tuple[int, int]) -> dict[str, Any]:
    """Images of different shapes as rows of patches: the values of ``spatial_shapes`` decide sizes."""
    most = max(height * width for height, width in shapes)
    mask = torch.zeros(len(shapes), most, dtype=torch.int64)
    for image, (height, width) in enumerate(shapes):
        mask[image, : height * width] = 1
    values = torch.randn(len(shapes), most, 3 * 2 * 2, dtype=torch.float64)
    return {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(shapes)}


def text_around_patches() -> dict[str, Any]:
    ids = torch.randint(5, VOCABULARY, (BATCH, LENGTH))
    ids[:, 1:3] = 4
    return {"input_ids": ids, "use_cache": False, **patches((2, 4), (4, 2))}


def masked_video() -> dict[str, Any]:
    """The values of the mask decide how many patches there are."""
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 1, 1, 0]]).bool()
    return {"pixel_values": torch.randn(2, 4, 3, 4, 4, dtype=torch.float64), "bool_masked_pos": mask}


def global_attention() -> dict[str, Any]:
    """The values of the masks decide which places there are that attend to all others."""
    places = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    places[:, 0] = 1
    return {**masked(), "global_attention_mask": places}


EAGER = {"_attn_implementation": "eager"}
GPT2 = {
    "vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
VIT = {**SIZES, "image_size": 8, "patch_size": 4, "num_labels": 5}
T5 = {
    "vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 5}

REQUIRED = {
    "gpt2": Case("GPT2LMHeadModel", "GPT2Config", GPT2, uncached),
    "bert": Case("BertForSequenceClassification", "BertConfig", SIZES, masked),
    "llama": Case("LlamaForCausalLM", "LlamaConfig", GROUPED, uncached),
    "vit": Case("ViTForImageClassification", "ViTConfig", VIT, pixels(8)),
    "t5": Case("T5ForConditionalGeneration", "T5Config", T5, translation),
    "resnet": Case("ResNetForImageClassification", "ResNetConfig", RESNET, pixels(16), train=True),
}
DISTILBERT = {
    "vocab_size": VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "max_position_embeddings": 16,
}  # fmt: skip
BLOOM = {"vocab_size": VOCABULARY, "hidden_size": 16, "n_layer": 2, "n_head": 2}
WHISPER = {
    "vocab_size": VOCABULARY, "num_mel_bins": 8, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    "max_source_positions": 6, "max_target_positions": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1,
}  # fmt: skip
CLIP = {"text_config": SIZES, "vision_config": {**VIT, "projection_dim": 8}, "projection_dim": 8}
CONVNEXT = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2, "num_labels": 5}
SWIN = {
    "image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "window_size": 4,
    "num_labels": 5,
}  # fmt: skip
WAV2VEC2 = {
    **SIZES, "conv_dim": [8, 8], "conv_stride": [5, 2], "conv_kernel": [10, 3], "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
MOBILEVIT = {
    "image_size": 32, "hidden_sizes": [8, 12, 16], "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16],
    "num_attention_heads": 2, "num_labels": 5,
}  # fmt: skip
DETR = {
    "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_queries": 3,
    "backbone_config": {"model_type": "resnet", **RESNET, "out_features": ["stage2"]},
}  # fmt: skip
PVT = {
    "image_size": 16, "num_encoder_blocks": 2, "depths": [1, 2], "sequence_reduction_ratios": [2, 1],
    "hidden_sizes": [8, 16], "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [1, 2],
    "mlp_ratios": [2, 2], "hidden_dropout_prob": 0.1, "num_labels": 5,
}  # fmt: skip
GEMMA3 = {
    "text_config": {
        **GROUPED, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "vision_config": {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4,
    },
    "mm_tokens_per_image": 4, "image_token_index": 47, "boi_token_index": 45, "eoi_token_index": 46,
}  # fmt: skip
PATCHES = {
    "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2, "num_patches": 9,
    "patch_size": 2,
}  # fmt: skip
LFM2_VL = {
    "text_config": {
        **GROUPED, "conv_L_cache": 3, "block_multiple_of": 2, "layer_types": ["conv", "full_attention"],
    },
    "vision_config": PATCHES, "image_token_id": 4, "downsample_factor": 2, "projector_hidden_size": 8,
}  # fmt: skip
VIDEOMAE = {
    "image_size": 4, "patch_size": 2, "num_frames": 4, "tubelet_size": 2, "hidden_size": 8, "num_hidden_layers": 1,
    "num_attention_heads": 2, "intermediate_size": 12, "decoder_num_attention_heads": 2, "decoder_hidden_size": 8,
    "decoder_num_hidden_layers": 1, "decoder_intermediate_size": 12,
}  # fmt: skip
T5GEMMA_PART = {
    **GROUPED, "head_dim": 4, "query_pre_attn_scalar": 4, "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
}  # fmt: skip
T5GEMMA = {"encoder": T5GEMMA_PART, "decoder": {**T5GEMMA_PART, "is_decoder": True}, "vocab_size": VOCABULARY}
SUPERPOINT = {
    "encoder_hidden_sizes": [4, 4], "decoder_hidden_size": 4, "descriptor_decoder_dim": 4, "nms_radius": 1,
    "border_removal_distance": 2,
}  # fmt: skip
ESMFOLD = {
    **SIZES, "vocab_size": 33, "hidden_size": 8, "num_hidden_layers": 1, "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0, "is_folding_model": True, "esmfold_config": {
        "lddt_head_hid_dim": 4, "trunk": {
            "num_blocks": 1, "sequence_state_dim": 8, "pairwise_state_dim": 4, "sequence_head_width": 4,
            "pairwise_head_width": 2, "position_bins": 4, "chunk_size": None, "max_recycles": 1, "structure_module": {
                "ipa_dim": 4, "num_angles": 7, "num_blocks": 1, "num_heads_ipa": 2, "pairwise_dim": 4, "resnet_dim": 4,
                "sequence_dim": 8, "num_qk_points": 2, "num_v_points": 2, "num_resnet_blocks": 1,
            },
        },
    },
}  # fmt: skip
MIXTRAL = {**GROUPED, "num_local_experts": 3, "num_experts_per_tok": 2}

OTHERS = {
    "gpt2-eager": Case("GPT2LMHeadModel", "GPT2Config", GPT2, uncached, EAGER),
    "llama-eager": Case("LlamaForCausalLM", "LlamaConfig", GROUPED, uncached, EAGER),
    "gpt2-cache": Case("GPT2LMHeadModel", "GPT2Config", GPT2, tokens),
    "llama-cache": Case("LlamaForCausalLM", "LlamaConfig", GROUPED, tokens),
    "t5-cache": Case("T5ForConditionalGeneration", "T5Config", T5, lambda: {**translation(), "use_cache": True}),
    "longformer": Case(
        "LongformerForMaskedLM", "LongformerConfig", {**SIZES, "num_hidden_layers": 1, "attention_window": [4]},
        global_attention,
    ),
    "vilt": Case("ViltForQuestionAnswering", "ViltConfig", VIT, lambda: {**tokens(), **pixels(8)()}),
    "distilbert": Case("DistilBertForSequenceClassification", "DistilBertConfig", DISTILBERT, masked),
    "roberta": Case("RobertaForMaskedLM", "RobertaConfig", SIZES, masked),
    "gpt-neox": Case("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES, uncached),
    "mistral": Case("MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 4}, uncached),
    "qwen2": Case("Qwen2ForCausalLM", "Qwen2Config", GROUPED, uncached),
    "gemma": Case("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 4}, uncached),
    "phi": Case("PhiForCausalLM", "PhiConfig", SIZES, uncached),
    "opt": Case("OPTForCausalLM", "OPTConfig", {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16}, masked_uncached),
    "bloom": Case("BloomForCausalLM", "BloomConfig", BLOOM, masked_uncached),
    "falcon": Case("FalconForCausalLM", "FalconConfig", SIZES, uncached),
    "mixtral": Case(
        "MixtralForCausalLM", "MixtralConfig", MIXTRAL, uncached, {"_experts_implementation": "batched_mm"}
    ),
    "deberta": Case("DebertaV2ForSequenceClassification", "DebertaV2Config", SIZES, masked),
    "whisper": Case("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, speech_features),
    "clip": Case("CLIPModel", "CLIPConfig", CLIP, text_and_pixels),
    "convnext": Case("ConvNextForImageClassification", "ConvNextConfig", CONVNEXT, pixels(8)),
    "swin": Case("SwinForImageClassification", "SwinConfig", SWIN, pixels(16)),
    "mamba": Case("MambaForCausalLM", "MambaConfig", STATE_SPACE, uncached),
    "mamba2": Case(
        "Mamba2ForCausalLM", "Mamba2Config",
        {**STATE_SPACE, "num_heads": 4, "head_dim": 8, "n_groups": 1, "chunk_size": 4}, uncached,
    ),
    "wav2vec2": Case(  # reverse mode's second derivative of torch._weight_norm is wrong
        "Wav2Vec2Model", "Wav2Vec2Config", WAV2VEC2, waveform, truth="difference"
    ),
    "mobilevit": Case("MobileViTForImageClassification", "MobileViTConfig", MOBILEVIT, pixels(32), train=True),
    "pvt": Case(  # dropout of values that are not contiguous
        "PvtForImageClassification", "PvtConfig", PVT, pixels(16), train=True
    ),
    "gemma3": Case(  # its mask is made by indexing under vmap
        "Gemma3ForConditionalGeneration", "Gemma3Config", GEMMA3, text_around_an_image
    ),
    "detr": Case("DetrForObjectDetection", "DetrConfig", DETR, pixels(16)),
    "siglip2": Case(
        "Siglip2ForImageClassification", "Siglip2Config", {"vision_config": PATCHES, "num_labels": 5},
        lambda: patches((3, 4), (2, 3)),
    ),
    "lfm2-vl": Case("Lfm2VlForConditionalGeneration", "Lfm2VlConfig", LFM2_VL, text_around_patches),
    "videomae": Case("VideoMAEForPreTraining", "VideoMAEConfig", VIDEOMAE, masked_video),
    "t5gemma": Case("T5GemmaForConditionalGeneration", "T5GemmaConfig", T5GEMMA, translation),
    "superpoint": Case(  # how many keypoints there are is decided by the data, and nothing else is
        "SuperPointForKeypointDetection", "SuperPointConfig", SUPERPOINT, pixels(16), output="scores"
    ),
    "esmfold": Case(
        "EsmForProteinFolding", "EsmConfig", ESMFOLD,
        lambda: {"input_ids": torch.randint(0, 19, (1, 3)), "num_recycles": 0}, output="positions",
    ),
}  # fmt: skip
CASES = {**REQUIRED, **OTHERS}

#: With fewer layers, where a graph of two would take minutes to compile.
SMALLER = {
    "t5": {"num_layers": 1},
    "mamba": {"num_hidden_layers": 1},
    "mamba2": {"num_hidden_layers": 1},
    "swin": {
        "image_size": 8, "num_labels": 2, "mlp_ratio": 1.0, "depths": [2], "num_heads": [2], "window_size": 2,
        "embed_dim": 4,
    },
    "wav2vec2": {
        "num_hidden_layers": 1, "conv_dim": [4], "conv_stride": [5], "conv_kernel": [10], "num_feat_extract_layers": 1,
        "num_conv_pos_embeddings": 2, "num_conv_pos_embedding_groups": 1,
    },
}  # fmt: skip
COMPILED = [*{**REQUIRED, **SMALLER}, "detr"]  # ``--every`` compiles all
#: A dropout in place draws a mask that depends on no value, for which Inductor has an order of its own.
WHEN_COMPILED = {**SMALLER, "mobilevit": {"classifier_dropout_prob": 0.0}}
#: Inductor's own rounding of tables of angles, which transformers computes in float32.
ROUNDING = 1e-7


FAST = [*REQUIRED, "gpt2-cache", "llama-cache", "convnext"]
MARKS = {n: [] if n in FAST else [pytest.mark.slow, pytest.mark.by_turns] for n in CASES}


@pytest.mark.parametrize("name", [pytest.param(n, marks=marks) for n, marks in MARKS.items()])
def test_eager(name: str) -> None:
    check(CASES[name].problem())


@pytest.mark.slow
@pytest.mark.by_turns
def test_compiled(compiled: str) -> None:
    case = CASES[compiled]
    problem = replace(case, options={**case.options, **WHEN_COMPILED.get(compiled, {})}).problem()
    problem = replace(problem, tolerance=max(problem.tolerance, ROUNDING))
    with torch._inductor.config.patch(fallback_random=True):
        check(problem, directions=1 if compiled in OTHERS else 2, lower=fomoh_fx.compile)


@pytest.mark.slow
def test_experts_by_grouped_products() -> None:
    """The default implementation, in float32: PyTorch's grouped product has no float64. Truth: one product for each."""
    problem = CASES["mixtral"].problem()
    tangents = problem.directions(2)
    truth = truth_of(problem, tangents)
    model = deepcopy(problem.model).float()
    model.config._experts_implementation = "grouped_mm"
    hd = fomoh_fx.transform(model, loss)
    out = hd(tangents={name: v.float() for name, v in tangents.items()}, targets=(), **problem.kwargs)
    assert any("grouped_mm" in str(n.target) for n in hd.stages["normalize"].graph.nodes)
    for actual, expected in zip((out.primal, out.tangent, out.hessian()), truth, strict=False):
        assert float((actual.double() - expected).norm() / expected.norm()) < 1e-4


@pytest.mark.slow
def test_experts_in_a_loop_over_those_that_are_chosen_are_refused() -> None:
    problem = CASES["mixtral"].problem()
    problem.model.config._experts_implementation = "eager"
    with pytest.raises(CaptureError, match="expert_hit"):
        fomoh_fx.transform(problem.model, loss)(tangents=problem.directions(1), targets=(), **problem.kwargs)
