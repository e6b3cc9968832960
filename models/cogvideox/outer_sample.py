"""What happens around every sampling run of a CogVideoX MODEL, whichever node starts it (OUTER_SAMPLE wrapper).

Checks the latent, adds the padding frames of 1.5 and drops them again, stops after the first step if it is NaN, and
gives back to the bit what a mask keeps, in one stage.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..specs import VAE_TEMPORAL_RATIO, ModelSpec, SpecError, check_latent
from ..turns import first_of_each

log = logging.getLogger("cogx")

# Seeds the padding's noise apart from the video's: XOR, because seed + 1 overflows at the maximum and repeats the
# generator of core's ancestral noise.
PADDING_SEED = 0x434F4758

MASKED_SECOND_STAGE = ("A noise mask on a latent that gets no noise, at a noise level above the last: this looks like "
                       "the second stage of a split run, and the part that the mask keeps would come back with the "
                       "first stage's noise. Sample a masked latent in one stage.")


def padding_noise(noise: Tensor, frames: int, seed: int | None) -> Tensor:
    """Noise of the padding frames: [B, C, frames, H, W]. Zeros if the run adds no noise (a second stage).

    One draw for all videos of a batch, so that each comes out as it would alone, wherever it stands in the batch.
    """
    shape = (1, noise.shape[1], frames, *noise.shape[3:])
    if not torch.count_nonzero(noise):
        return noise.new_zeros(shape).expand(noise.shape[0], *shape[1:])
    generator = torch.Generator("cpu").manual_seed((seed or 0) ^ PADDING_SEED)
    return torch.randn(shape, generator=generator).to(noise).expand(noise.shape[0], *shape[1:])


def with_padding_noise(noise: Tensor, latent_frames: int, padding: int, seed: int | None) -> Tensor:
    """The noise with that of the padding frames in front, which an inverted video brings along.

    Raises:
        SpecError: the noise is of another frame count than the latent.
    """
    if noise.shape[2] == latent_frames:
        return torch.cat([padding_noise(noise, padding, seed), noise], dim=2) if padding else noise
    if noise.shape[2] == latent_frames + padding:
        return noise
    raise SpecError(f"The noise has {noise.shape[2]} frames, the latent {latent_frames}: expected the same. The noise "
                    "was inverted with another model; connect the model that 'CogVideoX Inversion' took.")


def _is_second_stage(noise: Tensor, sigmas: Tensor, model: Any) -> bool:
    """The noise is in the latent already (DisableNoise, or KSampler (Advanced) with add_noise disable)."""
    above = len(sigmas) > 0 and float(sigmas[0]) > float(model.model_sampling.sigma_min)
    return above and not torch.count_nonzero(noise)


def repeat_first(x: Tensor, frames: int) -> Tensor:
    """[B, C, T, H, W] -> [B, C, frames + T, H, W], the first frame repeated at the front."""
    return torch.cat([x[:, :, :1].expand(-1, -1, frames, -1, -1), x], dim=2)


def _checked_callback(callback: Callable[..., Any] | None, extra: int, spec: ModelSpec,
                      dtype: torch.dtype) -> Callable[..., Any]:
    """Trims the ``extra`` frames off what previews and ``denoised_output`` see; refuses a NaN at the first step."""
    checked = False

    def trimmed(step: int, x0: Tensor, x: Tensor, total_steps: int) -> Any:
        nonlocal checked
        if not checked:
            checked = True
            if not torch.isfinite(x0).all():
                raise ValueError(_nan_message(spec, dtype))
        if callback is not None:
            return callback(step, x0[:, :, extra:], x[:, :, extra:], total_steps)
        return None

    return trimmed


def _nan_message(spec: ModelSpec, dtype: torch.dtype) -> str:
    remedy = "Load the model with weight_dtype auto (bf16, or fp32 on cards without bf16)."
    if dtype != torch.float16:
        remedy = ("The weights or the prompt hold NaN, or an attention kernel failed: check the file, remove LoRAs, "
                  "and start ComfyUI with --use-pytorch-cross-attention.")
    return (f"The first step of CogVideoX {spec.name} gave NaN or infinite values while computing in {dtype}, so the "
            f"video would be black; sampling stopped. {remedy}")


def _keep_first_prompts(guider: Any, frames: int) -> None:
    """A network that sees all ``frames`` at once knows no turns, and ComfyUI would mix the prompts of a sequence."""
    if frames > getattr(guider.model_options.get("context_handler"), "context_length", frames):
        return
    for name, entries in guider.conds.items():  # the guider's own copy, made for the run
        guider.conds[name] = kept = first_of_each(entries)
        if len(kept) < len(entries):
            log.warning("The %s prompts are a sequence, but the video is sampled in one piece: only the first counts. "
                        "Use 'CogVideoX Context Windows' with a window shorter than the video.", name)


def _frames_at_once(guider: Any, frames: int) -> int:
    """How many pixel frames the network sees at once. ComfyUI's own context windows are taken for short enough."""
    handler = guider.model_options.get("context_handler")
    return frames if handler is None else min(frames, getattr(getattr(handler, "windows", None), "length", 0))


def _is_closed_loop(guider: Any) -> bool:
    handler = guider.model_options.get("context_handler")
    return getattr(getattr(handler, "windows", None), "closed", False)


def outer_sample(executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor,
                 denoise_mask: Tensor | None = None, callback: Callable[..., Any] | None = None,
                 disable_pbar: bool = False, seed: int | None = None, latent_shapes: Any = None) -> Tensor:
    """OUTER_SAMPLE wrapper. Tensors are [B, C, T, H, W], unscaled. A closed loop of 1.5 keeps its padding frames.

    Raises:
        SpecError: another model's latent or inverted noise, or a size off the grid.
        ValueError: the first step is not finite.
    """
    model = executor.class_obj.model_patcher.model
    check_latent(tuple(latent_image.shape), model.spec)
    frames = VAE_TEMPORAL_RATIO * (latent_image.shape[2] - 1) + 1
    if _frames_at_once(executor.class_obj, frames) > model.spec.max_frames:
        log.warning("%d frames: CogVideoX %s was trained on at most %d and gets poorer beyond.", frames,
                    model.spec.name, model.spec.max_frames)
    if denoise_mask is not None and _is_second_stage(noise, sigmas, model):
        log.warning(MASKED_SECOND_STAGE)
    padding = model.spec.padding_frames(latent_image.shape[2])
    # In a closed loop the padding frames lie between the last frame and the first: without them there is a gap.
    extra = 0 if _is_closed_loop(executor.class_obj) else padding
    noise = with_padding_noise(noise, latent_image.shape[2], padding, seed)
    _keep_first_prompts(executor.class_obj, latent_image.shape[2] + padding)
    callback = _checked_callback(callback, extra, model.spec, model.get_dtype_inference())
    if padding:
        latent_image = repeat_first(latent_image, padding)
        if denoise_mask is not None:
            denoise_mask = repeat_first(denoise_mask, padding)
        latent_shapes = [latent_image.shape]
    # Positional: EasyCache's wrapper reads the sigmas as args[3].
    samples = executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed,
                       latent_shapes=latent_shapes)
    if denoise_mask is not None and len(sigmas) and float(sigmas[-1]) == 0:  # else it is to stay noisy
        samples = torch.where(denoise_mask.to(samples.device) == 0, latent_image.to(samples), samples)
    return samples[:, :, extra:]
