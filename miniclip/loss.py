"""The loss CLIP is trained with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.errors import InputError


def contrastive_loss(logits_per_image: Tensor) -> Tensor:
    """The symmetric cross-entropy of figure 3 of the paper (arXiv:2103.00020).

    Args:
        logits_per_image: (N, N) scaled similarities in which image i belongs to text i, as ``CLIP.forward`` returns
            them for N pairs.

    Returns:
        A scalar: the mean of the loss of finding each image's text and the loss of finding each text's image.

    Raises:
        InputError: if the logits are not a square floating-point matrix of at least one pair.
    """
    if not isinstance(logits_per_image, Tensor) or not logits_per_image.is_floating_point():
        kind = logits_per_image.dtype if isinstance(logits_per_image, Tensor) else type(logits_per_image).__name__
        raise InputError(f"the loss takes a tensor of floating-point logits, got {kind}")
    if logits_per_image.ndim != 2 or len(set(logits_per_image.shape)) != 1 or not len(logits_per_image):
        raise InputError(f"the loss takes (N, N) logits of N image-text pairs, got {tuple(logits_per_image.shape)}")
    target = torch.arange(len(logits_per_image), device=logits_per_image.device)
    image_loss = F.cross_entropy(logits_per_image, target)
    text_loss = F.cross_entropy(logits_per_image.T, target)
    return (image_loss + text_loss) / 2
