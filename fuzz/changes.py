"""The attack "models": random changes to a loaded model, after each of which the model must compute the change.

A case is the number that a chain of changes is drawn from. The reference is a copy of the changed model without packed
weights (``model.fast = False``). A few numbers written through ``.data`` are not among the changes: PyTorch does not
count them, and ``model.repack()`` is for them (docs/speed.md).
"""

from __future__ import annotations

import contextlib
import copy
import pickle
import random
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import miniclip
from miniclip import CLIP
from miniclip.config import CLIPConfig, TextConfig, VisionConfig

TEXTS = ["a cat", "a photo of a cat", "a photo of a dog on a red bench", ""]
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}  # of the largest number


def small_model() -> CLIP:
    torch.manual_seed(0)
    vision = VisionConfig(width=64, layers=3, heads=4, mlp_width=160, patch_size=8, image_size=32)
    text = TextConfig(width=48, layers=2, heads=3, mlp_width=96)
    model = CLIP(CLIPConfig(embed_dim=48, vision=vision, text=text)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape) * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.3))
    return model


class Changes:
    """The changes that a chain is drawn from. Each method whose name has no underscore in front is one."""

    def __init__(self, model: CLIP, choose: random.Random, undo: contextlib.ExitStack) -> None:
        self.model, self.choose, self._undo = model, choose, undo

    def _parameter(self) -> nn.Parameter:
        return self.choose.choice(list(self.model.parameters()))

    def _matrix(self) -> nn.Parameter:
        return self.choose.choice([each for each in self.model.parameters() if each.ndim == 2])

    def _linear(self) -> nn.Linear:
        layers = [each for each in self.model.modules() if isinstance(each, nn.Linear)]
        return self.choose.choice(layers)

    def _block(self) -> Any:
        tower = self.choose.choice([self.model.visual.transformer, self.model.transformer])
        return self.choose.choice(list(tower.resblocks))

    def in_place(self) -> None:
        with torch.no_grad():
            self._parameter().mul_(1.1)

    def one_number(self) -> None:
        with torch.no_grad():
            self._matrix()[0, 0] += 3

    def through_data(self) -> None:
        self._parameter().data.mul_(1.1)

    def rows_through_data(self) -> None:
        matrix = self._matrix()
        matrix.data[: len(matrix) // 2] *= 1.5

    def columns_through_data(self) -> None:
        matrix = self._matrix()
        matrix.data[:, matrix.shape[1] // 2 :] = 0.1

    def all_but_every_third_through_data(self) -> None:
        numbers = self._matrix().data.view(-1)
        numbers[torch.arange(len(numbers)) % 3 > 0] *= 1.3

    def other_data(self) -> None:
        parameter = self._parameter()
        parameter.data = parameter.data * 0.9

    def through_numpy(self) -> None:
        parameter = self._parameter()
        if parameter.dtype not in (torch.bfloat16,):
            parameter.detach().numpy()[...] *= 1.1

    def loaded(self) -> None:
        state = self.model.state_dict()
        self.model.load_state_dict({name: 1.05 * value for name, value in state.items()}, strict=False)

    def assigned(self) -> None:
        state = {name: 0.95 * value for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(state, strict=False, assign=True)

    def other_parameter(self) -> None:
        layer = self._linear()
        if not parametrize.is_parametrized(layer) and "weight" in layer._parameters:
            layer.weight = nn.Parameter(layer.weight.detach() * 1.2, requires_grad=self.choose.random() < 0.5)

    def trainable(self) -> None:
        self._parameter().requires_grad_(self.choose.random() < 0.7)

    def swapped_blocks(self) -> None:
        blocks = self.model.visual.transformer.resblocks
        blocks[0], blocks[1] = blocks[1], blocks[0]

    def parametrized(self) -> None:
        layer = self._linear()
        if "weight" in layer._parameters:
            parametrize.register_parametrization(layer, "weight", Halved())

    def pruned(self) -> None:
        layer = self._linear()
        if "weight" in layer._parameters:
            prune.l1_unstructured(layer, "weight", amount=0.3)

    def hook(self) -> None:
        handle = self._block().register_forward_hook(lambda module, inputs, output: output * 1.1)
        if self.choose.random() < 0.3:
            handle.remove()

    def other_activation(self) -> None:
        self._block().mlp.gelu = nn.ReLU()

    def no_norm(self) -> None:
        self._block().ln_2 = nn.Identity()

    def patched_class(self) -> None:
        layer: Any = self.choose.choice([type(self._block().mlp), nn.Linear, nn.LayerNorm])
        old = layer.forward
        self._undo.enter_context(mock.patch.object(layer, "forward", lambda self, x: old(self, x) * 1.01))

    def hidden_weight(self) -> None:
        """An attribute that is a function of a parameter. The last change: torch cannot copy or move such a model."""
        layer = self._linear()
        if "weight" in layer._parameters:
            layer.hidden = nn.Parameter(layer.weight.detach().clone(), requires_grad=True)
            del layer.weight
            layer.weight = layer.hidden * 1.2

    def quantised(self) -> None:
        if self.model.dtype == torch.float32 and not any(each.requires_grad for each in self.model.parameters()):
            with contextlib.suppress(AttributeError, RuntimeError):  # torch cannot quantise every changed layer
                torch.ao.quantization.quantize_dynamic(self.model, {nn.Linear}, inplace=True)

    def other_dtype(self) -> None:
        self.model.to(self.choose.choice([torch.float32, torch.float64, torch.bfloat16]))

    def shared(self) -> None:
        self.model.share_memory()

    def copied(self) -> None:
        self.model = copy.deepcopy(self.model)

    def pickled(self) -> None:
        with contextlib.suppress(AttributeError, TypeError, pickle.PicklingError, RuntimeError):  # hooks and the like
            self.model = pickle.loads(pickle.dumps(self.model))

    def repacked(self) -> None:
        self.model.repack()

    def threads(self) -> None:
        self._undo.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(self.choose.choice([1, 2]))


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 0.5


CHANGES: dict[str, Callable[[Changes], None]] = {
    name: change for name, change in vars(Changes).items() if not name.startswith("_")
}


def judge_chain(number: int) -> str:
    """Apply a chain of changes. Returns the number of changes in words, or raises AssertionError with their names."""
    choose = random.Random(number)
    done: list[str] = []
    with contextlib.ExitStack() as undo:
        changes = Changes(small_model(), choose, undo)
        compare(changes.model, choose, done)
        for _ in range(choose.randrange(1, 6)):
            done.append(choose.choice(list(CHANGES)))
            CHANGES[done[-1]](changes)
            compare(changes.model, choose, done)
            if done[-1] == "hidden_weight":
                break
    return f"right after {len(done)} changes"


def compare(model: CLIP, choose: random.Random, done: list[str]) -> None:
    plain = copy_of(model)
    plain.fast = False
    pixels = torch.randn(choose.choice([1, 2, 5]), 3, 32, 32, generator=torch.Generator().manual_seed(len(done)))
    tokens = miniclip.tokenize(TEXTS)
    with torch.no_grad() if choose.random() < 0.5 else contextlib.nullcontext():
        for what in ("image", "text"):
            argument = pixels if what == "image" else tokens
            fast, slow = (getattr(each, f"encode_{what}")(argument).detach().double() for each in (model, plain))
            far = float((fast - slow).abs().max() / slow.abs().max().clamp(min=1e-6))
            assert not far > LIMITS[model.dtype], f"{what} vectors differ by {far:.1e} after {', '.join(done)}"


def copy_of(model: CLIP) -> CLIP:
    """A copy with packed weights of its own. deepcopy refuses a tensor that is a function of a parameter."""
    functions = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and value.grad_fn is not None
    }
    return copy.deepcopy(model, functions)
