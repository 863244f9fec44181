"""Which weights each side reads, and how they are fetched."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import CLIPModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import miniclip
from miniclip import hub
from miniclip.checkpoint import open_checkpoint
from validation.reference import hf_config, quiet_transformers, seeded_checkpoint

# transformers' own copies of OpenAI's weights. For two of them OpenAI's repository has only a pickle. transformers
# reads that pickle; miniclip never does.
REFERENCES = {
    "ViT-B/32": hub.KNOWN["ViT-B/32"].sources[1],
    "ViT-B/16": hub.Source("openai/clip-vit-base-patch16", "main", "pytorch_model.bin"),
    "ViT-L/14": hub.KNOWN["ViT-L/14"].sources[0],
    "ViT-L/14@336px": hub.Source("openai/clip-vit-large-patch14-336", "main", "pytorch_model.bin"),
}

_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True)
class Pair:
    """Where each side reads its weights.

    Attributes:
        description: the weights in words, for the report.
        ours: a name or path for ``miniclip.load``.
        theirs: a folder or repository for transformers' ``from_pretrained``.
        revision: the repository's revision; "main" unless given.
        real: whether these are OpenAI's weights.
    """

    description: str
    ours: str
    theirs: str
    revision: str | None = None
    real: bool = False

    def load(
        self, device: str, dtype: torch.dtype
    ) -> tuple[miniclip.CLIP, miniclip.Preprocess, CLIPModel, CLIPImageProcessorPil | None]:
        """Load both sides: miniclip in ``dtype``, transformers in float32 (float64 for float64), without network.

        Returns:
            miniclip's model and preprocessing, transformers' model, and transformers' preprocessing where the folder
            has its settings.

        Raises:
            ConfigError: if transformers cannot load the weights.
            MiniclipError: if miniclip cannot load them.
        """
        model, preprocess = miniclip.load(self.ours, device, dtype=dtype)
        processor = None
        try:
            with quiet_transformers():
                reference = CLIPModel.from_pretrained(
                    self.theirs,
                    revision=self.revision or "main",
                    dtype=torch.float64 if dtype == torch.float64 else torch.float32,
                    attn_implementation="sdpa",
                    local_files_only=True,
                )
                if any((Path(self.theirs) / name).is_file() for name in _PROCESSOR_FILES):
                    processor = CLIPImageProcessorPil.from_pretrained(self.theirs)
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise miniclip.ConfigError(f"{self.theirs}: transformers cannot load it ({reason})") from None
        return model, preprocess, reference.eval().to(model.device), processor


@contextmanager
def weights_for(name: str, download: bool) -> Iterator[Pair]:
    """The weights to validate a model on.

    For a known model these are OpenAI's, if both sides can read them. Otherwise they are seeded ones in a temporary
    folder, which is removed at the end of the ``with`` block.

    Raises:
        ConfigError: if ``name`` is neither a known name nor a Hugging Face folder or repository.
        DownloadError: if a download fails.
    """
    if name in hub.BUNDLED:
        yield Pair("the trained weights in the package", name, str(hub.BUNDLED[name]))
    elif name not in hub.KNOWN:
        path = Path(name).expanduser()
        if not path.exists() and "/" in name:
            path = hub.fetch_repository(*name.split("@", 1))
        if not (path / "config.json").is_file():
            raise miniclip.ConfigError(f"{name}: transformers can only read a Hugging Face folder with a config.json")
        yield Pair(f"the weights in {name}", str(path), str(path))
    else:
        with tempfile.TemporaryDirectory(prefix="miniclip-validate-") as folder:
            yield _known_pair(name, download, Path(folder))


def _known_pair(name: str, download: bool, folder: Path) -> Pair:
    """The weights of a known model; ``folder`` takes the files that have to be made."""
    source = REFERENCES[name]
    ours = hub.cached_model(name)
    if download and not _is_hf_layout(ours):
        _download(name, source)
        ours = hub.cached_model(name)
    if ours and _is_cached(source):
        description = f"OpenAI's weights, transformers reading {source.repo}'s {source.filename}"
        return Pair(description, name, source.repo, source.revision, real=True)
    if ours and _is_hf_layout(ours):
        (folder / "model.safetensors").symlink_to(ours.resolve())
        hf_config(hub.KNOWN[name].config).save_pretrained(folder)
        return Pair("OpenAI's weights, both reading one file", name, str(folder), real=True)
    seeded_checkpoint(hub.KNOWN[name].config, folder)
    missing = f"transformers' copy of OpenAI's weights ({source.repo})" if ours else "OpenAI's weights"
    reason = f"{missing} not in the cache; --download fetches them"
    return Pair(f"a seeded checkpoint of {name}'s architecture ({reason})", str(folder), str(folder))


def _is_hf_layout(weights: Path | None) -> bool:
    """Whether transformers can read miniclip's file too."""
    return weights is not None and open_checkpoint(weights).layout == "hf"


def _is_cached(source: hub.Source) -> bool:
    return hub.is_cached(source) and hub.is_cached(replace(source, filename="config.json", sha256=None))


def _download(name: str, source: hub.Source) -> None:
    """Fetch both sides' weights and print the sizes. transformers' copy comes first: for B/32 miniclip reads it too."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    wanted = [source]
    if source not in (sources := hub.KNOWN[name].sources) and not hub.cached_model(name):
        wanted.append(sources[0])
    for item in wanted:
        if hub.is_cached(item):
            continue
        try:
            size = get_hf_file_metadata(hf_hub_url(item.repo, item.filename, revision=item.revision), timeout=5).size
        except Exception:  # only the size is missing: hub.fetch below reports the error in a sentence
            size = None
        megabytes = f"{size / 1e6:,.0f} MB" if size else "of unknown size"
        print(f"downloading {item.filename} of {item.repo}: {megabytes}", file=sys.stderr)
    hub.fetch(replace(source, filename="config.json", sha256=None))
    hub.fetch(source)
    hub.fetch_known(name)
