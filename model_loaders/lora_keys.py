"""What the keys of a LoRA file mean: which module of the transformer each changes, and with which tensors.

Pure: names and shapes only. The layouts are told apart by their keys, never by the name of the file:

- peft and diffusers: ``transformer.transformer_blocks.0.attn1.to_q.lora_A.weight``, ``.lora_A.default.weight``
- old diffusers: ``...attn1.processor.to_q_lora.up.weight``, ``...to_q.lora.up.weight``
- kohya ``lora_unet_...``, CogVideoX-Fun ``lora_unet__...``, both with ``lora_up``, ``lora_down`` and ``alpha``
- SAT, the authors' trainer: ``...layers.0.attention.query_key_value.matrix_A.0``, one pair each for q, k and v
- LoHa, LoKr, DoRA and plain differences, below any of the names above
- the names of ComfyUI core's own CogVideoX: ``diffusion_model.blocks.0.q...``
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from ..models.specs import PUBLISHED, SpecError

Shape = tuple[int, ...]

# What a tensor is to its module, by how its key ends. "up" and "down" are the two factors of a LoRA.
_ROLES = [(re.compile(pattern), role, layout) for pattern, role, layout in (
    (r"\.lora_A(\.(?!bias$)[^.]+)?(\.weight)?$", "down", "peft"),
    (r"\.lora_B(\.(?!bias$)[^.]+)?(\.weight)?$", "up", "peft"),
    (r"\.lora_(?P<role>up|down|mid)\.weight$", "", "kohya"),
    (r"(\.|_)lora(_linear_layer)?\.(?P<role>up|down)\.weight$", "", "diffusers (old)"),
    (r"\.matrix_A\.(?P<part>\d)$", "down", "SAT"),
    (r"\.matrix_B\.(?P<part>\d)$", "up", "SAT"),
    (r"\.alpha$", "alpha", ""),
    (r"\.(dora_scale|lora_magnitude_vector)(\.[^.]+)?(\.weight)?$", "magnitude", ""),
    (r"\.(?P<role>hada_(w[12]_[ab]|t[12]))$", "", "LoHa"),
    (r"\.(?P<role>lokr_(w[12](_[ab])?|t2))$", "", "LoKr"),
    (r"\.(?P<role>diff|diff_b|set_weight)$", "", "differences"),
)]

# A trainer wraps the transformer in one or more of these; the last three end where the underscored name begins.
_DOTTED = ("base_model.model.", "model.", "diffusion_model.", "transformer.", "module.", "unet.")
_UNDERSCORED = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
_TEXT = re.compile(r"(base_model\.model\.)?(text_encoders?[._]|lora_te\d?_|t5|conditioner\.|cond_stage_model\.)")

# Our name of a module (diffusers'), after "transformer_blocks.N.": SAT's, ComfyUI core's.
_BLOCK_NAMES = {
    "attn1.to_q": (None, "q"),
    "attn1.to_k": (None, "k"),
    "attn1.to_v": (None, "v"),
    "attn1.norm_q": (None, "norm_q"),
    "attn1.norm_k": (None, "norm_k"),
    "attn1.to_out.0": ("attention.dense", "attn_out"),
    "ff.net.0.proj": ("mlp.dense_h_to_4h", "ff_proj"),
    "ff.net.2": ("mlp.dense_4h_to_h", "ff_out"),
}
_FUSED = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_BLOCK = re.compile(r"transformer_blocks\.(\d+)\.(.+)$")


class Role(NamedTuple):
    """One key of a file, read: the module's name as it stands there, and what the tensor is to it."""

    module: str
    part: int | None  # SAT: which third of a fused projection
    role: str
    layout: str


@dataclass(frozen=True)
class Change:
    """How a file changes one module of the transformer.

    ``roles`` are the file's keys, by what they are to it; of a projection that the file fuses, ``third`` says which of
    its three parts.
    """

    module: str
    roles: Mapping[str, str]
    third: int | None = None

    @property
    def kind(self) -> str:
        """What ComfyUI calls it: lora, loha, lokr, diff; empty if the roles make nothing."""
        for kind, mark in (("lora", ("up", "down")), ("loha", "hada_"), ("lokr", "lokr_"), ("diff", ("diff", "set_"))):
            if any(role.startswith(mark) for role in self.roles):
                return kind
        return ""


@dataclass
class Plan:
    """What a file does to a model: its changes, what it holds besides, and what does not fit."""

    changes: list[Change] = field(default_factory=list)
    layouts: list[str] = field(default_factory=list)
    text: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    misfits: list[str] = field(default_factory=list)


def read_key(key: str) -> Role | None:
    """The module and the role of a key; None if it is none of a LoRA's."""
    for pattern, role, layout in _ROLES:
        found = pattern.search(key)
        if found:
            named = found.groupdict()
            part = int(named["part"]) if named.get("part") else None
            if layout == "kohya" and key.startswith("lora_unet__"):
                layout = "CogVideoX-Fun"
            return Role(key[:found.start()], part, named.get("role") or role, layout)
    return None


def is_text(key: str) -> bool:
    """Whether a key belongs to a text encoder."""
    return _TEXT.match(key) is not None


def module_names(modules: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Every name that a file may give a module of the transformer, without prefixes; three modules if it is fused."""
    names: dict[str, tuple[str, ...]] = {}
    modules = list(modules)
    for module in modules:
        for name in (module, *_other_names(module)):
            names[name] = names[name.replace(".", "_")] = (module,)
    known = set(modules)
    for block in dict.fromkeys(match[1] for match in map(_BLOCK.match, modules) if match):
        fused = tuple(f"transformer_blocks.{block}.{name}" for name in _FUSED)
        if known.issuperset(fused):
            for name in (f"transformer_blocks.{block}.attn1.to_qkv", f"layers.{block}.attention.query_key_value"):
                names[name] = names[name.replace(".", "_")] = fused
    return names


def _other_names(module: str) -> list[str]:
    match = _BLOCK.match(module)
    if match is None:  # core writes time_embedding_linear_1
        return [re.sub(r"^(time|ofs)_embedding\.", r"\1_embedding_", module)]
    block, inner = match.groups()
    sat, core = _BLOCK_NAMES.get(inner, (None, inner))
    names = [f"blocks.{block}.{core}"]
    if sat is not None:
        names.append(f"layers.{block}.{sat}")
    if inner.endswith(".to_out.0"):
        names.append(module.removesuffix(".0"))
    return names


def _find(name: str, names: Mapping[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """The modules of the model that a file's ``name`` means."""
    for prefix in _UNDERSCORED:
        if name.startswith(prefix):
            return names.get(name.removeprefix(prefix))
    name = name.replace(".processor.", ".")
    while True:
        if name in names:
            return names[name]
        wrapper = next((prefix for prefix in _DOTTED if name.startswith(prefix)), None)
        if wrapper is None:
            return None
        name = name.removeprefix(wrapper)


def plan(shapes: Mapping[str, Shape], model: Mapping[str, Shape], where: str) -> Plan:
    """What the tensors ``shapes`` of the file ``where`` do to a model with the weights ``model``.

    Raises:
        SpecError: two LoRAs for one module, half of one, no key that the model has, or the shapes of another model.
    """
    made = Plan()
    found: dict[tuple[str, int | None], dict[str, str]] = {}
    for key in shapes:
        role = None if is_text(key) else read_key(key)
        if role is None:
            (made.text if is_text(key) else made.unknown).append(key)
            continue
        roles = found.setdefault((role.module, role.part), {})
        if role.role in roles:
            raise SpecError(f"{where}: expected one LoRA, got several for {role.module}: {roles[role.role]} and {key}. "
                            "Save each as a file of its own.")
        roles[role.role] = key
        if role.layout and role.layout not in made.layouts:
            made.layouts.append(role.layout)
    names = module_names(key.removesuffix(".weight") for key in model if key.endswith(".weight"))
    for (module, part), roles in found.items():
        _add(made, module, part, roles, names, where)
    _check_matched(made, shapes, model, where)
    _check_once(made, where)
    _sort_out_misfits(made, shapes, model, where)
    return made


def _add(made: Plan, module: str, part: int | None, roles: dict[str, str], names: Mapping[str, tuple[str, ...]],
         where: str) -> None:
    targets = _find(module, names)
    if targets is not None and part is not None:  # SAT numbers the pairs of a fused projection
        targets = targets[part:part + 1] or None
    change = Change(targets[0], roles) if targets else None
    if targets is None or change is None or not change.kind or _is_tucker(roles) or _scales_nothing(change):
        made.unknown += roles.values()
        return
    _check_whole(roles, where)
    if len(targets) == 1:
        made.changes.append(change)
    elif change.kind == "lora":
        made.changes += [Change(target, roles, third) for third, target in enumerate(targets)]
    else:
        made.unknown += roles.values()


def _is_tucker(roles: Mapping[str, str]) -> bool:
    """A factorised convolution. CogVideoX has none that anybody trains so."""
    return any(role in roles for role in ("mid", "hada_t1", "lokr_t2"))


def _scales_nothing(change: Change) -> bool:
    """DoRA's magnitude scales what factors have changed; with a plain difference it means nothing."""
    return "magnitude" in change.roles and change.kind == "diff"


def _check_whole(roles: Mapping[str, str], where: str) -> None:
    pairs = [("up", "down"), ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"), ("hada_w1_a", "hada_w2_a"),
             ("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b")]
    if any(role.startswith("lokr_") for role in roles):
        roles = {**roles, **{role[:7]: key for role, key in roles.items() if role.startswith("lokr_")}}
        pairs.append(("lokr_w1", "lokr_w2"))
    for first, second in pairs:
        if (first in roles) != (second in roles):
            there, lacks = (first, second) if first in roles else (second, first)
            raise SpecError(f"{where} is incomplete: {roles[there]} lacks its {lacks} part. Download it again.")


def _check_matched(made: Plan, shapes: Mapping[str, Shape], model: Mapping[str, Shape], where: str) -> None:
    if made.changes:
        return
    keys = list(model)
    shown = [keys[0], keys[len(keys) // 2], keys[-1]]
    raise SpecError(f"{where}: expected a LoRA for this CogVideoX, got {len(shapes)} keys of which none matches, such "
                    f"as {list(shapes)[:3]}. The model has keys such as {shown}. Choose a LoRA that was trained for "
                    "CogVideoX.")


def _check_once(made: Plan, where: str) -> None:
    first: dict[str, Change] = {}
    for change in made.changes:
        other = first.setdefault(change.module, change)
        if other is not change:
            shown = [next(iter(c.roles.values())) for c in (other, change)]
            raise SpecError(f"{where}: expected one LoRA, got several for {change.module}: {shown[0]} and {shown[1]}. "
                            "Save each as a file of its own.")


def rank_of(change: Change, shapes: Mapping[str, Shape]) -> int | None:
    """The inner dimension of a change; None if it has none."""
    for role in ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):  # the order in which ComfyUI's LoKr asks
        if role in change.roles:
            shape = shapes[change.roles[role]]
            return shape[0] if shape else None
    return None


def changed_shapes(change: Change, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes that the weight ("weight") and bias ("bias") must have, [out, in] with all input axes in one."""
    s = {role: shapes[key] for role, key in change.roles.items()}
    needed: dict[str, Shape] = {}
    if change.kind == "lora":
        needed["weight"] = _outer(s["up"], s["down"])
    elif change.kind == "loha":
        first, second = _outer(s["hada_w1_a"], s["hada_w1_b"]), _outer(s["hada_w2_a"], s["hada_w2_b"])
        needed["weight"] = first if first == second else ()
    elif change.kind == "lokr":
        first, second = (_outer(s[f"lokr_w{n}_a"], s[f"lokr_w{n}_b"]) if f"lokr_w{n}_a" in s else s[f"lokr_w{n}"]
                         for n in (1, 2))
        fits = len(first) == 2 and len(second) in (2, 4)
        needed["weight"] = (first[0] * second[0], first[1] * prod(second[1:])) if fits else ()
    for role in ("diff", "set_weight"):
        if role in s:
            needed["weight"] = _flat(s[role])
    if "diff_b" in s:
        needed["bias"] = s["diff_b"]
    return needed


def _flat(shape: Shape) -> Shape:
    return (shape[0], prod(shape[1:])) if len(shape) > 1 else shape


def _outer(up: Shape, down: Shape) -> Shape:
    """Of up @ down; () if they do not fit each other."""
    fits = len(up) > 1 and len(down) > 1 and prod(up[1:]) == down[0]
    return (up[0], prod(down[1:])) if fits else ()


def _sort_out_misfits(made: Plan, shapes: Mapping[str, Shape], model: Mapping[str, Shape], where: str) -> None:
    """Take out what has another shape than the model.

    The image-to-video models differ from the others in the patch embedding only: such a LoRA is used without it.

    Raises:
        SpecError: a shape inside the blocks differs, so the LoRA is for another model.
    """
    problems = {change.module: _misfit(change, shapes, model) for change in made.changes}
    made.misfits = [problem for problem in problems.values() if problem]
    inside = [problem for module, problem in problems.items() if problem and _BLOCK.match(module)]
    made.changes = [change for change in made.changes if not problems[change.module]]
    if inside or not made.changes:
        raise SpecError(f"{where} was trained for another model: {(inside or made.misfits)[0]}. Choose a LoRA for this "
                        "model, or the model that it was trained for.")


def _misfit(change: Change, shapes: Mapping[str, Shape], model: Mapping[str, Shape]) -> str:
    """What does not fit, in words; empty if all does."""
    for name, got in changed_shapes(change, shapes).items():
        shape = model.get(f"{change.module}.{name}")
        expected = None if shape is None else _flat(shape)
        if change.third is not None and expected:
            expected = (3 * expected[0], *expected[1:])
        if not got:
            return f"its tensors for {change.module} do not fit each other"
        if got != expected:
            return (f"{change.module}.{name} has the shape {_shown(expected)} in this model and "
                    f"{_shown(got)} in the LoRA")
    return _magnitude_misfit(change, shapes, model)


def _magnitude_misfit(change: Change, shapes: Mapping[str, Shape], model: Mapping[str, Shape]) -> str:
    """DoRA has one value for each row ([out], [out, 1], [1, out, 1, 1]) or for each column ([1, in])."""
    if "magnitude" not in change.roles:
        return ""
    got, (rows, columns) = shapes[change.roles["magnitude"]], _flat(model[f"{change.module}.weight"])
    by_column = len(got) == 2 and got[0] == 1
    expected = columns if by_column else rows * (1 if change.third is None else 3)
    return "" if prod(got) == expected else f"the {prod(got)} magnitudes of {change.module} should be {expected}"


def _shown(shape: Shape | None) -> str:
    """A shape, and the published models whose width it is."""
    if shape is None:
        return "of nothing"
    widths = {spec.name for spec in PUBLISHED.values() if shape == (spec.transformer.hidden_size,) * 2}
    return f"{list(shape)}" + (f" (CogVideoX {', '.join(sorted(widths))})" if widths else "")
