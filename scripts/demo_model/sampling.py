"""Sampling while training: the reference's DDIM with guidance, as diffusers' pipelines run it, in batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .evaluate import Case
from .networks import LATENT_CHANNELS, LATENT_HEIGHT, LATENT_WIDTH, SCALING_FACTOR, Variant, make_scheduler, positions
from .runs import DEVICE, torch_generator
from .train_text import tokenize
from .train_vae import to_frames, to_pixels

STEPS, GUIDANCE = 25, 6.0  # while training; the demo's guidance of 2 looks better and scores the same
OFS = 2.0  # what the authors give the 1.5 image model


def condition(variant: Variant, image: torch.Tensor) -> torch.Tensor:
    """Condition channels [B, T, C, h, w] of image latents [B, C, h, w], unscaled.

    The image on the first frame and zeros elsewhere; scaled as a latent in 1.0, and not in 1.5 (the authors' rule).
    """
    placed = image.new_zeros(image.shape[0], variant.latent_frames, *image.shape[1:])
    placed[:, 0] = image if variant.is_1_5 else image * SCALING_FACTOR
    return placed


def embed(text_encoder: Any, tokenizer: Any, prompts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return text_encoder(tokenize(tokenizer, prompts))[0]


def ofs(transformer: Any) -> torch.Tensor | None:
    return None if transformer.config.ofs_embed_dim is None else torch.full((1,), OFS, device=DEVICE)


@torch.no_grad()
def sample(variant: Variant, networks: dict[str, Any], cases: list[Case], guidance: float = GUIDANCE) -> np.ndarray:
    """Videos of the cases: uint8 [B, F, H, W, 3]."""
    transformer, vae, scheduler = networks["transformer"], networks["vae"], make_scheduler()
    scheduler.set_timesteps(STEPS)
    size = (LATENT_CHANNELS, LATENT_HEIGHT, LATENT_WIDTH)
    x = torch.stack([torch.randn(variant.latent_frames, *size, generator=torch_generator(case.seed))
                     for case in cases]).to(DEVICE)
    text = embed(networks["text_encoder"], networks["tokenizer"], [""] * len(cases) + [case.prompt for case in cases])
    extra = []
    if variant.image:
        pixels = to_pixels(np.stack([case.image for case in cases])[:, None]).to(DEVICE)  # type: ignore[arg-type]
        placed = condition(variant, vae.encode(pixels).latent_dist.mean[:, :, 0])
        extra = [placed.repeat(2, 1, 1, 1, 1)]
    rotary = positions(transformer, DEVICE)
    for timestep in scheduler.timesteps:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            v = transformer(torch.cat([x.repeat(2, 1, 1, 1, 1), *extra], 2), text, timestep.expand(2 * len(cases)),
                            ofs=ofs(transformer), image_rotary_emb=rotary, return_dict=False)[0].float()
        without, with_text = v.chunk(2)
        x = scheduler.step(without + guidance * (with_text - without), timestep, x, return_dict=False)[0]
    latents = x[:, variant.latent_frames % 5:].permute(0, 2, 1, 3, 4) / SCALING_FACTOR  # btchw -> bcthw
    return np.concatenate([to_frames(vae.decode(part).sample) for part in latents.split(6)])


def generator_of(variant: Variant, networks: dict[str, Any], cases: list[Case]) -> Callable[[Case], np.ndarray]:
    """``sample`` as the function that ``evaluate`` takes, computed for all ``cases`` at once."""
    videos = {case.seed: video for case, video in zip(cases, sample(variant, networks, cases), strict=True)}
    return lambda case: videos[case.seed]
