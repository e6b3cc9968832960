"""Whose file it is, if it is not the one that was asked for: key fingerprints of other model families. Pure."""

from __future__ import annotations

from collections.abc import Iterable

# Name, and pieces of keys that must all occur. The more special come first.
_FAMILIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a LoRA (load it with CogVideoX Load LoRA)", ("lora_A.",)),
    ("a LoRA (load it with CogVideoX Load LoRA)", ("lora_down.",)),
    ("a LoRA (load it with CogVideoX Load LoRA)", ("matrix_A.0", "matrix_B.0")),
    ("CogView3-Plus or CogView4", ("time_condition_embed.", "patch_embed.text_proj.")),
    ("the CogVideoX transformer", ("patch_embed.text_proj.weight",)),
    ("the CogVideoX VAE", ("decoder.mid", "norm1.conv_y.conv.weight")),
    ("the UMT5 text encoder of Wan", ("block.1.layer.0.SelfAttention.relative_attention_bias.weight",)),
    ("a T5 text encoder", ("block.0.layer.0.SelfAttention.relative_attention_bias.weight",)),
    ("HunyuanVideo", ("txt_in.individual_token_refiner.",)),
    ("HunyuanVideo", ("context_embedder.token_refiner.",)),
    ("LTX-Video", ("patchify_proj.", "scale_shift_table")),
    ("LTX-Video", ("caption_projection.", "transformer_blocks.0.scale_shift_table", "proj_in.")),
    ("PixArt", ("adaln_single.", "caption_projection.")),
    ("Wan", ("blocks.0.self_attn.q.", "blocks.0.cross_attn.")),
    ("Wan", ("condition_embedder.text_embedder.", "blocks.0.attn1.to_q.")),
    ("Flux", ("double_blocks.0.img_attn.", "single_blocks.0.")),
    ("Flux", ("single_transformer_blocks.0.", "context_embedder.")),
    ("Stable Diffusion 3", ("joint_blocks.0.",)),
    ("Stable Diffusion 3", ("transformer_blocks.0.attn.add_k_proj.", "context_embedder.")),
    ("Qwen-Image", ("transformer_blocks.0.img_mod.", "txt_norm.")),
    ("Mochi", ("t5_y_embedder.",)),
    ("SDXL", ("label_emb.0.0.", "input_blocks.0.0.")),
    ("SDXL", ("add_embedding.linear_1.", "down_blocks.0.resnets.0.")),
    ("AnimateDiff", ("motion_modules.0.temporal_transformer.",)),
    ("ModelScope or Zeroscope", ("temp_convs.0.conv1.", "temp_attentions.0.")),
    ("Stable Diffusion 1 or 2", ("input_blocks.0.0.", "output_blocks.0.0.")),
    ("Stable Diffusion 1 or 2", ("down_blocks.0.resnets.0.", "up_blocks.0.resnets.0.", "conv_norm_out.", "time_emb")),
    ("the VAE of Wan", ("decoder.middle.0.residual.", "decoder.upsamples.0.")),
    ("the VAE of an image model", ("decoder.mid.block_1.norm1.weight", "encoder.down.0.block.0.")),
    ("the VAE of an image model", ("decoder.mid_block.resnets.0.norm1.weight", "encoder.down_blocks.0.")),
    ("a CLIP text encoder", ("text_model.encoder.layers.0.",)),
    ("a language model", ("layers.0.self_attn.k_proj.", "layers.0.mlp.")),
)


def family_of(keys: Iterable[str]) -> str | None:
    """The family that a file's keys belong to, in words; None if it is not one of those above."""
    joined = "\n".join(keys)
    return next((name for name, pieces in _FAMILIES if all(piece in joined for piece in pieces)), None)


def not_this(wanted: str, mark: str, keys: Iterable[str]) -> str:
    """Why a file is not ``wanted``: the family that it is of, or the key that it lacks and three that it has."""
    keys = list(keys)
    family = family_of(keys)
    if family:
        return f"This is not a {wanted}: expected the key {mark}; by its keys it is {family}. Choose another file."
    return (f"This is not a {wanted}: expected the key {mark} or its like in another layout, got {sorted(keys)[:3]} "
            "... Choose another file.")
