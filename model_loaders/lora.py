"""LoRA files as patches on a MODEL, through ComfyUI's own weight adapters.

``lora_keys`` says what each key changes, ``lora_scale`` how strongly the author meant it; here the tensors follow.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import comfy.lora
import comfy.model_management
import torch
from comfy.quant_ops import QuantizedTensor
from comfy.weight_adapter import WeightAdapterBase
from torch import Tensor

from ..models.specs import SpecError
from .files import read_header, readable_kind
from .lora_keys import Change, Plan, Shape, plan, rank_of
from .lora_scale import Scale, Settings, accepted, scale_of, settings_beside, settings_in, words_in
from .weights import read_tensors

log = logging.getLogger("cogx")

_SAMPLED = 8  # modules whose change is measured
_SLICED = ("up", "magnitude", "diff_b")  # of a fused projection: the tensors that have a row for each output
# How ComfyUI's adapters spell our roles.
_COMFY = {"up": "lora_up.weight", "down": "lora_down.weight"}


@dataclass(frozen=True)
class LoraFile:
    name: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str]

    @property
    def shapes(self) -> dict[str, Shape]:
        return {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}


class DoraAdapter(WeightAdapterBase):
    """DoRA (Liu 2024, eq. 5): the change of ``inner``, then every row, or column, scaled to the trained magnitude.

    ComfyUI's own rule for rows divides by the norm of the unchanged weight; the paper, peft and LyCORIS divide by the
    norm of the changed one.
    """

    name = "dora"

    def __init__(self, loaded_keys: set[str], weights: tuple[WeightAdapterBase, Tensor]) -> None:
        self.loaded_keys = loaded_keys
        self.weights = weights

    def calculate_weight(self, weight: Tensor, key: str, strength: float, strength_model: float, offset: Any,
                         function: Any, intermediate_dtype: torch.dtype = torch.float32,
                         original_weight: Any = None) -> Tensor:
        inner, magnitude = self.weights
        changed = inner.calculate_weight(weight.clone(), key, 1.0, strength_model, offset, lambda value: value,
                                         intermediate_dtype, original_weight)
        magnitude = comfy.model_management.cast_to_device(magnitude, weight.device, intermediate_dtype)
        by_column = magnitude.ndim == 2 and magnitude.shape[0] == 1
        flat = changed.flatten(1).to(intermediate_dtype)
        norm = flat.norm(dim=0 if by_column else 1, keepdim=True)
        flat = flat * (magnitude.reshape(norm.shape) / norm)
        weight += function((strength * (flat.reshape(weight.shape) - weight)).type(weight.dtype))
        return weight


def read_lora(path: Path) -> LoraFile:
    """The tensors and the metadata of a LoRA file. Nothing in a file is ever executed.

    Raises:
        SpecError: missing, truncated, or no file of tensors.
    """
    metadata = check_lora_file(path)
    return LoraFile(path.name, read_tensors(path), metadata)


def check_lora_file(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file whose header is right. Reads only the header.

    Raises:
        SpecError: missing, truncated, of no kind that LoRAs come in; a torch file is not looked into.
    """
    kind = readable_kind(path)
    if kind == "gguf":
        raise SpecError(f"{path}: expected a LoRA as a safetensors or torch file, got a GGUF file. Models belong "
                        "into CogVideoX Load Model.")
    return read_header(path)[1] if kind == "safetensors" else {}


def load_lora(model: Any, path: Path, strength: float) -> tuple[Any, str]:
    """A clone of ``model`` with the LoRA at ``path``, and the words for what was done. Strength 1 is the author's.

    Raises:
        SpecError: as ``read_lora`` and ``lora_keys.plan``; settings that are no numbers; NaN.
    """
    file = read_lora(path)
    parameters = dict(model.model.diffusion_model.named_parameters())
    what = plan(file.shapes, {key: tuple(value.shape) for key, value in parameters.items()}, file.name)
    settings, warning = _settings(path, file, what)
    _check_finite(what, file)
    scales = {change.module: _scale(change, file, what, settings) for change in what.changes}
    patches: dict[str, Any] = {}
    for change in what.changes:
        patches.update(_patches(change, file, scales[change.module], parameters[f"{change.module}.weight"].shape))
    patched = model.clone()
    if strength != 0:
        patched.add_patches(patches, strength)
    size = _relative_change(what, file, scales, parameters)
    report = _report(file, what, scales, strength, size)
    log.info("LoRA %s", report.replace("\n", " "))
    for line in [*filter(None, [warning]), *_warnings(file, what)]:
        log.warning("LoRA %s: %s", file.name, line)
        report += f"\n{line}"
    return patched, report


def _settings(path: Path, file: LoraFile, what: Plan) -> tuple[Settings | None, str]:
    if all(change.kind == "diff" or "alpha" in change.roles for change in what.changes):
        return None, ""  # then they decide nothing, whatever they are
    shapes = file.shapes
    ranks = {rank for change in what.changes if (rank := rank_of(change, shapes)) is not None}
    source = "its metadata"
    inside = settings_in(file.metadata, source)
    settings, warning = accepted(inside, ranks) if inside else settings_beside(path, ranks)
    return settings, " ".join(filter(None, [warning, "" if inside else words_in(file.metadata, source)]))


def _check_finite(what: Plan, file: LoraFile) -> None:
    for change in what.changes:
        for key in change.roles.values():
            if not file.tensors[key].float().isfinite().all():  # fp8 cannot be asked
                raise SpecError(f"{file.name}: {key} holds NaN or infinite values, which make a black video. Download "
                                "it again.")


def _scale(change: Change, file: LoraFile, what: Plan, settings: Settings | None) -> Scale:
    if change.kind == "diff":
        return Scale(1.0, "differences have none")
    alpha = file.tensors[change.roles["alpha"]] if "alpha" in change.roles else None
    if alpha is not None and alpha.numel() != 1:
        raise SpecError(f"{file.name}: alpha of {change.module} has {alpha.numel()} values, expected one. Download the "
                        "LoRA again.")
    return scale_of(change.module, rank_of(change, file.shapes), None if alpha is None else float(alpha), settings,
                    "SAT" in what.layouts)


def _patches(change: Change, file: LoraFile, scale: Scale, shape: torch.Size) -> dict[str, Any]:
    """ComfyUI's patches for the weight (of ``shape``) and the bias of a module, by key of the model."""
    named: dict[str, Tensor] = {}
    for role, key in change.roles.items():
        tensor = file.tensors[key]
        if change.third is not None and role in _SLICED and not _is_row(tensor):
            tensor = tensor.narrow(_row_axis(tensor), change.third * shape[0], shape[0])
        if role in ("diff", "set_weight"):
            tensor = tensor.reshape(shape)
        named[f"{change.module}.{_COMFY.get(role, role)}"] = tensor
    magnitude = named.pop(f"{change.module}.magnitude", None)
    _write_alpha(named, change, scale, rank_of(change, file.shapes))
    key = f"diffusion_model.{change.module}.weight"
    patches = comfy.lora.load_lora(named, {change.module: key}, log_missing=False)
    if magnitude is not None:
        adapter = patches[key]
        patches[key] = DoraAdapter(adapter.loaded_keys, (adapter, magnitude))
    return patches


def _is_row(tensor: Tensor) -> bool:
    """A magnitude for each column, which the thirds of a fused projection share."""
    return tensor.ndim == 2 and tensor.shape[0] == 1


def _row_axis(tensor: Tensor) -> int:
    """peft keeps the magnitudes of a convolution as [1, out, 1, 1]."""
    return 1 if tensor.shape[0] == 1 else 0


def _write_alpha(named: dict[str, Tensor], change: Change, scale: Scale, rank: int | None) -> None:
    """The scale as ComfyUI's adapters take it: alpha over rank, or within a factor where there is no rank."""
    if rank:
        named[f"{change.module}.alpha"] = torch.tensor(scale.value * rank, dtype=torch.float64)
    elif change.kind == "lokr" and scale.value != 1:
        factor = f"{change.module}.lokr_w1"
        named[factor] = named[factor].float() * scale.value


def _relative_change(what: Plan, file: LoraFile, scales: dict[str, Scale],
                     parameters: dict[str, Tensor]) -> float | None:
    """Norm of the change over the norm of the weight at strength 1, the median over some modules; None if no LoRA."""
    changes = [change for change in what.changes if change.kind == "lora" and change.third is None]
    sizes = []
    for change in changes[::max(1, len(changes) // _SAMPLED)]:
        up, down = (file.tensors[change.roles[role]].flatten(1).float() for role in ("up", "down"))
        # |up down|^2 from the two small Gram matrices: [rank, rank] in place of [out, in]
        squared = ((up.T @ up) * (down @ down.T)).sum().clamp(min=0)
        weight = parameters[f"{change.module}.weight"]
        norm = float((weight.dequantize() if isinstance(weight, QuantizedTensor) else weight).detach().float().norm())
        if norm:
            sizes.append(abs(scales[change.module].value) * float(squared) ** 0.5 / norm)
    return median(sizes) if sizes else None


def _report(file: LoraFile, what: Plan, scales: dict[str, Scale], strength: float, size: float | None) -> str:
    values = sorted({scale.value for scale in scales.values()})
    sources = list(dict.fromkeys(scale.source for scale in scales.values()))
    shown = f"{values[0]:.4g}" if len(values) == 1 else f"{values[0]:.4g} to {values[-1]:.4g}"
    total = f" = {values[0] * strength:.4g}" if len(values) == 1 else ""
    others = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
    lines = [f"{file.name}: {len(what.changes)} modules, {', '.join(what.layouts)}",
             f"scale {shown} ({sources[0]}{others}) x strength {strength:g}{total}"]
    if size is not None:
        lines.append(f"changes the weights by {size:.2%} at strength 1")
    ranks = {rank for change in what.changes if (rank := rank_of(change, file.shapes))}
    if ranks and all(scale.assumed for scale in scales.values()):
        lines.append(f"If it was exported from SAT, its alpha is 1: set strength {1 / max(ranks):.4g}, or write "
                     f'{{"lora_alpha": 1}} into {Path(file.name).stem}.json beside it')
    if what.text:
        lines.append(f"{len(what.text)} keys of a text encoder ignored")
    return "\n".join(lines)


def _warnings(file: LoraFile, what: Plan) -> list[str]:
    lines = []
    if what.unknown:
        lines.append(f"{len(what.unknown)} of {len(file.tensors)} keys match nothing in this model and are left out, "
                     f"such as {what.unknown[:3]}")
    if what.misfits:
        lines.append(f"{len(what.misfits)} modules have another shape in this model and are left out: "
                     f"{'; '.join(what.misfits[:3])}")
    return lines
