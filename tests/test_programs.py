"""What programs written for openai/CLIP do to a model, with transformers or plain PyTorch as the reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPModel

import miniclip
from miniclip import CLIP, InputError


@pytest.fixture
def model(tiny: Path) -> CLIP:
    return miniclip.load(tiny, "cpu")[0]


def pixels(n: int = 3, size: int = 32) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_without_the_projection_the_features_of_the_tower_come_out(model: CLIP, reference: CLIPModel) -> None:
    """As linear probes of openai/CLIP do it: model.visual.proj = None."""
    projected = model.encode_image(pixels())
    model.visual.proj = None
    for _ in range(3):  # with plain weights, and with packed ones
        features = model.encode_image(pixels())
        theirs = reference.vision_model(pixels()).pooler_output
        torch.testing.assert_close(features, theirs, rtol=1e-4, atol=1e-5)
    assert features.shape == (3, 64)
    assert projected.shape == (3, 48)
    assert model.visual.patch_tokens(pixels()).shape == (3, 16, 64)
    assert model.half().encode_image(pixels().half()).shape == (3, 64)


def test_replaced_position_embeddings_take_images_of_another_size(model: CLIP, reference: CLIPModel) -> None:
    """48 pixels have 6 x 6 patches of 8: interpolated as transformers does, with the same numbers."""
    positions = model.visual.positional_embedding
    patches = positions[1:].T.reshape(1, -1, 4, 4)
    larger = F.interpolate(patches, size=(6, 6), mode="bicubic", align_corners=False).flatten(2)[0].T
    model.visual.positional_embedding = nn.Parameter(torch.cat([positions[:1], larger]), requires_grad=False)
    theirs = reference.get_image_features(pixels(size=48), interpolate_pos_encoding=True)
    theirs = getattr(theirs, "pooler_output", theirs)
    for _ in range(3):
        torch.testing.assert_close(model.encode_image(pixels(size=48)), theirs, rtol=1e-4, atol=1e-5)
    for size, patches_there in ((32, 16), (56, 49)):
        with pytest.raises(InputError, match=rf"have {patches_there} patches, positional_embedding is for 36"):
            model.encode_image(pixels(size=size))


def test_other_sizes_are_refused_while_the_position_embeddings_are_the_models_own(model: CLIP) -> None:
    for size in (33, 48):  # 33 pixels have as many whole patches as 32
        with pytest.raises(InputError, match=r"images must be \(N, 3, 32, 32\)"):
            model.encode_image(pixels(size=size))
