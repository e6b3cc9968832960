"""Where each weight is in a file: the key layouts of the files that people have, as tables.

Every layout is mapped to diffusers' keys, which are those of the networks in ``models/``. A map says for each of them
which key of the file holds it and which of its rows, so that nothing is read, and nothing copied where a view does.
Pure: no torch. Sources: the ``sat/`` folder of the CogVideo repository and diffusers' conversion script (the authors'
layout), ``comfy/ldm/cogvideo`` of ComfyUI (core's). Core's VAE has diffusers' keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from ..models.specs import SpecError

Shape = tuple[int, ...]

DIFFUSERS, CORE, AUTHORS = "diffusers", "ComfyUI core", "authors (SAT)"


class Part(NamedTuple):
    """Where one weight of a network is.

    ``blocks``: which of ``of`` equal parts of the rows of ``key``, in this order; empty: all of it. ``shape``: the
    weight's own. ``factors``: the keys of a LoRA's up [out, rank] and down [rank, in] that were trained into it.
    """

    key: str
    shape: Shape
    blocks: tuple[int, ...] = ()
    of: int = 1
    factors: tuple[str, str] | None = None


class Rule(NamedTuple):
    """A line of a layout's table. ``{n}``, ``{m}``: numbers; ``{p}``: weight, bias and the like; ``{r}`` in the target:
    the levels counted from the other end."""

    source: str
    target: str
    blocks: tuple[int, ...] = ()
    of: int = 1


@dataclass(frozen=True)
class Layout:
    """``mark``: a key that every file of this layout has. No rules: the keys are diffusers' already."""

    name: str
    mark: str
    rules: tuple[Rule, ...] = ()


class Found(NamedTuple):
    """A component in a file: its layout, the prefix of its keys, and its weights by diffusers' keys."""

    layout: str
    prefix: str
    parts: dict[str, Part]


TRANSFORMER_MARK = "patch_embed.text_proj.weight"
VAE_MARK = "decoder.mid_block.resnets.0.norm1.norm_layer.weight"
TEXT_MARK = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"

_CORE_TRANSFORMER = (
    Rule("patch_embed.proj.{p}", "patch_embed.proj.{p}"),
    Rule("patch_embed.text_proj.{p}", "patch_embed.text_proj.{p}"),
    Rule("patch_embed.pos_embedding", "patch_embed.pos_embedding"),
    Rule("time_embedding_linear_{n}.{p}", "time_embedding.linear_{n}.{p}"),
    Rule("ofs_embedding_linear_{n}.{p}", "ofs_embedding.linear_{n}.{p}"),
    Rule("blocks.{n}.norm{m}.linear.{p}", "transformer_blocks.{n}.norm{m}.linear.{p}"),
    Rule("blocks.{n}.norm{m}.norm.{p}", "transformer_blocks.{n}.norm{m}.norm.{p}"),
    Rule("blocks.{n}.q.{p}", "transformer_blocks.{n}.attn1.to_q.{p}"),
    Rule("blocks.{n}.k.{p}", "transformer_blocks.{n}.attn1.to_k.{p}"),
    Rule("blocks.{n}.v.{p}", "transformer_blocks.{n}.attn1.to_v.{p}"),
    Rule("blocks.{n}.norm_q.{p}", "transformer_blocks.{n}.attn1.norm_q.{p}"),
    Rule("blocks.{n}.norm_k.{p}", "transformer_blocks.{n}.attn1.norm_k.{p}"),
    Rule("blocks.{n}.attn_out.{p}", "transformer_blocks.{n}.attn1.to_out.0.{p}"),
    Rule("blocks.{n}.ff_proj.{p}", "transformer_blocks.{n}.ff.net.0.proj.{p}"),
    Rule("blocks.{n}.ff_out.{p}", "transformer_blocks.{n}.ff.net.2.{p}"),
    Rule("norm_final.{p}", "norm_final.{p}"),
    Rule("norm_out.linear.{p}", "norm_out.linear.{p}"),
    Rule("norm_out.norm.{p}", "norm_out.norm.{p}"),
    Rule("proj_out.{p}", "proj_out.{p}"),
)

_SAT_LAYER, _SAT_ADALN, _BLOCK = "transformer.layers.{n}.", "mixins.adaln_layer.", "transformer_blocks.{n}."

_SAT_TRANSFORMER = (
    Rule("mixins.patch_embed.proj.{p}", "patch_embed.proj.{p}"),
    Rule("mixins.patch_embed.text_proj.{p}", "patch_embed.text_proj.{p}"),
    Rule("mixins.pos_embed.pos_embedding", "patch_embed.pos_embedding"),
    Rule("time_embed.0.{p}", "time_embedding.linear_1.{p}"),
    Rule("time_embed.2.{p}", "time_embedding.linear_2.{p}"),
    Rule("ofs_embed.0.{p}", "ofs_embedding.linear_1.{p}"),
    Rule("ofs_embed.2.{p}", "ofs_embedding.linear_2.{p}"),
    Rule(_SAT_LAYER + "input_layernorm.{p}", _BLOCK + "norm1.norm.{p}"),
    Rule(_SAT_LAYER + "post_attention_layernorm.{p}", _BLOCK + "norm2.norm.{p}"),
    Rule(_SAT_LAYER + "attention.query_key_value.{p}", _BLOCK + "attn1.to_q.{p}", (0,), 3),
    Rule(_SAT_LAYER + "attention.query_key_value.{p}", _BLOCK + "attn1.to_k.{p}", (1,), 3),
    Rule(_SAT_LAYER + "attention.query_key_value.{p}", _BLOCK + "attn1.to_v.{p}", (2,), 3),
    Rule(_SAT_LAYER + "attention.dense.{p}", _BLOCK + "attn1.to_out.0.{p}"),
    Rule(_SAT_LAYER + "mlp.dense_h_to_4h.{p}", _BLOCK + "ff.net.0.proj.{p}"),
    Rule(_SAT_LAYER + "mlp.dense_4h_to_h.{p}", _BLOCK + "ff.net.2.{p}"),
    # shift, scale and gate of the attention, then of the MLP, for the video; then the same six for the text
    Rule(_SAT_ADALN + "adaLN_modulations.{n}.1.{p}", _BLOCK + "norm1.linear.{p}", (0, 1, 2, 6, 7, 8), 12),
    Rule(_SAT_ADALN + "adaLN_modulations.{n}.1.{p}", _BLOCK + "norm2.linear.{p}", (3, 4, 5, 9, 10, 11), 12),
    Rule(_SAT_ADALN + "query_layernorm_list.{n}.{p}", _BLOCK + "attn1.norm_q.{p}"),
    Rule(_SAT_ADALN + "key_layernorm_list.{n}.{p}", _BLOCK + "attn1.norm_k.{p}"),
    Rule("transformer.final_layernorm.{p}", "norm_final.{p}"),
    Rule("mixins.final_layer.adaLN_modulation.1.{p}", "norm_out.linear.{p}"),
    Rule("mixins.final_layer.norm_final.{p}", "norm_out.norm.{p}"),
    Rule("mixins.final_layer.linear.{p}", "proj_out.{p}"),
)

# {q} is a path inside a resnet, which both layouts spell alike. The authors number the decoder's levels from the
# output, diffusers from the latent.
_SAT_VAE = (
    Rule("encoder.down.{n}.block.{m}.nin_shortcut.{p}", "encoder.down_blocks.{n}.resnets.{m}.conv_shortcut.{p}"),
    Rule("encoder.down.{n}.block.{m}.{q}", "encoder.down_blocks.{n}.resnets.{m}.{q}"),
    Rule("encoder.down.{n}.downsample.conv.{p}", "encoder.down_blocks.{n}.downsamplers.0.conv.{p}"),
    Rule("encoder.mid.block_1.{q}", "encoder.mid_block.resnets.0.{q}"),
    Rule("encoder.mid.block_2.{q}", "encoder.mid_block.resnets.1.{q}"),
    Rule("decoder.mid.block_1.{q}", "decoder.mid_block.resnets.0.{q}"),
    Rule("decoder.mid.block_2.{q}", "decoder.mid_block.resnets.1.{q}"),
    Rule("decoder.up.{n}.block.{m}.nin_shortcut.{p}", "decoder.up_blocks.{r}.resnets.{m}.conv_shortcut.{p}"),
    Rule("decoder.up.{n}.block.{m}.{q}", "decoder.up_blocks.{r}.resnets.{m}.{q}"),
    Rule("decoder.up.{n}.upsample.conv.{p}", "decoder.up_blocks.{r}.upsamplers.0.conv.{p}"),
    *(Rule(f"{half}.{name}.{{q}}", f"{half}.{name}.{{q}}")
      for half in ("encoder", "decoder") for name in ("conv_in", "norm_out", "conv_out")),
)

# In this order: a mark of a later layout may end like one of an earlier.
LAYOUTS: Mapping[str, tuple[Layout, ...]] = {
    "transformer": (
        Layout(AUTHORS, "mixins.patch_embed.text_proj.weight", _SAT_TRANSFORMER),
        Layout(CORE, "blocks.0.norm1.linear.weight", _CORE_TRANSFORMER),
        Layout(DIFFUSERS, TRANSFORMER_MARK),
    ),
    "vae": (Layout(AUTHORS, "decoder.mid.block_1.norm1.norm_layer.weight", _SAT_VAE), Layout(DIFFUSERS, VAE_MARK)),
    "text_encoder": (Layout(DIFFUSERS, TEXT_MARK),),
}

_TOKENS = {"{n}": r"(?P<n>\d{1,6})", "{m}": r"(?P<m>\d{1,6})", "{p}": r"(?P<p>[^.]+)", "{q}": r"(?P<q>.+)"}


def _pattern(source: str) -> re.Pattern[str]:
    parts = re.split(r"(\{[nmpq]\})", source)
    return re.compile("".join(_TOKENS.get(part, re.escape(part)) for part in parts))


def find_component(component: str, shapes: Mapping[str, Shape]) -> Found | None:
    """The ``component`` (transformer, vae, text_encoder) in a file of tensors ``shapes``; None if it is not there.

    Any prefix is accepted: ``model.diffusion_model.``, ``transformer.``, ``first_stage_model.`` and so on.

    Raises:
        SpecError: a joined weight whose rows cannot be divided.
    """
    for layout in LAYOUTS[component]:
        prefix = _prefix(shapes, layout.mark)
        if prefix is not None:
            inner = {key[len(prefix):]: shape for key, shape in shapes.items() if key.startswith(prefix)}
            parts = _mapped(layout, inner) if layout.rules else {key: Part(key, shape) for key, shape in inner.items()}
            if layout.name == AUTHORS and component == "transformer":
                parts = _with_conv_patch(_with_factors(parts, inner))
            return Found(layout.name, prefix, {key: _prefixed(part, prefix) for key, part in parts.items()})
    return None


def _prefixed(part: Part, prefix: str) -> Part:
    factors = None if part.factors is None else (prefix + part.factors[0], prefix + part.factors[1])
    return part._replace(key=prefix + part.key, factors=factors)


def _with_factors(parts: dict[str, Part], shapes: Mapping[str, Shape]) -> dict[str, Part]:
    """The authors' trainer keeps a LoRA in the checkpoint: a layer's own weight as ``LAYER.original.weight``, and for
    each of its parts (q, k and v) ``LAYER.matrix_A.0`` (down) and ``LAYER.matrix_B.0`` (up).

    Raises:
        SpecError: half of a pair is missing, or it does not fit the weight.
    """
    found = {}
    for name, part in parts.items():
        layer = part.key.removesuffix(f"{_ORIGINAL}weight")
        down, up = (f"{layer}.matrix_{letter}.{part.blocks[0] if part.blocks else 0}" for letter in "AB")
        if layer != part.key and (up in shapes or down in shapes):
            _check_factors(shapes.get(up, ()), shapes.get(down, ()), part.shape, layer)
            part = part._replace(factors=(up, down))
        found[name] = part
    return found


def _check_factors(up: Shape, down: Shape, weight: Shape, layer: str) -> None:
    if len(up) != 2 or len(down) != 2 or (up[0], down[1]) != weight or up[1] != down[0]:
        raise SpecError(f"{layer}: expected the LoRA in this checkpoint to fit its weight {list(weight)}, got matrix_B "
                        f"{list(up)} and matrix_A {list(down)}. The file is damaged; download it again.")


def _prefix(keys: Iterable[str], mark: str) -> str | None:
    """What stands before ``mark``, up to a dot; the shortest, if the file holds more than one copy."""
    found = [key[:-len(mark)] for key in keys if key.endswith(mark)]
    return min((prefix for prefix in found if not prefix or prefix.endswith(".")), key=len, default=None)


_ORIGINAL = ".original."  # in the keys of a layer that SAT trained a LoRA for


def _mapped(layout: Layout, shapes: Mapping[str, Shape]) -> dict[str, Part]:
    rules = [(_pattern(rule.source), rule) for rule in layout.rules]
    levels = len({key.split(".")[2] for key in shapes if key.startswith("decoder.up.") and key.count(".") > 2})
    parts: dict[str, Part] = {}
    for key, shape in shapes.items():
        matches = ((rule, pattern.fullmatch(key.replace(_ORIGINAL, "."))) for pattern, rule in rules)
        matched = [(rule, match.groupdict()) for rule, match in matches if match]
        for rule, names in matched:
            if rule.source == matched[0][0].source:  # the first pattern that fits, with all its targets
                target = rule.target.format(**names, r=levels - 1 - int(names.get("n") or 0))
                parts.setdefault(target, _part(key, shape, rule))
    return parts


def _part(key: str, shape: Shape, rule: Rule) -> Part:
    if rule.of == 1:
        return Part(key, shape)
    if not shape or shape[0] % rule.of:
        raise SpecError(f"{key}: expected a weight whose rows divide by {rule.of}, got shape {list(shape)}. The file "
                        "is damaged or belongs to another model; download it again.")
    return Part(key, (shape[0] // rule.of * len(rule.blocks), *shape[1:]), rule.blocks, rule.of)


def _with_conv_patch(parts: dict[str, Part]) -> dict[str, Part]:
    """The authors' current code writes the 1.0 patch convolution as a matrix over (c, 1, p, q): the same numbers.

    1.0 has four output values per channel, 1.5 eight; both have 16 latent channels.
    """
    patch, out = parts.get("patch_embed.proj.weight"), parts.get("proj_out.weight")
    if patch is None or out is None or len(patch.shape) != 2 or not out.shape or out.shape[0] != 64:
        return parts
    rows, columns = patch.shape
    if columns % 4:
        return parts
    return {**parts, "patch_embed.proj.weight": patch._replace(shape=(rows, columns // 4, 2, 2))}
