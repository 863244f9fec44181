"""Fixtures that several test files share: small seeded Hugging Face checkpoints, written by transformers."""

from __future__ import annotations

import os

# No test may reach the network, also on a machine that has one. Set before anything imports huggingface_hub.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

TINY: dict[str, Any] = {
    "projection_dim": 48,
    "vision_config": {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        "projection_dim": 48,
    },
    "text_config": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "projection_dim": 48,
    },
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``base`` with ``changes`` applied, section by section."""
    return base | {k: merged(base[k], v) if isinstance(base.get(k), dict) else v for k, v in changes.items()}


def make_reference(seed: int = 0, **changes: Any) -> CLIPModel:
    """A small transformers.CLIPModel with random weights. No bias is zero and no gain is one."""
    torch.manual_seed(seed)
    model = CLIPModel(CLIPConfig(**merged(TINY, changes), attn_implementation="sdpa"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "logit_scale":
                parameter.fill_(3.0)
            elif parameter.ndim < 2:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return model.eval()


@pytest.fixture(scope="session")
def reference() -> CLIPModel:
    """transformers' model with the weights of ``tiny``. Do not change it: all tests share it."""
    return make_reference()


@pytest.fixture(scope="session")
def tiny(reference: CLIPModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder with ``reference``'s weights. Do not change it: copy it first."""
    folder = tmp_path_factory.mktemp("tiny")
    reference.save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
