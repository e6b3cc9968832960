"""How strongly a LoRA's author meant it: the factor on up @ down, and where that is known from.

Pure. In this order: the alpha tensor of the module; for modules without one the training settings in the file's
metadata, or in a JSON file beside it; the trainer's default. Settings are lora_alpha and r as peft writes them, with
alpha_pattern and use_rslora.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..models.specs import SpecError
from .files import is_file, read_json

# Under which a file's metadata keeps a JSON object of settings: diffusers, finetrainers.
_OBJECTS = ("lora_adapter_metadata", "lora_config")
_ALPHA_NAMES = ("lora_alpha", "ss_network_alpha", "network_alpha", "alpha")
_RANK_NAMES = ("r", "ss_network_dim", "network_dim", "lora_rank", "rank")
_UNSET = (None, "", "None")  # metadata holds strings only
_KOHYA = "ss_"  # tools that change the rank of a LoRA write words in place of these numbers, such as Dynamic
_WEIGHTS = (".safetensors", ".sft", ".pt", ".bin", ".pth", ".ckpt")


@dataclass(frozen=True)
class Settings:
    """What a LoRA was trained with."""

    alpha: float
    rank: int | None
    source: str
    other_ranks: tuple[int, ...] = ()  # of single modules
    patterns: Mapping[str, float] = field(default_factory=dict)  # module name, or its end, to alpha
    rslora: bool = False

    def alpha_of(self, module: str) -> float:
        for name, alpha in self.patterns.items():
            if module == name or module.endswith(f".{name}"):
                return alpha
        return self.alpha


@dataclass(frozen=True)
class Scale:
    """The factor on a change, and the words for where it comes from."""

    value: float
    source: str
    assumed: bool = False  # nothing says it


def scale_of(module: str, rank: int | None, alpha: float | None, settings: Settings | None, is_sat: bool) -> Scale:
    """The scale of a module's change. ``alpha``: the value of its alpha tensor.

    Raises:
        SpecError: alpha is not a finite number.
    """
    if alpha is not None:
        _check(alpha, module)
        if not rank or alpha == 0:  # CogVideoX-Fun and kohya train with the rank then
            return Scale(1.0, "alpha is the rank")
        return Scale(alpha / rank, f"alpha {alpha:g} in the file, rank {rank}")
    known = settings.rank if settings and rank is None else rank
    if settings is not None and known:
        alpha = settings.alpha_of(module)
        divisor, words = (math.sqrt(known), "rank-stabilised ") if settings.rslora else (known, "")
        return Scale(alpha / divisor, f"{words}lora_alpha {alpha:g} in {settings.source}, rank {known}")
    if is_sat and rank:
        return Scale(1 / rank, f"rank {rank}; SAT trains with alpha 1")
    return Scale(1.0, "the file does not say; as diffusers assumes", assumed=True)


def _check(alpha: float, where: str) -> None:
    if not math.isfinite(alpha):
        raise SpecError(f"{where}: alpha is {alpha}, expected a finite number. Download the LoRA again.")


def settings_in(values: Mapping[str, Any], source: str) -> Settings | None:
    """The settings in a file's metadata or a config's JSON object; None if it says nothing of alpha.

    Raises:
        SpecError: they are there and unusable.
    """
    for name in _OBJECTS:
        if isinstance(values.get(name), str):
            inner = _object(values[name], name, source)
            return _settings({key.removeprefix("transformer."): value for key, value in inner.items()}, source)
    return _settings(values, source)


def _object(text: str, name: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise SpecError(f"{name} in {source}: expected a JSON object, got {text[:40]!r}. Download the LoRA again.")
    return value


def _settings(values: Mapping[str, Any], source: str) -> Settings | None:
    alpha, rank = _first(values, _ALPHA_NAMES), _first(values, _RANK_NAMES)
    if alpha is None:
        return None
    return Settings(
        alpha=_number(alpha, "lora_alpha", source),
        rank=None if rank is None else int(_number(rank, "r", source)),
        source=source,
        other_ranks=tuple(int(value) for value in _pattern(values, "rank_pattern", source).values()),
        patterns={_plain(name, source): value for name, value in _pattern(values, "alpha_pattern", source).items()},
        rslora=values.get("use_rslora") is True)


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if values.get(name) not in _UNSET and not _is_word(values, name)), None)


def _is_word(values: Mapping[str, Any], name: str) -> bool:
    return name.startswith(_KOHYA) and values.get(name) not in _UNSET and not math.isfinite(_float(values[name]))


def words_in(values: Mapping[str, Any], source: str) -> str:
    """A warning if kohya's settings have a word where alpha should be; empty if not."""
    return "".join(f"{name} {str(values[name])[:40]!r} in {source} is no number and is not used."
                   for name in _ALPHA_NAMES if _is_word(values, name))


def _pattern(values: Mapping[str, Any], name: str, source: str) -> dict[str, float]:
    pattern = values.get(name) or {}
    if not isinstance(pattern, Mapping):
        raise SpecError(f"{name} in {source}: expected a JSON object, got {str(pattern)[:40]!r}. Correct it.")
    return {module: _number(value, f"{name} of {module}", source) for module, value in pattern.items()}


def _number(value: Any, name: str, source: str) -> float:
    number = _float(value)
    if not math.isfinite(number):
        raise SpecError(f"{name} in {source}: expected a number, got {str(value)[:40]!r}. Correct it.")
    return number


def _float(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


def _plain(name: str, source: str) -> str:
    """peft reads these as regular expressions; trainers write names. A foreign expression is not run."""
    plain = name.replace("\\.", ".").removeprefix("^").removeprefix("transformer.").removesuffix("$")
    if set(plain) & set("*+?^$|()[]{}\\"):
        raise SpecError(f"alpha_pattern in {source}: expected names of modules, got the expression {name[:60]!r}. "
                        "Write the names out.")
    return plain


def files_beside(path: Path) -> list[Path]:
    """The JSON files that may hold a LoRA's settings: NAME.json beside NAME.safetensors, and peft's adapter_config.json
    if the LoRA is alone in its folder."""
    files = [path.with_suffix(".json")]
    if sum(file.suffix in _WEIGHTS for file in path.parent.glob("*")) == 1:
        files.append(path.parent / "adapter_config.json")
    return [file for file in files if is_file(file)]


def settings_beside(path: Path, ranks: Collection[int]) -> tuple[Settings | None, str]:
    """The settings in a JSON file beside a LoRA, and a warning if there are some that belong to another one.

    Raises:
        SpecError: the JSON file is damaged.
    """
    for file in files_beside(path):
        settings = settings_in(read_json(file), file.name)
        if settings is not None:
            return accepted(settings, ranks)
    return None, ""


def accepted(settings: Settings | None, ranks: Collection[int]) -> tuple[Settings | None, str]:
    """The settings unless their rank is none of the file's: then they describe another LoRA, and a warning says so."""
    if settings is None or settings.rank is None or not ranks or {settings.rank, *settings.other_ranks} & set(ranks):
        return settings, ""
    return None, (f"lora_alpha {settings.alpha:g} in {settings.source} is not used: it is for rank {settings.rank}, "
                  f"the LoRA has {', '.join(map(str, sorted(ranks)))}.")
