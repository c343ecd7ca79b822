"""Inputs and saliency maps as pictures that a page holds itself, where an input has the shape of an image."""

import base64
import io
from typing import Any

import numpy as np
from torch import Tensor

from fastsal.files import extra

SIDE = 160  # pixels of a side, at most
PIXELATED = 64  # up to this side a picture is kept as it is, pixel by pixel
# Dark for what speaks against, light for what speaks for: read by lightness alone too.
COLORMAP = "cividis"
SATURATED = 0.97  # the share of a map's pixels that are within its colours; of photographs few pixels are large

Values = np.ndarray[Any, np.dtype[np.float64]]


def is_image(shape: tuple[int, ...]) -> bool:
    """Whether an input of this shape, [C, H, W] with C = 1 or 3, or [H, W], can be looked at."""
    return min(shape, default=0) > 0 and (len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3)))


def uri(pixels: Values) -> str:
    """A picture [H, W] or [H, W, 3] in [0, 1] as the source of an `img`: PNG where it is small, else WebP, scaled down."""
    image = extra("PIL.Image", "pillow").fromarray(np.uint8(255 * np.nan_to_num(pixels).clip(0, 1) + 0.5))
    small, file = max(image.size) <= PIXELATED, io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(file, **{"format": "PNG", "optimize": True} if small else {"format": "WEBP", "quality": 80})
    return f"data:image/{'png' if small else 'webp'};base64,{base64.b64encode(file.getvalue()).decode()}"


def of_input(x: Tensor, low: float, high: float) -> str:
    """An input as a picture, from what is black to what is white."""
    pixels = (x.double().numpy() - low) / (high - low or 1.0)
    return uri(pixels if pixels.ndim == 2 else pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def of_map(saliency: Tensor) -> str:
    """A saliency map as a picture, its channels summed: middle grey is 0, each map on a scale of its own."""
    values = saliency.double().numpy()
    values = values.sum(0) if values.ndim == 3 else values
    known = np.abs(values[np.isfinite(values)])
    limit = (float(np.quantile(known, SATURATED)) if known.size else 0.0) or 1.0
    colors = extra("matplotlib").colormaps[COLORMAP](0.5 + 0.5 * np.nan_to_num(values).clip(-limit, limit) / limit)
    return uri(colors[..., :3])
