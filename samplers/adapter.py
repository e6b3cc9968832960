"""Attaches the sampling mathematics of this folder to a ComfyUI MODEL (``long_video.py``: windows and RIFLEx)."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.patcher_extension
import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from torch import Tensor

from ..models.cogvideox.apply_model import LADDER_KEY, VIDEO_KEY
from ..models.specs import ModelSpec, SpecError
from .guidance import dynamic_guidance
from .inversion import InverseRun, Trajectory, attend_to_reference, check_same_shape, problem_of_windows
from .reference import SCHEDULERS, ReferenceRun
from .schedules import parse_timesteps, steps_after_strength, trailing_timesteps

TRAILING = "trailing"
GB = 1e9
log = logging.getLogger("cogx")

# At zero terminal SNR these would spend most steps above t = 967, where all is noise: they are computed from t = 980
# and sigma_max is put in front.
STRETCHED = frozenset({"karras", "exponential"})
REPAIR_TIMESTEP = 980
# Mochi's schedule is a fraction of noise, 1 to 0; core multiplies it with sigma_max, which is right for flow models.
NOISE_FRACTION = "linear_quadratic"

GUIDANCE_KEY = "cogx_dynamic_guidance"
INVERSION_KEY = "cogx_inversion"
# Core's step caches guess from falling noise levels, and fail on the rising ones of an inversion.
STEP_CACHES = ("easycache", "lazycache")


def sampler_names() -> list[str]:
    """The exact samplers, then every one of ComfyUI's KSampler."""
    return [*SCHEDULERS, *comfy.samplers.KSampler.SAMPLERS]


def schedule_names() -> list[str]:
    """The reference's schedule, then every one of ComfyUI's KSampler."""
    return [TRAILING, *comfy.samplers.KSampler.SCHEDULERS]


def spec_of(model: Any) -> ModelSpec:
    """The spec of a MODEL.

    Raises:
        SpecError: the model is not one of this pack's.
    """
    inner = getattr(model, "model", model)
    spec = getattr(inner, "spec", None)
    if not isinstance(spec, ModelSpec):
        raise SpecError(f"Expected a CogVideoX MODEL, got {type(inner).__name__}. Load it with "
                        "'CogVideoX Load Pipeline' or 'CogVideoX Load Model'.")
    return spec


class ReferenceSampler(comfy.samplers.Sampler):
    """``cogvideox_ddim`` and ``cogvideox_dpm`` as a SAMPLER.

    Works on variance-preserving x as the reference does. The model is called through ComfyUI in its own scaling
    x * sqrt(sigma^2 + 1), masks and guidance included, and v is recovered from the denoised output.
    """

    def __init__(self, name: str, steps: int | None = None) -> None:
        self.name = name
        self.steps = steps  # of the whole schedule, where the node knows it: a short tail does not tell

    def sample(self, model_wrap: Any, sigmas: Tensor, extra_args: dict[str, Any], callback: Callable[..., Any] | None,
               noise: Tensor, latent_image: Tensor | None = None, denoise_mask: Tensor | None = None,
               disable_pbar: bool = False) -> Tensor:
        if latent_image is None:
            latent_image = torch.zeros_like(noise)
        if len(sigmas) == 0:
            return latent_image
        model = model_wrap.inner_model
        sampling, spec = model.model_sampling, getattr(model, "spec", None)
        if spec is None:
            raise SpecError(f"The sampler {self.name} needs a CogVideoX MODEL, got {type(model).__name__}. "
                            "Choose one of ComfyUI's samplers.")
        timesteps, end = _timesteps_of(sampling, sigmas)
        if not timesteps:  # both ends round to one timestep: nothing to do but to add its noise
            return sampling.noise_scaling(sigmas[-1], noise, latent_image)
        run = ReferenceRun(self.name, spec.schedule, timesteps, end, self.steps)
        denoiser = comfy.samplers.KSamplerX0Inpaint(model_wrap, sigmas)
        denoiser.noise, denoiser.latent_image = noise, latent_image
        generator = torch.Generator("cpu").manual_seed(extra_args.get("seed") or 0)
        x = run.noised(latent_image, noise)
        for i, timestep in enumerate(timesteps):
            sigma = sampling.sigmas[timestep].to(x)
            denoised = denoiser(x * (sigma**2 + 1).sqrt(), sigma.expand(x.shape[0]), denoise_mask, **extra_args)
            v = _velocity(denoised, x, sigma)
            after = run.step(i, v.transpose(1, 2), x.transpose(1, 2), generator)  # bcthw -> btchw
            x, x0 = (t.transpose(1, 2) for t in after)  # btchw -> bcthw
            if callback is not None:
                callback(i, x0, x, len(timesteps))
        if end is not None:
            sigma = sampling.sigmas[end].to(x)
            x = x * (sigma**2 + 1).sqrt()
        return x.contiguous()


def _velocity(denoised: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The v that the network gave for a variance-preserving x, from what ComfyUI made of it."""
    return x / sigma - denoised * ((sigma**2 + 1).sqrt() / sigma)


def _timesteps_of(sampling: Any, sigmas: Tensor) -> tuple[list[int], int | None]:
    """SIGMAS as falling timesteps, and the one at which they end; None if they end at 0.

    Raises:
        SpecError: they rise somewhere.
    """
    if bool((sigmas[1:] > sigmas[:-1]).any()):
        raise SpecError("SIGMAS rise: the samplers of the reference go from noise to video only. Expected falling "
                        "SIGMAS; use FlipSigmas' input, or one of ComfyUI's samplers.")
    values = [int(t) for t in sampling.timestep(sigmas[sigmas > 0])]
    end = None if float(sigmas[-1]) == 0.0 else values[-1]
    # Schedules off the table can name a timestep twice.
    return sorted(set(values) - {end}, reverse=True), end


def sampler_object(name: str, steps: int | None = None) -> comfy.samplers.Sampler:
    if name in SCHEDULERS:
        return ReferenceSampler(name, steps)
    return comfy.samplers.sampler_object(name)


def _full_sigmas(sampling: Any, schedule: str, steps: int) -> Tensor:
    if schedule == TRAILING or steps == 1:  # one step starts at full noise; kl_optimal is 0/0 and ddim_uniform at t = 1
        return sigmas_at(sampling, trailing_timesteps(steps, len(sampling.sigmas)))
    if schedule == NOISE_FRACTION:
        fraction = comfy.samplers.calculate_sigmas(SimpleNamespace(sigma_max=torch.ones(())), schedule, steps)
        return torch.cat([sampling.sigma_max.reshape(1).cpu().float(), fraction[1:] / (1 - fraction[1:])])
    if schedule in STRETCHED and steps > 1:
        start = SimpleNamespace(sigma_min=sampling.sigma_min, sigma_max=sampling.sigmas[REPAIR_TIMESTEP])
        rest = comfy.samplers.calculate_sigmas(start, schedule, steps - 1)
        return torch.cat([sampling.sigma_max.reshape(1).cpu().float(), rest])
    return comfy.samplers.calculate_sigmas(sampling, schedule, steps)


def sigmas_at(sampling: Any, timesteps: list[int]) -> Tensor:
    """SIGMAS of a list of timesteps, ending at 0: [N + 1], fp32."""
    return torch.cat([sampling.sigmas[timesteps].cpu().float(), torch.zeros(1)])


def make_sigmas(model: Any, steps: int, schedule: str, denoise: float = 1.0, timesteps: str = "") -> Tensor:
    """SIGMAS of a run: [steps + 1], fp32, ending at 0.

    ``denoise`` is the reference's strength: the last int(steps * denoise) of ``steps`` steps. Explicit ``timesteps``
    replace ``steps`` and ``schedule``.
    """
    sampling = model.get_model_object("model_sampling")
    explicit = parse_timesteps(timesteps)
    return _last_steps(sigmas_at(sampling, explicit) if explicit else _full_sigmas(sampling, schedule, steps), denoise)


def make_sampler_sigmas(model: Any, sampler: str, steps: int, schedule: str, denoise: float) -> Tensor:
    """As ``make_sigmas``, without the last-but-one sigma for the samplers that core runs so."""
    if sampler not in comfy.samplers.KSampler.DISCARD_PENULTIMATE_SIGMA_SAMPLERS:
        return make_sigmas(model, steps, schedule, denoise)
    sigmas = _full_sigmas(model.get_model_object("model_sampling"), schedule, steps + 1)
    return _last_steps(torch.cat([sigmas[:-2], sigmas[-1:]]), denoise)


def _last_steps(sigmas: Tensor, denoise: float) -> Tensor:
    total = len(sigmas) - 1
    kept = steps_after_strength(total, denoise)
    return sigmas[total - kept:] if kept else sigmas[:0]


def with_dynamic_guidance(model: Any, steps: int) -> Any:
    """A clone of MODEL whose guidance scale follows ``dynamic_guidance`` under any guider with one scale."""
    spec_of(model)
    model = model.clone()

    def predict_noise(executor: Any, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        guider = executor.class_obj
        scale = guider.cfg
        if scale <= 1 or not guider.conds.get("negative"):  # no guidance, nothing to vary: as the reference
            return executor(x, timestep, *args, **kwargs)
        t = float(guider.inner_model.model_sampling.timestep(timestep.flatten()[:1]))
        guider.cfg = dynamic_guidance(scale, t, steps)
        try:
            return executor(x, timestep, *args, **kwargs)
        finally:
            guider.cfg = scale

    model.remove_wrappers_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, GUIDANCE_KEY)
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, GUIDANCE_KEY, predict_noise)
    return model


def sample(model: Any, positive: Any, negative: Any, latent: dict[str, Any], seed: int, cfg: float,
           sampler: comfy.samplers.Sampler, sigmas: Tensor, callback: Any = None) -> dict[str, Any]:
    """Run a sampler on a LATENT and return the sampled LATENT, with ComfyUI's noise for the seed and its previews."""
    import latent_preview

    samples = comfy.sample.fix_empty_latent_channels(
        model, latent["samples"], latent.get("downscale_ratio_spacial"), latent.get("downscale_ratio_temporal"))
    noise = comfy.sample.prepare_noise(samples, seed, latent.get("batch_index"))
    callback = callback or latent_preview.prepare_callback(model, max(len(sigmas) - 1, 0))
    samples = comfy.sample.sample_custom(
        model, noise, cfg, sampler, sigmas, positive, negative, samples,
        noise_mask=latent.get("noise_mask"), callback=callback, disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed)
    kept = {key: value for key, value in latent.items() if not key.startswith("downscale_ratio")}
    return {**kept, "samples": samples}


class InversionSampler(comfy.samplers.Sampler):
    """Goes from the latent up to noise, for one run, and keeps the way in ``videos``."""

    def __init__(self, run: InverseRun) -> None:
        self.run = run
        self.videos: list[Tensor] = []

    def sample(self, model_wrap: Any, sigmas: Tensor, extra_args: dict[str, Any], callback: Callable[..., Any] | None,
               noise: Tensor, latent_image: Tensor | None = None, denoise_mask: Tensor | None = None,
               disable_pbar: bool = False) -> Tensor:
        x, timesteps = latent_image, self.run.timesteps
        self.videos = [_kept(x)]
        for i, timestep in enumerate(timesteps):
            sigma = model_wrap.inner_model.model_sampling.sigmas[timestep].to(x)
            denoised = model_wrap(x * (sigma**2 + 1).sqrt(), sigma.expand(x.shape[0]), **extra_args)
            x, x0 = self.run.step(i, _velocity(denoised, x, sigma), x)
            self.videos.append(_kept(x))
            if callback is not None:
                callback(i, x0, x, len(timesteps))
        return x


def _check_ram(values: int, steps: int) -> None:
    """Refuse to keep more videos of so many values than RAM has room for: the clean one and that of each step.

    Raises:
        SpecError: they do not fit into the free RAM.
    """
    needed = (steps + 1) * values * torch.float32.itemsize
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    if needed > free:
        raise SpecError(f"{steps} inversion steps: expected at most {free / GB:.1f} GB, the free RAM, to keep the "
                        f"video of each step; got {needed / GB:.1f}. Use fewer steps, or a smaller or shorter video.")
    if needed > GB:
        log.info("CogVideoX Inversion: keeps %.1f GB in RAM, %.1f GB are free.", needed / GB, free / GB)


def _kept(x: Tensor) -> Tensor:
    """A copy for after the run: in RAM, and no inference tensor, which training could not use."""
    with torch.inference_mode(False):
        return x.to(device="cpu", dtype=torch.float32, copy=True)


def invert(model: Any, positive: Any, latent: dict[str, Any], steps: int) -> Trajectory:
    """The way of a LATENT's video to the noise that the trailing DDIM of ``steps`` makes it from, without guidance.

    Raises:
        SpecError: another model, an empty latent, or more steps than RAM can keep.
    """
    import latent_preview

    spec = spec_of(model)
    samples = latent["samples"]
    if not torch.count_nonzero(samples):
        raise SpecError("latent_image is empty (all zeros): expected an encoded video, which inversion turns into "
                        "noise. Connect 'CogVideoX Video to Video' or 'VAE Encode'.")
    samples = comfy.sample.fix_empty_latent_channels(model, samples)
    frames = samples.shape[2]
    padding = spec.padding_frames(frames)
    _check_ram(samples.numel() // frames * (frames + padding), steps)
    sampler = InversionSampler(InverseRun(spec.schedule, steps))
    guider = comfy.samplers.CFGGuider(_clone_without(model, INVERSION_KEY, *STEP_CACHES))
    guider.inner_set_conds({"positive": positive})
    guider.set_cfg(1.0)  # with guidance the way back would not be the way up
    sigmas = sigmas_at(model.get_model_object("model_sampling"), sampler.run.timesteps[::-1]).flip(0)
    guider.sample(torch.zeros_like(samples), samples, sampler, sigmas,
                  callback=latent_preview.prepare_callback(model, steps),
                  disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=0)
    return sampler.run.trajectory(sampler.videos, padding)


def _clone_without(model: Any, *keys: str) -> Any:
    """A clone of MODEL without the wrappers of these keys."""
    model = model.clone()
    for kind in tuple(model.wrappers):
        for key in keys:
            model.remove_wrappers_with_key(kind, key)
    return model


def with_reference_video(model: Any, trajectory: Trajectory, features: bool) -> Any:
    """A clone of MODEL that knows an inverted video.

    Its noise is right for every timestep that a run begins at, ``denoise`` below 1 included. With ``features`` each
    attention also sees the keys and values of the inverted video at the noise level of the step; the batch that
    the network sees is then twice as large, and so is the memory that is asked for.
    """
    kinds = comfy.patcher_extension.WrappersMP
    model = _clone_without(model, INVERSION_KEY)  # of an earlier inversion
    model.add_wrapper_with_key(kinds.OUTER_SAMPLE, INVERSION_KEY, partial(_begin_on, trajectory, features))
    if features:
        model.add_wrapper_with_key(kinds.DIFFUSION_MODEL, INVERSION_KEY, partial(_forward_beside, trajectory))
        model.add_wrapper_with_key(kinds.PREPARE_SAMPLING, INVERSION_KEY, _prepare_for_twice)
        model.add_wrapper_with_key(kinds.CALC_COND_BATCH, INVERSION_KEY, _plan_for_twice)
    return model


def _begin_on(trajectory: Trajectory, features: bool, executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any,
              sigmas: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """OUTER_SAMPLE wrapper, inside the one that adds padding frames. Other noise than the inverted one is left alone.

    Raises:
        SpecError: ``features`` of a video of another shape, or windows that would not take the noise as it is.
    """
    if features:
        frames = latent_image.shape[2] - trajectory.padding
        check_same_shape((*latent_image.shape[:2], frames, *latent_image.shape[3:]), trajectory.visible_shape)
        executor.class_obj.model_options["transformer_options"][LADDER_KEY].copies = 2
    if torch.equal(noise.cpu(), trajectory.noise):
        problem = problem_of_windows(executor.class_obj.model_options.get("context_handler"))
        if problem:
            raise SpecError(problem)
        sampling = executor.class_obj.model_patcher.get_model_object("model_sampling")
        noise = trajectory.noise_at(int(sampling.timestep(sigmas[0])))
    return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)


def _forward_beside(trajectory: Trajectory, executor: Any, x: Tensor, timestep: Tensor, context: Tensor,
                    ofs: Tensor | None, control: Any, options: dict[str, Any], **kwargs: Any) -> Tensor:
    """DIFFUSION_MODEL wrapper: each video of the batch, and beside it the inverted one at this timestep.

    Raises:
        SpecError: the network is given a part of the video.
    """
    reference = trajectory.at(round(float(timestep[0]))).to(x)
    frames = getattr(options.get("context_window"), "index_list", ())  # a closed loop in one window: a rolled video
    reference = reference[:, :, frames] if len(frames) == reference.shape[2] else reference
    if VIDEO_KEY in options:  # memory is short, and the videos of the batch run one by one
        reference = reference[options[VIDEO_KEY]:][:1]
    if x.shape[2:] != reference.shape[2:]:
        raise SpecError(f"features: expected the whole video {list(reference.shape[2:])} (frames, rows, columns) at "
                        f"once, got a part of it, {list(x.shape[2:])}. Remove context windows and areas, or turn "
                        "features off.")
    reference = reference.repeat(x.shape[0] // reference.shape[0], 1, 1, 1, 1)
    reference = torch.cat([reference, x[:, reference.shape[1]:]], dim=1)  # with the condition of an image model
    attention = options.get("optimized_attention_override")
    options = {
        **options,
        # Patches find their half of the batch by these; caches must not take the reference for the video.
        "cond_or_uncond": options.get("cond_or_uncond", []) * 2,
        "uuids": [*options.get("uuids", ()), *(uuid.uuid5(name, INVERSION_KEY) for name in options.get("uuids", ()))],
        "optimized_attention_override": partial(_attention_beside, attention),
    }
    if ofs is not None:
        ofs = ofs.expand(x.shape[0]).repeat(2)
    out = executor(torch.cat([x, reference]), timestep.repeat(2), context.repeat(2, 1, 1), ofs, control, options,
                   **kwargs)
    return out[:x.shape[0]]


def _attention_beside(override: Callable[..., Tensor] | None, attention: Callable[..., Tensor], *args: Any,
                      **kwargs: Any) -> Tensor:
    """ComfyUI's attention override, around one that a node has set."""
    return attend_to_reference(partial(override, attention) if override else attention, *args, **kwargs)


def _prepare_for_twice(executor: Any, model: Any, noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
    """PREPARE_SAMPLING wrapper: the memory to free before a run is that of twice the videos."""
    return executor(model, [2 * noise_shape[0], *noise_shape[1:]], *args, **kwargs)


class _TwiceTheVideos:
    """A model whose estimate of memory counts each video twice."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def memory_required(self, input_shape: Any, **kwargs: Any) -> float:
        return self._model.memory_required([2 * input_shape[0], *input_shape[1:]], **kwargs)


def _plan_for_twice(executor: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """CALC_COND_BATCH wrapper: which conditions fit into one batch."""
    return executor(_TwiceTheVideos(model), *args, **kwargs)
