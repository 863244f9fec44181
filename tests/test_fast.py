"""The fast path: the plain modules' embeddings up to rounding, on any batch, whatever is done to the model."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import random
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_reference
from torch import Tensor, nn

import miniclip
from miniclip import CLIP, fast, layers, tokenize
from miniclip import model as model_module

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
    monkeypatch.setattr(fast, "_WORTH", 0)


@pytest.fixture(params=["quick_gelu", "gelu"], scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    act = {"hidden_act": request.param}
    path = tmp_path_factory.mktemp(request.param)
    make_reference(vision_config=act, text_config=act).save_pretrained(path)
    return path


@pytest.fixture
def model(tiny: Path) -> CLIP:
    return miniclip.load(tiny, "cpu")[0]


def pictures(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed)).to(dtype)


def plain(model: CLIP, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What the modules compute as they stand."""
    return model.visual(images), model.text(tokens)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-6) -> bool:
    a, b = F.normalize(a.double(), dim=-1), F.normalize(b.double(), dim=-1)
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance)


def is_right(model: CLIP, tolerance: float = 1e-6) -> bool:
    images, tokens = pictures(5, model.dtype), tokenize(TEXTS)
    expected = plain(model, images, tokens)
    # Twice: a second call must not see what a first one has kept.
    return all(
        close(model.encode_image(images), expected[0], tolerance)
        and close(model.encode_text(tokens), expected[1], tolerance)
        for _ in range(2)
    )


def runs_fast(model: CLIP) -> bool:
    return fast.path_of(model).startswith("fast")


# -- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_images_of_any_number(folder: Path, dtype: torch.dtype, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = miniclip.load(folder, "cpu", dtype=dtype)
    assert runs_fast(model)
    expected = model.visual(pictures(n, dtype))
    assert close(model.encode_image(pictures(n, dtype)), expected, DTYPES[dtype])
    monkeypatch.setattr(fast, "_TOKENS", 3 * 17)  # three of these images at a time
    assert close(model.encode_image(pictures(n, dtype)), expected, DTYPES[dtype])


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_images_in_any_layout(model: CLIP, layout: torch.memory_format) -> None:
    images = pictures(4).to(memory_format=layout)
    assert close(model.encode_image(images), model.visual(images))
    one = pictures(1).expand(4, -1, -1, -1)
    assert close(model.encode_image(one), model.visual(one))
    turned = pictures(4).transpose(2, 3)
    assert close(model.encode_image(turned), model.visual(turned))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("texts", [TEXTS, PROMPTS, ["cat"], [""], ["cat"] * 9, ["a", "b", "c"]], ids=repr)
def test_texts(folder: Path, dtype: torch.dtype, texts: list[str]) -> None:
    model, _ = miniclip.load(folder, "cpu", dtype=dtype)
    tokens = tokenize(texts)
    assert close(model.encode_text(tokens), model.text(tokens), DTYPES[dtype])
    assert close(model.encode_text(tokens.long()), model.text(tokens), DTYPES[dtype])


def random_rows(pick: random.Random) -> Tensor:
    """Rows that share beginnings of all lengths, in any order, with anything behind their ends."""
    rows = [[49406] + [pick.randint(1, 3) for _ in range(pick.randint(0, 20))] for _ in range(pick.randint(1, 40))]
    width = max(map(len, rows)) + 1
    ended = [[*row, 49407, *(pick.randint(0, 49407) for _ in range(width - len(row) - 1))] for row in rows]
    return torch.tensor(ended, dtype=torch.int32)


@pytest.mark.parametrize("seed", range(10))
def test_random_trees(tiny: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = miniclip.load(tiny, "cpu", dtype=torch.float64)
    tokens = random_rows(random.Random(seed))
    expected = model.text(tokens)
    assert close(model.encode_text(tokens), expected, 1e-13)
    for size in (1, 10, 50):  # nodes at a time
        monkeypatch.setattr(fast, "_TOKENS", size)
        assert close(model.encode_text(tokens), expected, 1e-13)
    monkeypatch.setattr(fast, "_TOKENS", 10**6)
    monkeypatch.setattr(fast, "_POSITIONS", 30)
    assert close(model.encode_text(tokens), expected, 1e-13)


@pytest.mark.parametrize("seed", range(10))
def test_a_tree_holds_every_prefix_once(seed: int) -> None:
    tokens = random_rows(random.Random(seed)).long()
    texts = {tuple(row[: row.index(49407) + 1]) for row in tokens.tolist()}
    prefixes = {text[:end] for text in texts for end in range(1, len(text) + 1)}
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(t) for t in sorted(texts)], True, padding_value=-1)
    tree = fast.Tree.of(rows, (rows >= 0).sum(dim=1))
    assert len(tree.tokens) == len(prefixes)
    for row, path, end in zip(sorted(texts), tree.path.tolist(), tree.ends.tolist()):
        assert path[len(row) - 1] == end
        assert [tree.tokens[node] for node in path[: len(row)]] == list(row)
        assert [tree.positions[node] for node in path[: len(row)]] == list(range(len(row)))


def test_the_parts_of_a_batch_are_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.unique(random_rows(random.Random(5)).long(), dim=0)
    lengths = (rows == 49407).int().argmax(dim=1) + 1
    for size in (1, 7, 100, 10**6):
        monkeypatch.setattr(fast, "_TOKENS", size)
        parts = list(fast.chunks(rows, lengths))
        assert [row for part in parts for row in range(part.start, part.stop)] == list(range(len(rows)))
    assert len(parts) == 1


def test_a_wrong_packed_weight_is_a_wrong_embedding(model: CLIP) -> None:
    """What the tests above rely on: they would notice."""
    assert is_right(model)
    for slot in (model._kernels._image, model._kernels._text):
        tower = slot.packed
        assert tower
        block = tower.last.block
        with torch.no_grad():
            tower.blocks[0].out = fast.Matrix(block.attn.out_proj.weight * 1.01)
    assert not close(model.encode_image(pictures(2)), model.visual(pictures(2)))
    assert not close(model.encode_text(tokenize(TEXTS)), model.text(tokenize(TEXTS)))


@pytest.mark.parametrize("packed", [True, False])
def test_bfloat16_stays_as_near_to_float32(folder: Path, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed too, where it is only emulated."""
    monkeypatch.setattr(fast, "has_packed_kernels", lambda dtype: packed)
    exact, _ = miniclip.load(folder, "cpu", dtype=torch.float64)
    model, _ = miniclip.load(folder, "cpu", dtype=torch.bfloat16)
    images, tokens = pictures(5), tokenize(TEXTS)
    for given, reference, as_it_stands in (
        (model.encode_image(images), exact.visual(images.double()), model.visual(images.bfloat16())),
        (model.encode_text(tokens), exact.text(tokens), model.text(tokens)),
    ):
        assert given.dtype == torch.bfloat16
        off = 1 - F.cosine_similarity(given.double(), reference).min()
        assert off < 1.5 * (1 - F.cosine_similarity(as_it_stands.double(), reference).min())
    assert runs_fast(model)


def test_another_torch_or_processor_has_no_packed_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = fast.has_packed_kernels.__wrapped__
    assert not kernels(torch.float64)
    assert not kernels(torch.float16)

    def other(*arguments: object, **settings: object) -> Tensor:
        raise RuntimeError("no such operator")

    for name, value in (("weight.dtype", None), ("__init__", other), ("add_to", lambda self, r, x, b: r)):
        with monkeypatch.context() as patched:
            if value is None:
                patched.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
            else:
                patched.setattr(fast.Matrix, name, value)
            assert not kernels(torch.float32)


# -- where the plain modules have to run ------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    "change",
    [
        *(hooked, own_layer, own_forward, other_mask, tanh_gelu, a_layer_more, a_norm_between, wrapped_activation),
        *(no_activation, dropped_block, no_blocks, no_bias, an_adapter_taken_away, own_embed, other_convolution),
        *(weights_that_are_computed, not_contiguous, every_other_bias, one_bias_for_all, part_of_a_wider_weight),
        *(functions_for_modules, hidden_by_an_attribute, own_convolution),
    ],
)
@pytest.mark.parametrize("before", [True, False], ids=["after a first call", "at once"])
def test_a_changed_tower_runs_as_it_is(model: CLIP, change: Callable[[CLIP], None], before: bool) -> None:
    assert not before or is_right(model)
    old = plain(model, pictures(5), tokenize(TEXTS))
    change(model)
    assert not runs_fast(model)
    assert is_right(model)
    new = plain(model, pictures(5), tokenize(TEXTS))
    assert not close(old[0], new[0])
    assert change is hooked or not close(old[1], new[1])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (model_module.ResidualAttentionBlock, "forward"),
        (model_module.VisionTransformer, "embed"),
        (model_module.TextTransformer, "embed"),
        (layers.QuickGELU, "forward"),
    ],
)
def test_class_level_changes_are_seen(model: CLIP, monkeypatch: pytest.MonkeyPatch, kind: type, name: str) -> None:
    assert is_right(model)
    original = getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda self, x: original(self, x) + 1)
    assert not runs_fast(model)
    assert is_right(model)


@pytest.mark.parametrize("size", [36, 39])
def test_a_size_that_is_no_multiple_of_the_patches(tmp_path: Path, size: int) -> None:
    make_reference(vision_config={"image_size": size}).save_pretrained(tmp_path)
    model, _ = miniclip.load(tmp_path, "cpu")
    assert runs_fast(model)
    images = torch.randn(3, 3, size, size)
    assert close(model.encode_image(images), model.visual(images))


def test_forward_mode_derivatives_come_through(model: CLIP) -> None:
    assert is_right(model)
    with torch.autograd.forward_ad.dual_level(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        images = torch.autograd.forward_ad.make_dual(pictures(2), torch.ones(2, 3, 32, 32))
        assert torch.autograd.forward_ad.unpack_dual(model.encode_image(images)).tangent is not None
    assert runs_fast(model)


def test_the_packed_copy_goes_when_it_is_of_no_use(model: CLIP) -> None:
    for change in (lambda: setattr(model, "fast", False), model.half, lambda: model.requires_grad_(True)):
        model.fast = True
        model.float().requires_grad_(False)
        assert is_right(model)
        assert model._kernels._image.packed
        old = weakref.ref(model._kernels._image.packed)
        change()
        model.encode_image(pictures(1))
        assert old() is None


def test_modes_of_torch_see_the_plain_modules(model: CLIP) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counted:
        model.encode_image(pictures(2))
        model.encode_text(tokenize(TEXTS))
    assert counted.get_total_flops() > 1e6
    with torch.autocast("cpu", torch.bfloat16):
        assert not runs_fast(model)
        assert model.encode_image(pictures(2)).dtype == model.visual(pictures(2)).dtype
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has no batching rule for its attention, and says so
        per_picture = torch.func.vmap(lambda image: model.encode_image(image[None])[0])(pictures(3))
    assert close(per_picture, model.visual(pictures(3)))
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not runs_fast(model)
    handle.remove()
    assert runs_fast(model)


def test_a_compiled_encoder_is_whole(model: CLIP) -> None:
    assert is_right(model)
    compiled = torch.compile(model.encode_image, backend="eager", fullgraph=True)
    assert close(compiled(pictures(2)), model.visual(pictures(2)))
    exported = torch.export.export(model.visual, (pictures(2),)).module()
    assert close(exported(pictures(2)), model.visual(pictures(2)))


def test_fast_can_be_turned_off(tiny: Path) -> None:
    model, _ = miniclip.load(tiny, "cpu", fast=False)
    assert fast.path_of(model) == "plain (fast is off)"
    assert is_right(model, 0)
    assert model._kernels._image.packed is None
    assert model._kernels._text.packed is None


def test_without_onednn_the_order_alone_is_kept(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "has_packed_kernels", lambda dtype: False)
    assert fast.path_of(model) == "fast, without packed kernels"
    assert is_right(model)


@pytest.mark.parametrize("inference", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_mode_alone_does_not_matter(model: CLIP, inference: Callable[[], torch.no_grad]) -> None:
    with inference():
        assert runs_fast(model)
        first = model.encode_image(pictures(2)), model.encode_text(tokenize(TEXTS))
    again = model.encode_image(pictures(2)), model.encode_text(tokenize(TEXTS))
    for a, b in zip(first, again):
        assert torch.equal(a, b)
        assert not b.requires_grad


def test_an_image_that_requires_grad_gets_it(model: CLIP) -> None:
    assert is_right(model)
    images = pictures(3).requires_grad_()
    model.encode_image(images).sum().backward()
    assert images.grad is not None
    assert images.grad.abs().max() > 0
    with torch.no_grad():
        assert close(model.encode_image(images), model.visual(images))


def test_a_parameter_that_requires_grad_gets_it(model: CLIP) -> None:
    assert is_right(model)
    for name, parameter in model.named_parameters():
        if name == "logit_scale":
            continue
        parameter.requires_grad_(True)
        (model.encode_image(pictures(2)).sum() + model.encode_text(tokenize(TEXTS)).sum()).backward()
        assert parameter.grad is not None, name
        parameter.requires_grad_(False)
    assert runs_fast(model)


def test_a_learned_prompt_gets_its_gradient_through_the_frozen_model(model: CLIP) -> None:
    """CoOp's way: the parts are walked by hand with vectors in place of words."""
    assert is_right(model)
    tokens = tokenize(["x x x x cat"])
    prompt = torch.zeros(4, 48, requires_grad=True)
    x = model.token_embedding(tokens)
    x = torch.cat([x[:, :1], prompt[None], x[:, 5:]], dim=1) + model.positional_embedding
    x = model.ln_final(model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2))
    text = x[0, tokens.argmax()] @ model.text_projection
    (text @ model.encode_image(pictures(1))[0]).backward()
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


def a_column_through_data(model: CLIP) -> None:
    """As one cuts out a neuron or a head."""
    model.visual.transformer.resblocks[1].mlp.c_proj.weight.data[:, 150] = 9
    model.transformer.resblocks[1].attn.out_proj.weight.data[:, 40] = 9


def a_block_through_data(model: CLIP) -> None:
    for tower in (model.visual.transformer, model.transformer):
        weight = tower.resblocks[0].attn.out_proj.weight
        half = len(weight) // 2
        weight.data[1:half, 1:half] *= 5


def a_row_through_numpy(model: CLIP) -> None:
    model.visual.transformer.resblocks[1].mlp.c_fc.weight.numpy()[100] = 9
    model.transformer.resblocks[0].attn.in_proj_weight.numpy()[70] = 9


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


@pytest.mark.parametrize(
    "change",
    [
        *(in_place, one_number, through_data, other_data, loaded, assigned, other_parameter, swapped_blocks),
        *(fewer_blocks, other_activation, gains_and_biases, a_column_through_data, a_row_through_numpy),
        a_block_through_data,
    ],
)
def test_no_packed_weight_is_ever_stale(model: CLIP, change: Callable[[CLIP], None]) -> None:
    assert is_right(model)
    old = model.encode_image(pictures(5)), model.encode_text(tokenize(TEXTS))
    change(model)
    assert runs_fast(model)
    assert is_right(model)
    assert not close(model.encode_image(pictures(5)), old[0])
    assert not close(model.encode_text(tokenize(TEXTS)), old[1])


def test_a_storage_that_is_used_again_is_not_taken_for_the_old_one(model: CLIP) -> None:
    """A freed weight's memory often becomes the next one's; then even its address is the same."""
    for factor in (0.5, 2, 0.5, 2, 0.5, 2):
        for parameter in model.visual.parameters():
            if parameter.ndim >= 2:
                new = parameter.data * factor
                parameter.data = torch.empty(0)
                parameter.data = new
        assert close(model.encode_image(pictures(3)), model.visual(pictures(3)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_it_follows_the_models_dtype_and_back(model: CLIP, dtype: torch.dtype) -> None:
    assert is_right(model)
    model.to(dtype)
    given = model.encode_image(pictures(3)), model.encode_text(tokenize(TEXTS))
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


def test_the_state_dict_holds_nothing_more(model: CLIP) -> None:
    before = list(model.state_dict()), [id(module) for module in model.modules()]
    assert is_right(model)
    assert (list(model.state_dict()), [id(module) for module in model.modules()]) == before
    assert len(pickle.dumps(model)) < 1.1 * len(pickle.dumps(model.state_dict()))


def test_training_goes_on_as_if_it_were_not_there(tiny: Path) -> None:
    results = []
    for way in (True, False):
        model, _ = miniclip.load(tiny, "cpu", dtype=torch.float64, fast=way)
        model.encode_image(pictures(5, torch.float64))
        model.requires_grad_(True)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            logits, _ = model(pictures(4, torch.float64, step), tokenize(["cat", "dog", "bird", "fish"]))
            optimiser.zero_grad()
            miniclip.contrastive_loss(logits).backward()
            optimiser.step()
        assert not runs_fast(model)
        with torch.no_grad():  # evaluated in between, as one does
            inside = model.encode_image(pictures(5, torch.float64))
        model.requires_grad_(False)
        results.append((inside, model.encode_image(pictures(5, torch.float64)), model.encode_text(tokenize(TEXTS))))
    for ours, reference in zip(*results):
        assert close(ours, reference, 1e-12)


def test_a_model_that_is_let_go_is_gone(tiny: Path) -> None:
    """Without waiting for the garbage collector: a second model may not fit beside the first."""
    model, _ = miniclip.load(tiny, "cpu")
    assert is_right(model)
    assert model._kernels._text.packed
    gone = weakref.ref(model), weakref.ref(model._kernels._text.packed)
    gc.disable()
    try:
        del model
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


def test_a_signal_handler_may_encode_too(model: CLIP) -> None:
    with model._kernels._alone():  # where a signal may arrive
        assert is_right(model)


def test_what_is_packed_goes_with_the_dtype_it_was_packed_from(model: CLIP) -> None:
    for change in (model.half, model.bfloat16, lambda: setattr(model, "fast", False)):
        model.fast = True
        model.float()
        assert is_right(model)
        gone = [weakref.ref(slot.packed) for slot in (model._kernels._image, model._kernels._text)]
        change()
        model.encode_image(pictures(1))
        assert [reference() for reference in gone] == [None, None]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e25])
def test_one_bad_text_leaves_the_others_alone(model: CLIP, bad: float) -> None:
    """Texts that share a beginning are computed together."""
    model.token_embedding.weight[300] = bad
    tokens = torch.tensor([[49406, 500, 320, 49407], [49406, 500, 400, 49407], [49406, 500, 300, 49407]])
    expected = model.text(tokens)
    assert expected.isnan().any(dim=1).tolist() == [False, False, True]
    for _ in range(2):
        given = model.encode_text(tokens)
        assert close(given[:2], expected[:2])
        assert given[2].isnan().all()


def test_threads_share_one_model(tiny: Path) -> None:
    for _ in range(5):
        model, _ = miniclip.load(tiny, "cpu")
        batches = [pictures(3, seed=seed) for seed in range(16)]
        expected = [model.visual(batch) for batch in batches]
        with ThreadPoolExecutor(8) as pool:
            given = list(pool.map(model.encode_image, batches))
            texts = list(pool.map(model.encode_text, [tokenize(TEXTS)] * 8))
        assert all(close(a, b) for a, b in zip(given, expected))
        assert all(torch.equal(text, texts[0]) for text in texts)


def test_weights_are_packed_once(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    pack = fast.Matrix.__init__

    def counted(self: fast.Matrix, *arguments: Any, **settings: Any) -> None:
        made.append(self)
        pack(self, *arguments, **settings)

    monkeypatch.setattr(fast.Matrix, "__init__", counted)
    for n in (1, 5, 2, 1):
        model.encode_image(pictures(n))
    assert len(made) == 1 + 2 * 4 + 5  # the patch embedding, two blocks, and the last with its query apart
    with torch.no_grad():
        model.visual.transformer.resblocks[0].mlp.c_fc.weight[0] = torch.nan  # which is not equal to itself
    for n in (1, 5):
        assert model.encode_image(pictures(n)).isnan().any()
    assert len(made) == 2 * 14


def is_packed(model: CLIP) -> tuple[bool, bool]:
    return model._kernels._image.packed is not None, model._kernels._text.packed is not None


def test_weights_are_packed_when_that_pays(model: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a first call that is large, at a second of any size, and not while the weights change from call to call."""
    monkeypatch.setattr(fast, "_WORTH", 17 * 30)  # tokens of 30 pictures
    model.encode_image(pictures(29))
    assert is_packed(model) == (False, False)
    model.encode_image(pictures(1))
    assert is_packed(model) == (True, False)
    for _ in range(3):
        model.visual.conv1.weight.mul_(-1)
        assert close(model.encode_image(pictures(2)), model.visual(pictures(2)))
        assert is_packed(model) == (False, False)
    model.visual.conv1.weight.mul_(-1)
    assert close(model.encode_image(pictures(30)), model.visual(pictures(30)))
    assert is_packed(model) == (True, False)
    model.encode_text(tokenize(["a photo of a cat"] * 200)[:70])  # 70 times 7 tokens
    assert is_packed(model) == (True, False)
    model.eval()
    model.encode_text(tokenize(["cat"]))
    assert is_packed(model) == (True, True)


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
def test_what_is_noted_of_a_model_is_enough(model: CLIP, change: Callable[[CLIP], None]) -> None:
    """The second and later calls compare notes instead of looking at everything again."""
    assert is_right(model)
    old = model.encode_image(pictures(5)), model.encode_text(tokenize(TEXTS))
    assert all(slot.kept and slot.kept[0].holds(model) for slot in (model._kernels._image, model._kernels._text))
    change(model)
    assert is_right(model)
    assert not close(model.encode_image(pictures(5)), old[0])
    assert not close(model.encode_text(tokenize(TEXTS)), old[1])


@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7), (12, 8), (8, 12), (1, 9), (9, 1), (9,), (6, 2, 3, 3)])
def test_what_is_looked_at_of_a_weight(shape: tuple[int, ...]) -> None:
    """So that whatever is done to a whole row or column is seen."""
    weight = torch.arange(torch.Size(shape).numel()).view(shape)
    seen = fast._some(weight)
    rows, columns = weight.reshape(len(weight), -1).shape
    assert len(set((seen % columns).tolist())) == columns
    assert len(set((seen // columns).tolist())) == rows
    assert len(seen) <= rows + columns + 1 or min(rows, columns) < 10


@pytest.mark.parametrize(
    "shape", [(768, 768), (3072, 768), (768, 3072), (2304, 768), (512, 2048), (64, 64), (768, 3, 32, 32)]
)
def test_no_large_block_of_a_weight_is_left_out(shape: tuple[int, ...]) -> None:
    numel = torch.Size(shape).numel()
    seen = fast._some(torch.arange(numel).view(shape))
    hit = torch.zeros(numel)
    hit[seen] = 1
    size = 4 * int(shape[0] ** 0.5)
    sums = F.pad(hit.view(shape[0], -1).cumsum(0).cumsum(1), (1, 0, 1, 0))
    inside = sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]
    assert inside.min() >= 1


def test_the_layers_have_what_is_used_of_them() -> None:
    assert layers.ACTIVATIONS.keys() == {"quick_gelu", "gelu"}  # a third would need its arm in fast.Block
