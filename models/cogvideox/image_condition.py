"""What an image-to-video CogVideoX sees of its images: the extra input channels, frame by frame.

Both references put the first image on the first frame that is sampled, which is the padding frame where 1.5 has one,
and zeros on the others (diffusers' ``pipeline_cogvideox_image2video.py``; ``sat/sample_video.py`` of the CogVideo
repository). They differ in the scale only: ``ModelSpec.image_scale``. Pure torch. Latents are [B, C, T, h, w].
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..specs import NO_IMAGE, VAE_SPATIAL_RATIO, VAE_TEMPORAL_RATIO, ModelSpec, SpecError

REFERENCE_KEY = "cogx_reference"  # in a conditioning, beside core's concat_latent_image: one of IMAGE_REFERENCES
NODE = "'CogVideoX Image to Video' (CogXImageToVideo)"


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images with the noise that both references train with: sigma = exp(N(-3, 0.5)), one per image, on -1..1.

    [N, H, W, 3] in 0..1, and slightly beyond on return. Source: ``add_noise_to_first_frame`` in
    ``sat/diffusion_video.py``.
    """
    sigma = torch.normal(-3.0, 0.5, (images.shape[0],), generator=generator).exp()
    noise = torch.randn(images.movedim(-1, 1).shape, generator=generator).movedim(1, -1)  # bchw -> bhwc
    return images + (0.5 * sigma[:, None, None, None] * noise).to(images)  # 0..1 is half as wide as -1..1


def condition_latent(frames: int, start: Tensor | None, end: Tensor | None) -> Tensor:
    """The images' latents on the first and the last of ``frames`` latent frames, zeros between them.

    ``start``, ``end``: [N, C, 1, h, w], unscaled; one of them may be None, and one image serves a batch of the other.

    Raises:
        SpecError: no image, different numbers of images, or one frame for two images.
    """
    given = [image for image in (start, end) if image is not None]
    if not given:
        raise SpecError(NO_IMAGE)
    count = max(image.shape[0] for image in given)
    if any(image.shape[0] not in (1, count) for image in given):
        raise SpecError(f"{given[0].shape[0]} start images and {given[1].shape[0]} end images: expected the same "
                        "number of both, or one of either.")
    if end is not None and frames < 2:
        raise SpecError("end_image with a length of 1: expected a longer video, so that it has a last frame. Set "
                        "length to 9 (1.0) or 17 (1.5) or more, or remove end_image.")
    condition = given[0].new_zeros(count, given[0].shape[1], frames, *given[0].shape[3:])
    if start is not None:
        condition[:, :, :1] = start
    if end is not None:
        condition[:, :, -1:] = end
    return condition


def padded_condition(condition: Tensor, padding: int) -> Tensor:
    """``padding`` frames more, at the front: the first frame's image moves to the new first frame and leaves zeros."""
    if not padding:
        return condition
    first, rest = condition[:, :, :1], condition[:, :, 1:]
    return torch.cat([first, torch.zeros_like(first).expand(-1, -1, padding, -1, -1), rest], dim=2)


def check_image(spec: ModelSpec, given: bool, what: str) -> None:
    """Refuse an image for a model that takes none, and none for a model that needs one.

    Raises:
        SpecError: names the node, or the models, that are missing.
    """
    if given and not spec.takes_image:
        raise SpecError(f"{what} holds an image, and CogVideoX {spec.name} is a text-to-video model: expected an "
                        "image-to-video model. Load CogVideoX-5b-I2V or CogVideoX1.5-5B-I2V, or connect the prompts "
                        "directly to the sampler.")
    if spec.takes_image and not given:
        raise SpecError(f"{what} holds no image, and CogVideoX {spec.name} is an image-to-video model: put the node "
                        f"{NODE} between the prompts and the sampler, or load a text-to-video model.")


def model_condition(condition: Tensor, noise_shape: tuple[int, ...], spec: ModelSpec, reference: str) -> Tensor:
    """The condition as the network takes it: scaled, and padded like the latent that is sampled.

    Args:
        condition: [N, C, T, h, w], unscaled, as ``condition_latent`` makes it.
        noise_shape: [B, C, T, h, w], where T may include 1.5's padding frames and N divides B.

    Raises:
        SpecError: it was made for a latent of another shape.
    """
    if condition.ndim != 5 or condition.shape[1] != spec.transformer.condition_channels:
        raise SpecError(f"The image in the conditioning has the latent shape {list(condition.shape)}: CogVideoX "
                        f"{spec.name} needs [batch, {spec.transformer.condition_channels}, frames, height/8, "
                        f"width/8]. Make it with {NODE} and the CogVideoX VAE.")
    frames = condition.shape[2]
    padding = noise_shape[2] - frames
    if padding not in (0, spec.padding_frames(frames)) or tuple(condition.shape[3:]) != tuple(noise_shape[3:]):
        unpadded = noise_shape[2] - spec.padding_frames(noise_shape[2] - 1)  # legal lengths have an odd count
        raise SpecError(f"The images in the conditioning are for {_in_pixels(frames, tuple(condition.shape[3:]))}, "
                        f"the latent is for {_in_pixels(unpadded, noise_shape[3:])}: set the same width, height and "
                        f"length in {NODE} and in the node that makes the latent, or take the LATENT of that node.")
    if noise_shape[0] % condition.shape[0]:
        videos = f"{noise_shape[0]} video{'s' if noise_shape[0] > 1 else ''}"
        raise SpecError(f"{condition.shape[0]} images in the conditioning and {videos} in the latent: expected one "
                        f"image, or one for each video. Take the LATENT of {NODE}, or give this node one image "
                        "(ImageFromBatch).")
    return padded_condition(condition * spec.image_scale(reference), padding)


def _in_pixels(frames: int, size: tuple[int, ...]) -> str:
    rows, columns = size
    return (f"{columns * VAE_SPATIAL_RATIO}x{rows * VAE_SPATIAL_RATIO} and "
            f"{(frames - 1) * VAE_TEMPORAL_RATIO + 1} frames")
