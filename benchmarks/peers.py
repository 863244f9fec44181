"""The peers, each ready to be called: transformers, ONNX Runtime, OpenVINO and open_clip with the same weights.

A peer that is not installed ends the run: a table without it would read as a win.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import CLIPModel

import miniclip

Encoder = Callable[[Tensor], Tensor]
PACKAGES = ("transformers", "onnxruntime", "onnx", "onnxscript", "openvino", "openai-clip", "matplotlib")
GPU_PACKAGES = ("transformers", "open_clip_torch", "matplotlib")  # open_clip needs torchvision


def check(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """The versions of the peers' packages.

    Raises:
        SystemExit: if some are missing; the message names them.
    """
    versions, missing = {}, []
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        command = "open_clip_torch" if packages is GPU_PACKAGES else '-c constraints.txt -e ".[dev,bench]"'
        raise SystemExit(f"benchmarks: missing {', '.join(missing)}: pip install {command}")
    return versions


def transformers_model(folder: Path, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> CLIPModel:
    """transformers' model, frozen, with the attention that is its default, or another one."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return CLIPModel.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval().requires_grad_(False)


def features(output: Any) -> Tensor:
    """The embeddings in what transformers returns: version 5 returns an object."""
    return output if isinstance(output, Tensor) else output.pooler_output


def images_of(model: CLIPModel) -> Encoder:
    def encode(pixels: Tensor) -> Tensor:
        with torch.inference_mode():
            return features(model.get_image_features(pixel_values=pixels))

    return encode


def texts_of(model: CLIPModel) -> Encoder:
    def encode(tokens: Tensor) -> Tensor:
        with torch.inference_mode():
            return features(model.get_text_features(input_ids=tokens))

    return encode


class Tower(nn.Module):
    def __init__(self, model: CLIPModel, kind: str) -> None:
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "images":
            return features(self.model.get_image_features(pixel_values=x))
        return features(self.model.get_text_features(input_ids=x))


def compiled(tower: nn.Module) -> Encoder:
    """A tower compiled for one shape, with CUDA graphs on a GPU."""
    torch._dynamo.reset()  # compiled code of other shapes
    function = torch.compile(tower.eval(), mode="reduce-overhead", dynamic=False)

    def encode(x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():  # torch.compile cannot trace inference mode
            torch.compiler.cudagraph_mark_step_begin()
            return function(x).clone()  # the next call writes to the same memory

    return encode


def open_clip_model(name: str, model: miniclip.CLIP) -> Any:
    """open_clip's model with the weights of miniclip's, which have the same names."""
    import open_clip  # type: ignore[import-not-found]

    theirs = open_clip.create_model(f"{name.replace('/', '-')}-quickgelu", device=model.device)
    theirs.load_state_dict(model.state_dict())
    return theirs.to(model.dtype).eval().requires_grad_(False)


def padded(encode: Encoder, length: int) -> Encoder:
    """An encoder of texts that takes no shorter rows than ``length``."""
    return lambda tokens: encode(F.pad(tokens, (0, length - tokens.shape[1])))


def onnx_file(model: CLIPModel, kind: str, path: Path, name: str = "x") -> Path:
    """Write a tower as ONNX, for batches of any size."""
    size: int = model.config.vision_config.image_size  # type: ignore[union-attr, assignment]
    example = torch.randn(2, 3, size, size) if kind == "images" else torch.randint(1, 99, (2, 77))
    batch = torch.export.Dim("batch", min=1, max=4096)
    tower, shapes = Tower(model, kind).eval(), ({0: batch},)
    torch.onnx.export(tower, (example,), path, dynamo=True, dynamic_shapes=shapes, input_names=[name], verbose=False)
    return path


def onnxruntime(path: Path, threads: int) -> Encoder:
    """A tower in ONNX Runtime, whose threads sleep between calls."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # By default its threads spin for some time after a call and take a core from whoever runs next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def encode(x: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: x.numpy()})[0])

    return encode


def openvino(path: Path, threads: int, precision: str = "f32") -> Encoder:
    """A tower in OpenVINO, set for one request at a time. Its threads spin for about 1 ms after a call."""
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    compiled = ov.Core().compile_model(str(path), "CPU", settings)
    request = compiled.create_infer_request()

    def encode(x: Tensor) -> Tensor:
        return torch.from_numpy(np.array(request.infer([x.numpy()])[0]))

    return encode


def openai_tokenizer() -> Any:
    """openai/CLIP's own tokenizer. Its package imports torchvision, so this file is loaded by its path."""
    package = importlib.util.find_spec("clip")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = os.path.join(package.submodule_search_locations[0], "simple_tokenizer.py")
    spec = importlib.util.spec_from_file_location("openai_simple_tokenizer", path)
    assert spec is not None
    assert spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()
