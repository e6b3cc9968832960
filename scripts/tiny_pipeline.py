"""Makes a seeded random tiny CogVideoX pipeline folder in the exact layout of the published ones.

    python scripts/tiny_pipeline.py --output models/diffusers/tiny --tokenizer PATH/t5_tokenizer [--variant 5B]

It has the architecture of the chosen variant at a few hundred kilobytes, so every code path can be run and compared
on a CPU in seconds. Its weights mean nothing: the video is noise.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

import torch

VARIANTS = ("2B", "5B", "5B-I2V", "1.5-5B", "1.5-5B-I2V")
LATENT_WIDTH, LATENT_HEIGHT, FRAMES = 12, 8, 17  # 96x64 pixels, 17 frames
TEXT_TOKENS, TEXT_DIM = 226, 32


def transformer_config(variant: str, **overrides: Any) -> dict[str, Any]:
    """Arguments of ``CogVideoXTransformer3DModel`` for a tiny model of the kind of ``variant``."""
    config: dict[str, Any] = {
        "num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2, "time_embed_dim": 32,
        "text_embed_dim": TEXT_DIM, "attention_bias": True, "max_text_seq_length": TEXT_TOKENS,
        "sample_width": LATENT_WIDTH, "sample_height": LATENT_HEIGHT, "sample_frames": FRAMES,
        "use_rotary_positional_embeddings": variant != "2B",
        "use_learned_positional_embeddings": variant == "5B-I2V",
        "in_channels": 32 if variant.endswith("I2V") else 16,
    }
    if variant.startswith("1.5"):
        # 300x300 is what the first published config says: the authors' grid of positions, not a video size.
        config.update(patch_size_t=2, patch_bias=False, max_text_seq_length=224, sample_width=300, sample_height=300,
                      ofs_embed_dim=32 if variant.endswith("I2V") else None)
    return {**config, **overrides}


def vae_config(variant: str) -> dict[str, Any]:
    """Arguments of ``AutoencoderKLCogVideoX``."""
    return {
        "block_out_channels": (8, 8, 16, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "sample_width": 8 * LATENT_WIDTH, "sample_height": 8 * LATENT_HEIGHT,
        "scaling_factor": 1.15258426 if variant == "2B" else 0.7,
        "invert_scale_latents": variant == "1.5-5B-I2V",
    }


def scheduler_config(variant: str) -> dict[str, Any]:
    """Arguments of ``CogVideoXDDIMScheduler`` as in the published scheduler_config.json."""
    return {
        "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
        "prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "set_alpha_to_one": True,
        "snr_shift_scale": 3.0 if variant == "2B" else 1.0, "timestep_spacing": "trailing",
    }


def randomize(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Perturb every weight, so that no norm is an identity and no bias zero: a dropped weight then shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        saved = module.state_dict().keys()
        for name, buffer in module.named_buffers():
            if name in saved:  # the learned positions; a computed table is not in the file
                buffer.add_(torch.randn(buffer.shape, generator=generator) * 0.05)
    return module.eval()


def tiny_transformer(variant: str, seed: int = 0, **overrides: Any) -> Any:
    from diffusers import CogVideoXTransformer3DModel

    torch.manual_seed(seed)
    return randomize(CogVideoXTransformer3DModel(**transformer_config(variant, **overrides)), seed)


def tiny_vae(variant: str, seed: int = 0) -> Any:
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(seed)
    return randomize(AutoencoderKLCogVideoX(**vae_config(variant)), seed)


def tiny_text_encoder(vocab_size: int = 32128, seed: int = 0) -> Any:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(seed)
    config = T5Config(d_model=TEXT_DIM, d_kv=8, d_ff=64, num_layers=2, num_heads=4, vocab_size=vocab_size,
                      feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    return randomize(T5EncoderModel(config), seed)


def make(output: Path, tokenizer: Path, variant: str = "5B", seed: int = 0) -> Path:
    """Write the pipeline folder to ``output``; nothing is left there if it fails half-way."""
    from diffusers import (
        CogVideoXDDIMScheduler,
        CogVideoXImageToVideoPipeline,
        CogVideoXPipeline,
    )
    from transformers import T5TokenizerFast

    pipeline_class = CogVideoXImageToVideoPipeline if variant.endswith("I2V") else CogVideoXPipeline
    pipeline = pipeline_class(
        tokenizer=T5TokenizerFast.from_pretrained(tokenizer),
        text_encoder=tiny_text_encoder(seed=seed),
        vae=tiny_vae(variant, seed),
        transformer=tiny_transformer(variant, seed),
        scheduler=CogVideoXDDIMScheduler(**scheduler_config(variant)),
    )
    temporary = output.with_name(output.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    pipeline.save_pretrained(temporary)
    shutil.rmtree(output, ignore_errors=True)
    temporary.rename(output)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the T5 tokenizer")
    parser.add_argument("--variant", choices=VARIANTS, default="5B")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    print(make(args.output, args.tokenizer, args.variant, args.seed))


if __name__ == "__main__":
    main()
