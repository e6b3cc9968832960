"""From files to MODEL, CLIP and VAE.

``find_*`` read configs and headers only and say what is wrong; ``load_*`` load. Weights are memory mapped and copied
straight to their dtype. Each patcher knows how to load itself again (``cached_patcher_init``), which core needs for
torch.compile, hooks and several GPUs.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import comfy.model_management
import comfy.model_patcher
import comfy.patcher_extension
import comfy.sd
import comfy.text_encoders.t5
import comfy.utils
import torch

from ..models.cogvideox.apply_model import apply_model, with_ladder
from ..models.cogvideox.base_model import CogVideoXConfig
from ..models.cogvideox.outer_sample import outer_sample
from ..models.cogvideox.transformer import CogVideoXTransformer
from ..models.cogvideox.vae import CogVideoXVAENetwork
from ..models.specs import PUBLISHED, ModelSpec, SpecError, TextSpec, VAESpec, check_dtype
from . import detect
from .files import (
    TensorInfo,
    check_not_quantized,
    check_shapes,
    main_dtype,
    pipeline_class,
    read_headers,
    read_json,
    weight_files,
)
from .recovery import save_outer_sample
from .text_encoder import make_clip, network_config
from .vae import CogVideoXVAE

log = logging.getLogger("cogx")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_FILE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
WRAPPER_KEY, RECOVERY_KEY = "cogx", "cogx_recovery"

SpecT = TypeVar("SpecT", ModelSpec, TextSpec, VAESpec)
ValueT = TypeVar("ValueT")


@dataclass(frozen=True)
class Component(Generic[SpecT]):
    """A component on disk that has been looked at: its files, their tensors, and what they are."""

    files: list[Path]
    prefix: str
    tensors: dict[str, TensorInfo]  # without the prefix
    spec: SpecT

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of its values; bf16 for plain fp8 and the like."""
        return _FILE_DTYPES.get(main_dtype(self.tensors), torch.bfloat16)

    def state_dict(self) -> dict[str, torch.Tensor]:
        state_dict: dict[str, torch.Tensor] = {}
        for file in self.files:
            state_dict.update(_without_prefix(comfy.utils.load_torch_file(str(file)), self.prefix))
        return state_dict


def _shapes(tensors: dict[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    return {key: info.shape for key, info in tensors.items()}


def expected_shapes(network: type[torch.nn.Module], spec: Any) -> dict[str, tuple[int, ...]]:
    module = network(spec, torch.float32, "meta", torch.nn)
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


# ComfyUI's ModelSave writes the first; a state dict of a whole MODEL has the second.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def _without_prefix(values: dict[str, ValueT], prefix: str) -> dict[str, ValueT]:
    return {key[len(prefix):]: value for key, value in values.items() if key.startswith(prefix)}


def _tensors_of(path: Path) -> tuple[list[Path], str, dict[str, TensorInfo]]:
    """The files of a component, the prefix of its keys, and its tensors without it."""
    if path.suffix and not path.is_dir() and path.suffix != ".safetensors":
        raise SpecError(f"{path.name}: expected a .safetensors file. Convert it, or download the safetensors version.")
    files = [path] if path.suffix == ".safetensors" else weight_files(path)
    tensors = read_headers(files)
    check_not_quantized(tensors, str(path))
    prefix = next((p for p in _PREFIXES if any(key.startswith(p) for key in tensors)), "")
    return files, prefix, _without_prefix(tensors, prefix)


def check_pipeline(folder: Path) -> None:
    """Refuse a folder that is not a CogVideoX pipeline.

    Raises:
        SpecError: its model_index.json names another pipeline.
    """
    name = pipeline_class(folder)
    if not name.startswith("CogVideoX"):
        raise SpecError(f"{folder}: expected a CogVideoX pipeline, got {name}. Choose another folder.")


def find_model(path: Path, variant: str = "auto") -> Component[ModelSpec]:
    """What the transformer at ``path`` (component folder or file) is. Reads headers only.

    Raises:
        SpecError: missing, truncated, of another class, or of another shape than its config says.
    """
    files, prefix, tensors = _tensors_of(path)
    shapes = _shapes(tensors)
    if path.is_dir():
        sibling = {name: path.parent / name for name in ("vae/config.json", "scheduler/scheduler_config.json")}
        configs = [read_json(file) if file.is_file() else None for file in sibling.values()]
        spec = detect.model_from_configs(read_json(path / "config.json"), *configs, where=str(path / "config.json"))
        if variant not in ("auto", spec.name):
            raise SpecError(f"variant {variant}: {path / 'config.json'} says {spec.name}. Set variant to auto.")
        detect.check_layer_count(spec.transformer.num_layers, shapes, "transformer_blocks.", str(path))
    else:
        spec = detect.model_from_shapes(shapes, variant)
    # The config is no guide here: diffusers writes a bias that patch_bias denies, and published files lack one.
    network = replace(spec.transformer, patch_bias="patch_embed.proj.bias" in tensors)
    spec = replace(spec, transformer=network)
    check_shapes(shapes, expected_shapes(CogVideoXTransformer, network), str(path))
    return Component(files, prefix, tensors, spec)


def find_vae(path: Path) -> Component[VAESpec]:
    """What the VAE at ``path`` is; as ``find_model``."""
    files, prefix, tensors = _tensors_of(path)
    shapes = _shapes(tensors)
    if path.is_dir():
        spec = detect.vae_from_config(read_json(path / "config.json"), str(path / "config.json"))
    else:
        spec = detect.vae_from_shapes(shapes)
    check_shapes(shapes, expected_shapes(CogVideoXVAENetwork, spec), str(path))
    return Component(files, prefix, tensors, spec)


def expected_text_shapes(spec: TextSpec, found: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    network = comfy.text_encoders.t5.T5(network_config(spec), torch.float32, "meta", torch.nn)
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    if "shared.weight" not in found:  # the same table under its other name
        shapes["encoder.embed_tokens.weight"] = shapes.pop("shared.weight")
    return shapes


def find_text_encoder(path: Path) -> Component[TextSpec]:
    """What the T5 encoder at ``path`` is; as ``find_model``."""
    files, prefix, tensors = _tensors_of(path)
    shapes = _shapes(tensors)
    from_shapes = detect.text_from_shapes(shapes)
    check_shapes(shapes, expected_text_shapes(from_shapes, shapes), str(path))
    if not path.is_dir():
        return Component(files, prefix, tensors, from_shapes)
    spec = detect.text_from_config(read_json(path / "config.json"), str(path / "config.json"))
    for name in ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size"):
        if getattr(spec, name) != getattr(from_shapes, name):
            raise SpecError(f"{path}: config.json says {name} {getattr(spec, name)}, the weights "
                            f"{getattr(from_shapes, name)}. Download the config.json that belongs to them.")
    return Component(files, prefix, tensors, spec)


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
               disable_dynamic: bool = False) -> Any:
    """The MODEL (ModelPatcher) of a transformer folder or file.

    Raises:
        SpecError: as ``find_model``; or a dtype in which the model overflows.
    """
    component = find_model(Path(path), variant)
    spec = component.spec
    check_dtype(weight_dtype, spec)
    config = CogVideoXConfig(spec)
    management = comfy.model_management
    load_device, offload_device = management.get_torch_device(), management.unet_offload_device()
    parameters = sum(torch.Size(info.shape).numel() for info in component.tensors.values())
    dtype, manual_cast = model_dtypes(config, weight_dtype, parameters, component.dtype)
    config.set_inference_dtype(dtype, manual_cast)
    model = config.get_model(device=None)
    if not management.is_device_cpu(offload_device):
        model.to(offload_device)
    patcher = _patcher_class(disable_dynamic)(model, load_device=load_device, offload_device=offload_device)
    model.load_model_weights(component.state_dict(), assign=patcher.is_dynamic())
    kinds = comfy.patcher_extension.WrappersMP
    # The first is the outermost: what is saved is what nodes get, padding frames and inverted noise dealt with.
    for kind, key, wrapper in ((kinds.OUTER_SAMPLE, RECOVERY_KEY, save_outer_sample),
                               (kinds.OUTER_SAMPLE, WRAPPER_KEY, with_ladder),
                               (kinds.OUTER_SAMPLE, WRAPPER_KEY, outer_sample),
                               (kinds.APPLY_MODEL, WRAPPER_KEY, apply_model)):
        patcher.add_wrapper_with_key(kind, key, wrapper)
    patcher.cached_patcher_init = (load_model, (path, weight_dtype, quantization, variant))
    log.info("Loaded %s: CogVideoX %s, %s", path, spec.name, str(dtype).removeprefix("torch."))
    return patcher


def tokenizer_folder(text_encoder: Path) -> Path:
    """The tokenizer beside a text encoder folder; ComfyUI's own T5 tokenizer, which is the same, otherwise.

    The published folders have their tokenizer as spiece.model only, which needs packages that ComfyUI does not have.
    """
    beside = text_encoder.parent / "tokenizer"
    if text_encoder.is_dir() and (beside / "tokenizer.json").is_file():
        return beside
    return Path(comfy.text_encoders.t5.__file__).parent / "t5_tokenizer"


def text_tokens_beside(text_encoder: Path) -> int:
    """The token count that the transformer of the same pipeline folder takes; 226 for a single file."""
    config = text_encoder.parent / "transformer" / "config.json"
    if text_encoder.is_dir() and config.is_file():
        return detect.model_from_configs(read_json(config), where=str(config)).text_tokens
    return PUBLISHED["5B"].text_tokens


def load_text_encoder(path: str, weight_dtype: str = "auto", quantization: str = "none", max_tokens: int = 226,
                      disable_dynamic: bool = False) -> Any:
    """The CLIP of a T5 encoder folder or file. ``auto`` keeps a 16 bit file as it is; ComfyUI computes in fp32.

    Raises:
        SpecError: as ``find_text_encoder``.
    """
    component = find_text_encoder(Path(path))
    clip = make_clip(component.state_dict(), component.spec, tokenizer_folder(Path(path)), max_tokens,
                     DTYPES.get(weight_dtype) or text_dtype(component.dtype), disable_dynamic)
    clip.patcher.cached_patcher_init = (_text_encoder_patcher, (path, weight_dtype, quantization, max_tokens))
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
    vae.load(component.state_dict())
    vae.patcher.cached_patcher_init = (_vae_patcher, (path, weight_dtype))
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
