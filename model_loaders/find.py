"""What is on disk: the files of a component, their layout, and what model they are. Reads configs and headers only.

A config.json decides where there is one, then what CogX Save Model noted in a file, then the config in its metadata,
then the shapes, then what the user says. ``Component.took`` says in words what was taken and why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import comfy.text_encoders.t5
import torch

from ..models.cogvideox.transformer import CogVideoXTransformer, with_published_keys
from ..models.cogvideox.vae import CogVideoXVAENetwork
from ..models.specs import ModelSpec, SpecError, TextSpec, TransformerSpec, VAESpec
from . import detect, weights
from .families import not_this
from .files import TensorInfo, check_shapes, is_file, is_folder, main_dtype, pipeline_class, read_json, weight_set
from .keys import TEXT_MARK, TRANSFORMER_MARK, VAE_MARK, Found, Part, Shape, find_component
from .quantization import check_stored, described
from .quantized_files import Described, Layers, describe
from .saved_spec import spec_from_metadata
from .sources import config_of, latent_configs
from .text_encoder import network_config

_FILE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_WANTED = {"transformer": ("CogVideoX transformer", TRANSFORMER_MARK), "vae": ("CogVideoX VAE", VAE_MARK),
           "text_encoder": ("T5 encoder", TEXT_MARK)}

SpecT = TypeVar("SpecT", ModelSpec, TextSpec, VAESpec)
Shapes = dict[str, Shape]


@dataclass(frozen=True)
class Component(Generic[SpecT]):
    """A component on disk that has been looked at. ``tensors``, ``layers`` (what is quantized) and ``parts`` go by
    diffusers' keys, and shapes are those of the network; ``source`` goes by the keys of the files."""

    source: Described
    tensors: dict[str, TensorInfo]
    layers: Layers
    parts: dict[str, Part]
    layout: str
    spec: SpecT
    took: str = ""

    @property
    def files(self) -> list[Path]:
        return self.source.files

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of most of its values; bf16 for quantized ones."""
        return _FILE_DTYPES.get(main_dtype(self.tensors), torch.bfloat16)

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[str, weights.Weight]]:
        """Its weights, by key. ``dtype``: of what has to be unpacked because the network has it in other pieces."""
        return weights.pieces(self.source, self.parts, dtype)

    def batches(self, dtype: torch.dtype) -> Iterator[dict[str, weights.Weight]]:
        """The same, a layer at a time: what had to be put together for one layer is freed before the next."""
        return weights.batches(self.source, self.parts, dtype)


class _Seen(NamedTuple):
    """The part of some files that is the wanted component."""

    source: Described
    tensors: dict[str, TensorInfo]
    shapes: Shapes
    found: Found

    def component(self, spec: SpecT, took: str) -> Component[SpecT]:
        layers = {_layer(key): self.source.layers[_layer(part.key)] for key, part in self.found.parts.items()
                  if not (part.blocks or part.factors) and _layer(part.key) in self.source.layers
                  and key.endswith(".weight")}
        took += self._merged()
        words = f"{took}; {self.found.layout} layout, {main_dtype(self.tensors)}{described(layers)}"
        return Component(self.source, self.tensors, layers, self.found.parts, self.found.layout, spec, words)


    def _merged(self) -> str:
        """The LoRA that is in the file, in words."""
        ranks = sorted({self.source.tensors[part.factors[1]].shape[0] for part in self.found.parts.values()
                        if part.factors})
        if not ranks:
            return ""
        rank = " and ".join(map(str, ranks))
        return f"; the LoRA of rank {rank} in it merged at 1/rank, as SAT trains it (alpha 1)"


def _layer(key: str) -> str:
    return key.removesuffix(".weight")


def _see(component: str, path: Path) -> _Seen:
    source = describe(weight_set(path))
    check_stored(source, str(path))
    found = find_component(component, {key: info.shape for key, info in source.tensors.items()})
    if found is None:
        raise SpecError(f"{path}: {not_this(*_WANTED[component], source.tensors)}")
    tensors = {key: TensorInfo(source.tensors[part.key].dtype, part.shape) for key, part in found.parts.items()}
    return _Seen(source, tensors, {key: part.shape for key, part in found.parts.items()}, found)


def _config_of(path: Path, names: Mapping[str, str]) -> tuple[dict[str, Any] | None, Path]:
    """The config.json that belongs to the weights at ``path``: a folder's must be there and of the right class, one
    beside a file counts if it is of it. ``names``: the entry that says the class, and the class."""
    file = config_of(path)
    if file is None:
        return None, path
    config = read_json(file)
    right = all(value in str(config.get(key)) for key, value in names.items())
    return (config if is_folder(path) or right else None), file


def expected_shapes(network: type[torch.nn.Module], spec: Any) -> Shapes:
    """The shapes of a network. All layers of a transformer are alike, so that one is built, whatever a file claims."""
    if not isinstance(spec, TransformerSpec):
        return _shapes_of(network(spec, torch.float32, "meta", torch.nn))
    one = _shapes_of(network(replace(spec, num_layers=1), torch.float32, "meta", torch.nn))
    return _repeated(one, "transformer_blocks.", 0, spec.num_layers)


def _shapes_of(module: torch.nn.Module) -> Shapes:
    return {key: tuple(value.shape) for key, value in with_published_keys(module.state_dict()).items()}


def _repeated(shapes: Shapes, prefix: str, last: int, layers: int) -> Shapes:
    """``shapes`` of a network of ``last + 1`` layers, with its last layer repeated up to ``layers``."""
    of_last = {key[len(prefix + str(last)):]: shape for key, shape in shapes.items()
               if key.startswith(f"{prefix}{last}.")}
    return {**shapes, **{f"{prefix}{layer}{rest}": shape for layer in range(last + 1, layers)
                         for rest, shape in of_last.items()}}


def check_pipeline(folder: Path) -> None:
    """Refuse a folder that is not a CogVideoX pipeline.

    Raises:
        SpecError: its model_index.json names another pipeline, or one of CogVideoX-Fun or with control.
    """
    name = pipeline_class(folder)
    if not name.startswith("CogVideoX"):
        raise SpecError(f"{folder}: expected a CogVideoX pipeline, got {name}. Choose another folder.")
    if "Fun" in name or "Control" in name:
        raise SpecError(f"{folder}: expected a pipeline for text or image to video, got {name}, which needs control or "
                        "in-painting. This pack does not run it; choose another folder.")


def find_model(path: Path, variant: str = "auto", vae_scale: float = 0.0) -> Component[ModelSpec]:
    """What the transformer at ``path`` (component folder, file or shard) is. Reads headers only.

    ``variant`` and ``vae_scale`` are the user's word where the files do not tell; 'auto' and 0 leave it to them.

    Raises:
        SpecError: missing, truncated, of another class, or of another shape than its config says.
    """
    seen = _see("transformer", path)
    rotates = any(key.endswith(detect.FREQUENCIES) for key in seen.source.tensors)
    config, file = _config_of(path, {"_class_name": detect.TRANSFORMER_CLASS})
    if config is not None:
        configs = [config, *(read_json(other) if is_file(other) else None for other in latent_configs(file))]
        saved, where = None, str(file)
    else:
        inside = detect.configs_in_metadata(seen.source.metadata)
        configs = [inside.get(name) for name in ("transformer", "vae", "scheduler")]
        saved, where = spec_from_metadata(seen.source.metadata, str(path)), f"the metadata of {path}"
    spec, why = _model_spec(seen.shapes, saved, configs, where, variant, rotates)
    # The config is no guide here: diffusers writes a bias that patch_bias denies, and published files lack one.
    network = replace(spec.transformer, patch_bias="patch_embed.proj.bias" in seen.tensors)
    scale = vae_scale or spec.latent.scaling_factor
    told = "its vae config" if (configs[1] or {}).get("scaling_factor") else f"as published for {spec.name}"
    whose = "as set" if vae_scale else "as it was saved" if saved else told
    spec = replace(spec, transformer=network, latent=replace(spec.latent, scaling_factor=scale))
    check_shapes(seen.shapes, expected_shapes(CogVideoXTransformer, network), str(path))
    why += detect.doubt(network)
    return seen.component(spec, f"CogVideoX {spec.name} ({why}); VAE scale {scale:g} ({whose})")


def _model_spec(shapes: Shapes, saved: ModelSpec | None, configs: list[dict[str, Any] | None], where: str,
                variant: str, rotates: bool) -> tuple[ModelSpec, str]:
    """The model, and how that is known. ``rotates``: the file holds rotary frequencies."""
    transformer, vae, scheduler = configs
    if saved is not None or transformer is not None:
        spec = saved or detect.model_from_configs(transformer, vae, scheduler, where=where)
        if variant not in ("auto", spec.name):
            raise SpecError(f"variant {variant}: {where} says {spec.name}. Set variant to auto.")
        detect.check_layer_count(spec.transformer.num_layers, shapes, "transformer_blocks.", where)
        return spec, "its config" if saved is None else "as it was saved"
    spec = detect.model_from_shapes(shapes, variant, rotates)
    return spec, "as set" if variant != "auto" else f"its shapes{detect.positions(shapes, rotates).why}"


def find_vae(path: Path) -> Component[VAESpec]:
    """What the VAE at ``path`` is; as ``find_model``."""
    seen = _see("vae", path)
    config, file = _config_of(path, {"_class_name": detect.VAE_CLASS})
    inside = detect.configs_in_metadata(seen.source.metadata).get("vae")
    if config is not None:
        spec, why = detect.vae_from_config(config, str(file)), "its config"
    elif inside is not None and "_class_name" in inside:
        spec, why = detect.vae_from_config(inside, f"the metadata of {path}"), "its metadata"
    else:
        spec, why = detect.vae_from_shapes(seen.shapes), "its shapes"
    check_shapes(seen.shapes, expected_shapes(CogVideoXVAENetwork, spec), str(path))
    return seen.component(spec, f"CogVideoX VAE ({why}); its latents carry no scale, the MODEL has it")


def expected_text_shapes(spec: TextSpec, found: Shapes) -> Shapes:
    small = replace(spec, num_layers=min(spec.num_layers, 2))  # the first layer has the relative positions for all
    network = comfy.text_encoders.t5.T5(network_config(small), torch.float32, "meta", torch.nn)
    shapes = _repeated(_shapes_of(network), "encoder.block.", small.num_layers - 1, spec.num_layers)
    if "shared.weight" not in found:  # the same table under its other name
        shapes["encoder.embed_tokens.weight"] = shapes.pop("shared.weight")
    return shapes


def find_text_encoder(path: Path) -> Component[TextSpec]:
    """What the T5 encoder at ``path`` is; as ``find_model``."""
    seen = _see("text_encoder", path)
    from_shapes = detect.text_from_shapes(seen.shapes)
    check_shapes(seen.shapes, expected_text_shapes(from_shapes, seen.shapes), str(path))
    config, file = _config_of(path, {"architectures": "T5"})
    words = f"T5 encoder of {from_shapes.num_layers} layers, width {from_shapes.d_model}"
    if config is None:
        return seen.component(from_shapes, f"{words} (its shapes)")
    spec = detect.text_from_config(config, str(file))
    for name in ("d_model", "d_kv", "d_ff", "num_layers", "num_heads", "vocab_size"):
        if getattr(spec, name) != getattr(from_shapes, name):
            raise SpecError(f"{path}: config.json says {name} {getattr(spec, name)}, the weights "
                            f"{getattr(from_shapes, name)}. Download the config.json that belongs to them.")
    return seen.component(spec, f"{words} (its config)")
