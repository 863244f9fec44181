"""Which weights each side reads: OpenAI's from the cache or a download, or a seeded checkpoint."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import run_python
from test_hub import FakeHub
from transformers import CLIPModel

import miniclip
from miniclip import hub
from validation.__main__ import main
from validation.stages import Row, compare
from validation.weights import REFERENCES, weights_for


def test_a_known_model_without_weights_gets_a_seeded_checkpoint(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    small = hub.KnownModel(miniclip.load(tiny, "cpu")[0].config, hub.KNOWN["ViT-B/16"].sources)
    monkeypatch.setitem(hub.KNOWN, "ViT-B/16", small)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with weights_for("ViT-B/16", download=False) as pair:
        assert "seeded" in pair.description
        assert "not in the cache" in pair.description
        model, preprocess, reference, _ = pair.load("cpu", torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                assert not torch.any(parameter == 0), name
                assert not torch.any(parameter == 1), name
        assert all(row.ok for row in compare(model, reference, preprocess))
    assert not Path(pair.ours).exists()


def test_a_known_model_in_the_cache_is_validated_on_its_weights(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The Hub's cache holds two copies; each side reads its own."""
    ours = hub.Source("somebody/clip", "1" * 40, "model.safetensors")
    theirs = hub.Source("openai/clip", "2" * 40, "model.safetensors")
    monkeypatch.setitem(REFERENCES, "ViT-B/32", theirs)
    for source in (ours, theirs):
        snapshot = tmp_path / f"models--{source.repo.replace('/', '--')}" / "snapshots" / source.revision
        snapshot.mkdir(parents=True)
        for name in ("config.json", "model.safetensors"):
            (snapshot / name).write_bytes((tiny / name).read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    known = hub.KnownModel(miniclip.load(tiny, "cpu")[0].config, (ours,))
    monkeypatch.setitem(hub.KNOWN, "ViT-B/32", known)
    with weights_for("ViT-B/32", download=False) as pair:
        assert pair.real
        assert theirs.repo in pair.description
        model, preprocess, reference, _ = pair.load("cpu", torch.float32)
        assert str(tmp_path) in str(reference.config._name_or_path) or reference.config._name_or_path == theirs.repo
        assert all(row.ok for row in compare(model, reference, preprocess))


DOWNLOAD = """
import sys
import huggingface_hub, miniclip
from miniclip import hub
from validation.__main__ import main
from validation.weights import REFERENCES

config = miniclip.load(sys.argv[1], "cpu")[0].config
hub.KNOWN["ViT-B/16"] = hub.KnownModel(config, (hub.Source("timm/tiny", sys.argv[2], "open_clip_model.safetensors"),))
REFERENCES["ViT-B/16"] = hub.Source("openai/tiny", "main", "pytorch_model.bin")
command = ["--model", "ViT-B/16", "--device", "cpu"]
status = main([*command, "--download"])
print("and without network:", flush=True)
huggingface_hub.constants.HF_HUB_OFFLINE = True
sys.exit(status or main(command))
"""


@pytest.mark.slow
def test_downloaded_weights_are_two_copies_of_one_model(tiny: Path, reference: CLIPModel, tmp_path: Path) -> None:
    """As with ViT-B/16: transformers reads its own pickle, miniclip a safetensors file in OpenAI's layout."""
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
    done = run_python("-c", DOWNLOAD, tiny, ours, **settings, HF_HUB_DISABLE_TELEMETRY="1")
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
    """The file that ``miniclip.load("ViT-B/32")`` caches is enough, also under an alias, and for published logits."""
    snapshot = tmp_path / "models--somebody--clip" / "snapshots" / ("1" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes((tiny / "model.safetensors").read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    ours = hub.Source("somebody/clip", "1" * 40, "model.safetensors")
    config = miniclip.load(tiny, "cpu")[0].config
    monkeypatch.setitem(hub.KNOWN, "ViT-B/32", hub.KnownModel(config, (ours,)))
    asked = []

    def published(model: miniclip.CLIP) -> Row:
        asked.append(model.dtype)
        return Row("published logits", 0.0, 0.0, 1.0, "", ok=True)

    monkeypatch.setattr("validation.report.published", published)
    monkeypatch.setattr("validation.weights._download", lambda *_: pytest.fail("downloads the same bytes again"))
    assert main(["--model", "openai/clip-vit-base-patch32", "--device", "cpu", "--download"]) == 0
    out = capsys.readouterr().out
    assert "ViT-B/32 on cpu in float32: OpenAI's weights, both reading one file" in out
    assert "published logits" in out
    assert asked == [torch.float32]


def test_a_download_without_network_fails_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "ViT-L/14@336px", "--download"]) == 1
    captured = capsys.readouterr()
    assert "HF_HUB_OFFLINE is set" in captured.err.splitlines()[-1]
    assert "Traceback" not in captured.err
