"""CLIP as in the paper (Radford et al. 2021, arXiv:2103.00020), under OpenAI's names.

The state_dict and the (L, N, W) contract of the transformers are those of openai/CLIP. In the shape comments N is the
batch, L the sequence length, W a tower's width, D the width of the joint space and S the image size.

One token of a sequence becomes its embedding: the class token of an image, the end token of a text. So the last block
computes that token alone. The block needs the keys and values of all tokens, and nothing else of the other tokens. A
hook would see these smaller shapes. Therefore a tower in which a module was hooked, patched or replaced computes every
token, as openai/CLIP does (``is_untouched``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from miniclip import layers, prefixes
from miniclip.config import CLIPConfig, TextConfig, TransformerConfig, VisionConfig
from miniclip.errors import ConfigError, InputError
from miniclip.layers import MLP, Embedding, MultiheadAttention, PackedLayer, PatchEmbedding, View, is_bare
from miniclip.packed import Packed, is_ordinary, is_traced

# Tokens in one pass of the image tower on a CPU: enough to keep the cores busy, few enough that activations stay in
# the cache and below 32 MB, from where on glibc maps every temporary anew. Measured with 64 images of ViT-B/32 on a
# Xeon with 48 MB of cache: 20.1 images/s at 400 tokens, 20.9 to 21.9 from 800 to 3,200, 20.7 at 6,400.
MAX_TOKENS = 1600


@dataclass
class Pooled:
    """The view of the last block: one token of each sequence asks."""

    at: Any  # the index of these tokens in (L, N)
    mask: Tensor | None = None  # (N, 1, 1, L) bool: which tokens they see; all without it

    def asking(self, x: Tensor) -> Tensor:
        return x[self.at][None]  # (1, N, W)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        return layers.attend(q, k, v, heads, self.mask)  # (1, N, W)


class ResidualAttentionBlock(nn.Module):
    """A pre-norm transformer block: (L, N, W) -> (L, N, W), or the tokens that ask in a view: (L', N', W)."""

    def __init__(self, config: TransformerConfig, causal: bool) -> None:
        super().__init__()
        self._length = config.context_length if isinstance(config, TextConfig) else 0
        self.attn = MultiheadAttention(config.width, config.heads, causal)
        self.ln_1 = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.mlp = MLP(config.width, config.mlp_width, config.activation)
        self.ln_2 = nn.LayerNorm(config.width, config.layer_norm_eps)

    def forward(self, x: Tensor, view: View | None = None) -> Tensor:
        y = self.ln_1(x)
        if "other_mask" in self.__dict__:
            x = x + self.attention(y)
        else:
            x = x + self.attn(y) if view is None else view.asking(x) + self.attn(y, view=view)
        return x + self.mlp(self.ln_2(x))

    def attention(self, x: Tensor) -> Tensor:
        """As in openai/CLIP: self-attention under ``attn_mask``, (L, N, W) -> (L, N, W)."""
        y: Tensor = self.attn(x, x, x, need_weights=False, attn_mask=self.attn_mask)[0]
        return y

    @property
    def attn_mask(self) -> Tensor | None:
        """As in openai/CLIP: what is added to the scores, (L, L), or None. It can be set, and is then obeyed."""
        if "other_mask" in self.__dict__:
            mask: Tensor | None = self.__dict__["other_mask"]
            if mask is None or mask.dtype == torch.bool:
                return mask
            return mask.to(self.attn.in_proj_weight)
        if not self.attn.causal:
            return None
        length = self._length
        return self.attn.in_proj_weight.new_full((length, length), -torch.inf).triu_(1)

    @attn_mask.setter
    def attn_mask(self, mask: Tensor | None) -> None:
        self.__dict__["other_mask"] = mask


class Transformer(nn.Module):
    """A stack of blocks: (L, N, W) -> (L, N, W). A causal one masks by itself."""

    def __init__(self, config: TransformerConfig, causal: bool) -> None:
        super().__init__()
        self.width = config.width
        self.layers = config.layers
        self.resblocks = nn.Sequential(*(ResidualAttentionBlock(config, causal) for _ in range(config.layers)))

    def forward(self, x: Tensor, view: View | None = None, last: View | None = None) -> Tensor:
        """``last`` is the view of the last block, ``view`` that of the others. Without ``last`` every token asks."""
        if last is None:
            return self.resblocks(x)
        *blocks, last_block = self.resblocks
        for block in blocks:
            x = block(x, view)
        return last_block(x, last)

    def hidden_states(self, x: Tensor) -> list[Tensor]:
        """The input and the output of every block, batch first: layers + 1 tensors (N, L, W)."""
        states = [x]
        for block in self.resblocks:
            states.append(block(states[-1]))
        return [state.transpose(0, 1) for state in states]


class VisionTransformer(nn.Module):
    """The image tower: (N, 3, S, S) normalised pixels -> (N, D) embeddings, not normalised."""

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__()
        self.input_resolution = config.image_size
        self.output_dim = embed_dim
        self.conv1 = PatchEmbedding(3, config.width, config.patch_size, config.patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(config.width))
        self.positional_embedding = nn.Parameter(torch.empty(config.grid**2 + 1, config.width))
        self.ln_pre = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.transformer = Transformer(config, causal=False)
        self.ln_post = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.proj: nn.Parameter | None = nn.Parameter(torch.empty(config.width, embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        x = self.ln_pre(self.embed(images)).transpose(0, 1).contiguous()  # (L, N, W)
        x = self.transformer(x, last=Pooled(0)) if is_untouched(self) else self.transformer(x)  # (1 or L, N, W)
        return self.project(self.ln_post(x[0]))  # (N, D): the class token comes first

    def project(self, x: Tensor) -> Tensor:
        """(…, W) -> (…, D). As in openai/CLIP, ``proj = None`` leaves the features of the tower, (…, W)."""
        return x if self.proj is None else x @ self.proj

    def embed(self, images: Tensor) -> Tensor:
        """Patch embeddings behind the class token, positions added: (N, 3, S, S) -> (N, L, W), L = patches + 1."""
        x = self.conv1(images).flatten(2).transpose(1, 2)  # (N, patches, W)
        class_token = self.class_embedding.expand(x.shape[0], 1, -1)  # (N, 1, W)
        return torch.cat([class_token, x], dim=1) + self.positional_embedding  # (N, L, W)

    def hidden_states(self, images: Tensor) -> list[Tensor]:
        """What enters the first block (after ``ln_pre``), then every block's output: layers + 1 tensors (N, L, W)."""
        images = self.check(images)
        return self.transformer.hidden_states(self.ln_pre(self.embed(images)).transpose(0, 1))

    def patch_tokens(self, images: Tensor) -> Tensor:
        """Each patch in the joint space: (N, 3, S, S) -> (N, patches, D), row by row from the top left."""
        return self.project(self.ln_post(self.hidden_states(images)[-1][:, 1:]))

    def check(self, images: Tensor) -> Tensor:
        """The images in the tower's dtype.

        Raises:
            InputError: if they are not (N, 3, S, S) floating-point pixels on the tower's device.
        """
        size, weight = self.input_resolution, self.conv1.weight
        if not isinstance(images, Tensor):
            raise InputError(f"images must be a tensor (N, 3, {size}, {size}), got {type(images).__name__}")
        own = (size // weight.shape[-1]) ** 2 + 1 == len(self.positional_embedding)
        if not own or images.ndim != 4 or images.shape[1:] != (3, size, size):
            self._check_size(images, own)
        if not images.is_floating_point():
            raise InputError(f"images must be normalised floating-point pixels, got {images.dtype}: use preprocess")
        if images.device != weight.device:
            raise InputError(f"images are on {images.device}, the model is on {weight.device}")
        return images.to(weight.dtype)

    def resample_positions(self, size: int) -> None:
        """Make the tower take images of ``size`` pixels: its position embeddings are resampled, bicubic.

        Raises:
            ConfigError: if ``size`` is not a multiple of the patch size.
        """
        patch, old = self.conv1.kernel_size[0], self.positional_embedding
        if not isinstance(size, int) or isinstance(size, bool) or size < patch or size % patch:
            raise ConfigError(f"image_size must be a multiple of {patch} pixels, the side of a patch, got {size!r}")
        if size == self.input_resolution:
            return
        before, after = self.input_resolution // patch, size // patch
        grid = old.detach()[1:].T.reshape(1, -1, before, before)
        # In float32 at least: torch has no bicubic kernel in half precision on every device.
        grid = F.interpolate(grid.to(torch.promote_types(old.dtype, torch.float32)), (after, after), mode="bicubic")
        patches = grid.flatten(2)[0].T.to(old.dtype)
        self.positional_embedding = nn.Parameter(torch.cat([old.detach()[:1], patches]), old.requires_grad)
        self.input_resolution = size

    def _check_size(self, images: Tensor, own: bool) -> None:
        """Images of another size fit if ``positional_embedding`` is not the tower's own, but one of as many patches."""
        size, rows, patch = self.input_resolution, len(self.positional_embedding), self.conv1.weight.shape[-1]
        if own or images.ndim != 4 or images.shape[1] != 3:
            raise InputError(f"images must be (N, 3, {size}, {size}), got {tuple(images.shape)}")
        if (patches := (images.shape[2] // patch) * (images.shape[3] // patch)) != rows - 1:
            raise InputError(
                f"images {tuple(images.shape)} have {patches} patches, positional_embedding is for {rows - 1}"
            )


class TextTransformer(nn.Module):
    """The text tower: (N, L) token ids -> (N, D) embeddings, not normalised.

    OpenAI's layout has the parts of this tower on the CLIP itself. So a CLIP is a text tower, with an image tower.
    """

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__()
        self.end_of_text = config.end_of_text
        self.transformer = Transformer(config, causal=True)
        self.token_embedding = Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.ln_final = nn.LayerNorm(config.width, config.layer_norm_eps)
        self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens).transpose(0, 1).contiguous()  # (L, N, W)
        ends = self.end_positions(tokens)
        at = ends, torch.arange(tokens.shape[0], device=tokens.device)
        if is_untouched(self):
            seen = torch.arange(tokens.shape[1], device=tokens.device) <= ends[:, None]  # (N, L)
            x = self.ln_final(self.transformer(x, last=Pooled(at, seen[:, None, None]))[0])  # (N, W)
        else:
            x = self.ln_final(self.transformer(x).transpose(0, 1)).transpose(0, 1)[at]  # (N, W)
        return x @ self.text_projection  # (N, D)

    def encode_tree(self, tree: prefixes.Tree) -> Tensor:
        """The texts of a tree, (rows, D): what ``forward`` gives for each, with shared beginnings computed once."""
        x = self.embed_tokens(tree.tokens[:, None], tree.positions[:, None])  # (nodes, 1, W)
        x = self.transformer(x, tree, prefixes.Ends(tree))[:, 0]  # (rows, W)
        return self.ln_final(x) @ self.text_projection

    def embed_tokens(self, tokens: Tensor, positions: Tensor | None = None) -> Tensor:
        """Token embeddings with positions added, 0 to L - 1 unless given (N, L): (N, L) -> (N, L, W)."""
        places = slice(tokens.shape[1]) if positions is None else positions
        return self.token_embedding(tokens) + self.positional_embedding[places]

    def end_positions(self, tokens: Tensor) -> Tensor:
        """Where each row is pooled, (N,): at its first end-of-text token (argmax returns the first of equals)."""
        return (tokens if self.end_of_text is None else (tokens == self.end_of_text).int()).argmax(dim=1)


class CLIP(TextTransformer):
    """Contrastive language-image pre-training: an image tower and a text tower that meet in one space.

    A model from ``miniclip.load`` is in eval mode and frozen; ``requires_grad_(True)`` makes it trainable. Building
    one directly gives uninitialised parameters.
    """

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__(config.text, config.embed_dim)
        self.config = config
        self.context_length = config.text.context_length
        self.vocab_size = config.text.vocab_size
        self.visual = VisionTransformer(config.vision, config.embed_dim)
        self.logit_scale = nn.Parameter(torch.empty(()))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters and the embeddings."""
        return self.visual.conv1.weight.dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters, where images and tokens must be."""
        return self.visual.conv1.weight.device

    @property
    def text(self) -> TextTransformer:
        """The text tower alone, to compile or export. It borrows this model's parts, and is made anew each time."""
        tower = TextTransformer.__new__(TextTransformer)
        nn.Module.__init__(tower)
        tower.training = self.training
        tower.end_of_text = self.end_of_text
        for name in "transformer", "token_embedding", "positional_embedding", "ln_final", "text_projection":
            setattr(tower, name, getattr(self, name))
        return tower

    @property
    def fast(self) -> bool:
        """False multiplies with the weights where they lie, and computes every token of every block."""
        return all(layer.packed is not None for layer in self.packed_layers().values())

    @fast.setter
    def fast(self, fast: bool) -> None:
        for layer in self.packed_layers().values():
            layer.packed = Packed() if fast else None

    def repack(self) -> None:
        """Free the packed copies of the weights. Call it after writing a few numbers through ``.data`` or numpy."""
        for layer in self.packed_layers().values():
            if layer.packed is not None:
                layer.packed.clear()

    def packed_layers(self) -> dict[str, PackedLayer]:
        """The layers that can keep packed copies of their weights, by name."""
        return {name: module for name, module in self.named_modules() if isinstance(module, PackedLayer)}

    def encode_image(self, image: Tensor) -> Tensor:
        """Images (N, 3, S, S), preprocessed, in any floating dtype -> embeddings (N, D), not normalised.

        Raises:
            InputError: if the images have another shape, dtype or device.
        """
        images = self.visual.check(image)
        if images.is_cpu and not is_traced():  # a trace would keep the number of parts of its example
            parts = -(-len(images) * len(self.visual.positional_embedding) // MAX_TOKENS)
            if parts > 1 and is_untouched(self.visual):
                return torch.cat([self.visual(part) for part in images.chunk(parts)])
        return self.visual(images)

    def encode_text(self, text: Tensor) -> Tensor:
        """Token ids (N, L), L at most ``context_length`` -> embeddings (N, D), not normalised.

        Raises:
            InputError: if the ids have another shape, dtype or device, are outside the vocabulary, or a row lacks
                its end token.
        """
        if is_traced():  # a trace would keep the lengths of its example
            return super().forward(text)
        lengths = self._check_tokens(text)
        if not lengths or not is_untouched(self):
            return super().forward(text)
        if is_ordinary(text) and self._shares_prefixes():  # a CPU without modes or transforms
            trees, row_of = prefixes.trees(text, lengths)
            embeddings = torch.cat([self.encode_tree(tree) for tree in trees])
            if embeddings.isfinite().all():  # texts that share a beginning would share a NaN as well
                return embeddings[row_of]
        # Exact: under the causal mask nothing after the end token reaches the token that is pooled.
        return super().forward(text[:, : max(lengths)])

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Images (N, 3, S, S) and token ids (M, L) -> (logits_per_image (N, M), logits_per_text (M, N)).

        A logit is exp(logit_scale) times the cosine similarity of an image and a text.
        """
        image_features = self.encode_image(image)  # (N, D)
        text_features = self.encode_text(text)  # (M, D)
        image_features = image_features / image_features.norm(dim=1, keepdim=True)
        text_features = text_features / text_features.norm(dim=1, keepdim=True)
        logits_per_image = self.logit_scale.exp() * image_features @ text_features.T  # (N, M)
        return logits_per_image, logits_per_image.T

    def hidden_states(self, text: Tensor) -> list[Tensor]:
        """The text tower's embeddings, then every block's output: layers + 1 tensors (N, L, W). Never cut."""
        self._check_tokens(text)
        return self.transformer.hidden_states(self.embed_tokens(text).transpose(0, 1))

    def _shares_prefixes(self) -> bool:
        """Whether a token's embedding depends on its id and position alone, and its gradient on no count of ids."""
        own = type(self).embed_tokens is _EMBED_TOKENS and "embed_tokens" not in self.__dict__
        per_position = len(self.positional_embedding) == self.context_length
        return own and per_position and not self.token_embedding.scale_grad_by_freq

    def _check_tokens(self, tokens: Tensor) -> list[int]:
        """The length of every row, its end token included."""
        if not isinstance(tokens, Tensor):
            raise InputError(f"text must be a tensor of token ids (N, L), got {type(tokens).__name__}: use tokenize")
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.context_length:
            raise InputError(f"text must be (N, L) with L from 1 to {self.context_length}, got {tuple(tokens.shape)}")
        if tokens.dtype not in (torch.int32, torch.int64):
            raise InputError(f"token ids must be int32 or int64, got {tokens.dtype}")
        if tokens.device != self.device:
            raise InputError(f"text is on {tokens.device}, the model is on {self.device}")
        if not len(tokens):
            return []
        # Checked here because an id out of range inside a CUDA kernel takes the process along; in one transfer.
        position = self.end_positions(tokens)
        end = tokens.gather(1, position[:, None])[:, 0]
        rows = torch.stack([tokens.amin(dim=1).long(), tokens.amax(dim=1).long(), end.long(), position], dim=1).tolist()
        for row, (low, high, end_id, _) in enumerate(rows):
            if low < 0 or high >= self.vocab_size:
                bad = low if low < 0 else high
                raise InputError(f"text {row} holds the id {bad}, the vocabulary ends at {self.vocab_size - 1}")
            if self.end_of_text not in (None, end_id):
                raise InputError(f"text {row} has no end token ({self.end_of_text}) among its {tokens.shape[1]} ids")
        return [position + 1 for *_, position in rows]


_EMBED_TOKENS = TextTransformer.embed_tokens
_OWN = ResidualAttentionBlock, Transformer, VisionTransformer, TextTransformer
layers.OWN_FORWARDS |= {kind: kind.forward for kind in _OWN}


def is_untouched(tower: VisionTransformer | TextTransformer) -> bool:
    """Whether the tower is as it was built, and fast: nobody sees the shapes that its parts get."""
    causal = isinstance(tower, TextTransformer)
    if causal and TextTransformer.forward is not layers.OWN_FORWARDS[TextTransformer]:
        return False
    names = "token_embedding", "transformer", "ln_final"
    modules: list[nn.Module | None] = [tower._modules.get(name) for name in names] if causal else [tower]
    seen = blocks = 0
    while modules:
        module = modules.pop()
        if module is None:
            continue
        attributes = module.__dict__
        if not is_bare(module) or attributes.get("packed", True) is None or attributes.get("causal", causal) != causal:
            return False
        if "other_mask" in attributes:
            return False
        modules += module._modules.values()
        seen += 1
        blocks += type(module) is ResidualAttentionBlock
    # A block has nine modules. Beside its blocks an image tower has six, a text tower four. Where a function or
    # nothing has taken the place of a module, the count is too small.
    return blocks > 0 and seen == (4 if causal else 6) + 9 * blocks


def path_of(clip: CLIP) -> str:
    """How images and texts are computed: "packed by oneDNN, 98 of 98 layers" or "plain (fast is off)", for example."""
    if not clip.fast:
        return "plain (fast is off)"
    layers = clip.packed_layers()
    plain = [name for name, layer in layers.items() if not (layer.packed and layer.packed.has_copies())]
    path = f"packed by oneDNN, {len(layers) - len(plain)} of {len(layers)} layers"
    if len(plain) == len(layers):
        path = f"plain weights ({clip.device.type}, {str(clip.dtype).removeprefix('torch.')})"
    elif 0 < len(plain) <= 3:
        path += f" (not {', '.join(plain)})"
    path += "" if is_untouched(clip.visual) else "; every token of an image"
    return path + ("" if is_untouched(clip) else "; every token of a text")


def convert_weights(model: nn.Module) -> None:
    """Turn the parameters of a model to float16, in place: openai/CLIP's function, which CoOp's family calls.

    In miniclip, these are all parameters, layer norms included.
    """
    model.half()
