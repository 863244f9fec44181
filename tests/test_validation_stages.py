"""Every planted mistake is found, and at the stage where the mistake is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_reference
from torch import Tensor, nn
from transformers import CLIPModel

import miniclip
from miniclip.model import TextTransformer
from validation.reference import seeded_checkpoint
from validation.report import path_of
from validation.stages import Limits, Row, compare, limits_for, measure, published
from validation.weights import Pair

Loaded = tuple[miniclip.CLIP, miniclip.Preprocess]


@pytest.fixture
def loaded(tiny: Path) -> Loaded:
    return miniclip.load(tiny, "cpu")


def first_drift(rows: list[Row]) -> str | None:
    return next((row.stage for row in rows if not row.ok), None)


def test_a_faithful_model_passes(loaded: Loaded, reference: CLIPModel) -> None:
    rows = compare(loaded[0], reference, loaded[1])
    assert first_drift(rows) is None
    stages = [row.stage for row in rows]
    assert stages[:6] == [
        "weights finite",
        "token ids",
        "pixels (openai)",
        "pixels (huggingface)",
        "patch embedding",
        "image ln_pre",
    ]
    assert stages[-2:] == ["logits", "probabilities"]
    for stage in ("image block 3", "image pooled", "image embedding (plain)", "image embedding (as used)"):
        assert stage in stages
    for stage in ("text block 2", "text pooled", "text embedding (plain)", "text embedding (as used)"):
        assert stage in stages


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_dtypes_pass(tiny: Path, dtype: torch.dtype) -> None:
    model, preprocess = miniclip.load(tiny, "cpu", dtype=dtype)
    reference = make_reference().to(torch.float64 if dtype == torch.float64 else torch.float32)
    assert first_drift(compare(model, reference, preprocess)) is None


# -- mutations of the model -----------------------------------------------------------------------------------------


def swap_q_and_k(tower: str) -> Callable[[miniclip.CLIP], None]:
    def mutate(model: miniclip.CLIP) -> None:
        transformer = model.visual.transformer if tower == "image" else model.transformer
        attn = transformer.resblocks[1].attn
        for parameter in (attn.in_proj_weight, attn.in_proj_bias):
            q, k, v = parameter.chunk(3)
            parameter.copy_(torch.cat([k, q, v]))

    return mutate


def swap_k_and_v(model: miniclip.CLIP) -> None:
    attn = model.visual.transformer.resblocks[0].attn
    q, k, v = attn.in_proj_weight.chunk(3)
    attn.in_proj_weight.copy_(torch.cat([q, v, k]))


def drop_ln_pre(model: miniclip.CLIP) -> None:
    model.visual.ln_pre = nn.Identity()


def other_gelu(model: miniclip.CLIP) -> None:
    for block in model.visual.transformer.resblocks:
        block.mlp.gelu = nn.GELU()


def other_gelu_in_text(model: miniclip.CLIP) -> None:
    model.transformer.resblocks[1].mlp.gelu = nn.GELU()


def untransposed_text_projection(model: miniclip.CLIP) -> None:
    model.text_projection.copy_(model.text_projection.T.clone())  # square in the tiny model, as in ViT-B


def forgotten_mask(model: miniclip.CLIP) -> None:
    model.transformer.resblocks[0].attn.causal = False


def wrong_eps(model: miniclip.CLIP) -> None:
    model.visual.ln_post.eps = 1e-3


def class_token_last(model: miniclip.CLIP) -> None:
    model.visual.positional_embedding.copy_(model.visual.positional_embedding.roll(1, dims=0))


def not_a_number(model: miniclip.CLIP) -> None:
    model.visual.proj[3, 4] = float("nan")


@pytest.mark.parametrize(
    ("mutate", "stage"),
    [
        (swap_q_and_k("image"), "image block 2"),
        (swap_q_and_k("text"), "text block 2"),
        (swap_k_and_v, "image block 1"),
        (drop_ln_pre, "image ln_pre"),
        (other_gelu, "image block 1"),
        (other_gelu_in_text, "text block 2"),
        (untransposed_text_projection, "text embedding (plain)"),
        (forgotten_mask, "text block 1"),
        (wrong_eps, "image pooled"),
        (class_token_last, "patch embedding"),
        (not_a_number, "weights finite"),
        (lambda model: model.logit_scale.add_(1e-4), "logits"),
        (lambda model: model.ln_final.bias.mul_(-1), "text pooled"),
        (lambda model: model.visual.proj.copy_(model.visual.proj.flip(0)), "image embedding (plain)"),
    ],
)
def test_a_mutated_model_fails_at_the_mutated_stage(
    loaded: Loaded, reference: CLIPModel, mutate: Callable[[miniclip.CLIP], None], stage: str
) -> None:
    model, preprocess = loaded
    with torch.no_grad():
        mutate(model)
    assert first_drift(compare(model, reference, preprocess)) == stage


def test_the_last_end_token_instead_of_the_first_fails(
    loaded: Loaded, reference: CLIPModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def last(self: TextTransformer, tokens: Tensor) -> Tensor:
        return tokens.shape[1] - 1 - (tokens == self.end_of_text).flip(1).int().argmax(dim=1)

    monkeypatch.setattr(TextTransformer, "end_positions", last)
    assert first_drift(compare(loaded[0], reference, loaded[1])) == "text pooled"


def test_a_wrong_packed_matrix_fails_in_the_row_as_used(
    loaded: Loaded, tiny: Path, reference: CLIPModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake that only packed weights have: they are wrong by 0.1 %."""
    first, preprocess = miniclip.load(tiny, "cpu")
    compare(first, reference, preprocess)  # the kernels are probed once per process, here with right weights
    pack = torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", lambda weight, *rest: pack(1.001 * weight, *rest))
    drift = first_drift(compare(loaded[0], reference, loaded[1]))
    # A processor without packed kernels has no such row to drift.
    assert drift == ("image embedding (as used)" if "packed by oneDNN" in path_of(first) else None)


def test_a_text_cut_too_short_fails_in_the_row_as_used(
    loaded: Loaded, reference: CLIPModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake that only ``encode_text`` has: the tower, which computes the plain row, gets the whole text."""
    check = miniclip.CLIP._check_tokens
    monkeypatch.setattr(miniclip.CLIP, "_check_tokens", lambda self, tokens: [n - 1 for n in check(self, tokens)])
    assert first_drift(compare(loaded[0], reference, loaded[1])) == "text embedding (as used)"


def test_a_floored_crop_fails(loaded: Loaded, reference: CLIPModel) -> None:
    class Floored(miniclip.Preprocess):
        """Hugging Face's crop, whatever the convention."""

        def __call__(self, images):  # type: ignore[no-untyped-def]
            return miniclip.Preprocess(32, convention="huggingface")(images)

    assert first_drift(compare(loaded[0], reference, Floored(32))) == "pixels (openai)"


def test_other_pixels_and_tokens_fail(loaded: Loaded, reference: CLIPModel) -> None:
    model, preprocess = loaded

    class Brighter(miniclip.Preprocess):
        def __call__(self, images):  # type: ignore[no-untyped-def]
            return super().__call__(images) + 1e-6

    assert first_drift(compare(model, reference, Brighter(32))) == "pixels (openai)"

    def shifted(*args, **kwargs):  # type: ignore[no-untyped-def]
        tokens = miniclip.tokenize(*args, **kwargs)
        tokens[0, 1] += 1
        return tokens

    assert first_drift(compare(model, reference, preprocess, tokenize=shifted)) == "token ids"


def test_a_wrong_shape_is_a_drift_and_not_a_crash() -> None:
    row = measure("stage", torch.zeros(2, 3), torch.zeros(3, 2), "hidden", Limits(hidden=1.0))
    assert not row.ok


@pytest.mark.parametrize("fast", [True, False])
def test_only_the_plain_stages_run_without_the_fast_path(
    loaded: Loaded, reference: CLIPModel, monkeypatch: pytest.MonkeyPatch, fast: bool
) -> None:
    model, preprocess = loaded
    model.fast = fast
    seen: dict[str, set[bool]] = {}

    def record(name: str) -> None:
        original = getattr(model, name)

        def recording(inputs: Tensor) -> object:
            seen.setdefault(name, set()).add(model.fast)
            return original(inputs)

        monkeypatch.setattr(model, name, recording)

    for name in ("hidden_states", "encode_image", "encode_text"):
        record(name)
    assert first_drift(compare(model, reference, preprocess)) is None
    assert seen == {"hidden_states": {False}, "encode_image": {fast}, "encode_text": {fast}}
    assert model.fast is fast


def test_the_fast_path_is_restored_after_an_error(loaded: Loaded, reference: CLIPModel) -> None:
    model, preprocess = loaded
    del model.visual.ln_post
    with pytest.raises(AttributeError, match="ln_post"):
        compare(model, reference, preprocess)
    assert model.fast is True


# -- the limits -----------------------------------------------------------------------------------------------------


# In bfloat16 the rounding error is as large as the difference of the two GELUs: only float16 gets that mutation.
COARSE = [swap_q_and_k("image"), swap_q_and_k("text"), drop_ln_pre, forgotten_mask]


@pytest.mark.parametrize(
    ("dtype", "mutate"),
    [*((dtype, mutate) for dtype in (torch.float16, torch.bfloat16) for mutate in COARSE), (torch.float16, other_gelu)],
)
def test_half_precision_hides_no_mutation_on_seeded_weights(
    tiny: Path, tmp_path: Path, dtype: torch.dtype, mutate: Callable[[miniclip.CLIP], None]
) -> None:
    seeded_checkpoint(miniclip.load(tiny, "cpu")[0].config, tmp_path)
    pair = Pair("", str(tmp_path), str(tmp_path))
    model, preprocess, reference, _ = pair.load("cpu", dtype)
    assert first_drift(compare(model, reference, preprocess)) is None
    with torch.no_grad():
        mutate(model)
    assert first_drift(compare(model, reference, preprocess)) is not None


def test_half_precision_bounds_the_scale_and_every_vector() -> None:
    limits = limits_for(torch.bfloat16)
    state = torch.randn(2, 5, 8)
    assert not measure("x", 2 * state, state, "hidden", limits).ok
    state[0, 0] *= 200
    wrong = state.clone()
    wrong[0, 3] *= -1  # one small token among large ones
    assert not measure("x", wrong, state, "hidden", limits).ok


def test_published_numbers_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests do not have OpenAI's ViT-B/32. A stand-in records what it is asked and gives the published logits."""
    seen = {}

    class Recorded:
        device = torch.device("cpu")

        def __call__(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
            seen.update(pixels=pixels, tokens=tokens)
            logits = torch.tensor([[22.7866, 22.8397], [23.2389, 22.8406]])
            return logits.T, logits + seen.get("off", 0)

    assert published(Recorded()).ok  # type: ignore[arg-type]
    assert seen["pixels"].shape == (2, 3, 224, 224)
    assert seen["pixels"][0].unique() == 0.25
    assert seen["tokens"].tolist()[1] == [49406, 320, 1125, 539, 320, 1929, 49407]
    seen["off"] = 2e-4
    assert not published(Recorded()).ok  # type: ignore[arg-type]
