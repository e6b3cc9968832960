"""Attaches what makes longer videos to a ComfyUI MODEL: context windows and RIFLEx."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import comfy.context_windows
import comfy.patcher_extension
from torch import Tensor

from ..models.cogvideox.positions import PLACE_KEY, RIFLEX_KEY, Place, Riflex, intrinsic_frequency
from ..models.specs import SpecError
from .adapter import spec_of
from .windows import GLOBAL, INDEPENDENT, Windows

log = logging.getLogger("cogx")

WINDOWS_KEY = "cogx_context_windows"
HANDLER = "context_handler"  # where ComfyUI looks for it, in model_options
TIME = 2  # [B, C, T, H, W]
# Of core's context windows node, which ours replaces.
CORE_NOISE_KEY, CORE_PREPARE_KEY = "ContextWindows_sampler_sample", "ContextWindows_prepare_sampling"


class Window(comfy.context_windows.IndexListContextWindow):
    """Core takes frames from the timestep too, which has one value for each video of the batch: here it stays whole."""

    def get_tensor(self, full: Tensor, device: Any = None, dim: int | None = None,
                   retain_index_list: Any = ()) -> Tensor:
        return full if dim == 0 else super().get_tensor(full, device, dim, list(retain_index_list))


class WindowHandler(comfy.context_windows.IndexListContextHandler):
    """Core's loop over windows, with this pack's windows and weights, and with the conditions that its models have."""

    def __init__(self, windows: Windows) -> None:
        def weights(length: int, full_length: int, idxs: list[int], **_: Any) -> list[float]:
            return windows.weights_of(idxs, full_length)

        super().__init__(
            comfy.context_windows.ContextSchedule(windows.schedule, windows.at),
            # Not core's name, for which core has a way of its own that takes no window over the end.
            comfy.context_windows.ContextFuseMethod(f"{WINDOWS_KEY}_{windows.fuse}", weights),
            context_length=windows.latent_frames, context_overlap=windows.latent_overlap, dim=TIME,
            freenoise=windows.noise != INDEPENDENT,
            # A frame before each window would make it longer than what the model was trained on, and odd for 1.5.
            causal_window_fix=False)
        self.windows = windows

    def should_use_context(self, model: Any, conds: Any, x_in: Tensor, timestep: Tensor, model_options: Any) -> bool:
        return x_in.size(TIME) > self.context_length

    def get_context_windows(self, model: Any, x_in: Tensor, model_options: Any) -> list[Window]:
        total = x_in.size(TIME)
        return [Window(frames, dim=TIME, total_frames=total) for frames in self.windows.at(total, self._step)]

    def get_resized_cond(self, cond_in: list[dict[str, Any]] | None, x_in: Tensor, window: Window,
                         device: Any = None) -> list[dict[str, Any]] | None:
        """The image condition and a mask over frames go by window; text, ofs and all else have no time."""
        return None if cond_in is None else [self._of_window(cond, x_in, window) for cond in cond_in]

    def _of_window(self, cond: dict[str, Any], x_in: Tensor, window: Window) -> dict[str, Any]:
        cond = {**cond, "model_conds": dict(cond["model_conds"])}
        image, mask = cond["model_conds"].get("c_concat"), cond.get("mask")
        if image is not None:
            cond["model_conds"]["c_concat"] = image._copy_with(self._image_of_window(image.cond, window))
        if mask is not None and mask.ndim == x_in.ndim - 1 and mask.size(1) == x_in.size(TIME):  # [N, T, H, W]
            cond["mask"] = window.get_tensor(mask, dim=1)
        return cond

    def _image_of_window(self, image: Tensor, window: Window) -> Tensor:
        """[B, C, T, H, W]: the window's frames, the first token of them from the video's start if it is the anchor."""
        sliced = window.get_tensor(image)
        if self.windows.anchor:
            first = self.windows.spec.transformer.temporal_patch
            sliced[:, :, :first] = image[:, :, :first]
        return sliced

    def evaluate_context_windows(self, calc_cond_batch: Callable[..., Any], model: Any, x_in: Tensor, conds: Any,
                                 timestep: Tensor, enumerated_context_windows: list[tuple[int, Window]],
                                 model_options: dict[str, Any], **kwargs: Any) -> Any:
        if self.windows.positions == GLOBAL:
            (_, window), = enumerated_context_windows  # core gives them one by one
            model_options["transformer_options"][PLACE_KEY] = Place(tuple(window.index_list), x_in.size(TIME))
        return super().evaluate_context_windows(calc_cond_batch, model, x_in, conds, timestep,
                                                enumerated_context_windows, model_options, **kwargs)


def _for_one_run(executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """OUTER_SAMPLE wrapper, inside the one that adds padding frames. The handler keeps its step: a run has its own."""
    options = executor.class_obj.model_options
    handler = options.get(HANDLER)
    if not isinstance(handler, WindowHandler):  # another node has replaced it
        return executor(noise, *args, **kwargs)
    spec = handler.windows.spec
    frames = (noise.size(TIME) // spec.transformer.temporal_patch - 1) * spec.token_frames + 1
    if noise.size(TIME) <= handler.context_length:
        log.info("Context windows: %d frames fit into one window of %d, so there are none.", frames,
                 handler.windows.length)
    options[HANDLER] = copy.copy(handler)
    try:
        return executor(noise, *args, **kwargs)
    finally:
        options[HANDLER] = handler


def _with_shared_noise(executor: Any, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], callback: Any,
                       noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """SAMPLER_SAMPLE wrapper: inside all that know the video's own noise."""
    handler = extra_args["model_options"].get(HANDLER)
    if isinstance(handler, WindowHandler) and handler.freenoise:
        noise = noise[:, :, handler.windows.noise_of(noise.size(TIME), extra_args.get("seed") or 0)]
    return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)


def with_context_windows(model: Any, windows: Windows) -> Any:
    """A clone of MODEL that sees a video longer than a window in windows, whichever node samples it."""
    kinds = comfy.patcher_extension.WrappersMP
    model = model.clone()
    for kind, key in ((kinds.OUTER_SAMPLE, WINDOWS_KEY), (kinds.SAMPLER_SAMPLE, WINDOWS_KEY),
                      (kinds.SAMPLER_SAMPLE, CORE_NOISE_KEY), (kinds.PREPARE_SAMPLING, CORE_PREPARE_KEY)):
        model.remove_wrappers_with_key(kind, key)
    model.model_options[HANDLER] = WindowHandler(windows)
    comfy.context_windows.create_prepare_sampling_wrapper(model)  # the memory to free is that of a window
    model.add_wrapper_with_key(kinds.OUTER_SAMPLE, WINDOWS_KEY, _for_one_run)
    model.add_wrapper_with_key(kinds.SAMPLER_SAMPLE, WINDOWS_KEY, _with_shared_noise)
    return model


def with_riflex(model: Any, k: int, tuned_frames: int) -> Any:
    """A clone of MODEL with RIFLEx.

    Args:
        k: which frequency, from 1; 0 takes that of the model.
        tuned_frames: the pixel frames that the weights were fine-tuned for with RIFLEx; 0 if they were not.

    Raises:
        SpecError: a model without RoPE alone, or no such frequency.
    """
    spec = spec_of(model)
    network = spec.transformer
    if not network.use_rotary_positional_embeddings:
        raise SpecError(f"RIFLEx: expected a model with rotary positions, got CogVideoX {spec.name}, which has "
                        "sinusoidal ones: there is no frequency to lower. Use 5B or 1.5-5B, or 'CogVideoX Context "
                        "Windows'.")
    if network.use_learned_positional_embeddings:
        raise SpecError(f"RIFLEx: expected a model with rotary positions only, got CogVideoX {spec.name}, which has "
                        f"learned ones for {network.sample_frames} frames too, and none beyond. Use 1.5-5B-I2V, or "
                        f"'CogVideoX Context Windows' with length {network.sample_frames}.")
    count = network.attention_head_dim // 8
    if k > count:
        raise SpecError(f"k {k}: CogVideoX {spec.name} has {count} frequencies of time; nearest: {count}.")
    trained, tuned = ((frames - 1) // spec.token_frames + 1 for frames in (spec.max_frames, tuned_frames))
    model = model.clone()
    model.model_options["transformer_options"][RIFLEX_KEY] = Riflex(
        k or intrinsic_frequency(network, trained), tuned if tuned_frames else 0)
    return model
