"""Augmentation of a whole batch at once, on the device: RGBA drawings -> RGB images."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

import miniclip


def on_white(rgba: Tensor) -> Tensor:
    """(N, 4, S, S) uint8 on a white ground -> (N, 3, S, S) RGB from 0 to 1."""
    rgba = rgba.float() / 255
    return rgba[:, :3] * rgba[:, 3:] + (1 - rgba[:, 3:])


def normalise(rgb: Tensor, preprocess: miniclip.Preprocess) -> Tensor:
    """(N, 3, S, S) RGB from 0 to 1 -> what the model's own preprocessing would give."""
    mean, std = (rgb.new_tensor(values).view(3, 1, 1) for values in (preprocess.mean, preprocess.std))
    return (rgb - mean) / std


def disguise(rgba: Tensor, generator: torch.Generator, outlines: float = 0.2) -> Tensor:
    """Draw the images anew, with other colours, places, sizes and grounds, some as outlines.

    Never mirrored: arrows, hands and letters would change their meaning.

    Args:
        rgba: drawings (N, 4, S, S) uint8.
        generator: the source of all randomness, on the device of ``rgba``.
        outlines: the share of the drawings that become outlines.

    Returns:
        RGB from 0 to 1, (N, 3, S, S).
    """
    draws = _Draws(len(rgba), generator)
    rgba = rgba.float() / 255
    alpha = rgba[:, 3:]
    # Premultiplied by the opacity, so that filtering does not mix in the colours of transparent pixels.
    rgba = torch.cat([rgba[:, :3] * alpha, alpha], dim=1)
    rgba = _outline(rgba, draws, outlines)
    rgba = _move(rgba, draws)
    rgb, alpha = rgba[:, :3], rgba[:, 3:]
    rgb = _recolour(rgb, alpha, draws)
    return rgb + _ground(rgb, alpha, draws) * (1 - alpha)


class _Draws:
    """Random numbers, one or several for each of ``n`` images."""

    def __init__(self, n: int, generator: torch.Generator) -> None:
        self.n, self.generator = n, generator

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """(n, *shape)."""
        empty = torch.empty(self.n, *shape, device=self.generator.device)
        return empty.uniform_(low, high, generator=self.generator)

    def chance(self, probability: float) -> Tensor:
        """True with the given probability, (n, 1, 1, 1)."""
        return self.uniform(0, 1, 1, 1, 1) < probability


def _outline(rgba: Tensor, draws: _Draws, share: float) -> Tensor:
    """Turn a share of the drawings into outlines: dark where colour or opacity changes, transparent or white inside."""
    chosen = (draws.uniform(0, 1) < share).nonzero()[:, 0]
    drawing, cover = rgba[chosen], rgba[chosen, 3:]
    change = (F.max_pool2d(drawing, 3, 1, 1) + F.max_pool2d(-drawing, 3, 1, 1)).amax(dim=1, keepdim=True)
    line = ((change - draws.uniform(0.05, 0.3, 1, 1, 1)[chosen]) * draws.uniform(1.5, 4, 1, 1, 1)[chosen]).clamp(0, 1)
    fill = torch.where(draws.chance(0.5)[chosen], cover, 0) * (1 - line)
    ink = line * draws.uniform(0, 0.3, 1, 1, 1)[chosen]
    rgba[chosen] = torch.cat([(ink + fill).expand(-1, 3, -1, -1), line + fill], dim=1)
    return rgba


def _move(rgba: Tensor, draws: _Draws) -> Tensor:
    """Shift, scale, stretch and slightly turn each drawing."""
    angle, stretch = draws.uniform(-0.12, 0.12), draws.uniform(-0.1, 0.1)
    # Of the sampled window: above 1 shrinks the drawing. One in ten may become as small as half.
    largest = torch.where(draws.chance(0.1).flatten(), 2.0, 1.2)
    scale = torch.exp(draws.uniform(0, 1) * (largest / 0.9).log() + math.log(0.9))
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    slack = 0.06 + (scale - 1).clamp(min=0)  # the largest shift: a smaller drawing may move further
    x = [cos * (1 + stretch), -sin, draws.uniform(-1, 1) * slack]
    y = [sin, cos * (1 - stretch), draws.uniform(-1, 1) * slack]
    theta = torch.stack(x + y, dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(rgba.shape), align_corners=False)
    return F.grid_sample(rgba, grid, align_corners=False)


def _recolour(rgb: Tensor, alpha: Tensor, draws: _Draws) -> Tensor:
    """Change saturation, contrast and brightness. All are linear, so premultiplied colours stay right."""
    grey = rgb.mean(dim=1, keepdim=True)
    rgb = grey + (rgb - grey) * torch.where(draws.chance(0.1), 0, draws.uniform(0.7, 1.3, 1, 1, 1))
    rgb = torch.where(draws.chance(0.04), _two_colours(grey, alpha, draws), rgb)
    rgb = rgb * draws.uniform(0.85, 1.15, 3, 1, 1) + alpha * draws.uniform(-0.1, 0.1, 1, 1, 1)
    return torch.minimum(rgb.clamp(min=0), alpha)


def _two_colours(grey: Tensor, alpha: Tensor, draws: _Draws) -> Tensor:
    """Drawings between two random colours, a dark one for black and a light one for white."""
    dark, light = draws.uniform(0, 0.4, 3, 1, 1), draws.uniform(0.6, 1, 3, 1, 1)
    return dark * (alpha - grey) + light * grey


def _ground(rgb: Tensor, alpha: Tensor, draws: _Draws) -> Tensor:
    """A ground for each drawing: white, one colour, or a soft gradient between four; never too close to its ink."""
    corners = draws.uniform(0, 1, 3, 2, 2)
    corners = torch.where(draws.chance(0.5), corners[..., :1, :1].expand(-1, -1, 2, 2), corners)
    ground = F.interpolate(corners, size=rgb.shape[-1], mode="bilinear", align_corners=True)
    ink = rgb.sum(dim=(1, 2, 3)) / (3 * alpha.sum(dim=(1, 2, 3)) + 1e-3)  # the mean brightness of the drawing, (N,)
    clash = (ink - ground.mean(dim=(1, 2, 3))).abs() < 0.25
    opposite = torch.where(ink < 0.5, 0.9, 0.1)[:, None, None, None] * 0.7 + ground * 0.3
    ground = torch.where(clash[:, None, None, None], opposite, ground)
    return torch.where(draws.chance(0.7) & (ink < 0.9)[:, None, None, None], 1.0, ground)
