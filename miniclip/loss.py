"""The loss that CLIP is trained with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from miniclip.errors import InputError


def contrastive_loss(logits_per_image: Tensor) -> Tensor:
    """The symmetric cross-entropy of CLIP: figure 3 of the paper (arXiv:2103.00020).

    Args:
        logits_per_image: (N, N), a floating-point dtype: the scaled similarities of N pairs. Row i is image i, column
            j is text j, and image i belongs to text i. ``CLIP.forward`` returns this matrix for N pairs.

    Returns:
        A scalar of the same dtype: the mean of two losses. The first is the cross-entropy of finding the text of each
        image, the second the cross-entropy of finding the image of each text.

    Raises:
        InputError: if the logits are not a square floating-point matrix of at least one pair.
    """
    if not isinstance(logits_per_image, Tensor) or not logits_per_image.is_floating_point():
        kind = logits_per_image.dtype if isinstance(logits_per_image, Tensor) else type(logits_per_image).__name__
        raise InputError(f"the loss takes a tensor of floating-point logits, got {kind}")
    if logits_per_image.ndim != 2 or len(set(logits_per_image.shape)) != 1 or not len(logits_per_image):
        raise InputError(f"the loss takes (N, N) logits of N image-text pairs, got {tuple(logits_per_image.shape)}")
    target = torch.arange(len(logits_per_image), device=logits_per_image.device)  # (N,): pair i is correct for row i
    image_loss = F.cross_entropy(logits_per_image, target)
    text_loss = F.cross_entropy(logits_per_image.T, target)
    return (image_loss + text_loss) / 2
