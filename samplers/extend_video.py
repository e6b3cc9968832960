"""Samples the chunks of a video that is being extended, with a ComfyUI MODEL and this pack's VAE.

A chunk begins with the encoded frames that it takes over, and keeps them while it is sampled: a noise mask in time, so
that the new frames go on with their motion. An image-to-video model also sees the first of them as its image.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import comfy.model_management
import latent_preview
import torch
from comfy.context_windows import IndexListContextHandler
from torch import Tensor

from ..models.cogvideox.apply_model import KEPT_KEY
from ..models.cogvideox.image_condition import REFERENCE_KEY, condition_latent
from ..models.cogvideox.pixels import as_rgb
from ..models.cogvideox.vae_plan import LATENT_CHUNK, PIXEL_CHUNK, chunk_bounds
from ..models.progress import Whole
from ..models.specs import Geometry, SpecError, check_geometry, size_problem
from . import adapter
from .extend import Extension, extend
from .long_video import HANDLER
from .prompts import in_turn
from .windows import LOOPED

log = logging.getLogger("cogx")

# The last steps may change the frames taken over too, so that the new ones meet them without an edge; the cross-fade
# then leads from the frames as they were to these.
RELEASED = 0.2
KEPT = 0.5  # in the mask: not 0, which would give the frames back to the bit


class Chunks(Protocol):
    """Where finished chunks are kept; see model_loaders/chunk_files.py."""

    def key(self, inputs: Any) -> str | None: ...

    def find(self, key: str | None, begun_from: Tensor) -> Tensor | None: ...

    def save(self, key: str | None, latent: Tensor, begun_from: Tensor, **facts: Any) -> None: ...


@dataclass(frozen=True)
class Sampling:
    """How every chunk is sampled, as in CogXSampler."""

    seed: int
    steps: int
    cfg: float
    sampler: str
    schedule: str
    denoise: float
    dynamic_cfg: bool


@dataclass
class Extender:
    """One run: what all chunks share.

    Attributes:
        vae: this pack's. match: 'off', 'soft' or 'full', see colour.py.
        decode: [1, 16, T, h, w] -> [1, frames, H, W, 3].
    """

    model: Any
    vae: Any
    positive: list[Any]
    negative: list[Any]
    plan: Extension
    sampling: Sampling
    match: str
    decode: Callable[[Tensor], Tensor]
    chunks: Chunks
    _key: str | None = None  # of the chunk before

    def run(self, frames: Tensor) -> Tensor:
        """The extended video: [N, H, W, C] -> [N + new frames, H, W, 3].

        Raises:
            SpecError: its size is not legal for the model, it is shorter than the overlap, no step is left to run, the
                MODEL samples closed loops, or there is no RAM for the whole video.
        """
        self._check_no_loop()
        height, width = frames.shape[1:3]
        problem = size_problem(width, height, self.plan.spec)
        if problem:
            raise SpecError(f"images of {width}x{height}: {problem} Scale or crop them before this node.")
        geometry = check_geometry(width, height, self.plan.length, self.plan.spec)
        frames, note = as_rgb(frames)
        if note:
            log.warning("Extend: %s.", note)
        self.plan.check_source(frames.shape[0])
        self.plan.check_ram(frames.shape[0], frames[0].nbytes,
                            comfy.model_management.get_free_memory(torch.device("cpu")))
        return extend(frames, self.plan, partial(self._chunk, geometry, self._bar(geometry)), self.match)

    def _check_no_loop(self) -> None:
        """Each window over the end would see frames of the beginning, which are those taken over."""
        handler = self.model.model_options.get(HANDLER)
        looped = isinstance(handler, IndexListContextHandler) and handler.closed_loop
        schedule = handler.context_schedule.name if looped else ""
        if LOOPED in schedule:  # core's looped_uniform, too; core's others take no notice of closed_loop
            raise SpecError(f"The MODEL samples closed loops (Context Windows with the schedule {schedule}): expected "
                            "one for a video that goes on. Connect the MODEL from before Context Windows, or choose "
                            "another schedule.")

    def _units(self, geometry: Geometry) -> tuple[int, int, int]:
        """Of a chunk, in the bar: the VAE's chunks and the sampler's steps."""
        return (len(chunk_bounds(self.plan.overlap, PIXEL_CHUNK)), len(self.sigmas) - 1,
                len(chunk_bounds(geometry.latent_frames, LATENT_CHUNK)))

    def _bar(self, geometry: Geometry) -> Whole:
        return Whole(self.plan.chunks * sum(self._units(geometry)))

    def _chunk(self, geometry: Geometry, whole: Whole, index: int, last: Tensor) -> Tensor:
        """The frames of a chunk, [length, H, W, 3], from the frames that it takes over."""
        encoding, steps, decoding = self._units(geometry)
        log.info("Extend: chunk %d of %d.", index + 1, self.plan.chunks)
        with whole.part(encoding):
            latent, image = self._begin(geometry, last)
        with whole.part(steps):
            samples = self._sampled(whole, index, latent, image)
        with whole.part(decoding):
            return self.decode(samples)[0]

    def _begin(self, geometry: Geometry, last: Tensor) -> tuple[Tensor, Tensor | None]:
        """The latent that a chunk is sampled from, [1, 16, T, h, w], and its image condition if the model takes one.

        Where the new frames will be lies the last one that there is, for runs that begin below full noise.
        """
        known = self.vae.encode_video(last)
        rest = geometry.latent_frames - self.plan.latent_overlap
        latent = torch.cat([known, known[:, :, -1:].expand(-1, -1, rest, -1, -1)], dim=2)
        if not self.plan.spec.takes_image:
            return latent, None
        return latent, condition_latent(geometry.latent_frames, self.vae.encode_video(last[:1]), None)

    def _sampled(self, whole: Whole, index: int, latent: Tensor, image: Tensor | None) -> Tensor:
        """The chunk's latent: kept from an earlier run, or sampled and kept."""
        positive, negative = (of[min(index, len(of) - 1)] for of in self._prompts)
        seed, sampling = self.plan.seed(self.sampling.seed, index), self.sampling
        known = latent[:, :, :self.plan.latent_overlap]
        # All that the frames before it were made with is in the key of the chunk before.
        self._key = key = self.chunks.key([self._key, index, positive, negative, asdict(sampling), self.plan.length,
                                           self.plan.overlap, self.match, RELEASED])
        found = self.chunks.find(key, known)
        if found is not None:
            return found.to(latent)
        # A copy in the recovery folder would push out one of the few renders that are kept there.
        self._sampled_model.model_options[KEPT_KEY] = key is not None
        began = time.monotonic()
        mask = torch.ones(1, 1, *latent.shape[2:])
        mask[:, :, :self.plan.latent_overlap] = KEPT
        samples = adapter.sample(
            self._sampled_model, _with_image(positive, image), _with_image(negative, image),
            {"samples": latent, "noise_mask": mask}, seed, sampling.cfg,
            adapter.sampler_object(sampling.sampler, sampling.steps), self.sigmas, self._callback(whole))["samples"]
        self.chunks.save(key, samples, known, fps=self.plan.spec.fps, model=self.plan.spec.name, seed=seed,
                         cfg=sampling.cfg, sampler=sampling.sampler, steps=len(self.sigmas) - 1,
                         dtype=str(self.model.model.get_dtype_inference()).removeprefix("torch."),
                         seconds=round(time.monotonic() - began, 1))
        return samples

    def _callback(self, whole: Whole) -> Callable[..., None]:
        """As ComfyUI's own, on the bar of the whole run."""
        previewer = latent_preview.get_previewer(self.model.load_device, self.model.model.latent_format)

        def callback(step: int, x0: Tensor, x: Tensor, total_steps: int) -> None:
            preview = previewer.decode_latent_to_preview_image("JPEG", x0) if previewer else None
            whole.show(step + 1, preview)

        return callback

    @cached_property
    def _prompts(self) -> tuple[list[Any], list[Any]]:
        return in_turn(self.positive), in_turn(self.negative)

    @cached_property
    def sigmas(self) -> Tensor:
        sampling = self.sampling
        return adapter.make_sampler_sigmas(self.model, sampling.sampler, sampling.steps, sampling.schedule,
                                           sampling.denoise)

    @cached_property
    def _sampled_model(self) -> Any:
        """A clone of MODEL with the guidance, and with the mask that lets go at the end."""
        steps = len(self.sigmas) - 1
        model = adapter.with_dynamic_guidance(self.model, steps) if self.sampling.dynamic_cfg else self.model.clone()
        model.set_model_denoise_mask_function(partial(_mask_at, release_sigma(self.sigmas)))
        return model


def release_sigma(sigmas: Tensor) -> float:
    """Below which noise level the frames taken over are let go; 0 keeps them to the end of a run of few steps."""
    steps = len(sigmas) - 1
    released = int(steps * RELEASED)
    return float((sigmas[steps - released] * sigmas[steps - released - 1]).sqrt()) if 0 < released < steps else 0.0


def _mask_at(release: float, sigma: Tensor, mask: Tensor, extra_options: Any) -> Tensor:
    """ComfyUI's denoise_mask_function: 0 for what is kept, 1 for what is sampled."""
    return (mask > KEPT).to(mask) if float(sigma.max()) > release else torch.ones_like(mask)


def _with_image(conditioning: list[Any], image: Tensor | None) -> list[Any]:
    """A CONDITIONING with the chunk's own image, if there is one; as core's image-to-video nodes attach theirs."""
    if image is None:
        return conditioning
    return [[text, {**options, "concat_latent_image": image, REFERENCE_KEY: "auto"}] for text, options in conditioning]
