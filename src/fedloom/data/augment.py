"""Random augmentation of batches of images with tensor operations. All random numbers come from the given stream."""

from __future__ import annotations

import math
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from fedloom.rng import Stream

AUGMENTS: Final = ("none", "flip", "crop-flip", "resized-crop-flip", "resized-crop-flip-once")


def flip(x: Tensor, stream: Stream) -> Tensor:
    """Flip each image of (B, C, H, W) horizontally with probability 1/2."""
    mirrored = (stream.uniform((len(x),)) < 0.5).to(x.device)
    return torch.where(mirrored[:, None, None, None], x.flip(3), x)


def crop(x: Tensor, stream: Stream, *, padding: int = 4, black: Tensor) -> Tensor:
    """Shift each image by up to `padding` pixels in each direction; `black` (C,) fills the border."""
    n, channels, height, width = x.shape
    padded = black.to(x).view(1, -1, 1, 1).repeat(n, 1, height + 2 * padding, width + 2 * padding)
    padded[:, :, padding : padding + height, padding : padding + width] = x
    top, left = stream.integers(2 * padding + 1, (2, n)).to(x.device)
    rows = top[:, None, None, None] + torch.arange(height, device=x.device)[:, None]
    columns = left[:, None, None, None] + torch.arange(width, device=x.device)
    picture = torch.arange(n, device=x.device)[:, None, None, None]
    return padded[picture, torch.arange(channels, device=x.device)[:, None, None], rows, columns]


def resized_crop_flip(x: Tensor, stream: Stream, *, smallest: float = 0.75) -> Tensor:
    """Crop a random window from each image, resize it to full size, and flip it horizontally with probability 1/2.

    A window covers a fraction between `smallest` and 1 of the image's area. Its aspect ratio is between 3:4 and 4:3. The area and the
    logarithm of the ratio are drawn uniformly. If a side is too long, it is clipped to the image's side, whereas torchvision would draw a
    new window. Interpolation is bilinear.
    """
    n = len(x)
    area, ratio, across, down, mirror = stream.uniform((5, n))
    area = smallest + (1 - smallest) * area
    ratio = torch.exp(math.log(4 / 3) * (2 * ratio - 1))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    windows = torch.zeros(n, 2, 3, dtype=area.dtype)
    windows[:, 0, 0] = torch.where(mirror < 0.5, -width, width)
    windows[:, 1, 1] = height
    windows[:, 0, 2] = (1 - width) * (2 * across - 1)
    windows[:, 1, 2] = (1 - height) * (2 * down - 1)
    grid = F.affine_grid(windows.to(x), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def once(images: Tensor, stream: Stream) -> Tensor:
    """Apply `resized_crop_flip` to a whole pool (N, C, H, W) of uint8 or float images. The result has the same dtype as the images."""
    out = torch.empty_like(images)
    for start in range(0, len(images), 256):
        changed = resized_crop_flip(images[start : start + 256].to(torch.get_default_dtype()), stream)
        out[start : start + 256] = changed if images.is_floating_point() else changed.round().clamp(0, 255)
    return out
