"""The towers of model.py in the order a CPU likes: the same embeddings up to rounding, in a fraction of the time.

model.py says what a CLIP computes; nothing here changes it. What is gained, and why it is exact:

- Weights are kept in the blocked layout that oneDNN multiplies from (``Matrix``), so that no call packs them again,
  and a bias, an activation or a residual is added while a result is still in a register.
- QuickGELU(x) = silu(1.702 x) / 1.702. The two factors are folded into the matrices before and behind it, and what is
  left is an activation that oneDNN has.
- Only the class token and the end token are pooled. The last block needs the keys and values of all tokens, and of
  those alone everything else.
- Under a causal mask a token's state depends on what stands before it and on nothing else. A batch of texts is a tree
  of prefixes (``Tree``), and every node of it is computed once: what the rows share, and never any padding.
- A batch is worked through in parts whose activations stay in the cache.

Everything that could make a tower compute something else is looked at before every call (``_look``, ``_Seen``,
``_Watch``); where anything has been changed in a way not known here, the plain modules run.
"""

from __future__ import annotations

import math
import operator
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Generic, TypeAlias, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from miniclip.layers import Conv2d, Embedding, Linear, MultiheadAttention, QuickGELU

# model.py stands above this file and uses it, so its classes have no names here.
CLIP: TypeAlias = Any
VisionTransformer: TypeAlias = Any
Transformer: TypeAlias = Any
ResidualAttentionBlock: TypeAlias = Any

# Rows of a matrix product: enough to keep the cores busy, few enough that 4 W of them stay below glibc's 32 MB, from
# which on every temporary is mapped, cleared and unmapped again. Measured on a Xeon with 48 MB of cache, 64 images of
# ViT-B/32: 20.1 a second at 400 rows, 20.9 to 21.9 from 800 to 3200, 20.7 at 6400.
_TOKENS = 1600
# Shapes that recur: oneDNN compiles a kernel for each number of rows it meets.
_ROWS = 32
# A chunk's keys and values are laid out by text, so one long text among many short ones has its price.
_POSITIONS = 8192

# Rows of a first call that are worth packing the weights for: what is won by them is about what packing takes.
_WORTH = 512

_CAPABILITIES = ("AVX2", "AVX512")
# float16 on a CPU is for storing: its products are slower than float32's.
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


# -- matrices ---------------------------------------------------------------------------------------------------------


@cache
def has_packed_kernels(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype from packed weights here, faster than torch does from plain ones."""
    # The operators are torch's own, made for its compiler, and documented nowhere: another version may have others.
    try:
        if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() not in _CAPABILITIES:
            return False
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        if dtype != torch.float32 and not (dtype == torch.bfloat16 and native):  # without instructions it is emulated
            return False
        x, bias, weight = (torch.linspace(-1, 1, n, dtype=dtype) for n in (64, 16, 128))
        x, weight = x.view(8, 8), weight.view(16, 8)
        plain, matrix = F.linear(x, weight, bias), Matrix(weight, packed=True)
        results = matrix(x, bias), matrix(x, bias, "swish"), matrix(x, bias, "gelu"), matrix.add_to(plain, x, bias)
    except (AttributeError, RuntimeError):
        return False
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    expected = plain, F.silu(plain), F.gelu(plain), 2 * plain
    return all(torch.allclose(a, b, atol=tolerance, rtol=tolerance) for a, b in zip(results, expected))


class Matrix:
    """The weights of a linear layer (out, in), times a factor, ready to be multiplied with."""

    def __init__(
        self,
        weight: Tensor,
        rows: int = _TOKENS,
        *,
        factor: float = 1.0,
        scratch: Tensor | None = None,
        packed: bool | None = None,
    ) -> None:
        weight = weight.detach()
        self.packed = has_packed_kernels(weight.dtype) if packed is None else packed
        if factor != 1:
            # Between packed matrices, which stay, temporaries that go would leave holes that nothing fits in again.
            reusable = scratch[: weight.numel()].view_as(weight) if self.packed and scratch is not None else None
            weight = torch.mul(weight, factor, out=reusable)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, rows) if self.packed else weight

    def __call__(self, x: Tensor, bias: Tensor | None = None, activation: str = "none") -> Tensor:
        """x (rows, in) -> activation(x Wᵀ + bias) (rows, out); the activation is "none", "swish" or "gelu"."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, bias, activation, [], "none")
        x = F.linear(x, self.weight, bias)
        return {"none": lambda x: x, "swish": F.silu, "gelu": F.gelu}[activation](x)

    def add_to(self, residual: Tensor, x: Tensor, bias: Tensor) -> Tensor:
        """x (rows, in), residual (rows, out) -> residual + x Wᵀ + bias (rows, out)."""
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, bias, "add")
        return F.linear(x, self.weight, bias) + residual


class Block:
    """A ResidualAttentionBlock with its matrices packed. Gains and most biases are read from the block itself."""

    def __init__(self, block: ResidualAttentionBlock, scratch: Tensor, last: bool) -> None:
        self.block = block
        attention, mlp = block.attn, block.mlp
        width = attention.in_proj_weight.shape[1]
        if last:
            self.q = Matrix(attention.in_proj_weight[:width], rows=_ROWS)
            self.kv = Matrix(attention.in_proj_weight[width:])
        else:
            self.qkv = Matrix(attention.in_proj_weight)
        rows = _ROWS if last else _TOKENS
        self.out = Matrix(attention.out_proj.weight, rows=rows)
        self.factor = 1.702 if isinstance(mlp.gelu, QuickGELU) else 1.0
        self.c_fc = Matrix(mlp.c_fc.weight, rows, factor=self.factor, scratch=scratch)
        self.c_fc_bias = mlp.c_fc.bias.detach() * self.factor
        self.c_proj = Matrix(mlp.c_proj.weight, rows, factor=1 / self.factor, scratch=scratch)

    def mlp(self, x: Tensor) -> Tensor:
        mlp = self.block.mlp
        hidden = self.c_fc(norm(self.block.ln_2, x), self.c_fc_bias, "gelu" if self.factor == 1 else "swish")
        return self.c_proj.add_to(x, hidden, mlp.c_proj.bias)


def packed_blocks(transformer: Transformer) -> tuple[list[Block], Block]:
    """All blocks but the last, and the last."""
    *blocks, last = transformer.resblocks
    scratch = last.mlp.c_fc.weight.new_empty(max(block.mlp.c_fc.weight.numel() for block in transformer.resblocks))
    return [Block(block, scratch, last=False) for block in blocks], Block(last, scratch, last=True)


def norm(layer: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


# -- images -----------------------------------------------------------------------------------------------------------


class ImageTower:
    """A VisionTransformer with its matrices packed."""

    def __init__(self, visual: VisionTransformer) -> None:
        self.visual = visual
        self.conv1 = Matrix(visual.conv1.weight.flatten(1))
        self.blocks, self.last = packed_blocks(visual.transformer)

    def __call__(self, images: Tensor) -> Tensor:
        """Images (N, 3, S, S) -> embeddings (N, D)."""
        parts = -(-len(images) * len(self.visual.positional_embedding) // _TOKENS)
        return torch.cat([self.pooled(part) for part in images.chunk(parts)]) @ self.visual.proj

    def embed(self, images: Tensor) -> Tensor:
        """Patches cut out and multiplied, which is what a convolution with its stride as its size does: (N, L, W)."""
        visual = self.visual
        size, positions = visual.conv1.kernel_size[0], visual.positional_embedding
        n, grid = len(images), images.shape[-1] // size
        images = images[:, :, : grid * size, : grid * size]  # a rest is left out, as a convolution does
        patches = images.reshape(n, 3, grid, size, grid, size).permute(0, 2, 4, 1, 3, 5).reshape(n * grid**2, -1)
        x = images.new_empty(n, *positions.shape)
        x[:, 0] = visual.class_embedding + positions[0]
        torch.add(self.conv1(patches).view(n, grid**2, -1), positions[1:], out=x[:, 1:])
        return x

    def pooled(self, images: Tensor) -> Tensor:
        """Images (N, 3, S, S) -> the class token behind ``ln_post`` (N, W)."""
        n, length = len(images), self.visual.positional_embedding.shape[0]
        x = norm(self.visual.ln_pre, self.embed(images)).flatten(0, 1)  # (N L, W)
        width = x.shape[1]
        for block in self.blocks:
            attention = block.block.attn
            qkv = block.qkv(norm(block.block.ln_1, x), attention.in_proj_bias)  # (N L, 3 W)
            q, k, v = qkv.view(n, length, 3, attention.heads, -1).permute(2, 0, 3, 1, 4)  # (N, heads, L, W / heads)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n * length, width)
            x = block.mlp(block.out.add_to(x, attended, attention.out_proj.bias))
        attention = self.last.block.attn
        normed, bias = norm(self.last.block.ln_1, x), attention.in_proj_bias
        k, v = self.last.kv(normed, bias[width:]).view(n, length, 2, attention.heads, -1).permute(2, 0, 3, 1, 4)
        q = self.last.q(normed.view(n, length, width)[:, 0].contiguous(), bias[:width])  # (N, W)
        q = q.view(n, 1, attention.heads, -1).transpose(1, 2)  # (N, heads, 1, W / heads)
        attended = F.scaled_dot_product_attention(q, k, v).reshape(n, width)
        x = x.view(n, length, width)[:, 0].contiguous()  # (N, W)
        return norm(self.visual.ln_post, self.last.mlp(self.last.out.add_to(x, attended, attention.out_proj.bias)))


# -- texts ------------------------------------------------------------------------------------------------------------


@dataclass
class Tree:
    """Texts as a tree of prefixes. A node is a token with all that stands before it; a row is a text.

    The rows are sorted, so each shares with the one before it a beginning of some length, and its own nodes are those
    behind. They are numbered row by row.
    """

    tokens: Tensor  # (nodes,) ids
    positions: Tensor  # (nodes,) where in its row each stands
    own: Tensor  # (rows, S) bool: the s-th place of a row's own nodes is taken
    path: Tensor  # (rows, L) the node at each position of a row, and behind its end the last
    mask: Tensor  # (rows, 1, S, L) bool: whether an own node sees a position
    reach: Tensor  # (rows, 1, 1, L) bool: whether the end token does
    ends: Tensor  # (rows,) the node that is pooled

    @classmethod
    def of(cls, rows: Tensor, lengths: Tensor) -> Tree:
        """Sorted, distinct rows (rows, L) of tokens, of which the first ``lengths`` (rows,) count."""
        columns = torch.arange(rows.shape[1])
        shared = shared_lengths(rows)
        inside = columns < lengths[:, None]  # (rows, L)
        new = inside & (columns >= shared[:, None])
        number = new.flatten().cumsum(0).view_as(new) - 1
        # Up to where a row shares, its nodes are those of the row before: the latest number in each column.
        path = torch.where(new, number, -1).cummax(dim=0).values
        ends = path.gather(1, lengths[:, None] - 1)  # (rows, 1)
        path = torch.where(inside, path, ends)
        slots = torch.arange(int((lengths - shared).max()))
        reach = shared[:, None] + slots  # (rows, S): the position of each own node
        return cls(
            tokens=rows[new],
            positions=columns.expand_as(new)[new],
            own=reach < lengths[:, None],
            path=path,
            mask=(columns <= reach[:, :, None])[:, None],
            reach=inside[:, None, None],
            ends=ends[:, 0],
        )


def shared_lengths(rows: Tensor) -> Tensor:
    """How many first tokens each row (rows, L) has in common with the one before it, (rows,)."""
    same = (rows[1:] == rows[:-1]).long().cumprod(dim=1).sum(dim=1)
    return torch.cat([same.new_zeros(1), same])


def chunks(rows: Tensor, lengths: Tensor) -> Iterator[slice]:
    """Parts of sorted rows that are worth a pass each: about ``_TOKENS`` nodes, ``_POSITIONS`` positions at most."""
    own, long = (lengths - shared_lengths(rows)).tolist(), lengths.tolist()
    start = nodes = longest = 0
    for row in range(len(rows)):
        longest = max(longest, long[row])
        if row > start and (nodes + own[row] > _TOKENS or (row + 1 - start) * longest > _POSITIONS):
            yield slice(start, row)
            start, nodes, longest = row, 0, long[row]
        nodes += own[row] if row > start else long[row]
    yield slice(start, len(rows))


class TextTower:
    """The text tower of a CLIP with its matrices packed."""

    def __init__(self, clip: CLIP) -> None:
        self.blocks, self.last = packed_blocks(clip.transformer)

    # The CLIP is given to each call. Kept here it would hold on to itself, and stay in memory when it is let go.
    def __call__(self, clip: CLIP, tokens: Tensor, lengths: Sequence[int]) -> Tensor:
        """Token ids (N, L), of which in each row the first ``lengths`` count -> embeddings (N, D)."""
        length = torch.tensor(lengths)
        tokens = torch.where(torch.arange(tokens.shape[1]) < length[:, None], tokens.long(), -1)[:, : max(lengths)]
        rows, row_of = torch.unique(tokens, dim=0, return_inverse=True)  # sorted
        length = (rows >= 0).sum(dim=1)
        pooled = []
        for part in chunks(rows, length):
            longest = int(length[part].max())
            pooled.append(self.pooled(clip, Tree.of(rows[part, :longest], length[part])))
        return (torch.cat(pooled) @ clip.text_projection)[row_of]

    def pooled(self, clip: CLIP, tree: Tree) -> Tensor:
        """The end tokens behind ``ln_final``, (rows, W)."""
        x = F.embedding(tree.tokens, clip.token_embedding.weight) + clip.positional_embedding[tree.positions]
        nodes, width = x.shape
        x = F.pad(x, (0, 0, 0, -nodes % _ROWS))  # (nodes', W)
        for block in self.blocks:
            attention = block.block.attn
            qkv = block.qkv(norm(block.block.ln_1, x), attention.in_proj_bias)  # (nodes', 3 W)
            q = qkv.new_zeros(*tree.own.shape, width)  # (rows, S, W)
            q[tree.own] = qkv[:nodes, :width]
            attended = self.attend(q, qkv[:, width:], tree.path, tree.mask, attention.heads)[tree.own]  # (nodes, W)
            attended = F.pad(attended, (0, 0, 0, -nodes % _ROWS))
            x = block.mlp(block.out.add_to(x, attended, attention.out_proj.bias))
        attention = self.last.block.attn
        normed, bias = norm(self.last.block.ln_1, x), attention.in_proj_bias
        kv = self.last.kv(normed, bias[width:])  # (nodes', 2 W)
        q = self.last.q(normed[tree.ends], bias[:width])[:, None]  # (rows, 1, W)
        attended = self.attend(q, kv, tree.path, tree.reach, attention.heads)[:, 0]  # (rows, W)
        x = self.last.mlp(self.last.out.add_to(x[tree.ends], attended, attention.out_proj.bias))
        return norm(clip.ln_final, x)

    @staticmethod
    def attend(q: Tensor, kv: Tensor, path: Tensor, mask: Tensor, heads: int) -> Tensor:
        """Queries (rows, S, W) to the keys and values (nodes, 2 W) along each row's path -> (rows, S, W)."""
        n, s, width = q.shape
        kv = kv.index_select(0, path.flatten()).view(n, -1, 2, heads, width // heads)
        k, v = kv.permute(2, 0, 3, 1, 4)  # each (rows, heads, L, W / heads)
        q = q.view(n, s, heads, -1).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(n, s, width)


# -- when ---------------------------------------------------------------------------------------------------------


_Tower = TypeVar("_Tower")
_Kind = TypeVar("_Kind", bound=type)


class Kernels:
    """The packed towers of one CLIP, made when they are worth it and again when a weight has changed.

    Belongs to its model and to the weights it was made from: a copy of the model, or what is unpickled, starts without.
    """

    def __init__(self) -> None:
        # Reentrant: a signal handler may encode too.
        self._lock, self._process = threading.RLock(), os.getpid()
        self.clear()

    def __reduce__(self) -> tuple[type[Kernels], tuple[()]]:
        return Kernels, ()

    def clear(self) -> None:
        """Lets go of what is packed."""
        self._image: _Slot[ImageTower] = _Slot()
        self._text: _Slot[TextTower] = _Slot()

    def image(self, clip: CLIP, images: Tensor) -> ImageTower | None:
        """The tower to give these images to; None where the plain one has to run."""
        if not self._can_be_used(clip, images):
            return None
        rows = len(images) * (clip.config.vision.grid**2 + 1)
        with self._alone():
            return self._image.tower(clip, rows, _look_at_image_tower, lambda: ImageTower(clip.visual))

    def text(self, clip: CLIP, tokens: Tensor, lengths: Sequence[int]) -> TextTower | None:
        """The tower to give these texts to; None where the plain one has to run."""
        if not self._can_be_used(clip, tokens):
            return None
        with self._alone():
            return self._text.tower(clip, sum(lengths), _look_at_text_tower, lambda: TextTower(clip))

    def _can_be_used(self, clip: CLIP, given: Tensor) -> bool:
        if _passing_reason(given) is not None:
            return False
        if _general_reason(clip) is not None:
            self.clear()
            return False
        return True

    def _alone(self) -> threading.RLock:
        """One thread at a time: two would pack the same weights twice. A forked process cannot wait for the other's."""
        if self._process != os.getpid():
            self._lock, self._process = threading.RLock(), os.getpid()
        return self._lock


class _Slot(Generic[_Tower]):
    """Room for one packed tower, with what has to be as it was for the tower to hold."""

    def __init__(self) -> None:
        self.kept: tuple[_Seen, _Watch, _Tower | None] | None = None

    @property
    def packed(self) -> _Tower | None:
        return self.kept and self.kept[2]

    def tower(
        self, clip: CLIP, rows: int, look: Callable[[CLIP], _Seen | str], pack: Callable[[], _Tower]
    ) -> _Tower | None:
        """What was packed before if it still holds; packed anew if that pays; else nothing.

        A second copy of the weights takes time and memory, which a process that encodes one picture never gets back:
        the first call packs if it brings many rows, and otherwise the second, if it finds the weights unchanged.
        """
        seen, watch, packed = self.kept or (None, None, None)
        if seen is None or not seen.holds(clip):
            found = look(clip)
            if isinstance(found, str):
                self.kept = None
                return None
            if seen is None or not seen.is_made_of(found):
                watch = packed = None
            seen = found
        unchanged = watch is not None and watch.unchanged()
        if unchanged and packed is not None:
            self.kept = seen, watch, packed  # type: ignore[assignment]
            return packed
        self.kept = packed = None  # first, so that there is no moment with both in memory
        try:
            # Tensors made in inference mode could not be used outside of it.
            with torch.inference_mode(False), torch.no_grad():
                watch = _Watch(seen.weights)
                if unchanged or rows >= _WORTH:
                    packed = pack()
        except (RuntimeError, MemoryError):  # no room for a second copy
            return None
        self.kept = seen, watch, packed
        return packed


def path_of(clip: CLIP) -> str:
    """The way that images and texts go now, if they do not require grad: "fast, …" or "plain (reason)"."""
    reason = _passing_reason(torch.empty(0, device=clip.device))
    for seen in (reason, _look_at_image_tower(clip), _look_at_text_tower(clip)):
        if isinstance(seen, str):
            return f"plain ({seen})"
    return f"fast, {'packed by oneDNN' if has_packed_kernels(clip.dtype) else 'without packed kernels'}"


def _passing_reason(given: Tensor) -> str | None:
    """Why the plain modules have to run now, whatever the model is like."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        return "it is being traced"
    if any(depth() for depth in _MODES) or _transform() is not None or forward_ad._current_level >= 0:
        return "a torch mode or transform is active"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if type(given) not in (Tensor, nn.Parameter):
        return f"the input is a {type(given).__name__}"
    if torch.is_grad_enabled() and given.requires_grad:
        return "the input requires grad"
    if any(_GLOBAL_HOOKS):
        return "global module hooks are registered"
    return None


class _Seen:
    """A tower as it was found: its modules, its parameters, and those of them that are packed."""

    def __init__(self) -> None:
        self.modules: list[nn.Module] = []
        self.parameters: list[Tensor] = []
        self.weights: list[Tensor] = []

    def freeze(self, clip: CLIP) -> _Seen:
        """Notes everything ``_look`` has looked at, so that ``holds`` can tell in a fraction of its time."""
        hooks = "_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"
        self.hooks = [getattr(module, name) for module in self.modules for name in hooks]
        attributes = [vars(module) for module in self.modules]
        inner = [d[name] for d in attributes for name in ("_modules", "_parameters")]
        # Of the CLIP no more than this: with all of it, it would hold on to itself.
        self.dicts = [clip._modules, clip._parameters, *attributes, *inner]
        self.values = [tuple(d.values()) for d in self.dicts]
        self.kinds = self._kinds()
        self.forms = self._forms()
        return self

    def holds(self, clip: CLIP) -> bool:
        """Whether ``_look`` would find the same again."""
        return (
            self.dicts[0] is clip._modules
            and self.dicts[1] is clip._parameters
            and all(len(d) == len(v) and all(map(operator.is_, d.values(), v)) for d, v in zip(self.dicts, self.values))
            and not any(self.hooks)
            and all(map(operator.is_, self._kinds(), self.kinds))
            and not (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters))
            and self._forms() == self.forms
        )

    def is_made_of(self, other: _Seen) -> bool:
        """Whether both have the same modules, of the same classes, and the same weights."""
        return all(
            len(ours) == len(theirs) and all(map(operator.is_, ours, theirs))
            for ours, theirs in (
                (self.modules, other.modules),
                (self.weights, other.weights),
                (self.kinds, other.kinds),
            )
        )

    def _forms(self) -> list[tuple[object, ...]]:
        return [(p.dtype, p.device, p.shape, p.stride()) for p in self.parameters]

    def _kinds(self) -> list[type]:
        return list(map(type, self.modules + self.parameters))  # type: ignore[operator]


def _look_at_image_tower(clip: CLIP) -> _Seen | str:
    visual = clip.visual
    seen = _look(clip, [(visual, _shapes()["image tower"])], [], causal=False)
    if isinstance(seen, str):
        return seen
    conv = visual.conv1
    if (conv.stride, conv.padding, conv.dilation, conv.groups) != (conv.kernel_size, (0, 0), (1, 1), 1):
        return "the patch embedding is another convolution"
    if len(visual.positional_embedding) != (visual.input_resolution // conv.kernel_size[0]) ** 2 + 1:
        return "there is not one position for each patch"
    return seen


def _look_at_text_tower(clip: CLIP) -> _Seen | str:
    shapes = _shapes()
    parts = [(clip.transformer, "transformer"), (clip.token_embedding, "embedding"), (clip.ln_final, "norm")]
    # OpenAI's layout keeps some of the tower on the CLIP itself.
    own = [clip.positional_embedding, clip.text_projection]
    seen = _look(clip, [(module, shapes[name]) for module, name in parts], own, causal=True)
    if not isinstance(seen, str) and clip.token_embedding.max_norm is not None:
        return "the token embedding renormalises"
    return seen


def _general_reason(clip: CLIP) -> str | None:
    """Why no tower of this model can be packed."""
    if not clip.fast:
        return "fast is off"
    if clip.device.type != "cpu":
        return f"the device is {clip.device.type}"
    if clip.dtype not in _DTYPES:
        return f"the dtype is {clip.dtype}"
    if not torch._C._get_mkldnn_enabled():
        return "oneDNN is turned off"
    if clip.__dict__.keys() & clip._modules.keys():
        return "a tower is hidden by an attribute"
    for (kind, name), original in _METHODS.items():
        if getattr(type(clip) if name == "text" else kind, name) is not original:
            return f"{kind.__name__}.{name} is not miniclip's own"
    return None


def _look(clip: CLIP, roots: Sequence[tuple[nn.Module, _Shape]], own: Sequence[Tensor], causal: bool) -> _Seen | str:
    """The parts of a tower, or why the plain modules have to run until something about the model changes."""
    if reason := _general_reason(clip):
        return reason
    seen = _Seen()
    parameters = list(own)
    stack: list[tuple[Any, _Shape]] = list(roots)
    while stack:
        module, shape = stack.pop()
        kind = type(module)
        if kind not in shape.kinds:
            return f"a {kind.__name__} is not miniclip's own"
        children = module._modules
        known = shape.children if shape.each is None else dict.fromkeys(children, shape.each)
        if children.keys() != known.keys() or not (children or shape.each is None):
            return f"a {kind.__name__} is not miniclip's own"
        if module._parameters.keys() != set(shape.parameters) | ({"bias"} if kind is Conv2d else set()):
            return f"the parameters of a {kind.__name__} are not miniclip's own"
        if (_OVERRIDES | children.keys()) & module.__dict__.keys() or module._compiled_call_impl is not None:
            return f"a {kind.__name__} has a forward of its own"
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"a {kind.__name__} has hooks"
        if kind is MultiheadAttention:
            if module.causal != causal:
                return "an attention has another mask"
            seen.weights += [module.in_proj_weight, module.in_proj_bias]
        elif kind is Linear:
            seen.weights += [module.weight, module.bias]
        elif kind is Conv2d:
            if module.bias is not None:
                return "the patch embedding has a bias"
            seen.weights.append(module.weight)
        elif kind is nn.GELU and module.approximate != "none":
            return "a GELU is approximated"
        parameters += [module._parameters[name] for name in shape.parameters]
        seen.modules.append(module)
        stack += [(children[name], known[name]) for name in children]
    grad = torch.is_grad_enabled()
    for parameter in parameters:
        if type(parameter) is not nn.Parameter or parameter.is_inference():
            return "a parameter is missing, or not an ordinary one"
        if grad and parameter.requires_grad:
            return "a parameter requires grad"
        if parameter.dtype != clip.dtype or parameter.device != clip.device:
            return "the parameters are of several dtypes or devices"
    if not all(weight.is_contiguous() for weight in seen.weights):
        return "a weight is not contiguous"
    seen.parameters = parameters
    return seen.freeze(clip)


_MODES = (torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack)
_transform = torch._C._functorch.peek_interpreter_stack
_GLOBAL_HOOKS = (
    torch.nn.modules.module._global_forward_hooks,
    torch.nn.modules.module._global_forward_pre_hooks,
    torch.nn.modules.module._global_backward_hooks,
    torch.nn.modules.module._global_backward_pre_hooks,
)

#: The methods whose arithmetic this file repeats, as they were when it was written.
_METHODS: dict[tuple[type, str], Any] = {
    (kind, "forward"): kind.forward
    for kind in (MultiheadAttention, Linear, Conv2d, Embedding, QuickGELU, nn.GELU, nn.LayerNorm, nn.Sequential)
}
_METHODS[Conv2d, "_conv_forward"] = Conv2d._conv_forward
_OVERRIDES = {"forward", "embed", "_conv_forward"}


@dataclass(frozen=True)
class _Shape:
    """What a module has to look like for its arithmetic to be the one repeated here."""

    kinds: tuple[type, ...]
    parameters: tuple[str, ...] = ()
    children: Mapping[str, _Shape] = field(default_factory=dict)
    each: _Shape | None = None  # of one or more children of any names


@cache
def _shapes() -> dict[str, _Shape]:
    own = {kind.__name__: kind for kind, _ in _METHODS}  # model.py's are among them by now
    linear = _Shape((Linear,), ("weight", "bias"))
    norm = _Shape((nn.LayerNorm,), ("weight", "bias"))
    attention = _Shape((MultiheadAttention,), ("in_proj_weight", "in_proj_bias"), {"out_proj": linear})
    activation = _Shape((QuickGELU, nn.GELU))
    mlp = _Shape((nn.Sequential,), (), {"c_fc": linear, "gelu": activation, "c_proj": linear})
    block = {"attn": attention, "ln_1": norm, "mlp": mlp, "ln_2": norm}
    blocks = _Shape((nn.Sequential,), each=_Shape((own["ResidualAttentionBlock"],), (), block))
    transformer = _Shape((own["Transformer"],), (), {"resblocks": blocks})
    image_tower = {"conv1": _Shape((Conv2d,), ("weight",)), "ln_pre": norm, "transformer": transformer, "ln_post": norm}
    parameters = ("class_embedding", "positional_embedding", "proj")
    return {
        "norm": norm,
        "transformer": transformer,
        "embedding": _Shape((Embedding,), ("weight",)),
        "image tower": _Shape((own["VisionTransformer"],), parameters, image_tower),
    }


def repeated(*names: str) -> Callable[[_Kind], _Kind]:
    """Marks a class of model.py of which methods are repeated here: what changes there has to change here."""

    def mark(kind: _Kind) -> _Kind:
        _METHODS.update({(kind, name): getattr(kind, name) for name in names})
        return kind

    return mark


class _Watch:
    """What packed weights were made from, to notice whatever has happened to them since.

    A write that torch counts is noticed whatever it wrote. One that it does not count, through ``weight.data`` or
    numpy, is noticed where it changed a whole row, column or block, which all that is done to weights so far does; a
    few numbers set in that way are not.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.weights = weights
        # Kept alive, so that no other tensor can come to lie at the same address.
        self.tensors = [weight.detach() for weight in weights]
        self.views = [_some(tensor) for tensor in self.tensors]
        self.samples = self._samples()
        self.states = self._states()

    def unchanged(self) -> bool:
        return self._states() == self.states and torch.equal(self._samples(), self.samples)

    def _states(self) -> list[tuple[int, int]]:
        return [(weight._version, weight.data_ptr()) for weight in self.weights]

    def _samples(self) -> Tensor:
        samples = torch.cat(self.views)
        return samples.view(_BITS[samples.dtype])


# Compared as bits: a NaN is not equal to itself.
_BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float64: torch.int64}


def _some(weight: Tensor) -> Tensor:
    """A view of numbers of a weight: of every row, of every column, and of any block a few times sqrt(rows) wide."""
    rows, columns = len(weight), weight[0].numel()  # a bias has one column
    step = min(rows, columns)  # as long as no row, so that none is stepped over
    step = max(step - math.isqrt(step), 1)  # from row to row so far aside, or all would lie on a diagonal
    while math.gcd(step, columns) > 1:  # it would come back to the same columns
        step -= 1
    return weight.as_strided((-(-rows * columns // step),), (step,))
