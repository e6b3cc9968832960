"""The training clips, encoded once: shards of latents, condition images and scenes in ``work/latents``."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import clips
from .clips import Scene
from .runs import DEVICE, numpy_generator, read, torch_generator, write
from .train_vae import to_pixels

SHARDS, SHARD_CLIPS = 64, 250
# The image's noise in the reference's training: its standard deviation is log-normal with these parameters.
NOISE_MEAN, NOISE_STD = -3.0, 0.5
NOISED_IMAGES = 2
SEED = 3


@dataclass(frozen=True)
class Clips:
    """All training clips: latents [N, T, C, h, w], where the shape is [N, T, h, w], condition images
    [N, 1 + NOISED_IMAGES, C, h, w] (the clean one first), and what each shows."""

    latents: torch.Tensor
    shape: torch.Tensor
    images: torch.Tensor
    scenes: list[Scene]


def _scenes(shard: int) -> tuple[list[Scene], np.random.Generator]:
    rng = numpy_generator(SEED, shard)
    return [clips.training_scene(rng) for _ in range(SHARD_CLIPS)], rng


def noised(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The reference's noise augmentation of condition images [B, 3, 1, H, W]: sat/diffusion_video.py, add_noise."""
    spread = torch.exp(torch.randn(images.shape[0], generator=generator) * NOISE_STD + NOISE_MEAN)
    noise = torch.randn(images.shape, generator=generator)
    return images + noise.to(images) * spread[:, None, None, None, None].to(images)


@torch.no_grad()
def encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Mean latents [B, T, C, h, w] of [B, 3, F, H, W], unscaled."""
    with torch.autocast(DEVICE.type, torch.bfloat16):
        latents = vae.encode(pixels).latent_dist.mean
    return latents.permute(0, 2, 1, 3, 4).half().cpu()  # bcthw -> btchw


def cells(covered: np.ndarray) -> torch.Tensor:
    """Coverage [F, H, W] at the latents' resolution [T, h, w]: the mean over a cell, the most of its frames."""
    frames = torch.from_numpy(covered).float()
    pooled = torch.nn.functional.avg_pool2d(frames[:, None], 8)[:, 0]
    later = pooled[1:].unflatten(0, (-1, 4)).amax(1)
    return torch.cat([pooled[:1], later]).half()


def make_shard(vae: Any, shard: int) -> dict[str, torch.Tensor]:
    scenes, rng = _scenes(shard)
    generator = torch_generator(SEED, shard)
    made: dict[str, list[torch.Tensor]] = {"latents": [], "shape": [], "images": []}
    for start in range(0, SHARD_CLIPS, 5):
        pairs = [clips.render(scene, rng) for scene in scenes[start:start + 5]]
        pixels = to_pixels(np.stack([frames for frames, _ in pairs])).to(DEVICE)
        first = pixels[:, :, :1]
        images = [encode(vae, first), *(encode(vae, noised(first, generator)) for _ in range(NOISED_IMAGES))]
        made["latents"].append(encode(vae, pixels))
        made["shape"].append(torch.stack([cells(covered) for _, covered in pairs]))
        made["images"].append(torch.cat(images, 1))
    return {name: torch.cat(parts) for name, parts in made.items()}


def fingerprint(vae: Any) -> str:
    return hashlib.sha256(b"".join(value.cpu().numpy().tobytes() for value in vae.state_dict().values())).hexdigest()


def prepare(work: Path, vae: Any, only: range | None = None) -> None:
    """Encodes what is missing; shards of another VAE are made anew."""
    folder = work / "latents"
    mark, wanted = folder / "vae", fingerprint(vae)
    if not mark.exists() or mark.read_text(encoding="utf-8") != wanted:
        for old in folder.glob("*.pt"):
            old.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(wanted, encoding="utf-8")
    for shard in only or range(SHARDS):
        path = folder / f"{shard:03}.pt"
        if not path.exists():
            write(path, make_shard(vae, shard))


def load(work: Path) -> Clips:
    paths = sorted((work / "latents").glob("*.pt"))
    if len(paths) != SHARDS:
        raise RuntimeError(f"{len(paths)} of {SHARDS} parts of the encoded clips are in {work / 'latents'}: run the "
                           "stage 'latents' to its end first")
    shards = [read(path) for path in paths]
    joined = {name: torch.cat([shard[name] for shard in shards]) for name in ("latents", "shape", "images")}
    return Clips(**joined, scenes=[scene for path in paths for scene in _scenes(int(path.stem))[0]])


