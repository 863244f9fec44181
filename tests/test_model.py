"""The model: OpenAI's names and contracts, pure towers, a door that checks, and the loss."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import make_reference
from torch import Tensor, nn
from transformers import CLIPModel

import miniclip
from miniclip import CLIP, InputError, hub, layers, prefixes, tokenize
from miniclip import model as model_module
from miniclip.model import ResidualAttentionBlock

TEXTS = ["a photo of a cat", "two dogs, and a very small bird on a wire", ""]


@pytest.fixture(scope="module")
def model(tiny: Path) -> CLIP:
    return miniclip.load(tiny, "cpu", dtype=torch.float64)[0]


@pytest.fixture
def fresh(tiny: Path) -> CLIP:
    return miniclip.load(tiny, "cpu", dtype=torch.float64)[0]


@pytest.fixture(scope="module")
def reference64() -> CLIPModel:
    return make_reference().double()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def close(a: Tensor, b: Tensor, tolerance: float = 1e-12) -> bool:
    return a.shape == b.shape and ((a - b).abs().max() <= tolerance * b.abs().max()).item()


# -- OpenAI's layout ------------------------------------------------------------------------------------------------


def openai_names(vision_layers: int, text_layers: int) -> set[str]:
    block = ["ln_1.weight", "ln_1.bias", "attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight"]
    block += ["attn.out_proj.bias", "ln_2.weight", "ln_2.bias"]
    block += ["mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"]
    names = {"logit_scale", "positional_embedding", "text_projection", "token_embedding.weight"}
    names |= {"ln_final.weight", "ln_final.bias", "visual.class_embedding", "visual.conv1.weight"}
    names |= {"visual.positional_embedding", "visual.proj"}
    names |= {f"visual.{norm}.{part}" for norm in ("ln_pre", "ln_post") for part in ("weight", "bias")}
    for prefix, count in (("visual.transformer", vision_layers), ("transformer", text_layers)):
        names |= {f"{prefix}.resblocks.{i}.{name}" for i in range(count) for name in block}
    return names


@pytest.mark.parametrize(
    ("name", "parameters", "layers"),
    [
        ("ViT-B/32", 151_277_313, 12),
        ("ViT-B/16", 149_620_737, 12),
        ("ViT-L/14", None, 24),
        ("ViT-L/14@336px", None, 24),
    ],
)
def test_known_architectures_have_openais_state_dict(name: str, parameters: int | None, layers: int) -> None:
    with torch.device("meta"):
        clip = CLIP(hub.KNOWN[name].config)
    assert set(clip.state_dict()) == openai_names(layers, 12)
    if parameters:
        assert sum(p.numel() for p in clip.parameters()) == parameters
    assert clip.visual.conv1.weight.shape == (clip.config.vision.width, 3, *[clip.config.vision.patch_size] * 2)
    assert clip.visual.proj.shape == (clip.visual.transformer.width, clip.visual.output_dim)
    assert clip.text_projection.shape == (clip.transformer.width, clip.visual.output_dim)
    assert clip.logit_scale.shape == ()


def test_attributes_that_clients_read(model: CLIP) -> None:
    assert model.visual.input_resolution == 32
    assert model.context_length == 77
    assert model.vocab_size == 49408
    assert model.dtype == torch.float64
    assert model.device == torch.device("cpu")
    assert model.logit_scale.exp().item() == pytest.approx(torch.tensor(3.0).exp().item())
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


class TorchBlock(nn.Module):
    """A block of openai/CLIP said with torch.nn.MultiheadAttention, whose parameters have the same names."""

    def __init__(self, width: int, heads: int, mlp_width: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, mlp_width), "c_proj": nn.Linear(mlp_width, width)})

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False, attn_mask=mask)[0]
        y = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](y * torch.sigmoid(1.702 * y))


@pytest.mark.parametrize("tower", ["image", "text"])
def test_transformers_and_blocks_keep_the_sequence_first_contract(model: CLIP, tower: str) -> None:
    """(L, N, W) in and out, the text tower masked, as prompt-learning code that walks the parts expects."""
    transformer = model.visual.transformer if tower == "image" else model.transformer
    config = model.config.vision if tower == "image" else model.config.text
    length = 11
    x = torch.randn(length, 4, config.width, dtype=torch.float64)
    mask = torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1) if tower == "text" else None
    expected = x
    for block in transformer.resblocks:
        oracle = TorchBlock(config.width, config.heads, config.mlp_width).double()
        oracle.load_state_dict(block.state_dict())
        assert close(block(expected), oracle(expected, mask))
        expected = oracle(expected, mask)
    assert close(transformer(x), expected)


def test_a_prompt_can_be_learned_through_a_frozen_model(model: CLIP) -> None:
    """CoOp (Zhou et al. 2022) in six lines: learned vectors in the place of words, walking the parts by hand."""
    tokens = tokenize(["X X X X cat", "X X X X dog"])
    with torch.no_grad():
        embedding = model.token_embedding(tokens).type(model.dtype)
    prompt = embedding[:, 1:5].clone().requires_grad_()
    x = torch.cat([embedding[:, :1], prompt, embedding[:, 5:]], dim=1) + model.positional_embedding.type(model.dtype)
    x = model.ln_final(model.transformer(x.permute(1, 0, 2)).permute(1, 0, 2))
    features = x[torch.arange(2), tokens.argmax(dim=-1)] @ model.text_projection
    assert close(features.detach(), model.encode_text(tokens))
    features.square().sum().backward()
    assert prompt.grad is not None
    assert (prompt.grad.abs().sum(dim=(0, 2)) > 0).all()


def test_the_image_tower_can_be_walked_by_hand(model: CLIP, images: Tensor) -> None:
    visual = model.visual
    x = visual.conv1(images)
    x = x.reshape(x.shape[0], x.shape[1], -1).permute(0, 2, 1)
    class_token = visual.class_embedding + torch.zeros(len(x), 1, x.shape[-1], dtype=x.dtype)
    x = visual.ln_pre(torch.cat([class_token, x], dim=1) + visual.positional_embedding)
    x = visual.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
    assert close(visual.ln_post(x[:, 0, :]) @ visual.proj, model.encode_image(images))


# -- against transformers -------------------------------------------------------------------------------------------


def test_logits_and_features(model: CLIP, reference64: CLIPModel, images: Tensor) -> None:
    tokens = tokenize(TEXTS)
    with torch.no_grad():
        expected = reference64(pixel_values=images, input_ids=tokens)
    per_image, per_text = model(images, tokens)
    assert close(per_image, expected.logits_per_image)
    assert close(per_text, expected.logits_per_text)
    assert close(F.normalize(model.encode_image(images), dim=1), expected.image_embeds)
    assert close(F.normalize(model.encode_text(tokens), dim=1), expected.text_embeds)


def test_patch_tokens_and_hidden_states(model: CLIP, reference64: CLIPModel, images: Tensor) -> None:
    with torch.no_grad():
        output = reference64.vision_model(images, output_hidden_states=True)
        last = reference64.vision_model.post_layernorm(output.hidden_states[-1][:, 1:])
        expected = reference64.visual_projection(last)
    assert close(model.visual.patch_tokens(images), expected)
    states = model.visual.hidden_states(images)
    assert [tuple(state.shape) for state in states] == [(3, 17, 64)] * 4
    assert all(map(close, states, output.hidden_states))
    assert [tuple(state.shape) for state in model.hidden_states(tokenize(TEXTS))] == [(3, 77, 48)] * 3


def test_loss_and_every_gradient_equal_transformers(fresh: CLIP, reference64: CLIPModel, images: Tensor) -> None:
    tokens = tokenize(TEXTS)
    theirs = copy.deepcopy(reference64).requires_grad_(True)
    expected = theirs(pixel_values=images, input_ids=tokens, return_loss=True).loss
    expected.backward()
    fresh.requires_grad_(True)
    loss = miniclip.contrastive_loss(fresh(images, tokens)[0])
    loss.backward()
    assert close(loss.detach(), expected.detach())
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    from miniclip.huggingface import HF_TO_OPENAI, TRANSPOSED

    compared = 0
    for name, parameter in fresh.named_parameters():
        layer = re.search(r"(?<=resblocks\.)\d+", name)
        row = re.sub(r"(?<=resblocks\.)\d+", "{}", name)
        parts = [grads[hf.format(layer and layer.group())] for hf, ours in HF_TO_OPENAI.items() if ours == row]
        expected_grad = torch.cat(parts) if len(parts) > 1 else parts[0]
        if name in TRANSPOSED:
            expected_grad = expected_grad.T
        assert parameter.grad is not None, name
        # the gradient of a key bias is zero up to rounding, so the scale is the largest gradient of the tensor or 1e-3
        assert (parameter.grad - expected_grad).abs().max() <= 1e-11 * max(expected_grad.abs().max().item(), 1e-3), name
        compared += len(parts)
    assert compared == len(grads)


def test_the_loss_refuses_logits_that_are_not_square() -> None:
    for shape in ((2, 3), (4,), (0, 0)):
        with pytest.raises(InputError, match=re.escape(str(shape))):
            miniclip.contrastive_loss(torch.zeros(shape))
    for logits, kind in ((torch.eye(3).long(), "torch.int64"), ((torch.eye(3), torch.eye(3)), "tuple")):
        with pytest.raises(InputError, match=kind):
            miniclip.contrastive_loss(logits)  # type: ignore[arg-type]


# -- pure towers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["image", "text"])
def test_towers_compile_whole_and_export(model: CLIP, images: Tensor, tower: str) -> None:
    module: nn.Module = model.visual if tower == "image" else model.text
    inputs = images if tower == "image" else tokenize(TEXTS)
    expected = module(inputs)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert close(compiled(inputs), expected)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(module, (inputs,), dynamic_shapes=({0: batch},)).module()
    assert close(exported(inputs), expected)
    assert close(exported(inputs[:2]), expected[:2])


def test_a_trace_and_an_export_keep_no_length(model: CLIP, images: Tensor) -> None:
    """The cut and the checks depend on the data; a traced model must not remember those of its example."""
    short, long = tokenize(["a cat", "a dog", ""]), tokenize(["a cat on a very long red sofa " * 3] * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing is deprecated, and still what some exporters do
        traced = torch.jit.trace(model, (images, short), check_trace=False)
    assert close(traced(images, long)[0], model(images, long)[0])
    exported = torch.export.export(model, (images, short)).module()
    assert close(exported(images, long)[0], model(images, long)[0])


def test_the_text_tower_shares_parameters_and_adds_no_names(fresh: CLIP) -> None:
    before = set(fresh.state_dict())
    tokens = tokenize(TEXTS)
    old = fresh.text(tokens)
    with torch.no_grad():
        fresh.text_projection.mul_(2)
    assert close(fresh.text(tokens), 2 * old)
    assert fresh.text.training == fresh.training
    fresh.load_state_dict({**fresh.state_dict(), "text_projection": fresh.text_projection / 2}, assign=True)
    assert close(fresh.text(tokens), old)
    assert set(fresh.state_dict()) == before


# -- texts of any length --------------------------------------------------------------------------------------------


def record_shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The numbers of queries and keys of each attention from now on."""
    shapes: list[tuple[int, int]] = []
    attend = layers.attend

    def recorded(q: Tensor, k: Tensor, *others: Any, **settings: Any) -> Tensor:
        shapes.append((len(q), len(k)))
        return attend(q, k, *others, **settings)

    for module in (layers, prefixes):
        monkeypatch.setattr(module, "attend", recorded)
    return shapes


@pytest.mark.parametrize("way", ["trees", "no trees", "gradients", "half precision"])
def test_the_last_block_computes_what_is_pooled(
    fresh: CLIP, images: Tensor, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a batch of texts is cut after its longest: 13 of 77 tokens here (a comma is a token)."""
    tokens = tokenize(TEXTS)
    dtype = torch.float16 if way == "half precision" else torch.float64
    fresh.to(dtype).fast = False
    expected = fresh.encode_image(images).detach(), fresh.encode_text(tokens)
    fresh.fast = True
    if way != "trees":  # as on a device
        monkeypatch.setattr(model_module, "is_ordinary", lambda x: False)
    fresh.requires_grad_(way == "gradients")
    shapes = record_shapes(monkeypatch)
    given = fresh.encode_image(images), fresh.encode_text(tokens)
    tolerance = 1e-2 if way == "half precision" else 1e-12
    assert all(close(a.detach(), b.detach(), tolerance) for a, b in zip(given, expected))
    text = [(12, 13), (1, 13)] if way == "trees" else [(13, 13), (1, 13)]
    assert shapes == [(17, 17), (17, 17), (1, 17), *text]
    fresh.fast = False
    shapes.clear()
    fresh.encode_image(images)
    fresh.encode_text(tokens)
    assert shapes == [(17, 17)] * 3 + [(77, 77)] * 2


def test_hooks_see_what_they_see_in_openai_clip(fresh: CLIP, images: Tensor) -> None:
    """A hook anywhere in a tower: every token of every block, and ln_final over all of them."""
    tokens = tokenize(TEXTS)
    expected = fresh.encode_image(images), fresh.encode_text(tokens)
    image = {"visual.conv1": (3, 64, 4, 4), "visual.ln_pre": (3, 17, 64), "visual.transformer": (17, 3, 64)}
    image |= {f"visual.transformer.resblocks.2{part}": (17, 3, 64) for part in ("", ".ln_1", ".attn", ".mlp.c_proj")}
    image |= {"visual.ln_post": (3, 64), "visual": (3, 48), "visual.transformer.resblocks.2.mlp.gelu": (17, 3, 160)}
    text = {"token_embedding": (3, 77, 48), "transformer": (77, 3, 48), "ln_final": (3, 77, 48)}
    text |= {f"transformer.resblocks.1{part}": (77, 3, 48) for part in ("", ".ln_2", ".attn.out_proj", ".mlp")}
    seen: list[tuple[int, ...]] = []
    for name, shape in {**image, **text}.items():
        hook = fresh.get_submodule(name).register_forward_hook(
            lambda _, given, output: seen.append(tuple(output.shape))
        )
        assert close(fresh.encode_image(images), expected[0])
        assert close(fresh.encode_text(tokens), expected[1])
        hook.remove()
        assert seen == [shape], name
        seen.clear()


def test_a_hook_sees_a_large_batch_whole(fresh: CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randn(9, 3, 32, 32, dtype=torch.float64)
    expected = fresh.encode_image(images)
    monkeypatch.setattr(model_module, "MAX_TOKENS", 17 * 2)
    batches: list[int] = []
    with monkeypatch.context() as patched:
        embed = fresh.visual.embed
        patched.setattr(fresh.visual, "embed", lambda x: batches.append(len(x)) or embed(x))  # type: ignore[func-returns-value]
        assert close(fresh.encode_image(images), expected)
    assert batches == [2, 2, 2, 2, 1]
    batches.clear()
    hook = fresh.visual.transformer.register_forward_hook(lambda _, args, output: batches.append(output.shape[1]))
    assert close(fresh.encode_image(images), expected)
    hook.remove()
    assert batches == [9]


def test_what_follows_the_end_token_does_not_matter(model: CLIP) -> None:
    tokens = tokenize(TEXTS)
    noisy = tokens.clone()
    for row, text in zip(noisy, TEXTS):
        end = len(miniclip.Tokenizer().encode(text)) + 2
        row[end:] = torch.randint(1, 49000, (77 - end,))
    padded_with_end = torch.where(tokens == 0, 49407, tokens)
    expected = model.encode_text(tokens)
    for variant in (noisy, padded_with_end, tokens[:, :13], tokens.long()):
        assert close(model.encode_text(variant), expected)


def test_the_largest_id_is_pooled_under_the_old_rule(tmp_path: Path) -> None:
    """transformers reads eos_token_id 2 as "where the largest id stands"."""
    old = make_reference(text_config={"eos_token_id": 2, "vocab_size": 99, "bos_token_id": 0, "pad_token_id": 1})
    old.save_pretrained(tmp_path)
    old = old.double()
    model, _ = miniclip.load(tmp_path, "cpu", dtype=torch.float64)
    tokens = torch.randint(0, 99, (5, 20), generator=torch.Generator().manual_seed(0))
    tokens[0, 3] = tokens[0, 9] = 98  # of equals the first
    with torch.no_grad():
        expected = old.get_text_features(tokens).pooler_output
    assert close(model.encode_text(tokens), expected)


# -- the door -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(3, 32, 32), "(3, 32, 32)"),
        (torch.zeros(1, 3, 224, 224), "must be (N, 3, 32, 32), got (1, 3, 224, 224)"),
        (torch.zeros(1, 1, 32, 32), "(1, 1, 32, 32)"),
        (torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "torch.uint8"),
        (torch.zeros(1, 3, 32, 32, device="meta"), "on meta, the model is on cpu"),
        ([[1.0]], "list"),
    ],
)
def test_images_are_checked_with_numbers(model: CLIP, images: Tensor, message: str) -> None:
    for call in (model.encode_image, model.visual.hidden_states, model.visual.patch_tokens):
        with pytest.raises(InputError, match=re.escape(message)):
            call(images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[0], "(77,)"),
        (lambda t: torch.cat([t, t], dim=1), "L from 1 to 77, got (3, 154)"),
        (lambda t: t[:, :0], "(3, 0)"),
        (lambda t: t.float(), "torch.float32"),
        (lambda t: t.to("meta"), "on meta, the model is on cpu"),
        (lambda t: t.index_fill(0, torch.tensor([1]), 5), "text 1 has no end token (49407) among its 77 ids"),
        (lambda t: t.where(t != 320, 49408), "text 0 holds the id 49408, the vocabulary ends at 49407"),
        (lambda t: t.where(t != 320, -1), "text 0 holds the id -1"),
        (lambda t: t[:, :6], "text 1 has no end token (49407) among its 6 ids"),
        (lambda t: t.tolist(), "list"),
    ],
)
def test_tokens_are_checked_with_numbers(model: CLIP, change: Callable[[Tensor], Tensor], message: str) -> None:
    tokens = change(tokenize(["a cat", "a dog on a very long lead", ""]))
    for call in (model.encode_text, model.hidden_states):
        with pytest.raises(InputError, match=re.escape(message)):
            call(tokens)


def test_images_of_any_floating_dtype_are_cast(model: CLIP, images: Tensor) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        features = model.encode_image(images.to(dtype))
        assert features.dtype == torch.float64
        assert close(features, model.encode_image(images.to(dtype).double()))


def test_empty_batches(model: CLIP) -> None:
    assert model.encode_image(torch.zeros(0, 3, 32, 32)).shape == (0, 48)
    assert model.encode_text(tokenize([])).shape == (0, 48)
    assert model(torch.zeros(0, 3, 32, 32), tokenize(TEXTS))[1].shape == (3, 0)


# -- an ordinary module ---------------------------------------------------------------------------------------------


def test_copies_pickles_and_casts_keep_working(fresh: CLIP, images: Tensor) -> None:
    tokens = tokenize(TEXTS)
    expected = fresh(images, tokens)[0]
    assert close(copy.deepcopy(fresh)(images, tokens)[0], expected)
    assert close(pickle.loads(pickle.dumps(fresh))(images, tokens)[0], expected)
    buffer = io.BytesIO()
    torch.save(fresh.state_dict(), buffer)
    buffer.seek(0)
    other = CLIP(fresh.config).double()
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert close(other(images, tokens)[0], expected)
    half = copy.deepcopy(fresh).half()
    assert half.dtype == torch.float16
    assert close(half(images, tokens)[0].double(), expected, 2e-2)


def test_threads_agree(model: CLIP, images: Tensor) -> None:
    tokens = tokenize(TEXTS)
    expected = model(images, tokens)[0]
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: model(images, tokens)[0], range(16)):
            assert torch.equal(result, expected)


def test_a_step_of_training_lowers_the_loss(fresh: CLIP, images: Tensor) -> None:
    tokens = tokenize(TEXTS)
    assert not fresh(images, tokens)[0].requires_grad
    fresh.requires_grad_(True)
    optimizer = torch.optim.SGD(fresh.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        loss = miniclip.contrastive_loss(fresh(images, tokens)[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_blocks_are_the_unit_of_both_towers(model: CLIP) -> None:
    blocks = [*model.visual.transformer.resblocks, *model.transformer.resblocks]
    assert all(isinstance(block, ResidualAttentionBlock) for block in blocks)
    assert [block.attn.causal for block in blocks] == [False] * 3 + [True] * 2


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_on_cuda(tiny: Path, reference64: CLIPModel, images: Tensor, dtype: torch.dtype | None) -> None:
    model, _ = miniclip.load(tiny, "cuda", dtype=dtype)
    assert model.dtype == (dtype or torch.float16)
    tokens = tokenize(TEXTS)
    with torch.no_grad():
        expected = reference64(pixel_values=images, input_ids=tokens)
    ours = F.normalize(model.encode_image(images.cuda()).double().cpu(), dim=1)
    assert F.cosine_similarity(ours, expected.image_embeds).min() > (0.999 if dtype is torch.bfloat16 else 0.99999)
    ours = F.normalize(model.encode_text(tokens.cuda()).double().cpu(), dim=1)
    assert F.cosine_similarity(ours, expected.text_embeds).min() > (0.999 if dtype is torch.bfloat16 else 0.99999)
    with pytest.raises(InputError, match="images are on cpu, the model is on cuda:0"):
        model.encode_image(images)
