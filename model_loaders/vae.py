"""The CogVideoX VAE as a ComfyUI VAE: exact chunks, spatial tiles when asked or when memory demands, progress."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import torch
from torch import Tensor

from ..models.cogvideox.vae import (
    LATENT_CHUNK,
    PIXEL_CHUNK,
    CogVideoXVAENetwork,
    blend_tiles,
    chunk_bounds,
    tile_starts,
)
from ..models.specs import SpecError, VAESpec
from .recovery import naming_saved_latent

log = logging.getLogger("cogx")

# Live values per pixel and channel at the widest point of a chunk: so many per frame (buffers of whole frames), and so
# many for the causal caches, which do not depend on the frames. Measured at full size by tests/comfy/test_memory.py;
# the channels are those of the second level, upsampled to full size, when decoding and of the first when encoding.
DECODE_LIVE_VALUES = (3.5, 15.5)
ENCODE_LIVE_VALUES = (5.2, 15.6)

DEFAULT_TILE = (240, 360)  # pixels, rows and columns: half the native size, as in the reference
DEFAULT_OVERLAP = 64


def _on_own_device(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Run on the VAE's device, which need not be the current one (core's SelectVAEDevice)."""
    @functools.wraps(method)
    def run(self: CogVideoXVAE, *args: Any, **kwargs: Any) -> Tensor:
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
        self.memory_used_decode = self._decode_memory
        self.memory_used_encode = self._encode_memory
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

    def _decode_memory(self, shape: Any, dtype: torch.dtype) -> float:
        """Bytes of an exact decode beside the weights. shape: [B, C, T, h, w]."""
        latents = _longest_chunk(shape[2], LATENT_CHUNK)
        ratio = self.spec.temporal_compression_ratio
        frames = ratio * latents - (ratio - 1) * (latents % 2)  # the odd latent is one frame
        values = DECODE_LIVE_VALUES[0] * frames + DECODE_LIVE_VALUES[1]
        pixels = shape[3] * shape[4] * self.spec.spatial_ratio**2
        return values * pixels * self.spec.block_out_channels[1] * comfy.model_management.dtype_size(dtype)

    def _encode_memory(self, shape: Any, dtype: torch.dtype) -> float:
        """Bytes of an exact encode beside the weights. shape: [B, 3, T, H, W] in pixels."""
        frames = _longest_chunk(shape[2], PIXEL_CHUNK)
        values = ENCODE_LIVE_VALUES[0] * frames + ENCODE_LIVE_VALUES[1]
        channels = self.spec.block_out_channels[0]
        return values * shape[3] * shape[4] * channels * comfy.model_management.dtype_size(dtype)

    def decode(self, samples_in: Tensor, vae_options: Any = None) -> Tensor:
        """Exact: [B, 16, T, h, w] -> [B, frames, H, W, 3]. Core's VAEDecode comes this way."""
        return self.decode_video(samples_in, tiling="auto")

    @naming_saved_latent
    @_on_own_device
    def decode_video(self, samples: Tensor, tiling: str = "auto", tile: tuple[int, int] = DEFAULT_TILE,
                     overlap: int = DEFAULT_OVERLAP) -> Tensor:
        """Frames of a latent.

        Args:
            samples: [B, 16, T, h, w], unscaled.
            tiling: 'off' never splits; 'on' uses spatial tiles (lossy); 'auto' splits only if the rest cannot fit.
            tile: rows and columns of a tile in pixels. overlap: in pixels.
        Returns [B, frames, H, W, 3] in 0..1, on the output device.

        Raises:
            SpecError: a latent of another model, or a tile that does not exceed its overlap.
        """
        self._check_latent(samples)
        tiled = tiling == "on" or (tiling == "auto" and not self._fits(samples.shape, self._decode_memory))
        if not tiled:
            try:
                return self._decode_exact(samples)
            except Exception as error:
                comfy.model_management.raise_non_oom(error)
                if tiling == "off":
                    raise
        if tiling == "auto":
            comfy.model_management.soft_empty_cache()
            log.warning("Decoding %dx%d in tiles: %.1f GB are needed at once and not free. Tiles change the picture "
                        "slightly; free memory or use a smaller size for an exact decode.", samples.shape[4] * 8,
                        samples.shape[3] * 8, self._decode_memory(samples.shape, self.vae_dtype) / 2**30)
        ratio = self.spec.spatial_ratio
        return self._decode_in_tiles(samples, (tile[0] // ratio, tile[1] // ratio), overlap // ratio)

    def _check_latent(self, samples: Tensor) -> None:
        if samples.ndim != 5 or samples.shape[1] != self.latent_channels:
            raise SpecError(f"Expected a CogVideoX latent [batch, {self.latent_channels}, frames, height/8, width/8], "
                            f"got {list(samples.shape)}. Connect the LATENT of a CogVideoX sampler.")

    def _fits(self, shape: Any, estimate: Any) -> bool:
        if comfy.model_management.is_device_cpu(self.device):
            return True
        total = comfy.model_management.get_total_memory(self.device)
        return estimate(shape, self.vae_dtype) + self.model_size() < total

    def _load(self, memory: float) -> None:
        comfy.model_management.load_models_gpu([self.patcher], memory_required=memory)

    def _decode_exact(self, samples: Tensor) -> Tensor:
        self._load(self._decode_memory(samples.shape, self.vae_dtype))
        progress = comfy.utils.ProgressBar(samples.shape[0] * len(chunk_bounds(samples.shape[2], LATENT_CHUNK)))
        videos = []
        for z in samples.split(1):
            chunks = []
            for chunk in self.first_stage_model.decode_chunks(z.to(self.device, self.vae_dtype)):
                chunks.append(self._to_frames(chunk))
                progress.update(1)
            videos.append(torch.cat(chunks, dim=1))
        return torch.cat(videos) if len(videos) > 1 else videos[0]

    def _to_frames(self, pixels: Tensor) -> Tensor:
        """[B, 3, T, H, W] in -1..1 -> [B, T, H, W, 3] in 0..1 on the output device."""
        frames = pixels.to(device=self.output_device, dtype=self.vae_output_dtype(), copy=True)
        return self.process_output(frames).permute(0, 2, 3, 4, 1)  # bcthw -> bthwc

    def _check_tile(self, tile: tuple[int, int], overlap: int) -> None:
        if overlap >= min(tile):
            ratio = self.spec.spatial_ratio
            raise SpecError(f"tile {tile[1] * ratio}x{tile[0] * ratio} pixels: expected more than the overlap of "
                            f"{overlap * ratio}. Make the tile larger or the overlap smaller.")

    def _decode_in_tiles(self, samples: Tensor, tile: tuple[int, int], overlap: int) -> Tensor:
        self._check_tile(tile, overlap)
        shape = (1, *samples.shape[1:3], *(min(pair) for pair in zip(tile, samples.shape[3:], strict=True)))
        self._load(self._decode_memory(shape, self.vae_dtype))
        tiles = len(tile_starts(samples.shape[3], tile[0], tile[0] - overlap)) * len(
            tile_starts(samples.shape[4], tile[1], tile[1] - overlap))
        chunks = len(chunk_bounds(samples.shape[2], LATENT_CHUNK))
        progress = comfy.utils.ProgressBar(samples.shape[0] * tiles * chunks)

        def run(z: Tensor) -> Tensor:
            parts = []
            for chunk in self.first_stage_model.decode_chunks(z.to(self.device, self.vae_dtype)):
                parts.append(chunk.float().cpu())
                progress.update(1)
            return torch.cat(parts, dim=2)

        videos = [blend_tiles(z, tile, overlap, self.spec.spatial_ratio, run) for z in samples.split(1)]
        return self._to_frames(torch.cat(videos))

    @naming_saved_latent
    @_on_own_device
    def decode_tiled(self, samples: Tensor, tile_x: int | None = None, tile_y: int | None = None,
                     overlap: int | None = None, tile_t: int | None = None, overlap_t: int | None = None) -> Tensor:
        """Core's VAEDecodeTiled comes this way; sizes in latent units. Tiles are spatial only: tiles in time would
        break the causal chunks, so ``tile_t`` and ``overlap_t`` are ignored."""
        self._check_latent(samples)
        ratio = self.spec.spatial_ratio
        tile = (tile_y or DEFAULT_TILE[0] // ratio, tile_x or DEFAULT_TILE[1] // ratio)
        return self._decode_in_tiles(samples, tile, DEFAULT_OVERLAP // ratio if overlap is None else overlap)

    def encode(self, pixel_samples: Tensor) -> Tensor:
        """The mean of the posterior, exact. Core's VAEEncode comes this way; see ``encode_video``."""
        return self.encode_video(pixel_samples)

    @_on_own_device
    def encode_video(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents of videos. [frames, H, W, 3] is one video, [B, frames, H, W, 3] a batch of videos.

        Returns [B, 16, T, h, w], unscaled: the mean of the posterior, or a draw from it with the CPU ``generator``,
        video by video as diffusers does. In tiles, with a warning, only if the rest cannot fit or memory runs out.
        """
        video = self._to_video(pixels)
        if self._fits(video.shape, self._encode_memory):
            try:
                return _latents_of(self._encode_exact(video), generator)
            except Exception as error:  # noqa: BLE001 - the host knows which errors mean out of memory
                comfy.model_management.raise_non_oom(error)
        comfy.model_management.soft_empty_cache()
        log.warning("Encoding %dx%d in tiles: %.1f GB are needed at once and not free. Tiles change the latent "
                    "slightly; free memory or use a smaller size for an exact encode.", video.shape[4],
                    video.shape[3], self._encode_memory(video.shape, self.vae_dtype) / 2**30)
        return _latents_of(self._encode_in_tiles(video, DEFAULT_TILE, DEFAULT_OVERLAP), generator)

    def _encode_exact(self, video: Tensor) -> Tensor:
        """Moments: [B, 3, T, H, W] -> [B, 32, T', h, w]."""
        self._load(self._encode_memory(video.shape, self.vae_dtype))
        progress = comfy.utils.ProgressBar(video.shape[0] * len(chunk_bounds(video.shape[2], PIXEL_CHUNK)))
        return torch.cat([self._encode_one(v, progress) for v in video.split(1)]).to(self.output_device)

    def _to_video(self, pixels: Tensor) -> Tensor:
        """Crop to whole latent cells: [..., H, W, C] -> [B, 3, T, H, W] in -1..1."""
        videos = pixels.shape[:-3] if pixels.ndim == 5 else (1, pixels.shape[0])
        pixels = self.vae_encode_crop_pixels(pixels.reshape(-1, *pixels.shape[-3:]))  # it would crop the frames too
        pixels = pixels.reshape(*videos, *pixels.shape[-3:])
        return self.process_input(pixels.permute(0, 4, 1, 2, 3))  # bthwc -> bcthw

    def _encode_one(self, x: Tensor, progress: Any) -> Tensor:
        parts = []
        for moments in self.first_stage_model.encode_chunks(x, self.device, self.vae_dtype):
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
        return _latents_of(self._encode_in_tiles(self._to_video(pixel_samples), tile, overlap))

    def _encode_in_tiles(self, video: Tensor, tile: tuple[int, int], overlap: int) -> Tensor:
        """As ``_encode_exact``."""
        ratio = self.spec.spatial_ratio
        self._check_tile((tile[0] // ratio, tile[1] // ratio), overlap // ratio)
        shape = (1, *video.shape[1:3], *(min(pair) for pair in zip(tile, video.shape[3:], strict=True)))
        self._load(self._encode_memory(shape, self.vae_dtype))
        tiles = len(tile_starts(video.shape[3], tile[0], tile[0] - overlap)) * len(
            tile_starts(video.shape[4], tile[1], tile[1] - overlap))
        chunks = len(chunk_bounds(video.shape[2], PIXEL_CHUNK))
        progress = comfy.utils.ProgressBar(video.shape[0] * tiles * chunks)
        latents = [blend_tiles(v, tile, overlap, 1 / ratio, lambda part: self._encode_one(part, progress))
                   for v in video.split(1)]
        return torch.cat(latents).to(self.output_device)


def _latents_of(moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Mean of the posterior, or a draw from it: [B, 32, T, h, w] (mean and log variance) -> [B, 16, T, h, w]."""
    mean, logvar = moments.chunk(2, dim=1)
    if generator is None:
        return mean.clone(memory_format=torch.contiguous_format)  # a view would keep the log variance in memory
    noise = torch.cat([torch.randn(one.shape, generator=generator) for one in mean.split(1)])
    return mean + (0.5 * logvar.clamp(-30.0, 20.0)).exp() * noise.to(mean)


def _longest_chunk(frames: int, size: int) -> int:
    """The frames of the first chunk; one more than ``size`` if others follow, because those hold full caches."""
    bounds = chunk_bounds(frames, size)
    return bounds[0][1] if len(bounds) == 1 else max(bounds[0][1], size + 1)


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
