"""Writes a diffusers model in the layouts of others: the authors' (SAT) and ComfyUI core's.

Written from what is public about these files (the module names in the CogVideo repository's ``sat/`` folder and in
``comfy/ldm/cogvideo``), by walking diffusers' modules. It shares no table with the pack.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _put(out: dict[str, Tensor], name: str, module: Any) -> None:
    for kind in ("weight", "bias"):
        value = getattr(module, kind, None)
        if value is not None:
            out[f"{name}.{kind}"] = value.detach().clone()


def _fused(modules: list[Any], kind: str) -> Tensor:
    return torch.cat([getattr(module, kind).detach() for module in modules])


def sat_transformer(model: Any, linear_patch: bool = False) -> dict[str, Tensor]:
    """``model.diffusion_model...`` of ``mp_rank_00_model_states.pt``, with what else stands in such a file.

    ``linear_patch``: the patch embedding of 1.0 as a matrix over (c, 1, p, q), as the authors' code is today.
    """
    out: dict[str, Tensor] = {}
    embed, config = model.patch_embed, model.config
    _put(out, "mixins.patch_embed.proj", embed.proj)
    _put(out, "mixins.patch_embed.text_proj", embed.text_proj)
    if linear_patch:
        out["mixins.patch_embed.proj.weight"] = out["mixins.patch_embed.proj.weight"].flatten(1)
    sincos = not config.use_rotary_positional_embeddings
    if sincos or config.use_learned_positional_embeddings:  # stored whether it is learned or computed
        out["mixins.pos_embed.pos_embedding"] = embed.pos_embedding.detach().clone()
    else:
        out["mixins.pos_embed.freqs_sin"] = torch.zeros(5, 4, 6, config.attention_head_dim)
    _put(out, "time_embed.0", model.time_embedding.linear_1)
    _put(out, "time_embed.2", model.time_embedding.linear_2)
    if config.ofs_embed_dim:
        _put(out, "ofs_embed.0", model.ofs_embedding.linear_1)
        _put(out, "ofs_embed.2", model.ofs_embedding.linear_2)
    for i, block in enumerate(model.transformer_blocks):
        _sat_block(out, i, block)
    _put(out, "transformer.final_layernorm", model.norm_final)
    _put(out, "mixins.final_layer.adaLN_modulation.1", model.norm_out.linear)
    _put(out, "mixins.final_layer.norm_final", model.norm_out.norm)
    _put(out, "mixins.final_layer.linear", model.proj_out)
    return {f"model.diffusion_model.{key}": value for key, value in out.items()}


def _sat_block(out: dict[str, Tensor], i: int, block: Any) -> None:
    layer, adaln = f"transformer.layers.{i}", "mixins.adaln_layer"
    attention = block.attn1
    _put(out, f"{layer}.input_layernorm", block.norm1.norm)
    _put(out, f"{layer}.post_attention_layernorm", block.norm2.norm)
    for kind in ("weight", "bias"):
        qkv = [attention.to_q, attention.to_k, attention.to_v]
        out[f"{layer}.attention.query_key_value.{kind}"] = _fused(qkv, kind)
        shift1, scale1, gate1, text_shift1, text_scale1, text_gate1 = getattr(block.norm1.linear, kind).chunk(6)
        shift2, scale2, gate2, text_shift2, text_scale2, text_gate2 = getattr(block.norm2.linear, kind).chunk(6)
        out[f"{adaln}.adaLN_modulations.{i}.1.{kind}"] = torch.cat([
            shift1, scale1, gate1, shift2, scale2, gate2,
            text_shift1, text_scale1, text_gate1, text_shift2, text_scale2, text_gate2]).detach()
    _put(out, f"{layer}.attention.dense", attention.to_out[0])
    _put(out, f"{layer}.mlp.dense_h_to_4h", block.ff.net[0].proj)
    _put(out, f"{layer}.mlp.dense_4h_to_h", block.ff.net[2])
    _put(out, f"{adaln}.query_layernorm_list.{i}", attention.norm_q)
    _put(out, f"{adaln}.key_layernorm_list.{i}", attention.norm_k)


def core_transformer(model: Any) -> dict[str, Tensor]:
    """The keys of ``comfy.ldm.cogvideo.model.CogVideoXTransformer3DModel``."""
    out: dict[str, Tensor] = {}
    _put(out, "patch_embed.proj", model.patch_embed.proj)
    _put(out, "patch_embed.text_proj", model.patch_embed.text_proj)
    if model.config.use_learned_positional_embeddings:
        out["patch_embed.pos_embedding"] = model.patch_embed.pos_embedding.detach().clone()
    for name in ("time_embedding", "ofs_embedding"):
        if getattr(model, name, None) is not None:
            _put(out, f"{name}_linear_1", getattr(model, name).linear_1)
            _put(out, f"{name}_linear_2", getattr(model, name).linear_2)
    for i, block in enumerate(model.transformer_blocks):
        attention = block.attn1
        for name, module in (
                ("norm1.linear", block.norm1.linear), ("norm1.norm", block.norm1.norm), ("q", attention.to_q),
                ("k", attention.to_k), ("v", attention.to_v), ("norm_q", attention.norm_q),
                ("norm_k", attention.norm_k), ("attn_out", attention.to_out[0]), ("norm2.linear", block.norm2.linear),
                ("norm2.norm", block.norm2.norm), ("ff_proj", block.ff.net[0].proj), ("ff_out", block.ff.net[2])):
            _put(out, f"blocks.{i}.{name}", module)
    _put(out, "norm_final", model.norm_final)
    _put(out, "norm_out.linear", model.norm_out.linear)
    _put(out, "norm_out.norm", model.norm_out.norm)
    _put(out, "proj_out", model.proj_out)
    return out


def sat_vae(vae: Any) -> dict[str, Tensor]:
    """The keys in the ``state_dict`` of ``3d-vae.pt``, with a weight of the loss, which is in it too."""
    out: dict[str, Tensor] = {"loss.logvar": torch.zeros(())}
    encoder, decoder = vae.encoder, vae.decoder
    for level, block in enumerate(encoder.down_blocks):
        _sat_level(out, f"encoder.down.{level}", block, "downsample", block.downsamplers)
    levels = len(decoder.up_blocks)
    for i, block in enumerate(decoder.up_blocks):  # the authors count from the output
        _sat_level(out, f"decoder.up.{levels - 1 - i}", block, "upsample", block.upsamplers)
    for half, part in (("encoder", encoder), ("decoder", decoder)):
        _put(out, f"{half}.conv_in.conv", part.conv_in.conv)
        _put(out, f"{half}.conv_out.conv", part.conv_out.conv)
        _sat_norm(out, f"{half}.norm_out", part.norm_out)
        for number, resnet in enumerate(part.mid_block.resnets, start=1):
            _sat_resnet(out, f"{half}.mid.block_{number}", resnet)
    return out


def _sat_level(out: dict[str, Tensor], name: str, block: Any, step: str, steps: Any) -> None:
    for j, resnet in enumerate(block.resnets):
        _sat_resnet(out, f"{name}.block.{j}", resnet)
    if steps is not None:
        _put(out, f"{name}.{step}.conv", steps[0].conv)


def _sat_resnet(out: dict[str, Tensor], name: str, resnet: Any) -> None:
    _sat_norm(out, f"{name}.norm1", resnet.norm1)
    _sat_norm(out, f"{name}.norm2", resnet.norm2)
    _put(out, f"{name}.conv1.conv", resnet.conv1.conv)
    _put(out, f"{name}.conv2.conv", resnet.conv2.conv)
    if resnet.in_channels != resnet.out_channels:
        _put(out, f"{name}.nin_shortcut", resnet.conv_shortcut)


def _sat_norm(out: dict[str, Tensor], name: str, norm: Any) -> None:
    if not hasattr(norm, "conv_y"):
        return _put(out, name, norm)
    _put(out, f"{name}.norm_layer", norm.norm_layer)
    _put(out, f"{name}.conv_y.conv", norm.conv_y.conv)
    return _put(out, f"{name}.conv_b.conv", norm.conv_b.conv)


def sat_with_lora(model: Any, rank: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint as the authors' trainer saves it with a LoRA (``LoraLinear`` in SwissArmyTransformer's lora2.py, its
    lora_alpha is 1); and the weights of ``model`` that it stands for, by diffusers' keys."""
    generator = torch.Generator().manual_seed(5)
    out, merged = {}, {}
    for key, value in sat_transformer(model).items():
        layer, _, kind = key.rpartition(".")
        if not layer.endswith((".attention.query_key_value", ".attention.dense")):
            out[key] = value
            continue
        out[f"{layer}.original.{kind}"] = value
        if kind == "bias":
            continue
        names = ["to_q", "to_k", "to_v"] if layer.endswith("query_key_value") else ["to_out.0"]
        block = layer.split(".layers.")[1].split(".")[0]
        for i, name in enumerate(names):
            down = out[f"{layer}.matrix_A.{i}"] = torch.randn(rank, value.shape[1], generator=generator) * 0.5
            up = out[f"{layer}.matrix_B.{i}"] = torch.randn(value.shape[0] // len(names), rank, generator=generator)
            own = value.chunk(len(names))[i].double()
            merged[f"transformer_blocks.{block}.attn1.{name}.weight"] = (
                own + (up.double() @ down.double()) * (1 / rank)).float()
    return out, merged
