"""The CogVideoX VAE as a ComfyUI VAE: exact in the memory that is free, spatial tiles when asked, progress."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import torch
from torch import Tensor

from ..models.cogvideox.tiles import blend_tiles, count_tiles
from ..models.cogvideox.vae import CogVideoXVAENetwork
from ..models.cogvideox.vae_plan import (
    LATENT_CHUNK,
    PIXEL_CHUNK,
    SMALLEST,
    UNSPLIT,
    Budget,
    Memory,
    Plan,
    choose,
    chunk_bounds,
    cpu_plan,
    decode_memory,
    decoded_frames,
    encode_memory,
)
from ..models.progress import progress_bar
from ..models.specs import SpecError, VAESpec
from .frames import Decoding, FileFrames, Format, Frames, TensorFrames, check_room
from .recovery import naming_saved_latent
from .vae_ladder import HostMemory, Work, budget_of, climb_down, exact_or_smaller, only

log = logging.getLogger("cogx")

DEFAULT_TILE = (240, 360)  # pixels, rows and columns: half the native size, as in the reference
DEFAULT_OVERLAP = 64


def _on_own_device(method: Callable[..., Any]) -> Callable[..., Any]:
    """Run on the VAE's device, which need not be the current one (core's SelectVAEDevice)."""
    @functools.wraps(method)
    def run(self: CogVideoXVAE, *args: Any, **kwargs: Any) -> Any:
        with comfy.model_management.cuda_device_context(self.device):
            return method(self, *args, **kwargs)

    return run


class CogVideoXVAE(comfy.sd.VAE):
    """A VAE of [B, 16, T, h, w] latents and [B, T, H, W, 3] frames in 0..1."""

    def __init__(self, spec: VAESpec, dtype: torch.dtype | None = None, disable_dynamic: bool = False) -> None:
        _init_host_defaults(self)
        self.spec = spec
        self.latent_channels = spec.latent_channels
        self.latent_dim = 3
        self.output_channels = spec.out_channels
        ratio = spec.spatial_ratio
        self.upscale_ratio = (lambda t: max(0, t * 4 - 3), ratio, ratio)
        self.downscale_ratio = (lambda t: max(0, math.floor((t + 3) / 4)), ratio, ratio)
        self.upscale_index_formula = self.downscale_index_formula = (4, ratio, ratio)
        self.working_dtypes = [torch.bfloat16, torch.float32]
        self.memory_used_decode = partial(self._planned, self.decode_memory)
        self.memory_used_encode = partial(self._planned, self.encode_memory)
        self.device = comfy.model_management.vae_device()
        self.vae_dtype = dtype or comfy.model_management.vae_dtype(self.device, self.working_dtypes)
        self.output_device = comfy.model_management.intermediate_device()
        network = CogVideoXVAENetwork(spec, self.vae_dtype, None, comfy.ops.disable_weight_init)
        self.first_stage_model = network.eval().requires_grad_(False)
        comfy.model_management.archive_model_dtypes(self.first_stage_model)
        patcher = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
        self.patcher = patcher(self.first_stage_model, load_device=self.device,
                               offload_device=comfy.model_management.vae_offload_device())

    def load(self, state_dict: dict[str, Tensor]) -> None:
        self.first_stage_model.load_state_dict(state_dict, strict=False, assign=self.patcher.is_dynamic())
        self.model_size()

    def decode_memory(self, shape: Any, plan: Plan) -> Memory:
        """What an exact decode takes beside the weights. shape: [B, C, T, h, w]."""
        return decode_memory(self.spec, tuple(shape[2:]), self.vae_dtype.itemsize, plan)

    def encode_memory(self, shape: Any, plan: Plan) -> Memory:
        """What an exact encode takes beside the weights. shape: [B, 3, T, H, W] in pixels."""
        return encode_memory(self.spec, tuple(shape[2:]), self.vae_dtype.itemsize, plan)

    def plan(self, memory: Callable[[Plan], Memory], frames: int) -> Plan | None:
        """What would be chosen now. frames: of the first chunk, in pixels."""
        return choose(memory, self.budget(), cpu_plan(self.spec, frames))

    def budget(self) -> Budget:
        """The memory that a decode or encode can have now."""
        weights = max(self.model_size() - self.patcher.loaded_size(), 0)
        return budget_of(self.device, self.first_stage_model, weights)

    def _planned(self, memory: Callable[[Any, Plan], Memory], shape: Any, dtype: torch.dtype) -> float:
        """Bytes that the host is told: of the plan that would be chosen now, or of the smallest."""
        of = partial(memory, shape)
        return of(self.plan(of, 1) or SMALLEST).device

    def _load(self, memory: Memory) -> None:
        comfy.model_management.load_models_gpu([self.patcher], memory_required=memory.device)

    def decode(self, samples_in: Tensor, vae_options: Any = None) -> Tensor:
        """Exact: [B, 16, T, h, w] -> [B, frames, H, W, 3]. Core's VAEDecode comes this way."""
        return self.decode_video(samples_in, tiling="auto")

    @naming_saved_latent
    @_on_own_device
    def decode_video(self, samples: Tensor, tiling: str = "auto", tile: tuple[int, int] = DEFAULT_TILE,
                     overlap: int = DEFAULT_OVERLAP, closed_loop: bool = False) -> Tensor:
        """Frames of a latent.

        Args:
            samples: [B, 16, T, h, w], unscaled.
            tiling: 'auto' is exact, in strips that fit the free memory, and goes on by itself if they do not after
                all (vae_ladder.py); 'off' never splits; 'on' takes spatial tiles, which are lossy.
            tile: rows and columns of a tile in pixels. overlap: in pixels.
            closed_loop: the first frame follows the last; every latent frame then gives four.
        Returns [B, frames, H, W, 3] in 0..1, on the output device.

        Raises:
            SpecError: a latent of another model, or a tile that does not exceed its overlap.
            OOM_EXCEPTION: nothing was enough; says what was tried.
        """
        videos = [video.frames for video in self._decode(samples, TensorFrames, tiling, tile, overlap,
                                                             closed_loop)]
        return torch.cat(videos) if len(videos) > 1 else videos[0]

    @naming_saved_latent
    @_on_own_device
    def decode_to_files(self, samples: Tensor, folder: Path, tiling: str = "auto",
                        tile: tuple[int, int] = DEFAULT_TILE, overlap: int = DEFAULT_OVERLAP,
                        closed_loop: bool = False) -> list[FileFrames]:
        """As ``decode_video``, but each video goes to a temporary file in ``folder``, chunk by chunk.

        Raises:
            SpecError, OOM_EXCEPTION: as ``decode_video``, or the disk has no room, which is looked for first.
        """
        self._check_latent(samples)
        shape = Decoding.of(samples, self.spec, TensorFrames, closed_loop).frames_shape
        check_room(folder, samples.shape[0] * math.prod(shape) * self.vae_dtype.itemsize)
        return self._decode(samples, partial(FileFrames, folder=folder), tiling, tile, overlap, closed_loop,
                            tiles_last=True)

    def _decode(self, samples: Tensor, new: Callable[..., Frames], tiling: str, tile: tuple[int, int],
                overlap: int, closed_loop: bool, tiles_last: bool = False) -> list[Any]:
        self._check_latent(samples)
        ratio = self.spec.spatial_ratio
        cells, overlap = (tile[0] // ratio, tile[1] // ratio), overlap // ratio
        self._check_tile(cells, overlap)
        to_image = Format(self.vae_output_dtype(), self.output_device, self.process_output)
        job = Decoding.of(samples, self.spec, partial(new, to_image), closed_loop)
        samples = job.samples
        frames, height, width, _ = job.frames_shape
        on_cpu = cpu_plan(self.spec, decoded_frames(_first(samples)))
        work = Work(f"decoding {frames} frames of {width}x{height}", partial(self.decode_memory, samples.shape), on_cpu,
                    decode_memory(self.spec, tuple(samples.shape[2:]), torch.float32.itemsize, on_cpu).device,
                    partial(self._decode_exact, job), partial(self._decode_in_tiles, job, cells, overlap), tiles_last)
        if tiling == "auto":
            return exact_or_smaller(work, self.device, self.budget())
        if tiling == "on":
            return climb_down(work.words, only("tiles", work.tiled, self.device))
        unsplit = only(str(UNSPLIT), partial(work.run, UNSPLIT, self.device), self.device)
        return climb_down(work.words, unsplit, "set tiling to auto, which needs less for the same video")

    def _check_latent(self, samples: Tensor) -> None:
        if samples.ndim != 5 or samples.shape[1] != self.latent_channels or not samples.numel():
            raise SpecError(f"Expected a CogVideoX latent [batch, {self.latent_channels}, frames, height/8, width/8], "
                            f"got {list(samples.shape)}. Connect the LATENT of a CogVideoX sampler.")

    def _decode_exact(self, job: Decoding, plan: Plan, device: torch.device) -> list[Any]:
        """The videos of a batch that are not done, and all of them together."""
        if device == self.device:
            self._load(self.decode_memory(job.samples.shape, plan))
        chunks = len(chunk_bounds(job.samples.shape[2], LATENT_CHUNK))
        progress = progress_bar(job.samples.shape[0] * chunks)
        for z in job.not_done():
            with job.video() as video, HostMemory() as host, closing(self._decoded(z, plan, device, host)) as chunks:
                for chunk in chunks:
                    video.write(chunk)
                    progress.update(1)
        return job.done

    def _decoded(self, z: Tensor, plan: Plan, device: torch.device, host: HostMemory) -> Iterator[Tensor]:
        chunks = self.first_stage_model.decode_chunks
        return chunks(z.to(device, self._dtype_on(device)), plan, host.make, _stop_if_interrupted)

    def _dtype_on(self, device: torch.device) -> torch.dtype:
        return self.vae_dtype if device == self.device else torch.float32  # the last rung, a CPU, is slow in bf16

    def _check_tile(self, tile: tuple[int, int], overlap: int) -> None:
        if overlap >= min(tile):
            ratio = self.spec.spatial_ratio
            raise SpecError(f"tile {tile[1] * ratio}x{tile[0] * ratio} pixels: expected more than the overlap of "
                            f"{overlap * ratio}. Make the tile larger or the overlap smaller.")

    def _decode_in_tiles(self, job: Decoding, tile: tuple[int, int], overlap: int) -> list[Any]:
        """As ``_decode_exact``; the tiles of one video are in memory together, all its frames."""
        samples = job.samples
        shape = (1, *samples.shape[1:3], *(min(pair) for pair in zip(tile, samples.shape[3:], strict=True)))
        memory = partial(self.decode_memory, shape)
        plan = self.plan(memory, decoded_frames(_first(samples))) or SMALLEST
        self._load(memory(plan))
        chunks = len(chunk_bounds(samples.shape[2], LATENT_CHUNK))
        progress = progress_bar(samples.shape[0] * count_tiles(samples.shape[3:], tile, overlap) * chunks)

        def run(z: Tensor) -> Tensor:
            parts = []
            with HostMemory() as host, closing(self._decoded(z, plan, self.device, host)) as chunks:
                for chunk in chunks:
                    parts.append(chunk.float().cpu())
                    progress.update(1)
            return torch.cat(parts, dim=2)

        for z in job.not_done():
            with job.video() as video:
                for pixels in blend_tiles(z, tile, overlap, self.spec.spatial_ratio, run).split(PIXEL_CHUNK, dim=2):
                    video.write(pixels)
        return job.done

    @naming_saved_latent
    def decode_tiled(self, samples: Tensor, tile_x: int | None = None, tile_y: int | None = None,
                     overlap: int | None = None, tile_t: int | None = None, overlap_t: int | None = None) -> Tensor:
        """Core's VAEDecodeTiled comes this way; sizes in latent units. Tiles are spatial only: tiles in time would
        break the causal chunks, so ``tile_t`` and ``overlap_t`` are ignored."""
        ratio = self.spec.spatial_ratio
        tile = (tile_y * ratio if tile_y else DEFAULT_TILE[0], tile_x * ratio if tile_x else DEFAULT_TILE[1])
        return self.decode_video(samples, "on", tile, DEFAULT_OVERLAP if overlap is None else overlap * ratio)

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """The mean of the posterior, exact. Core's VAEEncode comes this way; see ``encode_video``."""
        return self.encode_video(pixel_samples)

    @_on_own_device
    def encode_video(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents of videos. [frames, H, W, 3] is one video, [B, frames, H, W, 3] a batch of videos.

        Returns [B, 16, T, h, w], unscaled: the mean of the posterior, or a draw from it with the CPU ``generator``,
        video by video as diffusers does. Exact, with the same ladder as ``decode_video``.

        Raises:
            OOM_EXCEPTION: nothing was enough; says what was tried.
        """
        video = self._to_video(pixels)
        done: list[Tensor] = []
        on_cpu = cpu_plan(self.spec, chunk_bounds(video.shape[2], PIXEL_CHUNK)[0][1])
        work = Work(_encoding(video), partial(self.encode_memory, video.shape), on_cpu,
                    encode_memory(self.spec, tuple(video.shape[2:]), torch.float32.itemsize, on_cpu).device,
                    partial(self._encode_exact, video, done),
                    partial(self._encode_in_tiles, video, DEFAULT_TILE, DEFAULT_OVERLAP, done))
        return _latents_of(exact_or_smaller(work, self.device, self.budget()), generator)

    def _encode_exact(self, video: Tensor, done: list[Tensor], plan: Plan, device: torch.device) -> Tensor:
        """Moments: [B, 3, T, H, W] -> [B, 32, T', h, w]."""
        if device == self.device:
            self._load(self.encode_memory(video.shape, plan))
        progress = progress_bar(video.shape[0] * len(chunk_bounds(video.shape[2], PIXEL_CHUNK)))
        for x in video[len(done):].split(1):
            done.append(self._encode_one(x, plan, device, progress).to(self.output_device))
        return torch.cat(done)

    def _to_video(self, pixels: Tensor) -> Tensor:
        """Crop to whole latent cells: [..., H, W, C] -> [B, 3, T, H, W], in 0..1. A view: videos are long."""
        videos = pixels.shape[:-3] if pixels.ndim == 5 else (1, pixels.shape[0])
        pixels = self.vae_encode_crop_pixels(pixels.reshape(-1, *pixels.shape[-3:]))  # it would crop the frames too
        pixels = pixels.reshape(*videos, *pixels.shape[-3:])
        return pixels.permute(0, 4, 1, 2, 3)  # bthwc -> bcthw

    def _encode_one(self, x: Tensor, plan: Plan, device: torch.device, progress: Any) -> Tensor:
        parts = []
        encode, dtype = self.first_stage_model.encode_chunks, self._dtype_on(device)
        with HostMemory() as host, closing(encode(x, plan, host.make, _stop_if_interrupted, device, dtype,
                                                  self.process_input)) as chunks:
            for moments in chunks:
                parts.append(moments.to(device=self.output_device, dtype=self.vae_output_dtype()))
                progress.update(1)
        return torch.cat(parts, dim=2)

    @_on_own_device
    def encode_tiled(self, pixel_samples: Tensor, tile_x: int | None = None, tile_y: int | None = None,
                     overlap: int | None = None, tile_t: int | None = None, overlap_t: int | None = None) -> Tensor:
        """Core's VAEEncodeTiled comes this way; sizes in pixels. Tiles are spatial only, as in ``decode_tiled``."""
        ratio = self.spec.spatial_ratio
        tile = ((tile_y or DEFAULT_TILE[0]) // ratio * ratio, (tile_x or DEFAULT_TILE[1]) // ratio * ratio)
        overlap = (DEFAULT_OVERLAP if overlap is None else overlap) // ratio * ratio
        video = self._to_video(pixel_samples)
        tiled = partial(self._encode_in_tiles, video, tile, overlap, [])
        return _latents_of(climb_down(_encoding(video), only("tiles", tiled, self.device)))

    def _encode_in_tiles(self, video: Tensor, tile: tuple[int, int], overlap: int, done: list[Tensor]) -> Tensor:
        """As ``_encode_exact``."""
        ratio = self.spec.spatial_ratio
        self._check_tile((tile[0] // ratio, tile[1] // ratio), overlap // ratio)
        shape = (1, *video.shape[1:3], *(min(pair) for pair in zip(tile, video.shape[3:], strict=True)))
        bounds = chunk_bounds(video.shape[2], PIXEL_CHUNK)
        memory = partial(self.encode_memory, shape)
        plan = self.plan(memory, bounds[0][1]) or SMALLEST
        self._load(memory(plan))
        progress = progress_bar(
            video.shape[0] * count_tiles(video.shape[3:], tile, overlap) * len(bounds))
        for x in video[len(done):].split(1):
            moments = blend_tiles(x, tile, overlap, 1 / ratio,
                                  lambda part: self._encode_one(part, plan, self.device, progress))
            done.append(moments.to(device=self.output_device, dtype=self.vae_output_dtype()))
        return torch.cat(done)


def _stop_if_interrupted() -> None:
    comfy.model_management.throw_exception_if_processing_interrupted()


def _first(samples: Tensor) -> int:
    """Latent frames of the first chunk."""
    return chunk_bounds(samples.shape[2], LATENT_CHUNK)[0][1]


def _encoding(video: Tensor) -> str:
    return f"encoding {video.shape[2]} frames of {video.shape[4]}x{video.shape[3]}"


def _latents_of(moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mean of the posterior, or a draw from it: [B, 32, T, h, w] (mean and log variance) -> [B, 16, T, h, w]."""
    mean, logvar = moments.chunk(2, dim=1)
    if generator is None:
        return mean.clone(memory_format=torch.contiguous_format)  # a view would keep the log variance in memory
    noise = torch.cat([torch.randn(one.shape, generator=generator) for one in mean.split(1)])
    return mean + (0.5 * logvar.clamp(-30.0, 20.0)).exp() * noise.to(mean)


def require_cogvideox(vae: Any) -> CogVideoXVAE:
    """The VAE itself.

    Raises:
        SpecError: another model's VAE.
    """
    if not isinstance(vae, CogVideoXVAE):
        name = type(getattr(vae, "first_stage_model", vae)).__name__
        raise SpecError(f"Expected a CogVideoX VAE, got {name}. Load it with 'CogVideoX Load Pipeline' or "
                        "'CogVideoX Load VAE'.")
    return vae


def _init_host_defaults(vae: comfy.sd.VAE) -> None:
    """Every attribute that the host's VAE sets by default. An empty state dict makes its ``__init__`` return after
    them, with a warning that is not true here."""
    def keep(record: logging.LogRecord) -> bool:
        return "No VAE weights detected" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(keep)
    try:
        comfy.sd.VAE.__init__(vae, sd={})
    finally:
        root.removeFilter(keep)
