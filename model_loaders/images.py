"""Images and videos to latents, with the VAE: what the image and video nodes give to the samplers."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models.cogvideox.image_condition import REFERENCE_KEY, augmented, condition_latent
from ..models.cogvideox.pixels import as_rgb, fitted
from ..models.specs import Geometry, ModelSpec, SpecError, nearest_on_grid
from .vae import require_cogvideox

log = logging.getLogger("cogx")

MAX_BATCH = 64  # videos that are sampled at once from images; more is a video connected by mistake

END_IMAGE_NOTE = ("end_image: none of the published CogVideoX models was trained with a last frame, so expect a jump "
                  "or a blur at the end. Use a model or a LoRA that was trained on first and last frames.")


@dataclass(frozen=True)
class ImageOptions:
    """How condition images become latents.

    posterior: 'mean', or 'sample' to draw from the VAE's posterior as diffusers does. noise_augmentation: add the
    training's noise to the image. seed: of both.
    """

    fit: str = "crop"
    posterior: str = "mean"
    noise_augmentation: bool = False
    seed: int = 0


def count_videos(start: Tensor | None, end: Tensor | None, batch_size: int) -> int:
    """How many videos the images ([N, H, W, C]) make, ``batch_size`` from each.

    Raises:
        SpecError: more than ``MAX_BATCH``.
    """
    name, images = max((("start_image", start), ("end_image", end)),
                       key=lambda given: 0 if given[1] is None else given[1].shape[0])
    count = 1 if images is None else images.shape[0]
    if count * batch_size > MAX_BATCH:
        raise SpecError(f"{count} images in {name} with batch_size {batch_size} make {count * batch_size} videos: "
                        f"expected at most {MAX_BATCH}. To change a video take 'CogVideoX Video to Video' "
                        "(CogXVideoToVideo); to start from one of its frames, core's 'Image From Batch' "
                        "(ImageFromBatch).")
    return count * batch_size


def encode_condition(vae: Any, geometry: Geometry, start: Tensor | None, end: Tensor | None,
                     options: ImageOptions) -> tuple[Tensor, list[str]]:
    """The condition latent [N, 16, T, h, w] of start and end images ([N, H, W, C]), and notes for the user.

    Raises:
        SpecError: another model's VAE, or as ``condition_latent``.
    """
    network, notes = require_cogvideox(vae), []
    generator = torch.Generator("cpu").manual_seed(options.seed)

    def encode(images: Tensor | None) -> Tensor | None:
        if images is None:
            return None
        rgb, note = as_rgb(images)
        notes.extend([note] if note else [])
        pixels = fitted(rgb, geometry.width, geometry.height, options.fit)
        if options.noise_augmentation:
            pixels = augmented(pixels, generator)
        return network.encode_video(pixels[:, None], generator if options.posterior == "sample" else None)

    condition = condition_latent(geometry.latent_frames, encode(start), encode(end))
    if condition.shape[0] > 1:
        notes.append(f"{condition.shape[0]} images: each becomes a video of its own")
    if end is not None:
        notes.append(END_IMAGE_NOTE)
    for note in notes:
        log.warning("Image to video: %s.", note.rstrip("."))
    return condition, notes


def with_images(conditioning: list[Any], condition: Tensor, reference: str) -> list[Any]:
    """A CONDITIONING with a condition latent, as core's own image-to-video nodes attach theirs.

    What ``reference`` makes of it is decided when a MODEL samples: only that knows its scale.
    """
    return [[text, {**options, "concat_latent_image": condition, REFERENCE_KEY: reference}]
            for text, options in conditioning]


def encode_video(vae: Any, geometry: Geometry, video: Tensor, fit: str, *specs: ModelSpec) -> tuple[Tensor, list[str]]:
    """The latent [1, 16, T, h, w] of a video's first frames ([N, H, W, C]), and notes for the user.

    ``specs`` are the models that it may be for; a message names their frame counts.

    Raises:
        SpecError: another model's VAE, or fewer frames than the geometry has.
    """
    network, count = require_cogvideox(vae), video.shape[0]
    if count < geometry.frames:
        fitting = [f"{nearest_on_grid(count, spec.frame_step, 1, minimum=1)[0]} (CogVideoX "
                   f"{'1.5' if spec.is_v1_5 else '1.0'})" for spec in specs]
        raise SpecError(f"The video has {count} frames: expected at least the length of {geometry.frames}. Set length "
                        f"to {' or '.join(fitting)}, or give a longer video.")
    rgb, note = as_rgb(video[:geometry.frames])
    notes = [note] if note else []
    if count > geometry.frames:
        notes.append(f"the first {geometry.frames} of {count} frames are used")
    for note in notes:
        log.warning("Video to video: %s.", note)
    return network.encode_video(fitted(rgb, geometry.width, geometry.height, fit)), notes
