"""Decode images to uint8 and resize them."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

import numpy as np
import numpy.typing as npt
from PIL import Image

from fedloom.errors import DataError

Pixels = npt.NDArray[np.uint8]


def decode_picture(pictures: Iterable[tuple[str, bytes | None]], n: int, image_size: int | None) -> Pixels:
    """Decode `n` images to uint8 (N, C, H, W). C is 1 if all images are greyscale, and 3 otherwise.

    Each image is passed together with its location, which error messages show. With `image_size`, images are resized (bilinear) to that
    width and height; otherwise, all must have the same size. Raise DataError if an image cannot be decoded, or if sizes differ.
    """
    out: Pixels = np.empty((0, 0, 0, 0), np.uint8)
    for i, (where, pixels) in enumerate(_decoded(pictures, image_size)):
        if i == 0:
            out = np.empty((n, *pixels.shape), np.uint8)
        if pixels.shape[1:] != out.shape[2:]:
            sizes = f"{_edges(out.shape)} and, in {where}, {_edges(pixels.shape)}"
            raise DataError(f"images differ in size ({sizes}); set one size with data.image_size=N")
        if len(pixels) > out.shape[1]:
            out = np.repeat(out, 3, axis=1)
        out[i] = pixels
    if len(out) == 0:
        raise DataError("no images to read")
    return out


def _decoded(pictures: Iterable[tuple[str, bytes | None]], image_size: int | None) -> Iterator[tuple[str, Pixels]]:
    decode_one, rest = partial(_pixels, image_size), iter(pictures)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        while chunk := list(islice(rest, 1024)):
            # Threads help only with large images: for small ones, dispatch costs more than decoding.
            is_large = sum(len(encoded or b"") for _, encoded in chunk) > 16_384 * len(chunk)
            yield from zip(
                (where for where, _ in chunk), (pool.map if is_large else map)(decode_one, chunk), strict=True
            )


def resized(image: Image.Image, image_size: int | None) -> Pixels:
    """Return one image as uint8 (C, H, W), resized to a square if `image_size` is set. Raise DataError if it cannot be decoded."""
    if image.mode.startswith("I;16") or (
        image.mode == "I" and image.format == "PNG"
    ):  # older versions of Pillow open 16-bit PNG files in mode I
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))  # Pillow would clip at 255
    if image.mode in ("I", "F"):
        raise DataError("its pixels have 32 bits; save it with 8 or 16 bits")
    image = image.convert("L" if image.mode in ("1", "L", "LA") else "RGB")
    if image_size is not None and image.size != (image_size, image_size):
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def resized_all(images: Pixels, image_size: int | None) -> Pixels:
    """Return images (N, H, W) or (N, H, W, 3) as (N, C, H, W), each resized as by `resized`."""
    if image_size is None or images.shape[1:3] == (image_size, image_size):
        return images[:, None] if images.ndim == 3 else np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    return np.stack([resized(Image.fromarray(image), image_size) for image in images])


def _pixels(image_size: int | None, picture: tuple[str, bytes | None]) -> Pixels:
    where, encoded = picture
    try:
        with Image.open(io.BytesIO(encoded or b"")) as image:
            return resized(image, image_size)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{where}: Pillow cannot read this image ({type(error).__name__})") from error


def _edges(shape: Sequence[int]) -> str:
    return f"{shape[-2]}x{shape[-1]}"
