"""Packed weights: the plain layers' numbers up to rounding, whatever is done to the model, its weights or inputs."""

from __future__ import annotations

import copy
import gc
import io
import math
import multiprocessing
import pickle
import sys
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_reference
from helpers import run_python
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import miniclip
from miniclip import CLIP, layers, packed, tokenize
from miniclip import model as model_module
from miniclip.layers import PackedLayer
from miniclip.model import path_of

DTYPES = {torch.float32: 1e-6, torch.float64: 1e-13}
PROMPTS = [f"a photo of a {name}." for name in ("cat", "dog", "cat and a dog", "hot dog", "cat", "armadillo")]
TEXTS = [
    *PROMPTS,
    "",
    "cat",
    "photo",
    "a photo",
    "a photo of",
    "the " * 75,
    "two dogs, and a very small bird on a wire",
]


@pytest.fixture(autouse=True)
def _every_call_is_worth_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "WORTH_PACKING", 0)


@pytest.fixture(params=["quick_gelu", "gelu"], scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    act = {"hidden_act": request.param}
    path = tmp_path_factory.mktemp(request.param)
    make_reference(vision_config=act, text_config=act).save_pretrained(path)
    return path


@pytest.fixture
def model(tiny: Path) -> CLIP:
    return miniclip.load(tiny, "cpu")[0]


def make_pixels(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def packed_layers(model: CLIP) -> list[PackedLayer]:
    return [module for module in model.modules() if isinstance(module, PackedLayer)]


@contextmanager
def all_plain(model: CLIP) -> Iterator[None]:
    """What ``fast = False`` does, but the packed copies are back afterwards, so that a stale one would be seen."""
    kept = [(layer, layer.packed) for layer in packed_layers(model)]
    for layer, _ in kept:
        layer.packed = None
    yield
    for layer, copies in kept:
        layer.packed = copies


def plain(model: CLIP, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The embeddings from plain weights, every token computed."""
    with all_plain(model):
        return model.encode_image(images), model.encode_text(tokens)


def plain_images(model: CLIP, images: Tensor) -> Tensor:
    with all_plain(model):
        return model.encode_image(images)


def plain_texts(model: CLIP, tokens: Tensor) -> Tensor:
    with all_plain(model):
        return model.encode_text(tokens)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> bool:
    a, b = F.normalize(a.double(), dim=-1), F.normalize(b.double(), dim=-1)
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance)


class OnCuda(Tensor):
    """A tensor in the CPU's memory that says it is on CUDA. So the layers compute it as they do there."""

    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]


def is_right(model: CLIP, tolerance: float = 1e-6) -> bool:
    """Whether the model computes what its plain layers do, on the CPU and as on CUDA."""
    images, tokens = make_pixels(5, model.dtype), tokenize(TEXTS)
    expected = plain(model, images, tokens)
    # The first two are the same: a second call must not see what a first one has kept.
    return all(
        close(model.encode_image(images.as_subclass(kind)), expected[0], tolerance)
        and close(model.encode_text(tokens.as_subclass(kind)), expected[1], tolerance)
        for kind in (Tensor, Tensor, OnCuda)
    )


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed kernels on every processor: where oneDNN has none, plain copies stand in for packed ones."""
    if not packed.has_packed_kernels(torch.float32):
        activations = {"none": lambda x: x, "swish": F.silu, "gelu": F.gelu}

        def product(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
            return activations[activation](F.linear(x, weight, bias))

        monkeypatch.setattr(packed, "has_packed_kernels", lambda dtype: dtype == torch.float32)
        monkeypatch.setattr(packed, "pack", torch.clone)
        monkeypatch.setattr(layers, "product", product)


def count_packed(model: CLIP) -> int:
    return sum(bool(layer.packed and layer.packed.has_copies()) for layer in packed_layers(model))


def is_packed(model: CLIP) -> bool:
    """Whether all layers have packed copies, where this processor has the kernels."""
    return count_packed(model) == (len(packed_layers(model)) if packed.has_packed_kernels(model.dtype) else 0)


# -- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_images_of_any_number(folder: Path, dtype: torch.dtype, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = miniclip.load(folder, "cpu", dtype=dtype)
    expected = plain_images(model, make_pixels(n, dtype))
    assert close(model.encode_image(make_pixels(n, dtype)), expected, DTYPES[dtype])
    monkeypatch.setattr(model_module, "MAX_TOKENS", 3 * 17)  # three of these images at a time
    assert close(model.encode_image(make_pixels(n, dtype)), expected, DTYPES[dtype])


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_images_in_any_layout(model: CLIP, layout: torch.memory_format) -> None:
    images = make_pixels(4).to(memory_format=layout)
    assert close(model.encode_image(images), plain_images(model, images))
    one = make_pixels(1).expand(4, -1, -1, -1)
    assert close(model.encode_image(one), plain_images(model, one))
    turned = make_pixels(4).transpose(2, 3)
    assert close(model.encode_image(turned), plain_images(model, turned))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("texts", [TEXTS, PROMPTS, ["cat"], [""], ["cat"] * 9, ["a", "b", "c"]], ids=repr)
def test_texts(folder: Path, dtype: torch.dtype, texts: list[str]) -> None:
    model, _ = miniclip.load(folder, "cpu", dtype=dtype)
    tokens = tokenize(texts)
    assert close(model.encode_text(tokens), plain_texts(model, tokens), DTYPES[dtype])
    assert close(model.encode_text(tokens.long()), plain_texts(model, tokens), DTYPES[dtype])


@pytest.mark.parametrize("kernels", [True, False])
def test_bfloat16_stays_as_near_to_float32(folder: Path, kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed too, where it is only emulated."""
    monkeypatch.setattr(packed, "has_packed_kernels", lambda dtype: kernels)
    exact, _ = miniclip.load(folder, "cpu", dtype=torch.float64)
    model, _ = miniclip.load(folder, "cpu", dtype=torch.bfloat16)
    images, tokens = make_pixels(5), tokenize(TEXTS)
    for given, reference, as_it_stands in (
        (model.encode_image(images), plain_images(exact, images.double()), plain_images(model, images)),
        (model.encode_text(tokens), plain_texts(exact, tokens), plain_texts(model, tokens)),
    ):
        assert given.dtype == torch.bfloat16
        off = 1 - F.cosine_similarity(given.double(), reference).min()
        assert off < 1.5 * (1 - F.cosine_similarity(as_it_stands.double(), reference).min())
    assert count_packed(model) == (len(packed_layers(model)) if kernels else 0)


def test_another_torch_or_processor_has_no_packed_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = packed.has_packed_kernels.__wrapped__
    assert not kernels(torch.float64)
    assert not kernels(torch.float16)

    def other(*arguments: object, **settings: object) -> Tensor:
        raise RuntimeError("no such operator")

    changes: list[tuple[Any, str, Any]] = [
        (torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT"),
        (packed, "pack", other),
        (packed, "product", other),
        (packed, "product", lambda x, weight, bias, activation: F.linear(x, torch.zeros(16, 8))),
    ]
    for place, name, value in changes:
        with monkeypatch.context() as patched:
            patched.setattr(place, name, value)
            assert not kernels(torch.float32)


@pytest.mark.usefixtures("kernels")
def test_a_wrong_packed_weight_is_a_wrong_embedding(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of this file would notice one."""
    pack = packed.pack
    monkeypatch.setattr(packed, "pack", lambda weight: pack(weight * 1.01))
    assert not close(model.encode_image(make_pixels(2)), plain_images(model, make_pixels(2)))
    assert not close(model.encode_text(tokenize(TEXTS)), plain_texts(model, tokenize(TEXTS)))


# -- changed models ----------------------------------------------------------------------------------------------------


def hooked(model: CLIP) -> None:
    model.visual.transformer.resblocks[1].mlp.register_forward_hook(lambda *_: 2 * _[2])
    model.transformer.resblocks[1].register_forward_pre_hook(lambda *_: None)


def own_layer(model: CLIP) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for tower in (model.visual.transformer, model.transformer):
        old = tower.resblocks[0].mlp.c_fc
        new = Doubled(old.in_features, old.out_features)
        new.load_state_dict(old.state_dict())
        tower.resblocks[0].mlp.c_fc = new.requires_grad_(False)


def own_forward(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        block = tower.resblocks[1]
        block.forward = lambda x: 3 * x  # type: ignore[method-assign]


def other_mask(model: CLIP) -> None:
    model.transformer.resblocks[0].attn.causal = False
    model.visual.transformer.resblocks[0].attn.causal = True


def tanh_gelu(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        tower.resblocks[0].mlp.gelu = nn.GELU("tanh")


def a_layer_more(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        tower.resblocks[0].mlp.append(nn.Tanh())


def a_norm_between(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        mlp = tower.resblocks[0].mlp
        norm = nn.LayerNorm(mlp.c_fc.out_features).requires_grad_(False)
        tower.resblocks[0].mlp = nn.Sequential(OrderedDict(c_fc=mlp.c_fc, norm=norm, gelu=mlp.gelu, c_proj=mlp.c_proj))


def wrapped_activation(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        tower.resblocks[0].mlp.gelu = nn.Sequential(nn.GELU())


def no_activation(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        tower.resblocks[0].mlp.gelu = nn.Sequential()


def dropped_block(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        tower.resblocks[1] = nn.Sequential()


def no_blocks(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        tower.resblocks = nn.Sequential()


def no_bias(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        tower.resblocks[0].mlp.c_fc.bias = None
        tower.resblocks[-1].attn.in_proj_bias = None


def an_adapter_taken_away(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        tower.resblocks[0].adapter = nn.Linear(3, 3)
        tower.resblocks[0].adapter = None
        tower.resblocks[0].ln_1.bias.data += 1


def own_embed(model: CLIP) -> None:
    embed = model.visual.embed
    model.visual.embed = lambda images: 2 * embed(images)  # type: ignore[method-assign]
    model.token_embedding.max_norm = 0.5


def other_convolution(model: CLIP) -> None:
    model.visual.conv1.bias = nn.Parameter(torch.randn(64), requires_grad=False)
    model.transformer.resblocks[0].forward = lambda x: -x  # type: ignore[method-assign]


def weights_that_are_computed(model: CLIP) -> None:
    """As low-rank adaptations by hand do it: no parameter any more, but a tensor that something is trained through."""
    for tower in (model.visual.transformer, model.transformer):
        layer = tower.resblocks[0].mlp.c_fc
        weight = layer.weight
        del layer.weight
        layer.weight = weight * 1.5


def not_contiguous(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        weight = tower.resblocks[0].attn.out_proj.weight
        weight.data = weight.data.T


def every_other_bias(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        bias = tower.resblocks[0].attn.in_proj_bias
        bias.data = torch.stack([bias.data + 1, torch.randn_like(bias)], dim=1)[:, 0]


def one_bias_for_all(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        mlp = tower.resblocks[0].mlp
        mlp.c_proj.bias = nn.Parameter(torch.ones(1).expand_as(mlp.c_proj.bias), requires_grad=False)


def part_of_a_wider_weight(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        weight = tower.resblocks[0].mlp.c_fc.weight
        weight.data = torch.cat([weight.data, weight.data], dim=1)[:, : weight.shape[1]]
        weight.data[-20:] = 3


def functions_for_modules(model: CLIP) -> None:
    norm, blocks = model.ln_final, model.visual.transformer.resblocks
    del model.ln_final, model.visual.transformer.resblocks
    model.ln_final = lambda x: norm(x) + 1
    model.visual.transformer.resblocks = lambda x: blocks(2 * x)


def hidden_by_an_attribute(model: CLIP) -> None:
    other = copy.deepcopy(model.visual)
    in_place(other)
    model.__dict__["visual"] = other
    model.transformer.resblocks[0].__dict__["ln_1"] = nn.Identity()


def own_convolution(model: CLIP) -> None:
    convolve = model.visual.conv1._conv_forward
    model.visual.conv1._conv_forward = lambda *a: 2 * convolve(*a)  # type: ignore[method-assign]
    model.transformer.resblocks[0].forward = lambda x: -x  # type: ignore[method-assign]


class TakesOnlyX(nn.Module):
    """A wrapper as other libraries write it: it knows nothing of views."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y + torch.linspace(0, 1, y.shape[-1])


def wrapped_attention(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        tower.resblocks[-1].attn = TakesOnlyX(tower.resblocks[-1].attn)


def wrapped_last_block(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        tower.resblocks[-1] = TakesOnlyX(tower.resblocks[-1])


def other_heads(model: CLIP) -> None:
    model.visual.transformer.resblocks[-1].attn.heads = 8
    model.transformer.resblocks[-1].attn.heads = 6


@pytest.mark.parametrize(
    "change",
    [
        *(wrapped_attention, wrapped_last_block, other_heads),
        *(hooked, own_layer, own_forward, other_mask, tanh_gelu, a_layer_more, a_norm_between, wrapped_activation),
        *(no_activation, dropped_block, no_blocks, no_bias, an_adapter_taken_away, own_embed, other_convolution),
        *(weights_that_are_computed, not_contiguous, every_other_bias, one_bias_for_all, part_of_a_wider_weight),
        *(functions_for_modules, hidden_by_an_attribute, own_convolution),
    ],
)
@pytest.mark.parametrize("before", [True, False], ids=["after a first call", "at once"])
def test_a_changed_model_computes_the_change(model: CLIP, change: Callable[[CLIP], None], before: bool) -> None:
    assert not before or is_right(model)
    old = plain(model, make_pixels(5), tokenize(TEXTS))
    change(model)
    assert is_right(model)
    new = plain(model, make_pixels(5), tokenize(TEXTS))
    assert not close(old[0], new[0])
    assert change is hooked or not close(old[1], new[1])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (model_module.ResidualAttentionBlock, "forward"),
        (model_module.VisionTransformer, "embed"),
        (model_module.TextTransformer, "embed_tokens"),
        (layers.MLP, "forward"),
        (layers.Linear, "forward"),
        (layers.QuickGELU, "forward"),
    ],
)
def test_a_method_changed_on_its_class_runs(
    model: CLIP, monkeypatch: pytest.MonkeyPatch, kind: type, name: str
) -> None:
    assert is_right(model)
    old = plain(model, make_pixels(5), tokenize(TEXTS))
    original = getattr(kind, name)

    def changed(self: nn.Module, *given: Any) -> Tensor:
        x = original(self, *given)
        return x + torch.linspace(0, 1, x.shape[-1])  # a constant would be lost in the next layer norm

    monkeypatch.setattr(kind, name, changed)
    assert is_right(model)
    images, texts = plain(model, make_pixels(5), tokenize(TEXTS))
    assert kind is model_module.TextTransformer or not close(images, old[0])
    assert kind is model_module.VisionTransformer or not close(texts, old[1])


@pytest.mark.parametrize("size", [36, 39])
def test_a_size_that_is_no_multiple_of_the_patches(tmp_path: Path, size: int) -> None:
    make_reference(vision_config={"image_size": size}).save_pretrained(tmp_path)
    model, _ = miniclip.load(tmp_path, "cpu")
    images = torch.randn(3, 3, size, size)
    assert close(model.encode_image(images), plain_images(model, images))


# -- as on CUDA -------------------------------------------------------------------------------------------------------


def test_on_cuda_the_patches_are_a_product_and_the_mlp_is_scaled(
    model: CLIP, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_convolution(*_: object) -> Tensor:
        raise AssertionError("a convolution was called")

    calls: list[Tensor] = []
    scaled_mlp = layers.scaled_mlp

    def counted(x: Tensor, *parts: Any) -> Tensor:
        calls.append(x)
        return scaled_mlp(x, *parts)

    images, tokens = make_pixels(3).as_subclass(OnCuda), tokenize(TEXTS).as_subclass(OnCuda)
    monkeypatch.setattr(layers, "scaled_mlp", counted)
    monkeypatch.setattr(nn.Conv2d, "_conv_forward", no_convolution)
    model.encode_image(images)
    model.encode_text(tokens)
    assert len(calls) == 3 + 2  # the blocks of both towers
    assert count_packed(model) == 0
    model.fast = False
    with pytest.raises(AssertionError, match="a convolution was called"):
        model.encode_image(images)
    model.encode_text(tokens)
    assert len(calls) == 5
    if "quick" not in folder.name:
        miniclip.load(folder, "cpu")[0].encode_text(tokens)  # GELU has no such form
        assert len(calls) == 5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(8,), (5, 8), (4, 3, 8), (0, 8), (2, 0, 8)])
def test_the_scaled_mlp_is_the_formula(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    mlp = layers.MLP(8, 16, "quick_gelu").double()
    for layer in (mlp.c_fc, mlp.c_proj):
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
        layer.bias = layer.bias if bias else None
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    inputs = [x, *mlp.parameters()]
    expected = F.linear(mlp.gelu(F.linear(x, mlp.c_fc.weight, mlp.c_fc.bias)), mlp.c_proj.weight, mlp.c_proj.bias)
    ours = layers.scaled_mlp(x, mlp.c_fc, mlp.c_proj)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours.sum(), inputs), torch.autograd.grad(expected.sum(), inputs)):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_wrong_scale_is_a_wrong_embedding(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_right(model)
    monkeypatch.setattr(layers.F, "silu", lambda x: x * torch.sigmoid(x / 1.01))
    assert not is_right(model)


def test_forward_mode_derivatives_come_through(model: CLIP) -> None:
    assert is_right(model)
    with torch.autograd.forward_ad.dual_level(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        images = torch.autograd.forward_ad.make_dual(make_pixels(2), torch.ones(2, 3, 32, 32))
        assert torch.autograd.forward_ad.unpack_dual(model.encode_image(images)).tangent is not None
    assert close(model.encode_image(make_pixels(2)), plain_images(model, make_pixels(2)))


def copies_of(model: CLIP) -> list[weakref.ref[Tensor]]:
    known = [layer.packed.known for layer in packed_layers(model) if layer.packed]
    return [weakref.ref(copy) for one in known if one for copy in one.copies.values()]


def half(model: CLIP) -> None:
    model.half()


def no_longer_fast(model: CLIP) -> None:
    model.fast = False


def trained(model: CLIP) -> None:
    model.requires_grad_(True)


def repacked(model: CLIP) -> None:
    model.repack()


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("change", [half, no_longer_fast, trained, repacked, CLIP.double])
def test_copies_that_are_of_no_use_are_freed(model: CLIP, change: Callable[[CLIP], Any]) -> None:
    assert is_right(model)
    old = copies_of(model)
    assert len(old) >= len(packed_layers(model))
    change(model)
    if change is trained:  # noticed by the next call
        model.encode_image(make_pixels(1))
        model.encode_text(tokenize(["cat"]))
    assert not any(reference() is not None for reference in old)


def test_modes_of_torch_see_the_plain_modules(model: CLIP) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counted:
        model.encode_image(make_pixels(2))
        model.encode_text(tokenize(TEXTS))
    assert counted.get_total_flops() > 1e6
    with torch.autocast("cpu", torch.bfloat16):
        assert model.encode_image(make_pixels(2)).dtype == plain_images(model, make_pixels(2)).dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has no batching rule for its attention, and says so
        per_image = torch.func.vmap(lambda image: model.encode_image(image[None])[0])(make_pixels(3))
    assert close(per_image, plain_images(model, make_pixels(3)))
    seen: list[int] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(id(module)))
    try:
        assert is_right(model)
    finally:
        handle.remove()
    assert {id(module) for module in model.modules()} - {id(model)} <= set(seen)


def test_a_compiled_encoder_is_whole(model: CLIP) -> None:
    assert is_right(model)
    compiled = torch.compile(model.encode_image, backend="eager", fullgraph=True)
    assert close(compiled(make_pixels(2)), plain_images(model, make_pixels(2)))
    exported = torch.export.export(model.visual, (make_pixels(2),)).module()
    assert close(exported(make_pixels(2)), plain_images(model, make_pixels(2)))


def test_fast_can_be_turned_off(tiny: Path) -> None:
    model, _ = miniclip.load(tiny, "cpu", fast=False)
    assert path_of(model) == "plain (fast is off)"
    assert is_right(model, 0)
    assert count_packed(model) == 0
    model.fast = True
    assert is_right(model)
    assert is_packed(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.fast
        twin.fast = False
        twin = pickle.loads(pickle.dumps(twin))
        assert is_right(twin, 0)
        assert not twin.fast
        assert count_packed(twin) == 0


@pytest.mark.usefixtures("kernels")
def test_path_of_names_the_layers_that_are_not_packed(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_right(model)
    n = len(packed_layers(model))
    assert n == 1 + 4 * 3 + 4 * 2
    assert path_of(model) == f"packed by oneDNN, {n} of {n} layers"
    model.transformer.resblocks[1].mlp.c_fc.requires_grad_(True)
    assert is_right(model)
    assert path_of(model) == f"packed by oneDNN, {n - 1} of {n} layers (not transformer.resblocks.1.mlp.c_fc)"
    model.ln_final.register_forward_hook(lambda *_: None)
    assert path_of(model).endswith("; every token of a text")
    with monkeypatch.context() as patched:
        patched.setattr(packed, "has_packed_kernels", lambda dtype: False)
        model.repack()
        assert is_right(model)
        assert path_of(model).startswith("plain weights (cpu, float32)")


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_mode_alone_does_not_matter(model: CLIP, inference: Callable[[], torch.no_grad]) -> None:
    with inference():
        first = model.encode_image(make_pixels(2)), model.encode_text(tokenize(TEXTS))
    again = model.encode_image(make_pixels(2)), model.encode_text(tokenize(TEXTS))
    for a, b in zip(first, again):
        assert torch.equal(a, b)
        assert not b.requires_grad


def test_an_image_that_requires_grad_gets_it(model: CLIP) -> None:
    assert is_right(model)
    images = make_pixels(3).requires_grad_()
    model.encode_image(images).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0
    with torch.no_grad():
        assert close(model.encode_image(images), plain_images(model, images))


def test_a_parameter_that_requires_grad_gets_it(model: CLIP) -> None:
    assert is_right(model)
    for name, parameter in model.named_parameters():
        if name == "logit_scale":
            continue
        parameter.requires_grad_(True)
        (model.encode_image(make_pixels(2)).sum() + model.encode_text(tokenize(TEXTS)).sum()).backward()
        assert parameter.grad is not None, name
        parameter.requires_grad_(False)
    assert is_right(model)
    assert is_packed(model)


def test_a_learned_prompt_gets_its_gradient_through_the_frozen_model(model: CLIP) -> None:
    """CoOp's way: the parts are walked by hand with vectors in place of words."""
    assert is_right(model)
    tokens = tokenize(["x x x x cat"])
    prompt = torch.zeros(4, 48, requires_grad=True)
    x = model.token_embedding(tokens)
    x = torch.cat([x[:, :1], prompt[None], x[:, 5:]], dim=1) + model.positional_embedding
    x = model.ln_final(model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2))
    text = x[0, tokens.argmax()] @ model.text_projection
    (text @ model.encode_image(make_pixels(1))[0]).backward()
    assert prompt.grad is not None
    assert prompt.grad.abs().min() > 0


# -- whatever is done to the weights ----------------------------------------------------------------------------------


def in_place(model: CLIP) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)


def one_number(model: CLIP) -> None:
    with torch.no_grad():
        model.visual.transformer.resblocks[0].mlp.c_fc.weight[1, 1] += 100
        model.transformer.resblocks[0].attn.in_proj_weight[3, 5] += 100


def a_block_through_data(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        weight = tower.resblocks[0].attn.out_proj.weight
        half = len(weight) // 2
        weight.data[1:half, 1:half] *= 5


def all_through_numpy(model: CLIP) -> None:
    for parameter in model.parameters():
        parameter.numpy()[...] *= 1.1


def a_head_through_data(model: CLIP) -> None:
    """As one cuts out a head of attention."""
    model.visual.transformer.resblocks[1].attn.out_proj.weight.data[:, 16:32] = 0
    model.transformer.resblocks[1].attn.out_proj.weight.data[:, 16:32] = 0


def half_of_the_numbers_through_data(model: CLIP) -> None:
    """As unstructured pruning by hand does it."""
    for parameter in model.parameters():
        parameter.data.mul_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) < 0.5)


def through_data(model: CLIP) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.1)


def other_data(model: CLIP) -> None:
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.1


def loaded(model: CLIP) -> None:
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})


def assigned(model: CLIP) -> None:
    state = {name: 1.1 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)


def other_parameter(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        layer = tower.resblocks[1].mlp.c_proj
        layer.weight = nn.Parameter(layer.weight * 2, requires_grad=False)


def swapped_blocks(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        blocks = list(tower.resblocks)
        tower.resblocks = nn.Sequential(blocks[1], blocks[0], *blocks[2:])


def fewer_blocks(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        tower.resblocks = tower.resblocks[:1]


def other_activation(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        tower.resblocks[0].mlp.gelu = nn.GELU()


def gains_and_biases(model: CLIP) -> None:
    for name, parameter in model.named_parameters():
        if parameter.ndim < 2 and name != "logit_scale":
            parameter.data += 0.5


def exchanged_tensors(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        weight = tower.resblocks[0].mlp.c_fc.weight
        torch.utils.swap_tensors(weight, nn.Parameter(weight * 2, requires_grad=False))


def tied_weights(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        first, second = (block.mlp.c_fc for block in tower.resblocks[:2])
        second.weight = first.weight
        with torch.no_grad():
            first.weight.mul_(1.5)


@pytest.mark.parametrize(
    "change",
    [
        *(exchanged_tensors, tied_weights),
        *(in_place, one_number, through_data, other_data, loaded, assigned, other_parameter, swapped_blocks),
        *(fewer_blocks, other_activation, gains_and_biases, a_block_through_data, a_head_through_data),
        *(all_through_numpy, half_of_the_numbers_through_data),
    ],
)
def test_no_packed_weight_is_ever_stale(model: CLIP, change: Callable[[CLIP], None]) -> None:
    assert is_right(model)
    old = model.encode_image(make_pixels(5)), model.encode_text(tokenize(TEXTS))
    change(model)
    assert is_right(model)
    assert is_packed(model)
    assert not close(model.encode_image(make_pixels(5)), old[0])
    assert not close(model.encode_text(tokenize(TEXTS)), old[1])


@pytest.mark.usefixtures("kernels")
def test_repack_is_for_a_few_numbers_written_through_data(model: CLIP) -> None:
    """They go unnoticed, as the documentation says, and this is what helps."""
    assert is_right(model)
    weight = model.visual.transformer.resblocks[1].mlp.c_fc.weight
    weight.data[1, 2] += 1000
    assert not is_right(model)
    model.repack()
    assert is_right(model)
    with torch.no_grad():
        weight[1, 2] += 1000
    assert is_right(model)


def test_a_storage_that_is_used_again_is_not_taken_for_the_old_one(model: CLIP) -> None:
    """A freed weight's memory often becomes the next one's; then even its address is the same."""
    for factor in (0.5, 2, 0.5, 2, 0.5, 2):
        for parameter in model.visual.parameters():
            if parameter.ndim >= 2:
                new = parameter.data * factor
                parameter.data = torch.empty(0)
                parameter.data = new
        assert close(model.encode_image(make_pixels(3)), plain_images(model, make_pixels(3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_embeddings_have_the_models_dtype_there_and_back(model: CLIP, dtype: torch.dtype) -> None:
    assert is_right(model)
    model.to(dtype)
    given = model.encode_image(make_pixels(3)), model.encode_text(tokenize(TEXTS))
    assert {embedding.dtype for embedding in given} == {dtype}
    model.float()
    assert is_right(model)


@pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle", "torch.save"])
def test_a_copy_has_weights_of_its_own(model: CLIP, way: str) -> None:
    assert is_right(model)
    if way == "torch.save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin: CLIP = torch.load(buffer, weights_only=False)
    else:
        makers = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}
        twin = makers[way](model)
    assert is_right(twin)
    if way != "copy":  # which shares the modules themselves
        in_place(twin)
    assert is_right(twin)
    assert is_right(model)


def test_packing_adds_nothing_to_the_state_dict(model: CLIP) -> None:
    before = list(model.state_dict()), [id(module) for module in model.modules()]
    assert is_right(model)
    assert (list(model.state_dict()), [id(module) for module in model.modules()]) == before
    assert len(pickle.dumps(model)) < 1.1 * len(pickle.dumps(model.state_dict()))


def test_training_gives_the_same_numbers_with_and_without_packing(tiny: Path) -> None:
    results = []
    for way in (True, False):
        model, _ = miniclip.load(tiny, "cpu", dtype=torch.float64, fast=way)
        model.encode_image(make_pixels(5, torch.float64))
        model.requires_grad_(True)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            logits, _ = model(make_pixels(4, torch.float64, step), tokenize(["cat", "dog", "bird", "fish"]))
            optimiser.zero_grad()
            miniclip.contrastive_loss(logits).backward()
            optimiser.step()
        with torch.no_grad():  # evaluated in between, as one does
            inside = model.encode_image(make_pixels(5, torch.float64))
        model.requires_grad_(False)
        results.append((inside, model.encode_image(make_pixels(5, torch.float64)), model.encode_text(tokenize(TEXTS))))
    for ours, reference in zip(*results):
        assert close(ours, reference, 1e-12)


def test_a_deleted_model_frees_its_memory_at_once(tiny: Path) -> None:
    """Without waiting for the garbage collector: a second model may not fit beside the first."""
    model, _ = miniclip.load(tiny, "cpu")
    assert is_right(model)
    assert is_packed(model)
    gone = weakref.ref(model), *copies_of(model)
    gc.disable()
    try:
        del model
        assert all(reference() is None for reference in gone)
    finally:
        gc.enable()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e25])
def test_one_bad_text_leaves_the_others_alone(model: CLIP, bad: float) -> None:
    """Texts that share a beginning are computed together."""
    model.token_embedding.weight[300] = bad
    tokens = torch.tensor([[49406, 500, 320, 49407], [49406, 500, 400, 49407], [49406, 500, 300, 49407]])
    expected = plain_texts(model, tokens)
    assert expected.isnan().any(dim=1).tolist() == [False, False, True]
    for _ in range(2):
        given = model.encode_text(tokens)
        assert close(given[:2], expected[:2])
        assert given[2].isnan().all()


def test_threads_share_one_model(tiny: Path) -> None:
    for _ in range(5):
        model, _ = miniclip.load(tiny, "cpu")
        batches = [make_pixels(3, seed=seed) for seed in range(16)]
        expected = [plain_images(model, batch) for batch in batches]
        with ThreadPoolExecutor(8) as pool:
            given = list(pool.map(model.encode_image, batches))
            texts = list(pool.map(model.encode_text, [tokenize(TEXTS)] * 8))
        assert all(close(a, b) for a, b in zip(given, expected))
        assert all(torch.equal(text, texts[0]) for text in texts)


@pytest.mark.usefixtures("kernels")
def test_threads_may_clear_the_copies_that_others_use(model: CLIP) -> None:
    """With switches between threads as often as Python can."""
    expected = plain(model, make_pixels(2), tokenize(["cat"]))
    stop = threading.Event()

    def clear() -> None:
        while not stop.is_set():
            model.repack()
            for layer in packed_layers(model):
                if layer.packed:
                    layer.packed.clear()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            clearing = pool.submit(clear)
            encoded = [pool.submit(encode_both, model) for _ in range(60)]
            wait(encoded)
            stop.set()
            clearing.result()
    finally:
        sys.setswitchinterval(interval)
    for images, texts in (future.result() for future in encoded):
        assert close(images, expected[0])
        assert close(texts, expected[1])


def encode_both(model: CLIP) -> tuple[Tensor, Tensor]:
    return model.encode_image(make_pixels(2)), model.encode_text(tokenize(["cat"]))


@pytest.mark.usefixtures("kernels")
def test_weights_are_packed_once(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []
    pack = packed.pack
    monkeypatch.setattr(packed, "pack", lambda weight: made.append(weight) or pack(weight))  # type: ignore[func-returns-value]
    for n in (1, 5, 2, 1):
        model.encode_image(make_pixels(n))
    assert len(made) == 1 + 3 * 4 + 1  # the patch embedding, three blocks, and the query of the last one apart
    with torch.no_grad():
        model.visual.transformer.resblocks[0].mlp.c_fc.weight[0] = torch.nan  # which is not equal to itself
    for n in (1, 5):
        assert model.encode_image(make_pixels(n)).isnan().any()
    assert len(made) == 14 + 1  # only that one is stale


@pytest.mark.usefixtures("kernels")
def test_weights_are_packed_when_that_pays(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a first call that is large, at a second of any size, and not while the weights change from call to call."""
    monkeypatch.setattr(packed, "WORTH_PACKING", 17 * 30)  # tokens of 30 images
    image_layers = len(packed_layers(model.visual))  # type: ignore[arg-type]
    block = model.visual.transformer.resblocks[0]

    def is_block_packed() -> list[bool]:
        return [bool(layer.packed and layer.packed.has_copies()) for layer in packed_layers(block)]  # type: ignore[arg-type]

    model.encode_image(make_pixels(29))
    assert count_packed(model) == 0
    model.encode_image(make_pixels(1))
    assert count_packed(model) == image_layers
    for _ in range(3):
        for parameter in block.parameters():
            parameter.mul_(-1)
        assert close(model.encode_image(make_pixels(2)), plain_images(model, make_pixels(2)))
        assert not any(is_block_packed())
    for parameter in block.parameters():
        parameter.mul_(-1)
    assert close(model.encode_image(make_pixels(30)), plain_images(model, make_pixels(30)))
    assert all(is_block_packed())
    model.encode_text(tokenize(["cat"]))
    assert count_packed(model) == image_layers
    model.eval()
    model.encode_text(tokenize(["cat"]))
    assert count_packed(model) == len(packed_layers(model))


def cropped_in_place(model: CLIP) -> None:
    """The same memory, as fewer neurons."""
    for tower in (model.visual.transformer, model.transformer):
        mlp = tower.resblocks[0].mlp
        mlp.c_fc.weight.data, mlp.c_fc.bias.data = mlp.c_fc.weight.data[:64], mlp.c_fc.bias.data[:64]
        mlp.c_proj.weight.data = mlp.c_proj.weight.data[:, :64].contiguous()


def new_hooks(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        tower.resblocks[0]._forward_hooks = OrderedDict({1: lambda *_: 2 * _[2]})


def another_class(model: CLIP) -> None:
    class Doubled(layers.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    for tower in (model.visual.transformer, model.transformer):
        tower.resblocks[0].mlp.c_fc.__class__ = Doubled


def another_epsilon(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        tower.resblocks[0].ln_1.eps = 3.0


def another_activation_class(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        gelu: Any = tower.resblocks[0].mlp.gelu
        gelu.__class__, gelu.approximate = nn.GELU, "none"


def first_bias(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        tower.resblocks[0].mlp.c_fc.bias.data[5] = 30


@pytest.mark.parametrize(
    "change",
    [cropped_in_place, new_hooks, another_class, another_activation_class, another_epsilon, first_bias],
)
def test_small_changes_after_a_first_call_are_noticed(model: CLIP, change: Callable[[CLIP], None]) -> None:
    assert is_right(model)
    old = model.encode_image(make_pixels(5)), model.encode_text(tokenize(TEXTS))
    change(model)
    assert is_right(model)
    assert not close(model.encode_image(make_pixels(5)), old[0])
    assert not close(model.encode_text(tokenize(TEXTS)), old[1])


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize(
    "shape", [(64, 64), (48, 96), (96, 48), (192, 64), (64, 63), (768, 768), (768, 3072), (1536, 512), (64, 3, 8, 8)]
)
def test_regular_patterns_written_through_data_are_noticed(shape: tuple[int, ...]) -> None:
    """Every second to ninth number, and all but these; from every start."""
    for period in range(2, 10):
        for start in range(period):
            for written in (True, False):
                weight = nn.Parameter(torch.randn(shape), requires_grad=False)
                copies = packed.Packed()
                copies.usable(torch.randn(1, math.prod(shape[1:])), weight, None)
                assert copies.known is not None
                assert copies.known.holds_for(weight)
                numbers = weight.data.view(-1)
                numbers[(torch.arange(len(numbers)) % period == start) == written] += 1
                assert not copies.known.holds_for(weight), (period, start, written)


# -- what other libraries do to a model --------------------------------------------------------------------------------


def linear_layers(model: CLIP) -> list[nn.Module]:
    """An attention's projection and a first layer of an MLP, in both towers."""
    blocks = [tower.resblocks[1] for tower in (model.visual.transformer, model.transformer)]
    return [layer for block in blocks for layer in (block.attn.out_proj, block.mlp.c_fc)]


@pytest.mark.parametrize("before", [True, False], ids=["after a first call", "at once"])
def test_pruned_layers(model: CLIP, before: bool) -> None:
    assert not before or is_right(model)
    old = plain(model, make_pixels(5), tokenize(TEXTS))
    for layer in linear_layers(model):
        prune.l1_unstructured(layer, "weight", amount=0.5)
    assert is_right(model)
    assert not close(model.encode_image(make_pixels(5)), old[0])
    for layer in linear_layers(model):
        prune.remove(layer, "weight")
    model.requires_grad_(False)
    assert is_right(model)
    assert is_packed(model)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("before", [True, False], ids=["after a first call", "at once"])
def test_parametrized_layers(model: CLIP, before: bool) -> None:
    assert not before or is_right(model)
    old = plain(model, make_pixels(5), tokenize(TEXTS))
    for layer in linear_layers(model):
        parametrize.register_parametrization(layer, "weight", Doubled())
    for tower in (model.visual.transformer, model.transformer):
        parametrize.register_parametrization(tower.resblocks[0].attn, "in_proj_weight", Doubled())
    assert is_right(model)
    assert not close(model.encode_image(make_pixels(5)), old[0])
    assert not close(model.encode_text(tokenize(TEXTS)), old[1])


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["after a first call", "at once"])
def test_lora_by_peft(model: CLIP, before: bool) -> None:
    """Adapters that are trained, switched off, and merged into the weights."""
    from peft import LoraConfig, get_peft_model

    assert not before or is_right(model)
    old = plain(model, make_pixels(5), tokenize(TEXTS))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["c_fc", "c_proj"], init_lora_weights=False))
    wrapped.eval()
    with torch.no_grad():
        new = plain(model, make_pixels(5), tokenize(TEXTS))
        assert is_right(model)
        assert not close(new[0], old[0])
        assert not close(new[1], old[1])
        with wrapped.disable_adapter():
            assert close(model.encode_image(make_pixels(5)), old[0])
            assert close(model.encode_text(tokenize(TEXTS)), old[1])
    (model.encode_image(make_pixels(2)).sum() + model.encode_text(tokenize(TEXTS)).sum()).backward()
    trained = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert len(trained) == 2 * 2 * (3 + 2)
    assert all("lora_" in name for name in trained)
    merged = wrapped.merge_and_unload().requires_grad_(False)
    assert is_right(merged, 3e-6)
    assert close(merged.encode_image(make_pixels(5)), new[0], 3e-6)
    assert is_packed(merged)


def test_functional_call_uses_the_weights_it_is_given(model: CLIP) -> None:
    assert is_right(model)
    images, tokens = make_pixels(5), tokenize(TEXTS)
    other = copy.deepcopy(model)
    in_place(other)
    weights = {name: value.detach().clone() for name, value in other.named_parameters()}
    for _ in range(2):
        given = torch.func.functional_call(model, weights, (images, tokens))[0]
        assert torch.allclose(given, other(images, tokens)[0], atol=1e-4)
    weights = dict(other.named_parameters())
    for _ in range(3):
        given = torch.func.functional_call(model, weights, (images, tokens))[0]
        assert torch.allclose(given, other(images, tokens)[0], atol=1e-4)
    assert is_right(model)


def test_gradients_by_torch_func(model: CLIP) -> None:
    assert is_right(model)
    images, weights = make_pixels(2), dict(model.named_parameters())

    def total(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model.visual, weights, (images,)).sum()

    visual = {name.removeprefix("visual."): value for name, value in weights.items() if name.startswith("visual.")}
    gradients = torch.func.grad(total)(visual)
    model.requires_grad_(True)
    model.visual(images).sum().backward()
    for name, parameter in model.visual.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(gradients[name], parameter.grad, atol=1e-4, rtol=1e-4), name


def test_a_trace_of_a_packed_model_follows_its_weights(model: CLIP) -> None:
    assert is_right(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and still what some exporters do
        traced = torch.jit.trace(model, (make_pixels(2), tokenize(["a cat", "dogs"])), check_trace=False)
    images, tokens = make_pixels(5), tokenize(TEXTS)
    assert torch.allclose(traced(images, tokens)[0], model(images, tokens)[0], atol=1e-4)
    in_place(model)
    assert torch.allclose(traced(images, tokens)[0], model(images, tokens)[0], atol=1e-3)


def _encode_and_send(model: CLIP, connection: Any) -> None:
    torch.set_num_threads(1)  # OpenMP's threads did not come along
    connection.send((model.encode_image(make_pixels(2)).tolist(), model.encode_text(tokenize(["cat"])).tolist()))
    connection.close()


def test_a_forked_process_encodes(model: CLIP) -> None:
    """With the parent's packed copies, and while another thread of the parent is encoding."""
    torch.set_num_threads(1)
    assert is_right(model)
    expected = model.encode_image(make_pixels(2)), model.encode_text(tokenize(["cat"]))
    context = multiprocessing.get_context("fork")
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(lambda: [model.encode_image(make_pixels(8)) for _ in range(20)])
        for _ in range(3):
            receiver, sender = context.Pipe(duplex=False)
            child = context.Process(target=_encode_and_send, args=(model, sender))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads is what is tested
                child.start()
            assert receiver.poll(60)
            images, texts = receiver.recv()
            child.join(60)
            assert child.exitcode == 0
            assert close(torch.tensor(images), expected[0])
            assert close(torch.tensor(texts), expected[1])
        work.result()


# -- what a second attack found ----------------------------------------------------------------------------------------


def test_a_weight_that_moves_into_shared_memory_is_packed_anew() -> None:
    """torch unmaps the old memory. Reading a sample of it would end the process, so this runs in one of its own."""
    code = """
import torch
from miniclip import layers
layer = layers.Linear(2048, 2048).requires_grad_(False)
layer.weight.normal_(), layer.bias.normal_()
x = torch.randn(600, 2048)
first = layer(x), layer(x)
layer.weight.share_memory_()
assert torch.allclose(layer(x), first[1], atol=1e-3)
print("alive")
"""
    done = run_python("-c", code)
    assert done.stdout == "alive\n", done.stderr


class LearnedPrompt(CLIP):
    def embed_tokens(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        x = super().embed_tokens(tokens).clone()
        x[:, 1:3] += torch.linspace(0, 1, x.shape[-1])
        return x


def test_own_token_embeddings_are_used(model: CLIP) -> None:
    assert is_right(model)
    old = model.encode_text(tokenize(TEXTS))
    model.__class__ = LearnedPrompt
    assert is_right(model)
    assert not close(model.encode_text(tokenize(TEXTS)), old)
    model.__class__ = CLIP
    embed = model.embed_tokens
    model.embed_tokens = lambda tokens: 2 * embed(tokens)  # type: ignore[method-assign]
    assert is_right(model)


def test_a_frequency_scaled_gradient_counts_every_token(tiny: Path) -> None:
    gradients = []
    for fast in (True, False):
        model, _ = miniclip.load(tiny, "cpu", dtype=torch.float64, fast=fast)
        model.token_embedding.scale_grad_by_freq = True
        model.token_embedding.weight.requires_grad_(True)
        model.encode_text(tokenize(PROMPTS)).square().sum().backward()
        gradients.append(model.token_embedding.weight.grad)
    assert torch.allclose(gradients[0], gradients[1], atol=1e-12)


def test_a_position_for_all_tokens_is_broadcast(model: CLIP) -> None:
    model.positional_embedding = nn.Parameter(model.positional_embedding[:1].clone(), requires_grad=False)
    assert is_right(model)


@pytest.mark.usefixtures("kernels")
def test_biases_and_convolutions_that_torch_broadcasts_or_refuses(model: CLIP) -> None:
    assert is_right(model)
    for tower in (model.visual.transformer, model.transformer):
        tower.resblocks[0].mlp.c_proj.bias = nn.Parameter(torch.ones(1), requires_grad=False)
        tower.resblocks[1].mlp.c_fc.bias = nn.Parameter(torch.ones(1), requires_grad=False)
    assert is_right(model)
    with pytest.raises(RuntimeError, match="Kernel size"):
        model.visual.conv1(torch.zeros(2, 3, 4, 4))
    model.visual.conv1.weight = nn.Parameter(model.visual.conv1.weight[:, :, :4, :4].clone(), requires_grad=False)
    images = make_pixels(2)
    assert torch.allclose(model.visual.conv1(images), F.conv2d(images, model.visual.conv1.weight, stride=8), atol=1e-5)


@pytest.mark.usefixtures("kernels")
def test_weights_that_can_no_longer_be_packed_free_their_copies(model: CLIP) -> None:
    assert is_right(model)
    old = copies_of(model.visual)  # type: ignore[arg-type]
    for layer in packed_layers(model.visual):  # type: ignore[arg-type]
        for name, parameter in list(layer.named_parameters(recurse=False)):
            delattr(layer, name)
            setattr(layer, name, parameter.detach().clone())
    for _ in range(2):
        model.encode_image(make_pixels(2))
    assert not any(reference() is not None for reference in old)


def test_a_patched_text_forward_runs(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = model_module.TextTransformer.forward
    old = model.encode_text(tokenize(TEXTS))
    monkeypatch.setattr(model_module.TextTransformer, "forward", lambda self, tokens: 2 * forward(self, tokens))
    assert torch.allclose(model.encode_text(tokenize(TEXTS)), 2 * old, atol=1e-5)


@pytest.mark.slow
def test_lora_by_peft_on_the_patch_embedding(model: CLIP) -> None:
    from peft import LoraConfig, get_peft_model

    assert is_right(model)
    old = model.encode_image(make_pixels(5))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["conv1"]))  # starts as the identity
    with torch.no_grad():
        assert close(model.encode_image(make_pixels(5)), old)
    merged = wrapped.merge_and_unload().requires_grad_(False)
    assert is_right(merged)
    assert close(merged.encode_image(make_pixels(5)), old)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [True, False])
def test_a_whole_model_exports_with_a_dynamic_batch(model: CLIP, strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "MAX_TOKENS", 3 * 17)  # eager mode cuts this batch, the exported model does not
    batches = ({0: torch.export.Dim(name, min=2, max=2000)} for name in ("images", "texts"))
    inputs = make_pixels(3), tokenize(["a cat", "a dog", ""])
    exported = torch.export.export(model, inputs, dynamic_shapes=tuple(batches), strict=strict).module()
    images, tokens = make_pixels(20), tokenize(TEXTS)
    assert torch.allclose(exported(images, tokens)[0], model(images, tokens)[0], atol=1e-4)
