"""Images and videos as the VAE takes them: three channels, the video's size. [N, H, W, C] in 0..1. Pure torch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..specs import SpecError


def as_rgb(images: Tensor) -> tuple[Tensor, str | None]:
    """Three channels, and what was done to get them, for the user; None if they were there.

    Raises:
        SpecError: not an image of 1, 3 or 4 channels.
    """
    channels = images.shape[-1]
    if channels == 3:
        return images, None
    if channels == 1:
        return images.expand(*images.shape[:-1], 3), "grey image (1 channel): used for red, green and blue alike"
    if channels == 4:
        return images[..., :3] * images[..., 3:], ("RGBA image (4 channels): what is transparent became black; put it "
                                                   "on a background of your choice before if you want another")
    raise SpecError(f"An image with {channels} channels: expected 3 (RGB), 1 (grey) or 4 (RGBA). Convert it to RGB.")


def fitted(images: Tensor, width: int, height: int, fit: str) -> Tensor:
    """Images of ``width`` x ``height``; images that have this size are returned as they are.

    fit: 'crop' cuts the overhanging edges off, equally on both sides; 'pad' adds black edges; 'stretch' distorts.
    """
    if images.shape[1:3] == (height, width):
        return images
    out = images.new_empty(images.shape[0], height, width, images.shape[3])
    for i, image in enumerate(images.split(1)):  # a video may be large
        out[i:i + 1] = _fit_one(image, width, height, fit)
    return out


def _fit_one(image: Tensor, width: int, height: int, fit: str) -> Tensor:
    rows, columns = image.shape[1:3]
    scales = height / rows, width / columns
    if fit == "crop":
        h, w = (min(n, max(1, round(m / max(scales)))) for n, m in ((rows, height), (columns, width)))
        top, left = (rows - h) // 2, (columns - w) // 2
        image = image[:, top:top + h, left:left + w]
    if fit != "pad":
        return _resized(image, height, width)
    h, w = (min(m, max(1, round(n * min(scales)))) for n, m in ((rows, height), (columns, width)))
    top, left = (height - h) // 2, (width - w) // 2
    return F.pad(_resized(image, h, w), (0, 0, left, width - w - left, top, height - h - top))


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, as Pillow and torchvision resize."""
    if image.shape[1:3] == (height, width):
        return image
    resized = F.interpolate(image.movedim(-1, 1).float(), (height, width), mode="bicubic", antialias=True)  # bhwc->bchw
    return resized.clamp(0, 1).to(image.dtype).movedim(1, -1)  # bchw -> bhwc
