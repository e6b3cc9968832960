"""The demo model's networks: diffusers' and transformers' own classes, small. One owner of every size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .clips import FRAMES, HEIGHT, WIDTH

TEXT_TOKENS, TEXT_DIM = 32, 32
SCALING_FACTOR = 0.7  # of CogVideoX 5B and 1.5; the VAE is normalised so that latents times this have a spread of 1
LATENT_CHANNELS, LATENT_FRAMES = 16, (FRAMES - 1) // 4 + 1
LATENT_HEIGHT, LATENT_WIDTH = HEIGHT // 8, WIDTH // 8


@dataclass(frozen=True)
class Variant:
    """One of the transformers: what distinguishes it, and how long it is trained."""

    image: bool  # image to video: the encoded first frame as 16 more channels
    steps: int
    latent_frames: int = LATENT_FRAMES
    patch_size_t: int | None = None
    start: str | None = None  # the variant whose trained blocks it begins with

    @property
    def is_1_5(self) -> bool:
        return self.patch_size_t is not None


VARIANTS: Mapping[str, Variant] = {
    "5B": Variant(image=False, steps=6500),
    "5B-I2V": Variant(image=True, steps=2000),
    # 5 latent frames and the padding frame in front, for patches of two frames
    "1.5-5B-I2V": Variant(image=True, steps=4000, latent_frames=6, patch_size_t=2, start="5B-I2V"),
}


def make_transformer(variant: Variant) -> Any:
    from diffusers import CogVideoXTransformer3DModel

    config: dict[str, Any] = {
        "num_attention_heads": 2, "attention_head_dim": 64, "num_layers": 8, "time_embed_dim": 32,
        "text_embed_dim": TEXT_DIM, "max_text_seq_length": TEXT_TOKENS, "attention_bias": True,
        "in_channels": 32 if variant.image else 16, "out_channels": 16,
        "sample_width": LATENT_WIDTH, "sample_height": LATENT_HEIGHT, "sample_frames": FRAMES,
        "use_rotary_positional_embeddings": True,
    }
    if variant.is_1_5:
        config.update(patch_size_t=variant.patch_size_t, patch_bias=False, ofs_embed_dim=32,
                      sample_width=300, sample_height=300)  # the authors' grid of positions, as in the published file
    return CogVideoXTransformer3DModel(**config)


def make_vae() -> Any:
    from diffusers import AutoencoderKLCogVideoX

    return AutoencoderKLCogVideoX(block_out_channels=(16, 16, 32, 48), layers_per_block=1, norm_num_groups=8,
                                  sample_width=WIDTH, sample_height=HEIGHT, scaling_factor=SCALING_FACTOR)


def make_text_encoder(vocabulary: int = 32128) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(d_model=TEXT_DIM, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                                   vocab_size=vocabulary, feed_forward_proj="gated-gelu", dropout_rate=0.0,
                                   tie_word_embeddings=False))


def make_scheduler() -> Any:
    """The schedule of the 5B model: scaled linear betas, zero terminal SNR, v-prediction, trailing timesteps."""
    from diffusers import CogVideoXDDIMScheduler

    return CogVideoXDDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                  prediction_type="v_prediction", rescale_betas_zero_snr=True, set_alpha_to_one=True,
                                  snr_shift_scale=1.0, timestep_spacing="trailing")


def positions(transformer: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The rotary positions (cos, sin), as diffusers' pipelines compute them at the demo's size."""
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    config = transformer.config
    grid = (LATENT_HEIGHT // config.patch_size, LATENT_WIDTH // config.patch_size)
    if config.patch_size_t is None:
        crops, frames, extra = ((0, 0), grid), LATENT_FRAMES, {}
    else:
        frames = -(-LATENT_FRAMES // config.patch_size_t)
        crops = None
        extra = {"grid_type": "slice",
                 "max_size": (config.sample_height // config.patch_size, config.sample_width // config.patch_size)}
    return get_3d_rotary_pos_embed(config.attention_head_dim, crops, grid, frames, device=device, **extra)
