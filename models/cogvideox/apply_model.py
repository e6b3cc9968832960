"""What happens around every forward of a CogVideoX MODEL, under any sampler: running out of memory does not end a run.

A ladder, of which a run goes down only as far as it must, and stays there: free other models and the cache; run the
conditions of guidance in turn, then the videos of a batch, which is the same arithmetic; stream more of the weights
from RAM, half of what is loaded at a time. At its end the error says what was tried and what would fit.
"""

from __future__ import annotations

import copy
import gc
import logging
import uuid
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import comfy.model_management
import comfy.model_prefetch
import torch
from torch import Tensor

from ..smaller import shorter, smaller
from ..specs import VAE_SPATIAL_RATIO, VAE_TEMPORAL_RATIO, Geometry

log = logging.getLogger("cogx")

GB = 1e9
LADDER_KEY = "cogx_ladder"  # in transformer_options: the Ladder of a run
KEPT_KEY = "cogx_kept"  # in model_options: whoever samples keeps the result of the run himself
VIDEO_KEY = "cogx_video"  # likewise: the index of the one video that a forward is for, where they run one by one

WHOLE, CONDITIONS, VIDEOS = range(3)  # how a batch is split
SPLITS = {CONDITIONS: "run the conditions of guidance in turn", VIDEOS: "run the videos one by one"}


@dataclass(frozen=True)
class Batch:
    """What stands along dim 0 of a forward: the videos of the first condition, then those of the next."""

    conditions: int
    videos: int
    together: bool  # a patch joins the conditions of a video, as NAGuidance does: they stay in one forward

    @classmethod
    def of(cls, x: Tensor, options: dict[str, Any]) -> Batch:
        conditions = len(options.get("cond_or_uncond", ())) or 1
        if x.shape[0] % conditions:  # not as ComfyUI stacks them
            conditions = 1
        together = bool(options.get("patches", {}).get("attn1_output_patch"))
        return cls(conditions, x.shape[0] // conditions, together)

    def parts(self, split: int) -> list[tuple[range, range]]:
        """The conditions and the videos of each forward."""
        conditions = [range(c, c + 1) for c in range(self.conditions)]
        if split == WHOLE or self.together:
            conditions = [range(self.conditions)]
        videos = [range(v, v + 1) for v in range(self.videos)] if split == VIDEOS else [range(self.videos)]
        return [(c, v) for c in conditions for v in videos]

    def next_split(self, split: int) -> int | None:
        """The coarsest split that makes more parts than ``split`` does."""
        parts = len(self.parts(split))
        return next((s for s in range(split + 1, VIDEOS + 1) if len(self.parts(s)) > parts), None)

    def rows(self, conditions: range, videos: range) -> list[int]:
        return [c * self.videos + v for c in conditions for v in videos]

    def options_of(self, conditions: range, videos: range, options: dict[str, Any]) -> dict[str, Any]:
        """transformer_options of a part: what is listed by condition or by video goes with it."""
        part = dict(options)
        for key in ("cond_or_uncond", "uuids"):
            if key in options:
                part[key] = [options[key][c] for c in conditions]
        if len(videos) < self.videos:
            video = videos[0]
            part[VIDEO_KEY] = video
            # Step caches keep their state by uuid, and that of one video is no other's.
            part["uuids"] = [uuid.uuid5(name, f"{VIDEO_KEY} {video}") for name in part.get("uuids", ())]
            part["sigmas"] = _rows_of(options["sigmas"], [video], self.videos)
        return part


def _rows_of(value: Any, rows: list[int], batch: int) -> Any:
    """The rows of every tensor that has one for each row of the batch, in lists and dicts too; the rest as it is."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: _rows_of(item, rows, batch) for key, item in value.items()}
    if isinstance(value, list):
        return [_rows_of(item, rows, batch) for item in value]
    return value


@dataclass
class Rungs:
    """How far down one device is."""

    freed: bool = False
    split: int = WHOLE
    tried: list[str] = field(default_factory=list)


class Ladder:
    """The rungs that one sampling run needed, on each device that it uses.

    Attributes:
        copies: how many videos the network sees for each one of the batch (a patch may put references beside them).
    """

    def __init__(self, guider: Any, latent_shape: tuple[int, ...]) -> None:
        self.copies = 1
        self._guider = guider
        self._latent_shape = latent_shape  # [B, C, T, H, W] without padding frames
        self._rungs: dict[torch.device, Rungs] = {}

    def on(self, device: torch.device) -> Rungs:
        return self._rungs.setdefault(device, Rungs())

    def go_down(self, model: Any, x: Tensor, batch: Batch, reason: str) -> None:
        """Take the next rung for the device of ``x``, which holds what the failed forward was given.

        Raises:
            OOM_EXCEPTION: there is none.
        """
        _clean_up(model)
        rungs = self.on(x.device)
        rung = self._free(rungs, model, x.device) or _split(rungs, batch) or _stream(model)
        if rung is None:
            raise comfy.model_management.OOM_EXCEPTION(self._message(rungs, model, x, batch, reason))
        rungs.tried.append(rung)
        log.warning("Out of memory in sampling %s: %s, and try again.", self._asked(), rung)

    def _free(self, rungs: Rungs, model: Any, device: torch.device) -> str | None:
        if rungs.freed:
            return None
        rungs.freed = True
        in_use = [id(patcher) for patcher in getattr(self._guider, "loaded_models", ())]
        keep = [loaded for loaded in comfy.model_management.current_loaded_models
                if loaded.model is not None and (loaded.model.model is model or id(loaded.model) in in_use)]
        comfy.model_management.free_memory(1e30, device, keep_loaded=keep)
        return "free other models and the cache"

    def _geometry(self, model: Any) -> Geometry:
        _, _, frames, rows, columns = self._latent_shape
        return Geometry(model.spec, columns * VAE_SPATIAL_RATIO, rows * VAE_SPATIAL_RATIO,
                        VAE_TEMPORAL_RATIO * (frames - 1) + 1)

    def _asked(self) -> str:
        videos, _, frames, rows, columns = self._latent_shape
        return (f"{VAE_TEMPORAL_RATIO * (frames - 1) + 1} frames of {columns * VAE_SPATIAL_RATIO}x"
                f"{rows * VAE_SPATIAL_RATIO}, batch {videos}")

    def _message(self, rungs: Rungs, model: Any, x: Tensor, batch: Batch, reason: str) -> str:
        conditions, videos = batch.parts(rungs.split)[0]
        videos_at_once = len(conditions) * len(videos) * self.copies
        free = model.current_patcher.get_free_memory(x.device)
        needed = model.memory_required((videos_at_once, *x.shape[1:]))
        return (f"Out of memory in sampling {self._asked()}. Tried: {'; '.join(rungs.tried)}. The smallest forward "
                f"needs about {needed / GB:.2f} GB beside the weights, {free / GB:.2f} GB are free. "
                f"{self._advice(model, x, videos_at_once, min(free, needed))} ({reason})")

    def _advice(self, model: Any, x: Tensor, videos_at_once: int, free: float) -> str:
        """What would fit by the estimate: the most frames at this size, and the largest size with these frames."""
        asked = self._geometry(model)
        in_windows = x.shape[2] < asked.latent_frames

        def fits(geometry: Geometry) -> bool:
            _, channels, frames, *size = geometry.latent_shape()
            frames = x.shape[2] if in_windows else frames + model.spec.padding_frames(frames)
            return model.memory_required((videos_at_once, channels, frames, *size)) <= free

        found = ["a shorter context window"] if in_windows else []
        for candidates in ([] if in_windows else shorter(asked), smaller(asked)):
            fitting = next(filter(fits, candidates), None)
            if fitting is not None:
                found.append(f"{fitting.frames} frames of {fitting.width}x{fitting.height}")
        remedy = "Close other programs that use the GPU."
        return f"By the estimate this would fit: {' or '.join(found)}. {remedy}" if found else remedy


def _split(rungs: Rungs, batch: Batch) -> str | None:
    split = batch.next_split(rungs.split)
    if split is None:
        return None
    rungs.split = split
    return SPLITS[split]


def _stream(model: Any) -> str | None:
    """Take half of the loaded weights off the device, all of them in the end. They stay off until the next run."""
    patcher = model.current_patcher
    loaded, total = patcher.loaded_size(), patcher.model_size()
    keep = loaded // 2 if loaded > total / 8 else 0
    hooks = patcher.current_hooks
    patcher.partially_unload(torch.device("cpu"), loaded - keep)  # with --highvram the offload device is the GPU
    if hooks is not None:
        patcher.apply_hooks(hooks, force_apply=True)  # unloading took their changes off the weights
    streamed = total - patcher.loaded_size()
    return f"stream {streamed / GB:.2f} of {total / GB:.2f} GB of weights" if patcher.loaded_size() < loaded else None


def _clean_up(model: Any) -> None:
    """Let go of what a failed forward left: cycles, weights that were fetched in advance, cached blocks."""
    gc.collect()
    comfy.model_prefetch.cleanup_prefetched_modules(model.diffusion_model.modules())
    comfy.model_management.soft_empty_cache()


def _easycache_of(options: dict[str, Any]) -> Any:
    """The state of core's EasyCache, which changes inside a forward; an empty one where a run has none."""
    cache = options.get("easycache")
    return cache if hasattr(cache, "first_cond_uuid") else SimpleNamespace()  # LazyCache changes outside


def _state_of(cache: Any) -> dict[str, Any]:
    """What to put back after a failed forward: its dicts, lists and the sum of changes are changed in place."""
    return {name: copy.copy(value) if isinstance(value, (dict, list)) else
            value.clone() if isinstance(value, Tensor) and not value.ndim else value
            for name, value in vars(cache).items()}


def _start_anew(cache: Any) -> None:
    """What EasyCache knows goes by uuid, and videos that run one by one have new ones: none would ever match."""
    if not vars(cache):
        return
    skipped = cache.total_steps_skipped
    cache.reset()
    cache.relative_transformation_rate = None  # reset() makes it 0, by which every later step would be skipped
    cache.total_steps_skipped = skipped


def with_ladder(executor: Any, noise: Tensor, latent_image: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """OUTER_SAMPLE wrapper: the ladder lives for one run."""
    guider = executor.class_obj
    options = guider.model_options.setdefault("transformer_options", {})  # the guider's own copy, made for the run
    options[LADDER_KEY] = Ladder(guider, tuple(latent_image.shape))
    try:
        return executor(noise, latent_image, *args, **kwargs)
    finally:
        del options[LADDER_KEY]


def apply_model(executor: Any, x: Tensor, t: Tensor, c_concat: Tensor | None = None, c_crossattn: Tensor | None = None,
                control: Any = None, transformer_options: dict[str, Any] | None = None, **conds: Any) -> Tensor:
    """APPLY_MODEL wrapper. Everything given has the batch along dim 0; see ``Batch``.

    Raises:
        OOM_EXCEPTION: the last rung was not enough. Any other error comes through at once.
    """
    options = transformer_options or {}
    ladder = options.get(LADDER_KEY)
    tensors = (x, t, c_concat, c_crossattn, control)
    if ladder is None or torch.is_grad_enabled():  # training keeps its activations: splitting would not help
        return executor(*tensors, options, **conds)
    batch = Batch.of(x, options)
    cache = _easycache_of(options)
    while True:
        before, split = _state_of(cache), ladder.on(x.device).split
        out, reason = _attempt(executor, batch, split, tensors, options, conds)
        if out is not None:
            return out
        vars(cache).update(before)
        ladder.go_down(executor.class_obj, x, batch, reason)
        if VIDEOS == ladder.on(x.device).split != split:
            _start_anew(cache)


def _attempt(executor: Any, batch: Batch, split: int, tensors: tuple[Any, ...], options: dict[str, Any],
             conds: dict[str, Any]) -> tuple[Tensor | None, str]:
    """The output, or None and why, once the error is gone, and with its traceback the tensors of the failed try."""
    try:
        parts = batch.parts(split)
        if len(parts) == 1:
            return executor(*tensors, options, **conds), ""
        return _in_turn(executor, batch, parts, tensors, options, conds), ""
    except Exception as error:  # noqa: BLE001 - the host knows which errors mean out of memory
        comfy.model_management.raise_non_oom(error)
        return None, str(error).partition("\n")[0]


def _in_turn(executor: Any, batch: Batch, parts: list[tuple[range, range]], tensors: tuple[Any, ...],
             options: dict[str, Any], conds: dict[str, Any]) -> Tensor:
    """One forward for each part, put together in the order of the batch."""
    total = tensors[0].shape[0]
    out = torch.empty_like(tensors[0])
    for part in parts:
        rows = batch.rows(*part)
        given, more = _rows_of([list(tensors), conds], rows, total)
        out[rows] = executor(*given, batch.options_of(*part, options), **more)
    return out
