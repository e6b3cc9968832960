"""The diffusers side of the parity table: networks of the published widths with few layers, tiny ones to rehearse."""

from __future__ import annotations

from typing import Any

import torch
from cogx.scripts import tiny_pipeline
from torch import Tensor

SIZE = (5, 30, 44)  # latent (T, H, W); an odd count, so that 1.5 pads
TINY_SIZE = (5, 8, 12)


def relative_error(ours: Tensor, reference: Tensor) -> float:
    """L2 norm of the difference over the L2 norm of the reference; infinite if there is a NaN."""
    assert ours.shape == reference.shape, (tuple(ours.shape), tuple(reference.shape))
    ours, reference = ours.double().cpu(), reference.double().cpu()
    error = float((ours - reference).norm() / reference.norm())
    return error if error == error else float("inf")


def transformer(variant: str, tiny: bool) -> Any:
    """fp32, on the CPU."""
    if tiny:
        return _sharpen(tiny_pipeline.tiny_transformer(variant), 3.0)
    wide: dict[str, Any] = {"num_attention_heads": 30 if variant == "2B" else 48, "attention_head_dim": 64,
                            "num_layers": 4, "time_embed_dim": 512, "text_embed_dim": 4096}
    if not variant.startswith("1.5"):
        wide.update(sample_height=SIZE[1], sample_width=SIZE[2])
    if variant == "1.5-5B-I2V":
        wide["ofs_embed_dim"] = 512
    return _sharpen(tiny_pipeline.tiny_transformer(variant, **wide), 1.0)


def _sharpen(network: Any, values: float) -> Any:
    """Makes attention matter: with random weights it averages over all tokens, to almost nothing, and an error in it
    would not show. Twice the queries and keys give logits of standard deviation 4."""
    with torch.no_grad():
        for block in network.transformer_blocks:
            block.attn1.norm_q.weight *= 2
            block.attn1.norm_k.weight *= 2
            block.attn1.to_v.weight *= values
            block.attn1.to_out[0].weight *= values
    return network


Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def transformer_inputs(reference: Any, size: tuple[int, int, int], device: torch.device,
                       dtype: torch.dtype) -> Inputs:
    """Noisy latent, timesteps, context and ofs of two videos, representable in ``dtype``."""
    config = reference.config
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, config.in_channels, *size, generator=generator).to(device, dtype)
    context = torch.randn(2, config.max_text_seq_length, config.text_embed_dim, generator=generator).to(device, dtype)
    ofs = torch.full((2,), 2.0, device=device) if config.ofs_embed_dim else None
    return x, torch.tensor([999.0, 41.0], device=device), context, ofs


def run_transformer(network: Any, x: Tensor, timestep: Tensor, context: Tensor, ofs: Tensor | None) -> Tensor:
    """diffusers' forward as its pipeline calls it. [B, C, T, H, W]; an odd count of 1.5 is padded at the front.

    The noisy latent's first frame is repeated, the image's moves: the pipeline puts it on the first padded frame.
    """
    padding = -x.shape[2] % (network.config.patch_size_t or 1)
    if padding:
        noisy, image = x[:, :16], x[:, 16:]
        image = torch.cat([image[:, :, :1], torch.zeros_like(image[:, :, :1]), image[:, :, 1:]], dim=2)
        x = torch.cat([torch.cat([noisy[:, :, :1], noisy], dim=2), image], dim=1)
    x = x.permute(0, 2, 1, 3, 4)  # bcthw -> btchw
    rope = _rope(network, x) if network.config.use_rotary_positional_embeddings else None
    out = network(x.to(network.dtype), context.to(network.dtype), timestep, ofs=ofs, image_rotary_emb=rope,
                  return_dict=False)[0]
    return out.permute(0, 2, 1, 3, 4)[:, :, padding:]


def _rope(network: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline.__new__(CogVideoXPipeline)
    pipeline.vae_scale_factor_spatial = 8
    pipeline.register_modules(transformer=network)
    return pipeline._prepare_rotary_positional_embeddings(8 * x.shape[3], 8 * x.shape[4], x.shape[1], x.device)


def vae(tiny: bool) -> Any:
    """fp32, on the CPU."""
    if tiny:
        return tiny_pipeline.tiny_vae("5B")
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(0)
    return tiny_pipeline.randomize(AutoencoderKLCogVideoX(), 0)


def text_encoder(tiny: bool) -> Any:
    """fp32, on the CPU."""
    if tiny:
        return tiny_pipeline.tiny_text_encoder()
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    return T5EncoderModel(T5Config(d_model=1024, d_kv=64, d_ff=2816, num_layers=8, num_heads=16, vocab_size=32128,
                                   feed_forward_proj="gated-gelu", tie_word_embeddings=False)).eval()
