"""Models with nested stacks, changing widths and work in between: gradients are those of cached layers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import meft
from meft.verification.gradients import relative_differences
from meft_lab.families.subject import loss_on
from support.peft_helpers import taken

Made = tuple[nn.Module, dict[str, Any], list[str]]
IMAGES = {"pixel_values": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))}
SWIN: dict[str, Any] = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2]}


def boxes(model: type[nn.Module], config: Any) -> Made:
    """With auxiliary losses, for which the decoder norms every hidden state."""
    stages = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "out_features": ["stage2"]}
    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 5, "auxiliary_loss": True}
    layers = {"encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    backbone: dict[str, Any] = {"backbone": None, "use_timm_backbone": False, "use_pretrained_backbone": False}
    made = config(backbone_config=transformers.ResNetConfig(**stages), **backbone, **sizes, **layers)
    label = {"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.4, 0.3, 0.2]])}
    return model(made), {**IMAGES, "labels": [label, label]}, ["model.encoder.layers", "model.decoder.layers"]


def table_transformer() -> Made:
    return boxes(transformers.TableTransformerForObjectDetection, transformers.TableTransformerConfig)


def detr() -> Made:
    return boxes(transformers.DetrForObjectDetection, transformers.DetrConfig)


def yolos() -> Made:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    images = {"image_size": [64, 64], "patch_size": 16, "num_detection_tokens": 5}
    config = transformers.YolosConfig(**sizes, **images, use_mid_position_embeddings=True)
    return transformers.YolosModel(config), IMAGES, ["encoder.layer"]


def hiera() -> Made:
    patches = {"patch_kernel": [7, 7], "patch_stride": [4, 4], "patch_padding": [3, 3], "masked_unit_size": [4, 4]}
    stages: dict[str, Any] = {"depths": [2, 3], "num_heads": [1, 2], "masked_unit_attention": [True, False]}
    config = transformers.HieraConfig(embed_dim=16, image_size=[64, 64], num_query_pool=1, **patches, **stages)
    return transformers.HieraModel(config), IMAGES, ["encoder.stages.0.layers", "encoder.stages.1.layers"]


def sam2() -> Made:
    stages: dict[str, Any] = {
        "blocks_per_stage": [2, 2, 2, 2],
        "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [4, 2, 4, 2],
    }
    backbone = {"model_type": "sam2_hiera_det_model", "hidden_size": 16, "num_attention_heads": 1}
    backbone |= {"image_size": [64, 64], "global_attention_blocks": [5], **stages}
    config = transformers.Sam2VisionConfig(
        backbone_config={**backbone, "window_positional_embedding_background_size": [7, 7]},
        backbone_channel_list=[128, 64, 32, 16],
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
        fpn_hidden_size=32,
    )
    return transformers.Sam2VisionModel(config), IMAGES, ["backbone.blocks"]


def mask2former() -> Made:
    backbone = transformers.SwinConfig(**SWIN | {"depths": [2] * 4, "num_heads": [1, 2, 4, 4]}, window_size=4)
    backbone.out_features = ["stage1", "stage2", "stage3", "stage4"]
    widths = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "encoder_feedforward_dim": 64}
    layers = {"encoder_layers": 2, "decoder_layers": 3, "num_attention_heads": 4, "dim_feedforward": 64}
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone, num_queries=5, use_pretrained_backbone=False, **widths, **layers
    )
    stages = [f"pixel_level_module.encoder.swin.encoder.layers.{stage}.blocks" for stage in range(4)]
    others = ["pixel_level_module.decoder.encoder.layers", "transformer_module.decoder.layers"]
    return transformers.Mask2FormerModel(config), IMAGES, [*stages, *others]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "make",
    [table_transformer, yolos, hiera, *(pytest.param(make, marks=SLOW) for make in (detr, sam2, mask2former))],
)
@pytest.mark.parametrize("coupling", ["momentum", "meft1"])
def test_stacks_of_models(make: Callable[[], Made], coupling: str) -> None:
    torch.manual_seed(0)
    model, batch, names = make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found = []
    for backward in ("reversible", "cached"):
        converted = meft.make_reversible(copy.deepcopy(model).train(), coupling, backward=backward)
        torch.manual_seed(1)  # some drop out by function, or draw the points that they compare
        loss_on(converted, batch).backward()
        assert list(meft.report(converted).stacks) == names
        found.append(taken(converted))
    errors, _ = relative_differences({name: (found[0][name], found[1][name]) for name in found[1]})
    assert max(errors.values()) < 2e-5, max(errors, key=lambda name: errors[name])
    assert meft.verify(meft.make_reversible(model.train(), coupling), batch).bitwise
