"""What programs written for openai/CLIP do to a model, with transformers or plain PyTorch as the reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import make_image
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


@pytest.mark.parametrize("size", [16, 48, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_another_image_size_gives_transformers_vectors(
    size: int, dtype: torch.dtype, tiny: Path, reference: CLIPModel, tmp_path: Path
) -> None:
    resized, preprocess = miniclip.load(tiny, "cpu", image_size=size, dtype=dtype)
    assert (resized.visual.input_resolution, resized.config.vision.image_size, preprocess.size) == (size, size, size)
    theirs = reference.get_image_features(pixels(size=size), interpolate_pos_encoding=True)
    theirs = F.normalize(getattr(theirs, "pooler_output", theirs), dim=1)
    tolerance = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}[dtype]
    for _ in range(2):
        ours = F.normalize(resized.encode_image(pixels(size=size).to(dtype)).float(), dim=1)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)
    with pytest.raises(InputError, match=rf"images must be \(N, 3, {size}, {size}\)"):
        resized.encode_image(pixels(size=32))
    if dtype == torch.float32:  # saved, the folder has the new size
        miniclip.save_pretrained(resized, tmp_path, preprocess)
        again, _ = miniclip.load(tmp_path, "cpu")
        torch.testing.assert_close(again.encode_image(pixels(size=size)), resized.encode_image(pixels(size=size)))


@pytest.mark.parametrize("size", [0, 7, 33, -8, 32.0, True, "48"])
def test_an_image_size_that_is_no_multiple_of_the_patches_is_refused(size: Any, tiny: Path) -> None:
    with pytest.raises(miniclip.ConfigError, match="image_size must be a multiple of 8 pixels, the side of a patch"):
        miniclip.load(tiny, "cpu", image_size=size)


def test_the_own_image_size_changes_nothing(tiny: Path, model: CLIP) -> None:
    same, _ = miniclip.load(tiny, "cpu", image_size=32)
    assert torch.equal(same.visual.positional_embedding, model.visual.positional_embedding)


def test_other_sizes_are_refused_while_the_position_embeddings_are_the_models_own(model: CLIP) -> None:
    for size in (33, 48):  # 33 pixels have as many whole patches as 32
        with pytest.raises(InputError, match=r"images must be \(N, 3, 32, 32\)"):
            model.encode_image(pixels(size=size))


def as_torch(model: CLIP, tower: str, block: int) -> tuple[nn.MultiheadAttention, Any]:
    """PyTorch's own class with the weights of a block's attention."""
    blocks = model.visual.transformer.resblocks if tower == "image" else model.transformer.resblocks
    ours: Any = blocks[block].attn
    theirs = nn.MultiheadAttention(ours.embed_dim, ours.num_heads).eval()
    theirs.load_state_dict(ours.state_dict())
    return theirs, ours


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("options", [{}, {"need_weights": False}, {"average_attn_weights": False}])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_answers_as_torch_does(model: CLIP, tower: str, options: dict[str, bool], masked: bool) -> None:
    """As CLIPSeg and CLIP_Surgery call it: query, key and value, with weights and masks."""
    theirs, ours = as_torch(model, tower, 1)
    assert (ours.num_heads, ours.head_dim, ours.embed_dim) == (theirs.num_heads, theirs.head_dim, theirs.embed_dim)
    randoms = torch.Generator().manual_seed(0)
    q = torch.randn(5, 2, ours.embed_dim, generator=randoms)
    k, v = torch.randn(2, 7, 2, ours.embed_dim, generator=randoms)
    mask = torch.ones(5, 7).triu(2).bool() if masked else None
    (given, weights), (expected, their_weights) = (each(q, k, v, attn_mask=mask, **options) for each in (ours, theirs))
    torch.testing.assert_close(given, expected)
    assert (weights is None) == (their_weights is None)
    if weights is not None:
        torch.testing.assert_close(weights, their_weights)
    with pytest.raises(TypeError, match="query, key and value, or one tensor alone"):
        ours(q, k)


def openai_block(block: Any, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """openai/CLIP's formula of a block, with PyTorch's attention."""
    attention = nn.MultiheadAttention(block.attn.embed_dim, block.attn.num_heads).eval()
    attention.load_state_dict(block.attn.state_dict())
    y = block.ln_1(x)
    x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
    return x + block.mlp(block.ln_2(x))


def test_the_mask_of_a_block_is_openais(model: CLIP) -> None:
    blocks: Any = model.transformer.resblocks
    mask = blocks[0].attn_mask
    assert torch.equal(mask, torch.full((77, 77), float("-inf")).triu_(1))
    assert model.visual.transformer.resblocks[0].attn_mask is None
    x = torch.randn(77, 2, 48, generator=torch.Generator().manual_seed(0))
    y = blocks[0].ln_1(x)
    torch.testing.assert_close(blocks[0].attention(y), blocks[0].attn(y), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(blocks[0](x), openai_block(blocks[0], x, mask), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "float", "bool", "half"])
def test_a_mask_that_is_set_is_obeyed(model: CLIP, kind: str) -> None:
    """In both towers, before and after the weights are packed; and a model without it computes as before."""
    tokens, images = miniclip.tokenize(["a cat", "two dogs on a bench"]), pixels()
    before = model.encode_image(images), model.encode_text(tokens)
    windows = {length: (torch.arange(length)[:, None] - torch.arange(length)).abs() > 4 for length in (17, 77)}
    masks: dict[int, torch.Tensor | None] = dict.fromkeys((17, 77))
    if kind == "bool":
        masks = {**windows}
    elif kind != "none":
        dtype = torch.float16 if kind == "half" else torch.float32
        masks = {
            length: torch.zeros(length, length).masked_fill(window, -1e4).to(dtype)
            for length, window in windows.items()
        }
    for blocks, length in ((model.visual.transformer.resblocks, 17), (model.transformer.resblocks, 77)):
        for block in blocks:
            block.attn_mask = masks[length]
    float_masks = {
        length: mask.float() if kind == "half" and mask is not None else mask for length, mask in masks.items()
    }
    x = model.visual.ln_pre(model.visual.embed(images)).transpose(0, 1)
    for block in model.visual.transformer.resblocks:
        x = openai_block(block, x, float_masks[17])
    expected_images = model.visual.ln_post(x[0]) @ model.visual.proj
    y = model.embed_tokens(tokens).transpose(0, 1)
    for block in model.transformer.resblocks:
        y = openai_block(block, y, float_masks[77])
    ends = tokens.argmax(dim=1)
    expected_texts = model.ln_final(y.transpose(0, 1)[torch.arange(2), ends]) @ model.text_projection
    for _ in range(3):
        torch.testing.assert_close(model.encode_image(images), expected_images, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(model.encode_text(tokens), expected_texts, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(expected_texts, before[1], atol=1e-3)
    assert torch.allclose(expected_images, before[0], atol=1e-3) == (kind == "none")


# -- preprocess.transforms --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK", "1"])
@pytest.mark.parametrize("size", [(40, 30), (31, 77), (32, 32), (33, 32)])
def test_the_steps_one_by_one_equal_the_call_to_the_bit(mode: str, size: tuple[int, int]) -> None:
    preprocess = miniclip.Preprocess(32)
    image: Any = make_image(None, 3, size).convert(mode)
    expected = preprocess(image)
    assert len(preprocess.transforms) == 5
    for step in preprocess.transforms:
        image = step(image)
    assert torch.equal(image, expected)


def test_slices_of_the_steps_take_tensors_with_gradients() -> None:
    """As StyleGAN-NADA slices them: an image from -1 to 1, resized, cropped and normalised."""
    preprocess = miniclip.Preprocess(32)
    image = torch.rand(2, 3, 50, 70, generator=torch.Generator().manual_seed(0), requires_grad=True)
    x: Any = image
    for step in preprocess.transforms[:2] + preprocess.transforms[4:]:
        x = step(x)
    resized = F.interpolate(image, size=(32, 44), mode="bicubic", antialias=True, align_corners=False)
    mean, std = (torch.tensor(values)[:, None, None] for values in (preprocess.mean, preprocess.std))
    torch.testing.assert_close(x, (resized[..., 6:38] - mean) / std)
    x.sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0


def test_a_tensor_is_resized_nearly_as_an_image() -> None:
    """Pillow rounds to 8 bits between its two passes."""
    preprocess = miniclip.Preprocess(32)
    image = make_image(None, 5, (90, 60))
    pixels = torch.from_numpy(np.array(image).transpose(2, 0, 1).copy()).float() / 255
    for step in preprocess.transforms[:2] + preprocess.transforms[4:]:
        pixels = step(pixels)
    assert (pixels.clamp(-2, 2.5) - preprocess(image)).abs().mean() < 0.05


def test_steps_refuse_what_they_cannot_take() -> None:
    resize, crop, _, _, normalise = miniclip.Preprocess(32).transforms
    for call, said in (
        (lambda: resize("x"), "takes a PIL image or a tensor"),
        (lambda: crop(torch.zeros(3, 20, 40)), "40 x 20 pixels cannot be cropped to 32"),
        (lambda: normalise(torch.zeros(1, 4, 4)), r"got \(1, 4, 4\)"),
    ):
        with pytest.raises(InputError, match=said):
            call()
    with pytest.raises(miniclip.ConfigError, match="the convention"):
        _ = miniclip.Preprocess(32, convention="huggingface").transforms
