"""The primitives of a CLIP that torch.nn does not have in this shape."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Uninitialized:
    """A layer whose parameters wait for a checkpoint: filling them with random numbers first would cost a second."""

    def reset_parameters(self) -> None:
        pass


class Linear(_Uninitialized, nn.Linear):
    pass


class Conv2d(_Uninitialized, nn.Conv2d):
    pass


class Embedding(_Uninitialized, nn.Embedding):
    pass


class QuickGELU(nn.Module):
    """x · sigmoid(1.702 x), the approximation of GELU that OpenAI's weights were trained with."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class MultiheadAttention(nn.Module):
    """Self-attention over (L, N, W), with the parameter names of torch.nn.MultiheadAttention.

    Not that class itself, whose masked path builds the (L, L) mask and whose fast path is skipped as soon as a
    parameter requires grad: here query, key and value come from one matmul and go to one fused attention call.
    """

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        length, batch, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (L, N, 3W)
        qkv = qkv.view(length, batch, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 1, 3, 0, 4)  # each (N, heads, L, W / heads)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out_proj(x.permute(2, 0, 1, 3).reshape(length, batch, width))
