"""The proof proves something: every planted mistake is found, and at the stage where it is."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from conftest import make_reference
from test_hub import FakeHub
from torch import Tensor, nn
from transformers import CLIPModel

import miniclip
import validate
from miniclip import fast, hub
from miniclip.model import TextTransformer

Loaded = tuple[miniclip.CLIP, miniclip.Preprocess]


@pytest.fixture
def loaded(tiny: Path) -> Loaded:
    return miniclip.load(tiny, "cpu")


def first_drift(rows: list[validate.Row]) -> str | None:
    return next((row.stage for row in rows if not row.ok), None)


def test_a_faithful_model_passes(loaded: Loaded, reference: CLIPModel) -> None:
    rows = validate.compare(loaded[0], reference, loaded[1])
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
    assert first_drift(validate.compare(model, reference, preprocess)) is None


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
def test_a_mutated_model_fails_where_it_is_wrong(
    loaded: Loaded, reference: CLIPModel, mutate: Callable[[miniclip.CLIP], None], stage: str
) -> None:
    model, preprocess = loaded
    with torch.no_grad():
        mutate(model)
    assert first_drift(validate.compare(model, reference, preprocess)) == stage


def test_the_last_end_token_instead_of_the_first_fails(
    loaded: Loaded, reference: CLIPModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def last(self: TextTransformer, tokens: Tensor) -> Tensor:
        return tokens.shape[1] - 1 - (tokens == self.end_of_text).flip(1).int().argmax(dim=1)

    monkeypatch.setattr(TextTransformer, "end_positions", last)
    assert first_drift(validate.compare(loaded[0], reference, loaded[1])) == "text pooled"


def test_a_wrong_packed_matrix_fails_on_the_path_users_get(
    loaded: Loaded, reference: CLIPModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = fast.Matrix.add_to
    monkeypatch.setattr(fast.Matrix, "add_to", lambda self, residual, x, bias: exact(self, residual, 1.001 * x, bias))
    assert first_drift(validate.compare(loaded[0], reference, loaded[1])) == "image embedding (as used)"


def test_cutting_a_text_too_short_fails_on_the_path_users_get(
    loaded: Loaded, reference: CLIPModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain path is right and the shortcut around it wrong: the row of the shortcut says so."""
    check = miniclip.CLIP._check_tokens
    monkeypatch.setattr(miniclip.CLIP, "_check_tokens", lambda self, tokens: [n - 1 for n in check(self, tokens)])
    assert first_drift(validate.compare(loaded[0], reference, loaded[1])) == "text embedding (as used)"


def test_a_floored_crop_fails(loaded: Loaded, reference: CLIPModel) -> None:
    class Floored(miniclip.Preprocess):
        def _resize_and_crop(self, image):  # type: ignore[no-untyped-def]
            return super(Floored, replace(self, convention="huggingface"))._resize_and_crop(image)

    assert first_drift(validate.compare(loaded[0], reference, Floored(32))) == "pixels (openai)"


def test_other_pixels_and_tokens_fail(loaded: Loaded, reference: CLIPModel) -> None:
    model, preprocess = loaded

    class Brighter(miniclip.Preprocess):
        def __call__(self, images):  # type: ignore[no-untyped-def]
            return super().__call__(images) + 1e-6

    assert first_drift(validate.compare(model, reference, Brighter(32))) == "pixels (openai)"

    def shifted(*args, **kwargs):  # type: ignore[no-untyped-def]
        tokens = miniclip.tokenize(*args, **kwargs)
        tokens[0, 1] += 1
        return tokens

    assert first_drift(validate.compare(model, reference, preprocess, tokenize=shifted)) == "token ids"


def test_a_wrong_shape_is_a_drift_not_a_crash() -> None:
    row = validate.measure("stage", torch.zeros(2, 3), torch.zeros(3, 2), "hidden", validate.Limits(hidden=1.0))
    assert not row.ok


# -- the command ----------------------------------------------------------------------------------------------------


def test_main_prints_the_table_and_exits_0(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate.main(["--model", str(tiny), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    for heading in ("stage", "max abs Δ", "relative", "cosine", "limit", "ok"):
        assert heading in out
    assert "patch embedding" in out
    assert "DRIFTS" not in out
    assert "within their limits" in out


def test_main_names_the_first_drift_and_exits_1(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(miniclip.layers.QuickGELU, "forward", lambda self, x: nn.functional.gelu(x))
    assert validate.main(["--model", str(tiny), "--device", "cpu"]) == 1
    captured = capsys.readouterr()
    assert "DRIFTS" in captured.out
    assert "first drifts at 'image block 1'" in captured.err


def test_what_happens_later_hides_no_drift(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = make_reference()
    with torch.no_grad():
        broken.visual_projection.weight[3, 4] = float("nan")
    broken.save_pretrained(tmp_path)
    capsys.readouterr()
    assert validate.main(["--model", str(tmp_path), "nowhere", str(tiny), "--device", "cpu", "--json"]) == 1
    captured = capsys.readouterr()
    first, last = json.loads(captured.out, parse_constant=pytest.fail)["reports"]
    assert first["rows"][0]["max_abs"] is None
    assert first["rows"][0]["limit"] == "none, but visual.proj holds 1 NaN or infinity"
    assert all(row["ok"] for row in last["rows"])
    assert "first drifts at 'weights finite'" in captured.err
    assert "nowhere: transformers can only read" in captured.err


def test_a_model_of_another_vocabulary_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_reference(text_config={"vocab_size": 1000, "eos_token_id": 2}).save_pretrained(tmp_path)
    assert validate.main(["--model", str(tmp_path), "--device", "cpu"]) == 1
    assert "need ids up to 49407, the model has 1000" in capsys.readouterr().err


def test_a_folder_transformers_cannot_load_is_refused(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_bytes((tiny / "config.json").read_bytes())
    (tmp_path / "clip.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    assert validate.main(["--model", str(tmp_path), "--device", "cpu"]) == 1
    assert "transformers cannot load it" in capsys.readouterr().err


def test_a_folders_own_preprocessing_is_read_by_transformers_itself(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    settings = {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "image_mean": [0.4, 0.5, 0.6]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    assert validate.main(["--model", str(tmp_path), "--device", "cpu"]) == 0
    monkeypatch.setattr("miniclip.huggingface.preprocess_from_dict", lambda config: miniclip.Preprocess(32))
    assert validate.main(["--model", str(tmp_path), "--device", "cpu"]) == 1
    assert "first drifts at 'pixels (openai)'" in capsys.readouterr().err


def test_main_as_json(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate.main(["--model", str(tiny), "--device", "cpu", "--dtype", "float64", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["versions"]["torch"] == torch.__version__
    (report,) = result["reports"]
    assert report["dtype"] == "float64"
    assert all(row["ok"] for row in report["rows"])


def test_main_refuses_what_transformers_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert validate.main(["--model", str(tmp_path)]) == 1
    assert "config.json" in capsys.readouterr().err
    assert validate.main(["--model", "nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err


def test_a_known_model_without_weights_gets_a_seeded_checkpoint(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = hub.KnownModel(miniclip.load(tiny, "cpu")[0].config, hub.KNOWN["ViT-B/16"].sources)
    monkeypatch.setitem(hub.KNOWN, "ViT-B/16", small)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with validate.weights_for("ViT-B/16", download=False) as pair:
        assert "seeded" in pair.description
        assert "not in the cache" in pair.description
        model, preprocess, reference, _ = pair.load("cpu", torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                assert not torch.any(parameter == 0), name
                assert not torch.any(parameter == 1), name
        assert first_drift(validate.compare(model, reference, preprocess)) is None
    assert not Path(pair.ours).exists()


def test_a_known_model_in_the_cache_is_validated_on_its_weights(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two copies under the names the Hub's cache would give them; each side reads its own."""
    ours = hub.Source("somebody/clip", "1" * 40, "model.safetensors")
    theirs = hub.Source("openai/clip", "2" * 40, "model.safetensors")
    monkeypatch.setitem(validate.REFERENCES, "ViT-B/32", theirs)
    for source in (ours, theirs):
        snapshot = tmp_path / f"models--{source.repo.replace('/', '--')}" / "snapshots" / source.revision
        snapshot.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (snapshot / name).write_bytes((tiny / name).read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    known = hub.KnownModel(miniclip.load(tiny, "cpu")[0].config, (ours,))
    monkeypatch.setitem(hub.KNOWN, "ViT-B/32", known)
    with validate.weights_for("ViT-B/32", download=False) as pair:
        assert pair.real
        assert theirs.repo in pair.description
        model, preprocess, reference, _ = pair.load("cpu", torch.float32)
        assert str(tmp_path) in str(reference.config._name_or_path) or reference.config._name_or_path == theirs.repo
        assert first_drift(validate.compare(model, reference, preprocess)) is None


DOWNLOAD = """
import sys
import huggingface_hub, miniclip, validate
from miniclip import fast, hub

config = miniclip.load(sys.argv[1], "cpu")[0].config
hub.KNOWN["ViT-B/16"] = hub.KnownModel(config, (hub.Source("timm/tiny", sys.argv[2], "open_clip_model.safetensors"),))
validate.REFERENCES["ViT-B/16"] = hub.Source("openai/tiny", "main", "pytorch_model.bin")
command = ["--model", "ViT-B/16", "--device", "cpu"]
status = validate.main([*command, "--download"])
print("and without network:", flush=True)
huggingface_hub.constants.HF_HUB_OFFLINE = True
sys.exit(status or validate.main(command))
"""


def test_downloaded_weights_are_two_copies_of_one_model(tiny: Path, reference: CLIPModel, tmp_path: Path) -> None:
    """As for ViT-B/16: transformers reads its own pickle, miniclip a safetensors file in OpenAI's layout."""
    server = FakeHub(tmp_path / "unused")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    model, _ = miniclip.load(tiny, "cpu")
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    ours = server.add("timm/tiny", {"open_clip_model.safetensors": safetensors.torch.save(state)})
    pickle = io.BytesIO()
    torch.save(reference.state_dict(), pickle)
    server.add(
        "openai/tiny", {"pytorch_model.bin": pickle.getvalue(), "config.json": (tiny / "config.json").read_bytes()}
    )
    settings = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    env = {**os.environ, **settings, "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(Path(validate.__file__).parent)}

    command = [sys.executable, "-c", DOWNLOAD, str(tiny), ours]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert "downloading pytorch_model.bin of openai/tiny: 10 MB" in done.stderr
    assert "downloading open_clip_model.safetensors of timm/tiny: 10 MB" in done.stderr
    online, offline = done.stdout.split("and without network:")
    for output in (online, offline):
        assert "OpenAI's weights, transformers reading openai/tiny's pytorch_model.bin" in output
        assert "DRIFTS" not in output
    fetched = [request.path for request in server.requests if request.method == "GET"]
    assert len(fetched) == len(set(fetched)) == 3  # two files of weights and a configuration, once


def test_one_file_in_the_cache_serves_both(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What ``miniclip.load("ViT-B/32")`` leaves behind is enough, under an alias too, and is checked in full."""
    snapshot = tmp_path / "models--somebody--clip" / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    ours = hub.Source("somebody/clip", "1" * 40, "model.safetensors")
    config = miniclip.load(tiny, "cpu")[0].config
    monkeypatch.setitem(hub.KNOWN, "ViT-B/32", hub.KnownModel(config, (ours,)))
    asked = []

    def published(model: miniclip.CLIP) -> validate.Row:
        asked.append(model.dtype)
        return validate.Row("published logits", 0.0, 0.0, 1.0, "", ok=True)

    monkeypatch.setattr(validate, "published", published)
    monkeypatch.setattr(validate, "_download", lambda *_: pytest.fail("a second copy of the same bytes"))
    assert validate.main(["--model", "openai/clip-vit-base-patch32", "--device", "cpu", "--download"]) == 0
    out = capsys.readouterr().out
    assert "ViT-B/32 on cpu in float32: OpenAI's weights, both reading one file" in out
    assert "published logits" in out
    assert asked == [torch.float32]


def test_downloading_without_network_is_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert validate.main(["--model", "ViT-L/14@336px", "--download"]) == 1
    captured = capsys.readouterr()
    assert "HF_HUB_OFFLINE is set" in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err


# In bfloat16 the two GELUs are as far apart as its rounding: that mutation is for the other dtypes.
COARSE = [swap_q_and_k("image"), swap_q_and_k("text"), drop_ln_pre, forgotten_mask]


@pytest.mark.parametrize(
    ("dtype", "mutate"),
    [*((dtype, mutate) for dtype in (torch.float16, torch.bfloat16) for mutate in COARSE), (torch.float16, other_gelu)],
)
def test_half_precision_hides_no_mutation_on_seeded_weights(
    tiny: Path, tmp_path: Path, dtype: torch.dtype, mutate: Callable[[miniclip.CLIP], None]
) -> None:
    validate.seeded_checkpoint(miniclip.load(tiny, "cpu")[0].config, tmp_path)
    pair = validate.Pair("", str(tmp_path), str(tmp_path))
    model, preprocess, reference, _ = pair.load("cpu", dtype)
    assert first_drift(validate.compare(model, reference, preprocess)) is None
    with torch.no_grad():
        mutate(model)
    assert first_drift(validate.compare(model, reference, preprocess)) is not None


def test_half_precision_bounds_the_scale_and_every_vector() -> None:
    limits = validate.limits_for("cpu", torch.bfloat16)
    state = torch.randn(2, 5, 8)
    assert not validate.measure("x", 2 * state, state, "hidden", limits).ok
    state[0, 0] *= 200
    wrong = state.clone()
    wrong[0, 3] *= -1  # one small token among large ones
    assert not validate.measure("x", wrong, state, "hidden", limits).ok


def test_published_numbers_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real ViT-B/32 is not here; what the check asks of a model is."""
    seen = {}

    class Recorded:
        device = torch.device("cpu")

        def __call__(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
            seen.update(pixels=pixels, tokens=tokens)
            logits = torch.tensor([[22.7866, 22.8397], [23.2389, 22.8406]])
            return logits.T, logits + seen.get("off", 0)

    assert validate.published(Recorded()).ok  # type: ignore[arg-type]
    assert seen["pixels"].shape == (2, 3, 224, 224)
    assert seen["pixels"][0].unique() == 0.25
    assert seen["tokens"].tolist()[1] == [49406, 320, 1125, 539, 320, 1929, 49407]
    seen["off"] = 2e-4
    assert not validate.published(Recorded()).ok  # type: ignore[arg-type]


def test_the_script_runs_from_the_shell(tiny: Path) -> None:
    script = Path(validate.__file__)
    done = subprocess.run(
        [sys.executable, str(script), "--model", str(tiny), "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_on_cuda(tiny: Path, dtype: str) -> None:
    assert validate.main(["--model", str(tiny), "--device", "cuda", "--dtype", dtype]) == 0
