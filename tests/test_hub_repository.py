"""Hub repositories: what is downloaded, what is used from the cache, and what is refused, with the real client."""

# ruff: noqa: F811 (the parameters of the tests bear the names of imported fixtures)
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
from fake_hub import (
    LOGIN_PAGE,
    NAME,
    REFUSALS,
    SMALL,
    WEIGHTS,
    WEIGHTS_SHA256,
    FakeHub,
    flip_a_byte,
    is_large,
    left_in,
    one_sentence,
    same,
    server,  # noqa: F401 (a fixture)
)
from helpers import run_python
from transformers import CLIPModel

import miniclip
from miniclip import CheckpointError, DownloadError, UnknownModelError, hub
from miniclip.hub import KnownModel, Source


@pytest.fixture
def folder(tiny: Path) -> dict[str, bytes]:
    """A repository as Hugging Face's own tools write it, including files that miniclip does not need."""
    settings = {"image_processor_type": "CLIPImageProcessor", "crop_size": 32, "size": {"shortest_edge": 40}}
    return {
        "README.md": b"# A model",
        "config.json": (tiny / "config.json").read_bytes(),
        "model.safetensors": (tiny / "model.safetensors").read_bytes(),
        "preprocessor_config.json": json.dumps(settings).encode(),
        "pytorch_model.bin": b"\x80\x04.",
    }


@pytest.fixture
def sharded(reference: CLIPModel, tmp_path: Path) -> dict[str, bytes]:
    reference.save_pretrained(tmp_path / "sharded", max_shard_size="5MB")
    files = {path.name: path.read_bytes() for path in (tmp_path / "sharded").iterdir()}
    assert len([name for name in files if is_large(name)]) > 1
    return files


def test_hugging_face_repository_is_loaded_from_one_commit(
    server: FakeHub, tiny: Path, folder: dict[str, bytes]
) -> None:
    commit = server.add("owner/name", folder)
    model, preprocess = miniclip.load("owner/name", "cpu")
    assert same(model, miniclip.load(tiny, "cpu")[0])
    assert preprocess.shortest_edge == 40
    # all files come from one commit, and only the needed ones
    needed = ("config.json", "model.safetensors", "preprocessor_config.json")
    asked = {path for path in server.asked("HEAD") if "/resolve/" in path}
    assert asked == {f"/owner/name/resolve/{commit}/{name}" for name in needed}
    server.forget()
    miniclip.load("owner/name", "cpu")
    assert [request.path for request in server.requests] == ["/api/models/owner/name/revision/main"]


def test_processor_config_of_transformers_5_is_downloaded(server: FakeHub, folder: dict[str, bytes]) -> None:
    settings = json.loads(folder.pop("preprocessor_config.json"))
    server.add("owner/name", folder | {"processor_config.json": json.dumps({"image_processor": settings}).encode()})
    assert miniclip.load("owner/name", "cpu")[1].shortest_edge == 40


def test_sharded_repository_is_loaded(server: FakeHub, tiny: Path, sharded: dict[str, bytes]) -> None:
    server.add("owner/name", sharded)
    model = miniclip.load("owner/name", "cpu")[0]
    assert same(model, miniclip.load(tiny, "cpu")[0])
    server.unplug()
    assert same(model, miniclip.load("owner/name", "cpu")[0])
    # a repository without one of its shards does not count as cached
    next(path for path in hub.fetch_repository("owner/name").iterdir() if is_large(path.name)).unlink()
    with pytest.raises(DownloadError, match="owner/name is not in the cache"):
        miniclip.load("owner/name", "cpu")
    assert server.requests == []


def test_open_clip_repository_is_loaded(server: FakeHub, tiny: Path) -> None:
    expected = miniclip.load(tiny, "cpu")[0]
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 3, "head_width": 16, "mlp_ratio": 2.5}
    text = {"width": 48, "layers": 2, "heads": 3, "mlp_ratio": 2.0}
    model_cfg = {"embed_dim": 48, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    config = {"model_cfg": model_cfg, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
    files = {
        "open_clip_config.json": json.dumps(config).encode(),
        "open_clip_model.safetensors": safetensors.torch.save(expected.state_dict()),
        # as in timm's repositories: the image tower alone under timm's names, and timm's configuration
        "model.safetensors": safetensors.torch.save({"patch_embed.proj.weight": torch.zeros(64, 3, 8, 8)}),
        "config.json": json.dumps({"architecture": "vit_tiny"}).encode(),
    }
    server.add("owner/name", files)
    model, preprocess = miniclip.load("owner/name", "cpu")
    assert same(model, expected)
    assert preprocess.mean == (0.1, 0.2, 0.3)
    assert len(server.asked("GET", "/cdn/")) == 1


def test_revision_may_be_a_branch_a_tag_or_a_commit(server: FakeHub, folder: dict[str, bytes]) -> None:
    settings = json.loads(folder["preprocessor_config.json"])
    old = server.add("owner/name", folder, "v1", "refs/pr/15")
    settings["size"]["shortest_edge"] = 48
    new = server.add("owner/name", folder | {"preprocessor_config.json": json.dumps(settings).encode()}, "main")

    def edges() -> list[int | None]:
        names = ["owner/name", "owner/name@v1", "owner/name@refs/pr/15", f"owner/name@{old}", f"owner/name@{new}"]
        return [miniclip.load(name, "cpu")[1].shortest_edge for name in names]

    assert edges() == [48, 40, 40, 40, 48]
    assert len(server.asked("GET", "/cdn/")) == 1  # both commits have the same weights
    server.unplug()
    assert edges() == [48, 40, 40, 40, 48]
    assert server.requests == []
    with pytest.raises(DownloadError, match="owner/name is not in the cache"):
        miniclip.load("owner/name@v2", "cpu")


@pytest.mark.parametrize(
    "revision",
    [
        *(
            "../../x",
            "..",
            "a/../../../b",
            "refs/../../../z",
            "/abs",
            "a//b",
            "a/",
            ".hidden",
            "a/.b",
            "a.lock",
            "a.lock/b",
        ),
        *(
            "a.",
            "@",
            "@{1}",
            "a b",
            "a\nb",
            "a\x00b",
            "a\x1b[31m",
            "a\x7f",
            "a\\b",
            "C:b",
            "a~1",
            "a^",
            "a?",
            "a*",
            "a[0]",
        ),
        "\ud800",
    ],
)
def test_what_can_be_no_revision_is_refused_before_anything_is_asked(
    server: FakeHub, folder: dict[str, bytes], revision: str, tmp_path: Path
) -> None:
    """A Hub that answers to such a name would make the note of its commit leave the cache."""
    server.add("owner/name", folder, "main", revision)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UnknownModelError, match="cannot be a revision of owner/name") as refused:
        miniclip.load(f"owner/name@{revision}", "cpu")
    assert one_sentence(refused.value)
    assert server.requests == []
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "revision", ["main", "v1.0", "refs/pr/15", "feature/a-b_c+d", "@a", "é", "a@b", "-x", "a" * 40]
)
def test_other_revisions_are_taken(server: FakeHub, folder: dict[str, bytes], revision: str) -> None:
    commit = server.add("owner/name", folder, revision)
    assert hub.fetch_repository("owner/name", revision).name == commit
    server.unplug()
    assert hub.fetch_repository("owner/name", revision).name == commit


def test_a_hub_that_names_no_commit_is_refused(
    server: FakeHub, folder: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import HfApi

    own = HfApi.model_info

    def model_info(self: HfApi, *given: object, **settings: object) -> object:
        info = own(self, *given, **settings)  # type: ignore[arg-type]
        info.sha = "../../x"
        return info

    server.add("owner/name", folder)
    monkeypatch.setattr(HfApi, "model_info", model_info)
    with pytest.raises(DownloadError, match=r"named '\.\./\.\./x' as a commit"):
        miniclip.load("owner/name", "cpu")
    assert not server.asked("GET", "/cdn/")


def test_moved_branch_is_followed_once_all_its_files_are_there(server: FakeHub) -> None:
    old = server.add("owner/name", SMALL)
    assert hub.fetch_repository("owner/name").name == old
    newer = b"?" + WEIGHTS[1:]
    new = server.add("owner/name", SMALL | {"model.safetensors": newer})
    server.refusals["/cdn/"] = (500, "")
    with pytest.raises(DownloadError, match=r"owner/name: model\.safetensors cannot be downloaded \(HTTP 500"):
        hub.fetch_repository("owner/name")
    server.refusals["/api/"] = (500, "")  # now nothing answers: the old, complete commit is used
    assert hub.fetch_repository("owner/name").name == old
    server.refusals.clear()
    assert hub.fetch_repository("owner/name").name == new
    server.unplug()
    assert (hub.fetch_repository("owner/name") / "model.safetensors").read_bytes() == newer


@pytest.mark.parametrize(("status", "code"), REFUSALS)
def test_cached_repository_is_used_when_the_hub_refuses(server: FakeHub, status: int, code: str) -> None:
    server.add("owner/name", SMALL)
    path = hub.fetch_repository("owner/name")
    server.refusals["/api/"] = (status, code)
    assert hub.fetch_repository("owner/name") == path


def test_cached_repository_is_used_behind_a_login_page(server: FakeHub) -> None:
    server.add("owner/name", SMALL)
    path = hub.fetch_repository("owner/name")
    server.page = (200, {"Content-Type": "text/html"}, LOGIN_PAGE)
    assert hub.fetch_repository("owner/name") == path


def test_damaged_cached_repository_is_downloaded_again(server: FakeHub) -> None:
    server.add("owner/name", SMALL)
    weights = hub.fetch_repository("owner/name") / "model.safetensors"
    flip_a_byte(weights)
    with pytest.warns(UserWarning, match="no longer has its checksum"):
        hub.fetch_repository("owner/name")
    assert weights.read_bytes() == WEIGHTS
    flip_a_byte(weights)
    server.unplug()
    with pytest.warns(UserWarning, match="no longer"), pytest.raises(DownloadError, match="owner/name is not in the"):
        hub.fetch_repository("owner/name")
    assert [path.name for path in left_in(server.cache) if path.is_symlink()] == ["config.json"]


def test_shard_with_wrong_checksum_is_refused(server: FakeHub) -> None:
    index = json.dumps({"weight_map": {"a": "one.safetensors"}}).encode()
    server.add("owner/name", {"model.safetensors.index.json": index, "one.safetensors": WEIGHTS})
    server.blobs[WEIGHTS_SHA256] = b"?" + WEIGHTS[1:]
    with pytest.raises(DownloadError, match=r"one\.safetensors of owner/name arrived with the wrong checksum"):
        miniclip.load("owner/name", "cpu")
    assert WEIGHTS_SHA256 not in [path.name for path in left_in(server.cache)]


@pytest.mark.parametrize("files", [["pytorch_model.bin"], ["config.json", "open_clip_pytorch_model.bin", "README.md"]])
def test_repository_of_pickles_is_refused_before_any_download(server: FakeHub, files: list[str]) -> None:
    server.add("owner/name", dict.fromkeys(files, b"\x80\x04."))
    with pytest.raises(CheckpointError, match=r"owner/name: has no safetensors; .* is a pickle") as caught:
        miniclip.load("owner/name", "cpu")
    assert "Convert it once: safetensors.torch.save_file" in str(caught.value)
    assert [request.path for request in server.requests] == ["/api/models/owner/name/revision/main"]


def test_repository_without_weights_is_refused(server: FakeHub) -> None:
    server.add("owner/name", {"README.md": b"# A data set"})
    with pytest.raises(CheckpointError, match=r"owner/name: holds no weights; expected one of model\.safetensors"):
        miniclip.load("owner/name", "cpu")


@pytest.mark.parametrize(("status", "code"), [(400, ""), (401, "RepoNotFound"), (403, "GatedRepo"), (404, "")])
def test_error_for_an_unknown_repository_lists_the_known_models(server: FakeHub, status: int, code: str) -> None:
    server.refusals["/api/models/nobody/nothing"] = (status, code)
    with pytest.raises(UnknownModelError) as caught:
        miniclip.load("nobody/nothing", "cpu")
    text = one_sentence(caught.value)
    assert "'nobody/nothing'" in text
    assert all(name in text for name in miniclip.available_models())
    assert f"HTTP {status}" in text
    assert ("HF_TOKEN" in text) == (status in (401, 403))
    assert left_in(server.cache) == []


def test_error_names_an_unknown_revision(server: FakeHub) -> None:
    server.add("owner/name", SMALL)
    with pytest.raises(UnknownModelError, match=r"'owner/name' is neither .* at revision 'v2' \(HTTP 404\)"):
        miniclip.load("owner/name@v2", "cpu")


def test_impossible_repository_name_is_unknown(server: FakeHub) -> None:
    with pytest.raises(UnknownModelError, match="'owner/na--me' is neither"):
        miniclip.load("owner/na--me", "cpu")
    server.unplug()
    with pytest.raises(UnknownModelError, match="'owner/na--me' is neither"):
        miniclip.load("owner/na--me", "cpu")
    assert server.requests == []


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_failing_hub_is_a_download_error(server: FakeHub, status: int) -> None:
    server.refusals["/api/"] = (status, "")
    with pytest.raises(DownloadError, match=rf"^owner/name is not in .* \(HTTP {status}\); try again") as caught:
        miniclip.load("owner/name", "cpu")
    one_sentence(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [401, 403])
def test_error_for_a_gated_repository_asks_for_a_token(server: FakeHub, status: int) -> None:
    """The list of files of a gated repository is public, the files are not."""
    server.add("owner/name", SMALL)
    server.refusals["/resolve/"] = (status, "GatedRepo")
    with pytest.raises(DownloadError) as caught:
        miniclip.load("owner/name", "cpu")
    assert one_sentence(caught.value) == (
        f"owner/name: config.json cannot be downloaded (HTTP {status}; a private or gated repository needs a "
        "valid token in HF_TOKEN)"
    )


@pytest.mark.parametrize("shard", ["../x.safetensors", "..", "/tmp/x.safetensors", "a/../../x.safetensors", "x.bin"])
def test_index_that_leaves_its_folder_is_refused(server: FakeHub, shard: str) -> None:
    index = json.dumps({"weight_map": {"visual.proj": shard}}).encode()
    server.add("owner/name", {"model.safetensors.index.json": index, shard: WEIGHTS})
    with pytest.raises(CheckpointError, match=r"leaves the folder|is a pickle"):
        miniclip.load("owner/name", "cpu")
    assert {Path(path).name for path in server.asked("HEAD")} == {"model.safetensors.index.json"}


@pytest.mark.parametrize("index", [b"[]", b"{}", b"not json", b'{"weight_map": ["one.safetensors"]}'])
def test_malformed_index_is_refused(server: FakeHub, index: bytes) -> None:
    server.add("owner/name", {"model.safetensors.index.json": index})
    with pytest.raises((CheckpointError, miniclip.ConfigError), match=r"model\.safetensors\.index\.json"):
        miniclip.load("owner/name", "cpu")


def test_error_names_a_missing_shard(server: FakeHub) -> None:
    index = json.dumps({"weight_map": {"a": "one.safetensors", "b": "gone.safetensors"}}).encode()
    server.add("owner/name", {"model.safetensors.index.json": index, "one.safetensors": WEIGHTS})
    with pytest.raises(CheckpointError, match=r"gone\.safetensors'? is missing"):
        miniclip.load("owner/name", "cpu")


@pytest.mark.parametrize("alias", hub.ALIASES)
def test_aliases_load_the_pinned_sources(server: FakeHub, monkeypatch: pytest.MonkeyPatch, alias: str) -> None:
    assert hub.ALIASES[alias] in hub.KNOWN
    server.add(alias, {"pytorch_model.bin": b"\x80\x04."})  # the content of the main branch
    commit = server.add("pinned/source", {"model.safetensors": WEIGHTS})
    known = KnownModel(hub.KNOWN[NAME].config, (Source("pinned/source", commit, "model.safetensors", WEIGHTS_SHA256),))
    monkeypatch.setitem(hub.KNOWN, hub.ALIASES[alias], known)
    with pytest.raises(CheckpointError, match="models--pinned--source"):  # these bytes are not a safetensors file
        miniclip.load(alias, "cpu")
    assert {request.path for request in server.requests} == {
        f"/pinned/source/resolve/{commit}/model.safetensors",
        f"/cdn/{WEIGHTS_SHA256}",
    }


@pytest.mark.slow
def test_environment_variables_select_the_hub_and_the_cache(
    server: FakeHub, tmp_path: Path, folder: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in os.environ:
        if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")):
            monkeypatch.delenv(name)
    server.add("owner/name", folder)
    program = "import miniclip; print(miniclip.load('owner/name', 'cpu')[0].text_projection.sum().item())"

    def run(**variables: str) -> str:
        own = {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
        done = run_python("-c", program, **own, **variables)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = run()
    assert "/owner/name/resolve/" in server.asked("HEAD")[0]
    assert list((tmp_path / "hf" / "hub" / "models--owner--name" / "snapshots").rglob("model.safetensors"))
    server.forget()
    assert run(HF_HUB_OFFLINE="1") == first
    assert server.requests == []
