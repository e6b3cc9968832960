"""Attaches what makes longer videos to a ComfyUI MODEL: context windows and RIFLEx."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.context_windows
import comfy.patcher_extension
import torch
from torch import Tensor

from ..models.cogvideox.image_condition import REFERENCE_KEY
from ..models.cogvideox.positions import PLACE_KEY, RIFLEX_KEY, Place, Riflex, intrinsic_frequency
from ..models.specs import SpecError
from ..models.turns import TURN, sequences
from .adapter import spec_of
from .windows import COARSE, GLOBAL, INDEPENDENT, Windows, runs_within

log = logging.getLogger("cogx")

WINDOWS_KEY = "cogx_context_windows"
HANDLER = "context_handler"  # where ComfyUI looks for it, in model_options
EASYCACHE = "easycache"  # in transformer_options
TIME = 2  # [B, C, T, H, W]
FULL_NOISE = 990  # from this timestep up nothing is left of a video
# How much of a later window's anchor is what the window before made; the rest is the start image. With all of it the
# look wears off from window to window, with half of it the object shows where the image has it, too.
CARRIED = 0.75
OVERVIEW = -1  # the window that lays a video out, beside the numbers of the others
CORE_PREPARE_KEY = "ContextWindows_prepare_sampling"  # of core's context windows node, which ours replaces


class Window(comfy.context_windows.IndexListContextWindow):
    """Core's, with two differences. Core takes frames from the timestep too, which has one value for each video of the
    batch: here it stays whole. And core picks frames one by one, which for frames side by side is half of what windows
    cost beside their forwards."""

    def get_tensor(self, full: Tensor, device: Any = None, dim: int | None = None,
                   retain_index_list: Any = ()) -> Tensor:
        if dim == 0:
            return full
        part = self._side_by_side(full, dim)
        if part is None or retain_index_list:
            return super().get_tensor(full, device, dim, list(retain_index_list))
        return part.clone().to(device)  # a copy, as with core: the image of a window is written over

    def add_window(self, full: Tensor, to_add: Tensor, dim: int | None = None) -> Tensor:
        part = self._side_by_side(full, dim)
        if part is None:
            return super().add_window(full, to_add, dim)
        part += to_add
        return full

    def _side_by_side(self, full: Tensor, dim: int | None) -> Tensor | None:
        """The window's part of ``full``; None over the end of a closed loop and for frames from here and there. A
        window's frames rise, or go over the end once."""
        first, count = self.index_list[0], len(self.index_list)
        if self.index_list[-1] != first + count - 1:
            return None
        return full.narrow(self.dim if dim is None else dim, first, count)


def _cross_faded(one: dict[str, Any], other: dict[str, Any], share: float) -> dict[str, Any]:
    """A prompt's condition on its way to the next: the embedding in between, all else of the nearer one."""
    nearer = other if share >= 0.5 else one
    if share in (0, 1):
        return nearer
    texts = [cond["model_conds"]["c_crossattn"] for cond in (one, other)]
    text = texts[0]._copy_with(torch.lerp(texts[0].cond, texts[1].cond, share))
    return {**nearer, "model_conds": {**nearer["model_conds"], "c_crossattn": text}}


def _areas_of_window(cond: dict[str, Any], window: Window) -> list[dict[str, Any]]:
    """A condition for a part of the time, as it lies in a window. ComfyUI's area is sizes, then starts; with time six
    numbers."""
    area = cond.get("area")
    if area is None or len(area) < 6:
        return [cond]
    frames, rows, columns, first, *corner = area
    return [{**cond, "area": (count, rows, columns, start, *corner)}
            for start, count in runs_within(window.index_list, first, frames)]


def _has_sequence(conds: list[dict[str, Any]] | None) -> bool:
    """Whether there is more than one prompt in turn."""
    return any(len(places) > 1 for places in sequences([cond.get(TURN) for cond in conds or []]))


class WindowHandler(comfy.context_windows.IndexListContextHandler):
    """Core's loop over windows, with this pack's windows and weights, and with the conditions that its models have."""

    def __init__(self, windows: Windows, may_lay_out: bool = True) -> None:
        super().__init__(
            # Core asks neither of the two functions: what would is replaced below.
            comfy.context_windows.ContextSchedule(windows.schedule, windows.at),
            # Not core's name, for which core has a way of its own that takes no window over the end.
            comfy.context_windows.ContextFuseMethod(f"{WINDOWS_KEY}_{windows.fuse}", windows.weights_of),
            context_length=windows.latent_frames, context_overlap=windows.latent_overlap, dim=TIME,
            closed_loop=windows.closed, freenoise=windows.noise != INDEPENDENT,
            # A frame before each window would make it longer than what the model was trained on, and odd for 1.5.
            causal_window_fix=False)
        self.windows = windows
        self._may_lay_out = may_lay_out
        self._caches: dict[int, Any] = {}
        self._carries = False
        # Of the run, worked out once: each window's weights; the two places around each frame, first all of the ones
        # before it, and the shares.
        self._weights: dict[tuple[int, ...], Tensor] = {}
        self._around: tuple[Tensor, Tensor] | None = None
        self._before: tuple[list[int], Tensor] | None = None  # this step's last window: frames, and what it made

    def should_use_context(self, model: Any, conds: Any, x_in: Tensor, timestep: Tensor, model_options: Any) -> bool:
        return self.windows.apply_to(x_in.size(TIME))

    def set_step(self, timestep: Tensor, model_options: dict[str, Any]) -> None:
        if self.windows.moves:
            super().set_step(timestep, model_options)

    def get_context_windows(self, model: Any, x_in: Tensor, model_options: Any) -> list[Window]:
        total = x_in.size(TIME)
        return [Window(frames, dim=TIME, total_frames=total) for frames in self.windows.at(total, self._step)]

    def execute(self, calc_cond_batch: Callable[..., Any], model: Any, conds: Any, x_in: Tensor, timestep: Tensor,
                model_options: dict[str, Any]) -> list[Tensor]:
        """Core's loop, but for the steps that lay the video out."""
        self._before = None
        coarse = self.windows.schedule == COARSE and self._may_lay_out
        if coarse and self.windows.lays_out(x_in.size(TIME), float(model.model_sampling.timestep(timestep[:1]))):
            return self._lay_out(calc_cond_batch, model, conds, x_in, timestep, model_options)
        self._carries = coarse
        return super().execute(calc_cond_batch, model, conds, x_in, timestep, model_options)

    def _lay_out(self, calc_cond_batch: Callable[..., Any], model: Any, conds: Any, x_in: Tensor, timestep: Tensor,
                 model_options: dict[str, Any]) -> list[Tensor]:
        """One window over the whole video; frames that are not in it come from those around them."""
        total = x_in.size(TIME)
        window = Window(self.windows.overview(total), dim=TIME, total_frames=total)
        options = model_options["transformer_options"]
        options["context_window"] = window
        parts = [self.get_resized_cond(cond, x_in, window) for cond in conds]
        with self._options_of(OVERVIEW, window, options, model):
            seen = calc_cond_batch(model, parts, window.get_tensor(x_in), timestep, model_options)
        if self._around is None:
            first, second, shares = zip(*self.windows.around(total), strict=True)
            self._around = (torch.tensor(first + second, device=x_in.device),
                            x_in.new_tensor(shares)[:, None, None])  # over [B, C, T, h, w]
        places, share = self._around
        return [torch.lerp(*made.index_select(TIME, places).chunk(2, TIME), share.to(made)) for made in seen]

    def get_resized_cond(self, cond_in: list[dict[str, Any]] | None, x_in: Tensor, window: Window,
                         device: Any = None) -> list[dict[str, Any]] | None:
        """The image condition and a mask over frames go by window; text, ofs and all else have no time."""
        if cond_in is None:
            return None
        return [self._of_window(cond, x_in, window) for prompt in self._prompts_of_window(cond_in, window)
                for cond in _areas_of_window(prompt, window)]

    def _prompts_of_window(self, conds: list[dict[str, Any]], window: Window) -> list[dict[str, Any]]:
        """One entry of each sequence of prompts, so that they take no more forwards than one prompt does."""
        found = []
        for places in sequences([cond.get(TURN) for cond in conds]):
            a, b, share = (0, 0, 0.0) if len(places) == 1 else self.windows.prompts_of(
                [conds[place][TURN] for place in places], window.index_list, window.total_frames)
            found.append(_cross_faded(conds[places[a]], conds[places[b]], share))
        return found

    def warn_of_unseen(self, conds: dict[str, list[dict[str, Any]]], total: int, steps: int) -> None:
        """Say which prompts no window has for its own, in a run over ``total`` latent frames."""
        for entries in conds.values():
            for places in sequences([entry.get(TURN) for entry in entries]):
                unseen = self.windows.unseen([entries[p][TURN] for p in places], total, steps) if places[1:] else []
                if unseen:
                    log.warning("Context windows: no window has prompt %s of %d for its own: there are %d windows. Use "
                                "shorter windows or a longer video.", ", ".join(str(turn + 1) for turn in unseen),
                                len(places), len(self.windows.at(total, 0)))

    def _of_window(self, cond: dict[str, Any], x_in: Tensor, window: Window) -> dict[str, Any]:
        cond = {**cond, "model_conds": dict(cond["model_conds"])}
        image, mask = cond["model_conds"].get("c_concat"), cond.get("mask")
        if image is not None:
            spec = self.windows.spec
            scale = spec.image_scale(cond.get(REFERENCE_KEY, "auto")) / spec.latent.scaling_factor
            cond["model_conds"]["c_concat"] = image._copy_with(self._image_of_window(image.cond, window, scale))
        if mask is not None and mask.ndim == x_in.ndim - 1 and mask.size(1) == x_in.size(TIME):  # [N, T, H, W]
            cond["mask"] = window.get_tensor(mask, dim=1)
        return cond

    def _image_of_window(self, image: Tensor, window: Window, scale: float) -> Tensor:
        """[B, C, T, H, W]: the window's frames, the first token of them from the video's start if it is the anchor.

        Where the video was laid out, the image would pull a later window back to the place that it shows. There it is
        mixed with what the window before has just made of the same frame, times ``scale``.
        """
        sliced = window.get_tensor(image)
        if not self.windows.anchor or len(window.index_list) == window.total_frames:  # all of it has its image in it
            return sliced
        first, begin = self.windows.spec.transformer.temporal_patch, window.index_list[0]
        sliced[:, :, :first] = image[:, :, :first]
        frames, made = self._before or ([], image)
        if begin in frames:  # not the first window, nor any without an overlap
            sliced = sliced.repeat(len(made) // len(sliced), 1, 1, 1, 1)  # one image may be that of a whole batch
            carried = made[:, :, frames.index(begin)].to(sliced) * scale
            sliced[:, :, 0] = torch.lerp(sliced[:, :, 0], carried, CARRIED)
        return sliced

    def combine_context_window_results(self, x_in: Tensor, sub_conds_out: list[Tensor], sub_conds: Any, window: Window,
                                       window_idx: int, total_windows: int, timestep: Tensor, sums: list[Tensor],
                                       counts: list[Tensor], biases: Any) -> None:
        """As core's, but each window's weights are worked out once a run, and nothing is called back."""
        if self._carries:
            self._before = window.index_list, sub_conds_out[0]  # without guidance, whose strength is not known here
        frames = tuple(window.index_list)
        if frames not in self._weights:
            weights = self.windows.weights_of(frames, window.total_frames)
            self._weights[frames] = x_in.new_tensor(weights, dtype=torch.float32)[:, None, None]  # over [B, C, T, h, w]
        for made, total, count in zip(sub_conds_out, sums, counts, strict=True):
            window.add_window(total, made * self._weights[frames])
            window.add_window(count, self._weights[frames])

    def evaluate_context_windows(self, calc_cond_batch: Callable[..., Any], model: Any, x_in: Tensor, conds: Any,
                                 timestep: Tensor, enumerated_context_windows: list[tuple[int, Window]],
                                 model_options: dict[str, Any], **kwargs: Any) -> Any:
        (index, window), = enumerated_context_windows  # core gives them one by one
        with self._options_of(index, window, model_options["transformer_options"], model):
            return super().evaluate_context_windows(calc_cond_batch, model, x_in, conds, timestep,
                                                    enumerated_context_windows, model_options, **kwargs)

    @contextmanager
    def _options_of(self, index: int, window: Window, options: dict[str, Any], model: Any) -> Iterator[None]:
        """A window's own entries in ``transformer_options``, beside core's."""
        if self.windows.positions == GLOBAL:
            options[PLACE_KEY] = Place(tuple(window.index_list), window.total_frames)
        cache = options.get(EASYCACHE)
        if hasattr(cache, "first_cond_uuid"):  # LazyCache has none: it sees the whole video
            options[EASYCACHE] = self._cache_of(index, cache, model)
        try:
            yield
        finally:
            if cache is not None:
                options[EASYCACHE] = cache

    def _cache_of(self, index: int, cache: Any, model: Any) -> Any:
        """EasyCache compares a forward with the one before, which must be that of the same window at the last step."""
        if index not in self._caches or self.windows.moves:
            self._caches[index] = cache.clone().prepare_timesteps(model.model_sampling)
        skipped = {own: self._caches[own].total_steps_skipped for own in self._caches}
        laying_out = skipped.pop(OVERVIEW, 0)
        cache.total_steps_skipped = laying_out + min(skipped.values(), default=0)  # whole steps, for its log
        return self._caches[index]


def _reason_not_to_lay_out(guider: Any, noise: Tensor, latent_image: Tensor, sigmas: Tensor) -> str | None:
    """Why a run's frames cannot come from one window over the whole video; None if they can."""
    if any(map(_has_sequence, guider.conds.values())):
        return "one window over the whole video has one prompt, not a sequence of them"
    sampling = guider.model_patcher.get_model_object("model_sampling")
    begins = float(sampling.timestep(sigmas[0])) if len(sigmas) else 0.0
    if begins < FULL_NOISE and torch.count_nonzero(latent_image) and torch.count_nonzero(noise):
        return "the run begins on a video, whose motion is to be kept"
    return None


def _for_one_run(executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, *args: Any,
                 **kwargs: Any) -> Tensor:
    """OUTER_SAMPLE wrapper, inside the one that adds padding frames. The handler keeps its step: a run has its own."""
    options = executor.class_obj.model_options
    handler = options.get(HANDLER)
    if not isinstance(handler, WindowHandler):  # another node has replaced it
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)
    spec = handler.windows.spec
    frames = (noise.size(TIME) // spec.transformer.temporal_patch - 1) * spec.token_frames + 1
    reason = None
    if noise.size(TIME) <= handler.context_length:
        log.info("Context windows: %d frames fit into one window of %d, so there %s.", frames, handler.windows.length,
                 "is one, which begins elsewhere at each step" if handler.windows.closed else "are none")
    else:
        conds = executor.class_obj.conds
        handler.warn_of_unseen(conds, noise.size(TIME), len(sigmas) - 1)
        if handler.windows.schedule == COARSE:
            reason = _reason_not_to_lay_out(executor.class_obj, noise, latent_image, sigmas)
        if reason:
            log.info("Context windows: coarse is sampled as static, because %s.", reason)
    if handler.windows.moves and hasattr(options.get("transformer_options", {}).get(EASYCACHE), "first_cond_uuid"):
        log.warning("Context windows: EasyCache skips nothing, as %s windows see other frames at each step. Set the "
                    "schedule to static.", handler.windows.schedule)
    # In the guider's own copy of the options, made for the run.
    options[HANDLER] = WindowHandler(handler.windows, may_lay_out=reason is None)
    return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)


def _with_shared_noise(executor: Any, guider: Any, sigmas: Tensor, extra_args: dict[str, Any], callback: Any,
                       noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """SAMPLER_SAMPLE wrapper: inside all that know the video's own noise."""
    handler = extra_args["model_options"].get(HANDLER)
    if isinstance(handler, WindowHandler):
        noise = noise[:, :, handler.windows.noise_of(noise.size(TIME), extra_args.get("seed") or 0)]
    return executor(guider, sigmas, extra_args, callback, noise, *args, **kwargs)


def with_context_windows(model: Any, windows: Windows) -> Any:
    """A clone of MODEL that sees a video longer than a window in windows, whichever node samples it."""
    kinds = comfy.patcher_extension.WrappersMP
    unusual = windows.unusual_length()
    if unusual:
        log.warning("Context windows: %s", unusual)
    model = model.clone()
    for kind, key in ((kinds.OUTER_SAMPLE, WINDOWS_KEY), (kinds.SAMPLER_SAMPLE, WINDOWS_KEY),
                      (kinds.PREPARE_SAMPLING, CORE_PREPARE_KEY)):
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
