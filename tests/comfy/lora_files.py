"""LoRAs of the demo model, trained with peft, and writers for the layouts that trainers use."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

DEMO = Path(__file__).resolve().parents[2] / "demo" / "CogX-Demo" / "transformer"
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
RANK, ALPHA = 4, 2.0


@dataclass
class Trained:
    """What peft trained: its own files' tensors by module and role, and its own merge of every weight."""

    tensors: dict[str, dict[str, Tensor]]  # module -> what follows it in peft's keys -> tensor
    merged: dict[str, Tensor]
    base: dict[str, Tensor]

    def factors(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {module: (roles["lora_A.weight"], roles["lora_B.weight"]) for module, roles in self.tensors.items()}


def train(make_config: Callable[[], object], folder: Path | None = None, steps: int = 8) -> Trained:
    """A few large steps towards noise; ``folder`` gets what peft itself saves."""
    from diffusers import CogVideoXTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from peft import get_peft_model, get_peft_model_state_dict

    torch.manual_seed(0)
    transformer = CogVideoXTransformer3DModel.from_pretrained(DEMO)
    base = {key: value.clone() for key, value in transformer.state_dict().items()}
    model = get_peft_model(transformer, make_config())
    optimizer = torch.optim.Adam([value for value in model.parameters() if value.requires_grad], lr=2e-2)
    positions = get_3d_rotary_pos_embed(64, ((0, 0), (4, 6)), grid_size=(4, 6), temporal_size=5)
    for _ in range(steps):
        out = model(hidden_states=torch.randn(1, 5, 16, 8, 12), encoder_hidden_states=torch.randn(1, 32, 32),
                    timestep=torch.tensor([500]), image_rotary_emb=positions, return_dict=False)[0]
        (out - torch.randn_like(out)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if folder is not None:
        model.save_pretrained(folder)
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, value in get_peft_model_state_dict(model).items():
        module, role = _split(key.removeprefix("base_model.model."))
        tensors.setdefault(module, {})[role] = value.detach().clone()
    merged = model.merge_and_unload().state_dict()
    return Trained(tensors, merged, base)


def _split(key: str) -> tuple[str, str]:
    start = min(place for mark in (".lora_", ".hada_", ".lokr_") if (place := key.find(mark)) > 0)
    return key[:start], key[start + 1:]


def peft(trained: Trained, folder: Path) -> Path:
    """As ``PeftModel.save_pretrained``, alpha in adapter_config.json."""
    values = {f"base_model.model.{m}.{role}": t for m, roles in trained.tensors.items() for role, t in roles.items()}
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}))
    return _saved(values, folder / "adapter_model.safetensors")


def diffusers(trained: Trained, folder: Path) -> Path:
    """diffusers' own writer, with its metadata."""
    from diffusers import CogVideoXPipeline

    layers = {f"{m}.lora_{x}.weight": t for m, pair in trained.factors().items() for x, t in zip("AB", pair,
                                                                                              strict=True)}
    CogVideoXPipeline.save_lora_weights(folder, transformer_lora_layers=layers,
                                        transformer_lora_adapter_metadata={"r": RANK, "lora_alpha": ALPHA})
    return folder / "pytorch_lora_weights.safetensors"


def diffusers_without_prefix(trained: Trained, folder: Path) -> Path:
    """The bare names, alpha in NAME.json."""
    (folder / "bare.json").write_text(json.dumps({"lora_alpha": ALPHA}))
    return _factors(trained, folder / "bare.safetensors", "{}.lora_A.weight", "{}.lora_B.weight")


def diffusers_in_half_scale(trained: Trained, folder: Path) -> Path:
    """No alpha anywhere: the author meant scale 1."""
    return _factors(trained, folder / "x.safetensors", "transformer.{}.lora_A.weight", "transformer.{}.lora_B.weight",
                    up_times=ALPHA / RANK)


def finetrainers(trained: Trained, folder: Path) -> Path:
    """Names with the adapter's, settings in the metadata under lora_config."""
    settings = json.dumps({"r": RANK, "lora_alpha": ALPHA, "init_lora_weights": True, "target_modules": ATTENTION})
    return _factors(trained, folder / "x.safetensors", "transformer.{}.lora_A.default.weight",
                    "transformer.{}.lora_B.default.weight", metadata={"lora_config": settings})


def old_diffusers(trained: Trained, folder: Path) -> Path:
    values = {}
    for module, (down, up) in trained.factors().items():
        block, name = module.removesuffix(".0").rsplit(".", 1)
        values[f"transformer.{block}.processor.{name}_lora.down.weight"] = down
        values[f"transformer.{block}.processor.{name}_lora.up.weight"] = up * (ALPHA / RANK)
    return _saved(values, folder / "x.safetensors")


def kohya(trained: Trained, folder: Path, prefix: str = "lora_unet_") -> Path:
    values = {}
    for module, (down, up) in trained.factors().items():
        name = prefix + module.replace(".", "_")
        values |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    return _saved(values, folder / "x.safetensors")


def fun(trained: Trained, folder: Path) -> Path:
    """CogVideoX-Fun: two underscores, and the text encoder's keys beside."""
    from safetensors.torch import load_file

    values = load_file(kohya(trained, folder, "lora_unet__"))
    values["lora_te_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight"] = torch.ones(4, 32)
    values["lora_te_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight"] = torch.ones(32, 4)
    return _saved(values, folder / "fun.safetensors")


def sat(trained: Trained, folder: Path) -> Path:
    """The authors' trainer: a pair for each third of the fused projection, alpha 1, a pickle of nested dicts."""
    values = {}
    for module, (down, up) in trained.factors().items():
        _, block, _, name = module.split(".", 3)
        dense = name == "to_out.0"
        layer = f"model.diffusion_model.transformer.layers.{block}.attention."
        layer += "dense" if dense else "query_key_value"
        part = 0 if dense else ATTENTION.index(name)
        values[f"{layer}.matrix_A.{part}"], values[f"{layer}.matrix_B.{part}"] = down, up * ALPHA
    path = folder / "mp_rank_00_model_states.pt"
    torch.save({"module": values, "global_steps": 8}, path)
    return path


def fused(trained: Trained, folder: Path, name: str = "layers.{}.attention.query_key_value") -> Path:
    """One pair of three times the rank for the fused projection; its three parts do not mix."""
    values = {}
    factors = trained.factors()
    for block in range(8):
        pairs = [factors[f"transformer_blocks.{block}.attn1.{third}"] for third in ATTENTION[:3]]
        module = f"diffusion_model.{name.format(block)}"
        values[f"{module}.lora_A.weight"] = torch.cat([down for down, _ in pairs])
        values[f"{module}.lora_B.weight"] = torch.block_diag(*(up for _, up in pairs))
        values[f"{module}.alpha"] = torch.tensor(3 * ALPHA)
        out = f"transformer_blocks.{block}.attn1.to_out.0"
        values[f"{out}.lora_A.weight"], values[f"{out}.lora_B.weight"] = factors[out]
        values[f"{out}.alpha"] = torch.tensor(ALPHA)
    return _saved(values, folder / "x.safetensors")


def fused_diffusers(trained: Trained, folder: Path) -> Path:
    return fused(trained, folder, "transformer_blocks.{}.attn1.to_qkv")


def core(trained: Trained, folder: Path) -> Path:
    """The names of ComfyUI's own CogVideoX."""
    core_names = dict(zip(ATTENTION, ("q", "k", "v", "attn_out"), strict=True))
    values = {}
    for module, (down, up) in trained.factors().items():
        _, block, _, name = module.split(".", 3)
        name = f"diffusion_model.blocks.{block}.{core_names[name]}"
        values |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(ALPHA)}
    return _saved(values, folder / "x.safetensors")


def differences(trained: Trained, folder: Path) -> Path:
    """The change itself, as core's extraction and its LoRA training write it."""
    changes = {key: value - trained.base[key] for key, value in trained.merged.items()}
    return _saved({f"diffusion_model.{key.removesuffix('.weight')}.diff": value for key, value in changes.items()
                   if key.endswith(".weight")} | {
                   f"diffusion_model.{key.removesuffix('.bias')}.diff_b": value for key, value in changes.items()
                   if key.endswith(".bias")}, folder / "x.safetensors")


def whole_weights(trained: Trained, folder: Path) -> Path:
    changed = [module for module in trained.tensors]
    return _saved({f"diffusion_model.{module}.set_weight": trained.merged[f"{module}.weight"] for module in changed},
                  folder / "x.safetensors")


LAYOUTS = {writer.__name__: writer for writer in (
    peft, diffusers, diffusers_without_prefix, diffusers_in_half_scale, finetrainers, old_diffusers, kohya, fun, sat,
    fused, fused_diffusers, core, differences, whole_weights)}


def _factors(trained: Trained, path: Path, down: str, up: str, up_times: float = 1.0,
             metadata: dict[str, str] | None = None) -> Path:
    values = {}
    for module, (a, b) in trained.factors().items():
        values |= {down.format(module): a, up.format(module): b * up_times}
    return _saved(values, path, metadata)


def _saved(values: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> Path:
    save_file({key: value.contiguous().clone() for key, value in values.items()}, path, metadata)
    return path
