"""Weights in the layout that a CPU multiplies fastest, and the rule for when such a copy may be used.

PyTorch arranges a plain weight for its matrix kernels in every call. oneDNN can do that once, with operators that
torch's own compiler uses. These are undocumented, so ``has_packed_kernels`` tries them before anything relies on them.
They know nothing of autograd, tracing or ``torch.func``, so ``is_ordinary`` keeps such inputs away from them.
"""

from __future__ import annotations

from functools import cache
from itertools import count
from math import gcd
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

# Packing takes as long as it saves in one product of about this many rows. A process that encodes one image would
# never get back the time and the memory.
WORTH_PACKING = 512

_SAMPLES = 64  # numbers compared to notice a write that torch does not count; they take a microsecond
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16}  # NaN differs from itself, its bits do not
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transform = torch._C._functorch.peek_interpreter_stack


def is_traced() -> bool:
    """Whether torch.compile, torch.export or torch.jit.trace is recording this call."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def is_ordinary(x: Tensor) -> bool:
    """Whether ``x`` may go to a kernel that autograd, tracers, modes, autocast and torch.func do not know."""
    return (
        not is_traced()
        and type(x) in (Tensor, nn.Parameter)
        and x.is_cpu
        and not (x.requires_grad and torch.is_grad_enabled())
        and not (_dispatch_modes() or _function_modes())
        and _transform() is None
        and forward_ad._current_level < 0
        and not torch.is_autocast_enabled("cpu")
    )


@cache
def has_packed_kernels(dtype: torch.dtype) -> bool:
    """Whether this torch and this processor multiply packed weights of this dtype, and give the right results."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # else bfloat16 is emulated
    if dtype != torch.float32 and not (dtype == torch.bfloat16 and native):
        return False
    if not torch.backends.mkldnn.is_available() or "AVX" not in torch.backends.cpu.get_cpu_capability():
        return False
    x, weight, bias = (torch.linspace(-1, 1, n, dtype=dtype) for n in (64, 128, 16))
    x, weight = x.view(8, 8), weight.view(16, 8)
    plain = F.linear(x, weight, bias)
    expected = {"none": plain, "swish": F.silu(plain), "gelu": F.gelu(plain)}
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    try:
        results = {activation: product(x, pack(weight), bias, activation) for activation in expected}
    except (AttributeError, RuntimeError):
        return False
    return all(torch.allclose(results[name], expected[name], tolerance, tolerance) for name in expected)


@cache
def keep_freed_memory() -> None:
    """Let the C library keep memory that one call frees and the next call needs.

    glibc returns freed memory to the system above twice the size of the largest block freed so far. For a small block
    every batch pays for the page faults again, up to a fifth of its time. The largest block that counts has 32 MB.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


def pack(weight: Tensor) -> Tensor:
    """A weight (out, in) in oneDNN's blocked layout."""
    keep_freed_memory()
    return torch.ops.mkldnn._reorder_linear_weight(weight)


def product(x: Tensor, packed: Tensor, bias: Tensor | None, activation: str = "none") -> Tensor:
    """x (…, in), a packed weight (out, in) -> activation(x Wᵀ + bias) (…, out); "none", "swish" or "gelu"."""
    bias = bias if bias is None else bias.contiguous()
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], "none")


class Packed:
    """The packed copies of one layer's weight. The layer owns them, and asks ``usable`` before every product.

    A copy is used while the weight is the same parameter, at the same address, with the same version and the same
    sample of numbers. Every write that torch counts changes the version. A write to a whole tensor through ``.data``
    or numpy changes the sample. A few numbers written in that way go unnoticed: call ``CLIP.repack`` after it.

    ``usable`` drops the copies when the weight has changed or is trained. ``to()`` and its like, ``CLIP.repack`` and
    setting ``CLIP.fast`` drop them at once. Deep copies and pickles of a layer start without. There is no lock: two
    threads may pack one weight, and either copy is right. What is known of a weight is replaced as a whole.
    """

    def __init__(self) -> None:
        self.known: _Known | None = None

    def __reduce__(self) -> tuple[type[Packed], tuple[()]]:
        return Packed, ()

    def clear(self) -> None:
        """Free the copies."""
        self.known = None

    def has_copies(self) -> bool:
        """Whether anything is packed now."""
        return self.known is not None and bool(self.known.copies)

    def usable(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        """Whether ``x`` may be multiplied with a packed copy of ``weight``, and whether packing pays.

        Packing pays from the second call with the same weight on, or at once for ``WORTH_PACKING`` rows of ``x``.
        """
        if not x.is_cpu or is_traced():
            return False
        known = self.known  # read once, because another thread may clear it
        if known is not None and not known.holds_for(weight):
            known = None
            self.clear()
        if torch.is_grad_enabled() and (weight.requires_grad or (bias is not None and bias.requires_grad)):
            self.clear()  # the layer is being trained
            return False
        if not (is_ordinary(x) and type(weight) is nn.Parameter and weight.is_cpu and torch._C._get_mkldnn_enabled()):
            return False
        if bias is not None and (bias.dtype != x.dtype or bias.shape != weight.shape[:1]):
            return False
        if not (x.dtype == weight.dtype and x.numel() and has_packed_kernels(x.dtype)):
            return False
        if known is not None:
            return True
        if not weight.is_contiguous() or weight.is_inference():
            return False
        # The step walks over rows and columns, so that every large block of the matrix has numbers in the sample. It
        # shares no factor with the columns or with small periods: "all but every third number" has samples as well.
        # The view keeps freed memory, so that no other weight comes to the same address.
        columns = weight.numel() // len(weight)
        step = weight.numel() // _SAMPLES // columns * columns + max(int(0.618 * columns), 1)
        step = next(each for each in count(step) if gcd(each, 210 * columns) == 1)
        with torch.inference_mode(False):
            sample = weight.detach().view(_BITS[weight.dtype]).flatten().numpy()[::step]
        self.known = _Known(weight, _state(weight), sample, sample.tobytes(), {})
        return x.numel() >= WORTH_PACKING * (x.shape[-1] if weight.ndim == 2 else columns)

    def copy(self, weight: Tensor, part: slice = slice(None), factor: float = 1.0) -> Tensor:
        """``weight[part] * factor``, packed on first use. Ask ``usable`` before."""
        known, key = self.known, (part.start, part.stop, factor)
        copies = known.copies if known is not None and known.weight is weight else {}  # cleared by another thread
        if key not in copies:
            with torch.inference_mode(False), torch.no_grad():  # an inference tensor would be unusable outside of it
                matrix = weight.detach().flatten(1)[part]
                copies[key] = pack(matrix if factor == 1 else matrix * factor)
        return copies[key]


class _Known(NamedTuple):
    """A weight, what shows that it is unchanged, and its copies by part and factor."""

    weight: Tensor
    state: tuple[object, ...]
    sample: Any  # a numpy view of some of its numbers, as integers
    bits: bytes  # of the sample
    copies: dict[tuple[object, ...], Tensor]

    def holds_for(self, weight: Tensor) -> bool:
        # In this order: a weight that has moved, into shared memory for example, may leave the sample without memory.
        same = weight is self.weight and not weight.is_inference() and self.state == _state(weight)
        return same and self.bits == self.sample.tobytes()


def _state(weight: Tensor) -> tuple[object, ...]:
    return weight._version, weight.data_ptr(), weight.shape, weight.stride()
