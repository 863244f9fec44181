"""The layers of a CLIP. Each computes one formula, in the fastest way that its input allows.

A layer with a weight matrix owns a ``Packed``: on a CPU, where nobody asks for gradients, the layer multiplies with a
packed copy of its weight, and the result is the same up to rounding. On CUDA, the patch embedding and the MLP are
arranged for fewer passes over memory. ``CLIP.fast = False`` sets ``packed`` to None, which leaves the plain formula.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip.packed import Packed, product


class PackedLayer(nn.Module):
    """A layer that keeps packed copies of its weight."""

    packed: Packed | None

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.packed = Packed()

    def reset_parameters(self) -> None:
        """Leave the parameters uninitialised: random numbers would take a second, and a checkpoint follows."""

    def _apply(self, *arguments: Any, **settings: Any) -> PackedLayer:
        """What ``to()``, ``half()``, ``cuda()`` and their like call. The copies are of no use after it."""
        if self.packed is not None:
            self.packed.clear()
        return super()._apply(*arguments, **settings)  # type: ignore[no-untyped-call]


class Linear(PackedLayer, nn.Linear):
    """x Wᵀ + b: (…, in) -> (…, out)."""

    def forward(self, x: Tensor) -> Tensor:
        packed = self.packed  # read once, because another thread may turn fast off
        if packed and packed.usable(x, self.weight, self.bias):
            return product(x, packed.copy(self.weight), self.bias)
        return F.linear(x, self.weight, self.bias)


class PatchEmbedding(PackedLayer, nn.Conv2d):
    """A convolution whose stride is its size, without padding: (N, 3, S, S) -> (N, W, grid, grid).

    As a product the result is channels-last in memory: use ``flatten`` or ``reshape`` on it, not ``view``.
    """

    def forward(self, images: Tensor) -> Tensor:
        packed, weight, bias = self.packed, self.weight, self.bias
        tiles = packed is not None and images.ndim == 4 and self._tiles(images)
        if packed and tiles and (images.is_cuda or packed.usable(images, weight, bias)):
            # Every pixel is in one patch, so the convolution is a product with the flattened patches. On an H200 the
            # convolution of 256 images takes four times as long as the product.
            (n, channels), size = images.shape[:2], self.kernel_size[0]
            height, width = (side // size for side in images.shape[2:])  # a convolution leaves out the rest, too
            images = images[:, :, : height * size, : width * size]
            patches = images.reshape(n, channels, height, size, width, size).permute(0, 2, 4, 1, 3, 5).flatten(3)
            if images.is_cuda:
                return F.linear(patches, weight.flatten(1), bias).permute(0, 3, 1, 2)
            return product(patches, packed.copy(weight), bias).permute(0, 3, 1, 2)
        return super().forward(images)

    def _tiles(self, images: Tensor) -> bool:
        """Whether it is still such a convolution, for images with room for a patch: its attributes can be set."""
        settings = self.stride, self.padding, self.dilation, self.groups, self.weight.shape[1:]
        own = settings == (self.kernel_size, (0, 0), (1, 1), 1, (self.in_channels, *self.kernel_size))
        fits = images.shape[1] == self.in_channels and min(images.shape[2:]) >= self.kernel_size[0]
        return own and fits and "_conv_forward" not in self.__dict__


class Embedding(nn.Embedding):
    """A table of vectors, uninitialised: (…) ids -> (…, W)."""

    def reset_parameters(self) -> None:
        """As ``PackedLayer.reset_parameters``."""


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the approximation of GELU that OpenAI's weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class MLP(nn.Sequential):
    """W₂ activation(W₁ x + b₁) + b₂: (…, W) -> (…, W)."""

    c_fc: Linear
    gelu: nn.Module
    c_proj: Linear

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        layers = {"c_fc": Linear(width, hidden), "gelu": ACTIVATIONS[activation](), "c_proj": Linear(hidden, width)}
        super().__init__(OrderedDict(layers))

    def forward(self, x: Tensor) -> Tensor:
        if not self._is_bare():
            return super().forward(x)  # type: ignore[no-untyped-call]  # calls the parts, whatever they are
        c_fc, c_proj = self.c_fc, self.c_proj
        first, second = c_fc.packed, c_proj.packed
        # Both are asked, so that both know their weight when the second call comes.
        usable = [layer.packed and layer.packed.usable(x, layer.weight, layer.bias) for layer in (c_fc, c_proj)]
        if not (first and second and all(usable)):
            if x.is_cuda and first and second and type(self.gelu) is QuickGELU:
                return scaled_mlp(x, c_fc, c_proj)
            return F.linear(self.gelu(F.linear(x, c_fc.weight, c_fc.bias)), c_proj.weight, c_proj.bias)
        # oneDNN applies an activation while a result is in a register. It has no QuickGELU, but it has silu:
        # QuickGELU(x) = silu(1.702 x) / 1.702. The packed copies carry the two factors.
        factor, activation = (1.702, "swish") if type(self.gelu) is QuickGELU else (1.0, "gelu")
        bias = c_fc.bias if factor == 1 or c_fc.bias is None else c_fc.bias * factor
        hidden = product(x, first.copy(c_fc.weight, factor=factor), bias, activation)  # (…, 4 W)
        return product(hidden, second.copy(c_proj.weight, factor=1 / factor), c_proj.bias)

    def _is_bare(self) -> bool:
        """Whether the three parts are the original ones, and nobody watches them."""
        parts = list(self._modules.values())
        return (
            [type(part) for part in parts] in ([Linear, QuickGELU, Linear], [Linear, nn.GELU, Linear])
            and all(map(is_bare, parts))
            and getattr(parts[1], "approximate", "none") == "none"
        )


def scaled_mlp(x: Tensor, c_fc: Linear, c_proj: Linear) -> Tensor:
    """W₂ QuickGELU(W₁ x + b₁) + b₂, with QuickGELU(x) = silu(1.702 x) / 1.702: (…, W) -> (…, W).

    A matrix product multiplies its result with a number at no cost. So there is one pass over the hidden numbers
    (…, 4 W) between the products, and not three: of 256 images of ViT-B/16 on an H200, 1.8 ms instead of 5.7 ms.
    """
    rows = x.reshape(-1, x.shape[-1])
    bias, zero = c_fc.bias, x.new_zeros(())
    hidden = F.silu(torch.addmm(zero if bias is None else 1.702 * bias, rows, c_fc.weight.t(), alpha=1.702))
    y = torch.addmm(zero if c_proj.bias is None else c_proj.bias, hidden, c_proj.weight.t(), alpha=1 / 1.702)
    return y.view(*x.shape[:-1], y.shape[-1])


class View(Protocol):
    """Which tokens of a sequence ask, and whom they see. A block with a view computes the tokens that ask."""

    def asking(self, x: Tensor) -> Tensor: ...  # (L, N, W) -> (L', N', W)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor: ...  # q is (L', N', W), k and v (L, N, W)


def attend(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """softmax(q kᵀ / √d) v for each head: q (L', N, W), k and v (L, N, W) -> (L', N, W).

    ``mask`` is True where a query sees a key, in a shape that broadcasts to (N, heads, L', L).
    """
    (queries, n, width), keys = q.shape, k.shape[0]
    depth = width // heads
    if q.is_cpu and (q.dtype == torch.bfloat16 or mask is not None):
        # Two products and a softmax: on a CPU faster than the fused call in bfloat16 (0.45 and 0.86 ms for an image of
        # 197 tokens and 12 heads), and with a mask (256 prompts of ViT-B/32 took 244 ms, and take 216 ms).
        # Each is (N heads, L, W / heads).
        q, k, v = (t.reshape(t.shape[0], n * heads, depth).transpose(0, 1) for t in (q, k, v))
        scores = torch.baddbmm(q.new_empty(1), q, k.transpose(1, 2), beta=0, alpha=depth**-0.5)
        scores = scores.view(n, heads, queries, keys)
        if causal:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril()
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        x = torch.bmm(scores.softmax(dim=-1).flatten(0, 1), v)  # (N heads, L', W / heads)
        return x.transpose(0, 1).reshape(queries, n, width)
    q, k, v = (t.view(*t.shape[:2], heads, depth).permute(1, 2, 0, 3) for t in (q, k, v))  # (N, heads, L, W / heads)
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return x.permute(2, 0, 1, 3).flatten(2)


class MultiheadAttention(PackedLayer):
    """Self-attention over (L, N, W), with the parameter names of torch.nn.MultiheadAttention.

    Not that class itself: its masked path builds an (L, L) mask, and its fast path is skipped as soon as a parameter
    requires grad. Here query, key and value come from one product.
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = Linear(width, width)

    @property
    def num_heads(self) -> int:
        """As ``embed_dim`` and ``head_dim``: what torch.nn.MultiheadAttention calls it."""
        return self.heads

    @property
    def embed_dim(self) -> int:
        return self.in_proj_weight.shape[1]

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.heads

    def forward(
        self,
        x: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        view: View | None = None,
        **more: Any,
    ) -> Any:
        """(L, N, W) -> (L, N, W), or (L', N', W) with a view.

        With key and value, the answer is that of torch.nn.MultiheadAttention: a pair of output and weights, no causal
        mask unless ``attn_mask`` is one, and the same further arguments.
        """
        if key is not None or value is not None or more:
            return self._as_torch(x, key, value, **more)
        weight, bias, width, packed = self.in_proj_weight, self.in_proj_bias, x.shape[-1], self.packed
        packed = packed if packed and packed.usable(x, weight, bias) else None

        def project(x: Tensor, part: slice = slice(None)) -> Tensor:
            part_bias = bias if bias is None else bias[part]
            return product(x, packed.copy(weight, part), part_bias) if packed else F.linear(x, weight[part], part_bias)

        if view is None or (asking := view.asking(x)) is x:
            q, k, v = project(x).chunk(3, dim=-1)  # each (L, N, W)
        else:
            q = project(asking, slice(None, width))  # (L', N', W)
            k, v = project(x, slice(width, None)).chunk(2, dim=-1)
        y = view.attend(q, k, v, self.heads) if view else attend(q, k, v, self.heads, causal=self.causal)
        return self.out_proj(y)

    def _as_torch(self, query: Tensor, key: Tensor | None, value: Tensor | None, **more: Any) -> Any:
        if key is None or value is None:
            raise TypeError("attention takes query, key and value, or one tensor alone")
        return F.multi_head_attention_forward(
            *(query, key, value, self.embed_dim, self.heads, self.in_proj_weight, self.in_proj_bias),
            *(None, None, False, 0.0, self.out_proj.weight, self.out_proj.bias),  # no added bias, no dropout
            training=self.training,
            **more,
        )


_HOOKS = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
_GLOBAL_HOOKS = [getattr(nn.modules.module, f"_global{name}") for name in _HOOKS]
_LAYERS = Linear, PatchEmbedding, Embedding, MLP, MultiheadAttention, QuickGELU, nn.GELU, nn.LayerNorm, nn.Sequential

#: The forward methods of the classes that a CLIP is made of, as they were written. model.py adds its classes.
OWN_FORWARDS: dict[type[nn.Module], Any] = {kind: kind.forward for kind in _LAYERS}


def is_bare(module: nn.Module) -> bool:
    """Whether a call of the module runs what its class says and nothing more: no hook, no patch, no wrapper."""
    kind, attributes, children = type(module), module.__dict__, module._modules
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return (
        kind.forward is OWN_FORWARDS.get(kind)
        and "forward" not in attributes
        and not (hooks or any(_GLOBAL_HOOKS))
        and module._compiled_call_impl is None
        and not (children and any(name in attributes for name in children))  # such an attribute hides the child
    )
