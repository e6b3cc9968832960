"""What a file or folder is, what is wrong with it, which node takes it, and how much memory it will want.

Built on ``load.find_*``: what they accept loads. ``explained`` adds to a loader's error what the file really is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import comfy.model_management
import torch

from ..models.cogvideox import vae_plan
from ..models.cogvideox.base_model import CogVideoXConfig
from ..models.cogvideox.vae_plan import LATENT_CHUNK, Budget, choose, chunk_bounds, cpu_plan, decoded_frames
from ..models.specs import PUBLISHED, Geometry, ModelSpec, SpecError, VAESpec
from . import folders, load
from .download import UNFINISHED
from .families import family_of
from .files import (
    CONFIG,
    INDEX,
    is_file,
    is_folder,
    kind_of,
    main_dtype,
    pipeline_class,
    read_header,
    read_json,
    weight_set,
)
from .gguf_files import gguf_names
from .keys import DIFFUSERS, Shape, find_component
from .quantized_files import GGUF, describe
from .sources import parts_of
from .vae import SMALLEST
from .vae_ladder import RAM_SHARE

_DTYPES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


@dataclass(frozen=True)
class Kind:
    """A kind of component: how it is looked at, and which node loads it."""

    word: str
    folder: str
    find: Callable[[Path], Any]
    node: str


# The functions are looked up when they are called.
KINDS = (
    Kind("transformer", "transformer", lambda path: load.find_model(path), "CogVideoX Load Model"),
    Kind("VAE", "vae", lambda path: load.find_vae(path), "CogVideoX Load VAE"),
    Kind("text encoder", "text_encoder", lambda path: load.find_text_encoder(path), "CogVideoX Load Text Encoder"),
)


@dataclass(frozen=True)
class Found:
    """A component that loads, and what it is."""

    kind: Kind
    component: Any  # load.Component
    path: Path

    @property
    def parameters(self) -> int:
        return sum(math.prod(info.shape) for info in self.component.tensors.values())

    @property
    def stored(self) -> int:
        """Bytes on the disk."""
        return sum(file.stat().st_size for file in self.component.files)

    @property
    def dtype(self) -> str:
        """How most values are stored: a dtype, or the formats of what is quantized."""
        held = {conf["format"] for conf in self.component.layers.values()}
        name = main_dtype(self.component.tensors)
        return " and ".join(sorted(held)).replace(GGUF, "GGUF ") or _DTYPES.get(name, name)

    @property
    def what(self) -> str:
        """One line: variant, parameters, dtype, size."""
        spec, files = self.component.spec, len(self.component.files)
        name = f"CogVideoX {spec.name} transformer" if isinstance(spec, ModelSpec) else {
            "VAE": "CogVideoX VAE", "text encoder": "T5 text encoder"}[self.kind.word]
        layout = self.component.layout
        return (f"{name}, {_count(self.parameters)} parameters, {self.dtype}, {_gb(self.stored)}"
                + (f" in {files} files" if files > 1 else "") + (f", {layout} layout" if layout != DIFFUSERS else ""))

    @property
    def loaded_dtype(self) -> torch.dtype:
        """What weight_dtype auto makes of it on this machine."""
        management = comfy.model_management
        if isinstance(self.component.spec, VAESpec):
            return management.vae_dtype(management.vae_device(), [torch.bfloat16, torch.float32])
        if isinstance(self.component.spec, ModelSpec):
            return load.model_dtype(self.component)
        return load.text_dtype(self.component.dtype)

    @property
    def weights(self) -> float:
        """Bytes of the loaded weights; quantized ones stay as they are stored."""
        if self.component.layers:
            return self.stored
        return self.parameters * comfy.model_management.dtype_size(self.loaded_dtype)


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _count(number: int) -> str:
    return f"{number / 1e9:.2f} billion" if number >= 1e8 else f"{number / 1e6:.2f} million"


def identify(path: Path) -> Found:
    """The component at ``path``.

    Raises:
        SpecError: none that loads; says what is wrong, and what else the file seems to be.
    """
    errors = {}
    for kind in KINDS:
        try:
            return Found(kind, kind.find(path), path)
        except SpecError as error:
            errors[kind.word] = str(error)
    shapes = _shapes(path)
    likely = [kind.word for kind in KINDS if _holds(kind, shapes)] or [
        kind.word for kind in KINDS if kind.folder == path.name]
    if likely or len(set(errors.values())) == 1:  # the same trouble whatever it is, such as a truncated file
        raise SpecError(errors[likely[0] if likely else KINDS[0].word])
    raise SpecError(f"{path} is no part of a CogVideoX model. {_seems(path, shapes)}".rstrip())


def _shapes(path: Path) -> dict[str, Shape]:
    """The tensors of a file or of a folder; none if they cannot be read: the error of the loader says why."""
    try:
        return {key: info.shape for key, info in describe(weight_set(path)).tensors.items()}
    except (SpecError, OSError):
        return _shapes_of_a_format_that_is_not_read(path)


def _shapes_of_a_format_that_is_not_read(path: Path) -> dict[str, Shape]:
    """Of a file that is sound: quantized by another tool, or a language model in GGUF (without the shapes)."""
    try:
        if kind_of(path) == "gguf":
            return dict.fromkeys(gguf_names(path), ())
        return {key: info.shape for key, info in read_header(path)[0].items()}
    except (SpecError, OSError):
        return {}


def _holds(kind: Kind, shapes: dict[str, Shape]) -> bool:
    """Whether there is such a component among tensors, in any layout; it need not load."""
    try:
        return find_component(kind.folder, shapes) is not None
    except SpecError:  # in its layout, and damaged
        return True


def _seems(path: Path, shapes: dict[str, Shape]) -> str:
    family = family_of(shapes)
    if family:
        return f"It seems to be {family}."
    if is_folder(path) and is_file(path / CONFIG):
        config = read_json(path / CONFIG)
        return f"Its config.json says {config.get('_class_name') or config.get('architectures')}."
    return f"Its tensors are {sorted(shapes)[:3]} ..." if shapes else ""


def what_it_is(path: Path) -> str:
    """One sentence for an error message; empty if the error says it all."""
    try:
        found = identify(path)
    except (SpecError, OSError):  # the loader's own error names other families; OSError: gone, or not readable
        return ""
    return f"It is a {found.what}: take '{found.kind.node}'."


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Adds to a SpecError of a loader what the file at ``path`` is, where that helps."""
    try:
        yield
    except SpecError as error:
        sentence = what_it_is(path)
        if not sentence:
            raise
        raise SpecError(f"{error} {sentence}") from error


# --- Memory, by the estimates that ComfyUI plans with ---


def sampling_memory(spec: ModelSpec, dtype: torch.dtype, batch: int = 1) -> float:
    """Bytes beside the weights for a step at the native size and length, padding frames of 1.5 included."""
    config = CogVideoXConfig(spec)
    config.set_inference_dtype(dtype, None)
    b, c, t, h, w = _native(spec).latent_shape(batch)
    return config.get_model(device="meta").memory_required((b, c, t + spec.padding_frames(t), h, w))


def decode_memory(vae: VAESpec, spec: ModelSpec, dtype: torch.dtype, weights: float = 0) -> float:
    """Bytes beside the weights for an exact decode at the native size and length of ``spec``: of the plan that the VAE
    chooses when all of this machine's memory is free, or of the smallest that there is."""
    management, cpu = comfy.model_management, torch.device("cpu")
    total = management.get_total_memory(management.get_torch_device()) - weights
    on_cpu = management.is_device_cpu(management.get_torch_device())
    budget = Budget(total, RAM_SHARE * management.get_total_memory(cpu), unified=on_cpu)
    frames, rows, columns = _native(spec).latent_shape()[2:]
    memory = partial(vae_plan.decode_memory, vae, (frames, rows, columns), dtype.itemsize)
    first = decoded_frames(chunk_bounds(frames, LATENT_CHUNK)[0][1])
    return memory(choose(memory, budget, cpu_plan(vae, first)) or SMALLEST).device


def _native(spec: ModelSpec) -> Geometry:
    return Geometry(spec, spec.native_width, spec.native_height, spec.transformer.sample_frames)


def size_words(spec: ModelSpec) -> str:
    return f"{spec.native_width}x{spec.native_height}, {spec.transformer.sample_frames} frames"


# --- A whole report ---


@dataclass
class Report:
    """Lines for a person; ``problems`` counts what does not load."""

    lines: list[str]
    problems: int = 0

    def add(self, line: str, depth: int = 0) -> None:
        self.lines.append("  " * depth + line)


def examine(path: Path) -> Report:
    """Everything about a pipeline folder, a component folder or a file."""
    report = Report([str(path)])
    if not os.path.exists(path):
        report.problems += 1
        report.add("problem: there is no such file or folder.", 1)
    elif is_file(path / INDEX):
        _examine_pipeline(path, report)
    elif is_folder(path) and not is_file(path / CONFIG) and _parts(path):
        report.add("what: parts of a pipeline, without its model_index.json: the parts load one by one", 1)
        _examine_parts(path, report)
    else:
        found = _examine_component(path, report)
        if found:
            report.add(f"node: {found.kind.node}", 1)
            _memory_lines([found], report)
    return report


def survey() -> list[Report]:
    """A report for each CogVideoX model in ComfyUI's model folders. Other models' files are only counted."""
    reports = [examine(folders.pipeline_path(name)) for name in folders.pipeline_names()]
    reports += [examine(path) for path in folders.partial_folders()]
    others = 0
    for component in folders.FILE_CATEGORIES:
        for name in folders.file_names(component):
            path = folders.component_path(component, name)
            if is_other_model(path):
                others += 1
            else:
                reports.append(examine(path))
    last = Report([f"{len(reports)} CogVideoX models and parts; {others} files of other models were left out."])
    for root in folders.pipeline_roots():
        names = sorted({each.name for place in (".", "*") for each in root.glob(f"{place}/{UNFINISHED}/*")})
        if names:
            last.add(f"unfinished downloads in {root}: {names}. Download them again to go on.")
    return [*reports, last]


def is_other_model(path: Path) -> bool:
    """Whether a file can be read and nothing in it is CogVideoX's."""
    shapes = _shapes(path)
    return bool(shapes) and not any(_holds(kind, shapes) for kind in KINDS)


def _examine_pipeline(folder: Path, report: Report) -> None:
    try:
        name = pipeline_class(folder)
        load.check_pipeline(folder)
    except SpecError as error:
        report.problems += 1
        report.add(f"problem: {error}", 1)
        return
    report.add(f"what: pipeline folder ({name})", 1)
    found = _examine_parts(folder, report, complete=True)
    if len(found) == len(KINDS):
        report.add("node: CogVideoX Load Pipeline", 1)


def _examine_parts(folder: Path, report: Report, complete: bool = False) -> list[Found]:
    found = []
    for name in [kind.folder for kind in KINDS] if complete else _parts(folder):
        report.add(f"{name}:", 1)
        one = _examine_component(folder / name, report, depth=2)
        found += [one] if one else []
    _memory_lines(found, report)
    return found


def _parts(folder: Path) -> list[str]:
    """The folders of parts, by their usual names or by what is in them."""
    usual = [kind.folder for kind in KINDS if os.path.exists(folder / kind.folder)]
    return list(dict.fromkeys([*usual, *parts_of(folder)]))


def _examine_component(path: Path, report: Report, depth: int = 1) -> Found | None:
    try:
        found = identify(path)
    except SpecError as error:
        report.problems += 1
        report.add(f"problem: {error}", depth)
        return None
    report.add(f"what: {found.what}", depth)
    return found


def _memory_lines(found: list[Found], report: Report) -> None:
    specs = {type(one.component.spec): one for one in found}
    model, vae = specs.get(ModelSpec), specs.get(VAESpec)
    for one in found:
        names = {dtype: name for name, dtype in load.DTYPES.items()}
        line = f"memory: {one.kind.word} weights {_gb(one.weights)}"
        line += f" (in {names[one.loaded_dtype]})" if not one.component.layers else ""
        working = 0.0
        if isinstance(one.component.spec, ModelSpec):
            working = sampling_memory(one.component.spec, one.loaded_dtype)
            line += (f"; a step at {size_words(one.component.spec)} {_gb(working)} more, "
                     f"{_gb(sampling_memory(one.component.spec, one.loaded_dtype, 2))} with both prompts at once")
        elif one is vae:
            spec = model.component.spec if model else PUBLISHED["5B"]
            working = decode_memory(one.component.spec, spec, one.loaded_dtype, one.weights)
            line += f"; a decode at {size_words(spec)} {_gb(working)} more"
        report.add(f"{line}. {verdict(one.weights, working, one is vae)}", 1)


def verdict(weights: float, working: float, can_tile: bool) -> str:
    """Whether it fits into this machine's memory. Weights can wait in RAM, what is worked on cannot."""
    device = comfy.model_management.get_torch_device()
    total = comfy.model_management.get_total_memory(device)
    if weights + working <= total:
        return "Fits."
    on_cpu = comfy.model_management.is_device_cpu(device)
    ram = comfy.model_management.get_total_memory(torch.device("cpu"))
    if working <= total and not on_cpu and weights <= ram:
        return "Fits with part of the weights in RAM, which is slower."
    if can_tile:
        return "Fits in tiles only, which change the picture slightly."
    return f"Does not fit into {_gb(total)}{'' if on_cpu else f' and {_gb(ram)} RAM'}: a smaller model, size or length."
