"""From files to MODEL, CLIP and VAE.

``find_*`` (in ``find.py``) read configs and headers only and say what is wrong; ``load_*`` load. Weights are memory
mapped and copied straight to their dtype. Each patcher knows how to load itself again (``cached_patcher_init``), which
core needs for torch.compile, hooks and several GPUs.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import torch

from ..models.cogvideox.apply_model import apply_model, with_ladder
from ..models.cogvideox.base_model import CogVideoXConfig
from ..models.cogvideox.outer_sample import outer_sample
from ..models.specs import PUBLISHED, ModelSpec, check_dtype
from . import detect, sources
from .files import read_json
from .find import Component, check_pipeline, find_model, find_text_encoder, find_vae
from .quantization import check_quantization, operations, prepared
from .recovery import save_outer_sample
from .text_encoder import default_tokenizer_folder, make_clip
from .vae import CogVideoXVAE

log = logging.getLogger("cogx")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
WRAPPER_KEY, RECOVERY_KEY = "cogx", "cogx_recovery"


def _patcher_class(disable_dynamic: bool) -> Any:
    # Looked up at call time: main.py rebinds CoreModelPatcher when it turns dynamic VRAM on.
    return comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher


def model_dtypes(config: CogVideoXConfig, weight_dtype: str, parameters: int,
                 stored: torch.dtype) -> tuple[torch.dtype, torch.dtype | None]:
    """The dtype of a transformer's weights, and the one that it computes in if that is another.

    parameters: how many the network has. stored: the dtype of the file.
    """
    management, spec = comfy.model_management, config.spec
    load_device = management.get_torch_device()
    dtype = DTYPES.get(weight_dtype) or management.unet_dtype(
        model_params=parameters, supported_dtypes=config.supported_inference_dtypes, weight_dtype=stored)
    if dtype == torch.float16 and not spec.fp16_safe:  # only --fp16-unet gets here
        dtype = torch.bfloat16 if management.should_use_bf16(load_device) else torch.float32
        log.warning("CogVideoX %s overflows in fp16, so --fp16-unet is not followed: %s instead.", spec.name, dtype)
    return dtype, management.unet_manual_cast(dtype, load_device, config.supported_inference_dtypes)


def load_model(path: str, weight_dtype: str = "auto", quantization: str = "none", variant: str = "auto",
               vae_scale: float = 0.0, disable_dynamic: bool = False) -> Any:
    """The MODEL (ModelPatcher) of a transformer folder or file. ``vae_scale`` 0: what the files say.

    Raises:
        SpecError: as ``find_model`` and ``check_quantization``; or a dtype in which the model overflows.
    """
    component = find_model(Path(path), variant, vae_scale)
    check_dtype(weight_dtype, component.spec)
    check_quantization(quantization, component.layers)
    config = CogVideoXConfig(component.spec)
    management = comfy.model_management
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    dtype, manual_cast = model_dtypes(config, weight_dtype, _parameters(component), component.dtype)
    config.set_inference_dtype(dtype, manual_cast)
    is_quantized = quantization != "none" or bool(component.layers)
    if is_quantized:
        config.custom_operations = operations(dtype)
    model = config.get_model(device=None)
    to_offload = not management.is_device_cpu(offload_device)
    if to_offload and not is_quantized:
        model.to(offload_device)
    patcher = _patcher_class(disable_dynamic)(model, load_device=load_device, offload_device=offload_device)
    if is_quantized or patcher.is_dynamic():
        # In one call: layers have no weights before it, and what it lacks is missed or filled with zeros.
        weights = prepared(component.pieces(dtype), "transformer", quantization, dtype)
        model.diffusion_model.load_state_dict(weights, strict=False, assign=patcher.is_dynamic())
    else:
        for batch in component.batches(dtype):
            model.diffusion_model.load_state_dict(batch, strict=False)
    if to_offload and is_quantized:
        model.to(offload_device)  # only now do the quantized layers have weights
    kinds = comfy.patcher_extension.WrappersMP
    # The first is the outermost: what is saved is what nodes get, padding frames and inverted noise dealt with.
    for kind, key, wrapper in ((kinds.OUTER_SAMPLE, RECOVERY_KEY, save_outer_sample),
                               (kinds.OUTER_SAMPLE, WRAPPER_KEY, with_ladder),
                               (kinds.OUTER_SAMPLE, WRAPPER_KEY, outer_sample),
                               (kinds.APPLY_MODEL, WRAPPER_KEY, apply_model)):
        patcher.add_wrapper_with_key(kind, key, wrapper)
    patcher.cached_patcher_init = (load_model, (path, weight_dtype, quantization, variant, vae_scale))
    made = "" if quantization == "none" else f", quantized to {quantization}"
    log.info("Loaded %s as %s: %s%s", path, str(dtype).removeprefix("torch."), component.took, made)
    return patcher


def _parameters(component: Component[ModelSpec]) -> int:
    return sum(torch.Size(info.shape).numel() for info in component.tensors.values())


def model_dtype(component: Component[ModelSpec]) -> torch.dtype:
    """What ``auto`` holds the weights in on this machine."""
    return model_dtypes(CogVideoXConfig(component.spec), "auto", _parameters(component), component.dtype)[0]


def tokenizer_folder(text_encoder: Path) -> Path:
    """The tokenizer beside a text encoder folder; ComfyUI's own T5 tokenizer, which is the same, otherwise.

    The published folders have their tokenizer as spiece.model only, which needs packages that ComfyUI does not have.
    """
    return sources.tokenizer_folder(text_encoder) or default_tokenizer_folder()


def text_tokens_beside(text_encoder: Path) -> int:
    """The token count that the transformer of the same pipeline folder takes; 226 for a single file."""
    config = sources.transformer_config_beside(text_encoder)
    if config is not None:
        return detect.model_from_configs(read_json(config), where=str(config)).text_tokens
    return PUBLISHED["5B"].text_tokens


def load_text_encoder(path: str, weight_dtype: str = "auto", quantization: str = "none", max_tokens: int = 226,
                      disable_dynamic: bool = False) -> Any:
    """The CLIP of a T5 encoder folder or file. ``auto`` keeps a 16 bit file as it is; ComfyUI computes in fp32.

    Raises:
        SpecError: as ``find_text_encoder`` and ``check_quantization``.
    """
    component = find_text_encoder(Path(path))
    check_quantization(quantization, component.layers)
    dtype = DTYPES.get(weight_dtype) or text_dtype(component.dtype)
    layer_types = operations(dtype, full_precision=True) if quantization != "none" or component.layers else None
    clip = make_clip(prepared(component.pieces(dtype), "text_encoder", quantization, dtype), component.spec,
                     tokenizer_folder(Path(path)), max_tokens, dtype, disable_dynamic, layer_types)
    clip.patcher.cached_patcher_init = (_text_encoder_patcher, (path, weight_dtype, quantization, max_tokens))
    log.info("Loaded %s: %s", path, component.took)
    return clip


def text_dtype(stored: torch.dtype) -> torch.dtype:
    """fp32 files (19 GB in the 1.5 folders) are held in bf16, as the reference runs them; not on a CPU."""
    on_cpu = comfy.model_management.is_device_cpu(comfy.model_management.text_encoder_device())
    return torch.bfloat16 if stored == torch.float32 and not on_cpu else stored


def _text_encoder_patcher(*args: Any, disable_dynamic: bool = False) -> Any:
    return load_text_encoder(*args, disable_dynamic=disable_dynamic).patcher


def load_vae(path: str, weight_dtype: str = "auto", disable_dynamic: bool = False) -> Any:
    """The VAE of a VAE folder or file.

    Raises:
        SpecError: as ``find_vae``.
    """
    component = find_vae(Path(path))
    vae = CogVideoXVAE(component.spec, DTYPES.get(weight_dtype), disable_dynamic)
    vae.load(prepared(component.pieces(vae.vae_dtype), "vae", "none", vae.vae_dtype))
    vae.patcher.cached_patcher_init = (_vae_patcher, (path, weight_dtype))
    log.info("Loaded %s: %s", path, component.took)
    return vae


def _vae_patcher(*args: Any, disable_dynamic: bool = False) -> Any:
    return load_vae(*args, disable_dynamic=disable_dynamic).patcher


def load_pipeline(folder: str, weight_dtype: str = "auto", quantization: str = "none") -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE of an HF pipeline folder; the CLIP pads to the model's token count."""
    root = Path(folder)
    check_pipeline(root)
    model = load_model(str(root / "transformer"), weight_dtype, quantization)
    clip = load_text_encoder(str(root / "text_encoder"), weight_dtype, quantization, model.model.spec.text_tokens)
    return model, clip, load_vae(str(root / "vae"), weight_dtype)
