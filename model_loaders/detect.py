"""What is in a file: from config.json dicts, or from {key: shape} alone, to a spec.

Pure: no ComfyUI, no torch. File names decide nothing. Shapes are by diffusers' keys; ``keys.py`` finds them in every
other layout.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from ..models.specs import (
    PUBLISHED,
    TRAIN_TIMESTEPS,
    VAE_SPATIAL_RATIO,
    LatentSpec,
    ModelSpec,
    ScheduleSpec,
    SpecError,
    TextSpec,
    TransformerSpec,
    VAESpec,
    nearest_published,
    pick,
)
from .families import not_this
from .keys import TEXT_MARK, TRANSFORMER_MARK, VAE_MARK

Shapes = Mapping[str, tuple[int, ...]]
Config = Mapping[str, Any]

TRANSFORMER_CLASS = "CogVideoXTransformer3DModel"
VAE_CLASS = "AutoencoderKLCogVideoX"
FREQUENCIES = ("pos_embed.freqs_sin", "pos_embed.freqs_cos")  # the authors' files with rotary positions have them
FEED_FORWARDS = ("gated-gelu", "relu", "gated-relu")
TEXT_CLASSES = ("T5EncoderModel", "T5ForConditionalGeneration")
# Bounds for what a damaged file may ask; the published VAE has 4 levels of 3, T5's vocabulary is the longest side.
MAX_VAE_LEVELS, MAX_VAE_RESNETS, MAX_SIDE = 8, 64, 2**20


def check_class(config: Config, expected: str, where: str) -> None:
    """Refuse a config.json of another class.

    Raises:
        SpecError: ``_class_name`` is not ``expected``.
    """
    found = config.get("_class_name")
    if found != expected:
        raise SpecError(f"{where}: expected _class_name {expected}, got {found}. "
                        "This folder holds another kind of model; choose a CogVideoX one.")


def model_from_configs(transformer: Config, vae: Config | None = None, scheduler: Config | None = None,
                       where: str = "transformer/config.json") -> ModelSpec:
    """The model of a pipeline folder. What no config says is taken from the published model of the same kind."""
    check_class(transformer, TRANSFORMER_CLASS, where)
    network = TransformerSpec(**pick(TransformerSpec, transformer, where))
    _check_variant_options(transformer, where)
    base = nearest_published(network)
    latent = base.latent
    if vae is not None:
        channels = pick(VAESpec, vae, "vae/config.json").get("latent_channels", latent.channels)
        latent = replace(latent, channels=channels, **pick(LatentSpec, vae, "vae/config.json"))
    schedule = base.schedule
    if scheduler is not None:
        schedule = replace(schedule, **pick(ScheduleSpec, scheduler, "scheduler_config.json"))
    _check_schedule(schedule)
    width, height = base.native_width, base.native_height
    # A square sample size (300x300 in some 1.5 configs) is the authors' grid of positions, not a video size.
    if not (base.is_v1_5 and network.sample_width == network.sample_height):
        width, height = network.sample_width * VAE_SPATIAL_RATIO, network.sample_height * VAE_SPATIAL_RATIO
    return replace(base, transformer=network, latent=latent, schedule=schedule, native_width=width,
                   native_height=height, max_frames=max(network.sample_frames, base.max_frames),
                   text_tokens=network.max_text_seq_length)


def _check_variant_options(config: Config, where: str) -> None:
    known = {"activation_fn": "gelu-approximate", "timestep_activation_fn": "silu", "norm_elementwise_affine": True}
    for key, value in known.items():
        if config.get(key, value) != value:
            raise SpecError(f"{where}: expected {key} {value}, got {config[key]}. No published CogVideoX has this; "
                            "the file is a different architecture.")


def _check_schedule(schedule: ScheduleSpec) -> None:
    if schedule.num_train_timesteps != TRAIN_TIMESTEPS:
        raise SpecError(f"scheduler_config.json: expected num_train_timesteps {TRAIN_TIMESTEPS}, got "
                        f"{schedule.num_train_timesteps}. Restore the original scheduler_config.json.")
    if schedule.prediction_type != "v_prediction" or schedule.beta_schedule != "scaled_linear":
        raise SpecError(
            f"scheduler_config.json: expected prediction_type v_prediction and beta_schedule scaled_linear, got "
            f"{schedule.prediction_type} and {schedule.beta_schedule}. No CogVideoX model uses these; "
            "restore the original scheduler_config.json.")


def vae_from_config(config: Config, where: str = "vae/config.json") -> VAESpec:
    check_class(config, VAE_CLASS, where)
    spec = VAESpec(**pick(VAESpec, config, where))
    if len(spec.block_out_channels) > MAX_VAE_LEVELS or spec.layers_per_block > MAX_VAE_RESNETS:
        raise SpecError(f"{where}: {len(spec.block_out_channels)} levels of {spec.layers_per_block} blocks are no "
                        "CogVideoX VAE. Restore the original file.")
    if any(width % spec.norm_num_groups for width in spec.block_out_channels):
        raise SpecError(f"{where}: norm_num_groups {spec.norm_num_groups} does not divide block_out_channels "
                        f"{list(spec.block_out_channels)}. Restore the original file.")
    return spec


def text_from_config(config: Config, where: str = "text_encoder/config.json") -> TextSpec:
    """The T5 encoder of a config.json.

    Raises:
        SpecError: another class, or relative position buckets that ComfyUI's T5 does not have.
    """
    classes = config.get("architectures") or []
    if not any(name in TEXT_CLASSES for name in classes):
        raise SpecError(f"{where}: expected architectures {list(TEXT_CLASSES)}, got {classes}. "
                        "CogVideoX needs a T5 encoder.")
    spec = TextSpec(**pick(TextSpec, config, where))
    if spec.feed_forward_proj not in FEED_FORWARDS:
        raise SpecError(f"{where}: expected feed_forward_proj to be one of {list(FEED_FORWARDS)}, got "
                        f"{spec.feed_forward_proj}. Use the T5-v1.1-XXL encoder of a CogVideoX pipeline.")
    default = TextSpec()
    for key in ("relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon"):
        if getattr(spec, key) != getattr(default, key):
            raise SpecError(f"{where}: expected {key} {getattr(default, key)}, got {getattr(spec, key)}. "
                            "Use the T5 encoder that belongs to CogVideoX.")
    return spec


def check_layer_count(config_layers: int, shapes: Shapes, prefix: str, where: str) -> None:
    """Refuse a config whose depth is not the file's, before a network of that depth is built to compare shapes.

    Raises:
        SpecError: the counts differ.
    """
    found = _count(shapes, prefix)
    if config_layers != found:
        raise SpecError(f"{where}: expected {config_layers} layers (its config.json), got {found} in the weights. "
                        "The file is incomplete or its config.json belongs to another model; download both again.")


def _count(shapes: Shapes, prefix: str) -> int:
    return len({key[len(prefix):].split(".")[0] for key in shapes if key.startswith(prefix)})


def _dims(shapes: Shapes, key: str, *ranks: int) -> tuple[int, ...]:
    """The shape of ``key``.

    Raises:
        KeyError: it is not there. SpecError: another number of dimensions than ``ranks``, or an empty one.
    """
    shape = shapes[key]
    if len(shape) not in ranks or 0 in shape or max(shape) > MAX_SIDE:
        raise SpecError(f"{key}: expected {' or '.join(map(str, ranks))} dimensions, got shape {list(shape)}. The file "
                        "is damaged or belongs to another model; download it again.")
    return shape


def configs_in_metadata(metadata: Mapping[str, str]) -> dict[str, Config]:
    """The configs that a single file's metadata holds under ``config``, by component: the JSON of a config.json, or of
    several by their names (transformer, vae, scheduler). What is not of CogVideoX is left out."""
    try:
        found = json.loads(metadata.get("config", ""))
    except (ValueError, TypeError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    kinds = {TRANSFORMER_CLASS: "transformer", VAE_CLASS: "vae"}
    if "_class_name" in found:
        found = {kinds.get(str(found["_class_name"]), "other"): found}
    configs = {name: value for name, value in found.items() if isinstance(value, dict)}
    own = {name for name in configs if kinds.get(str(configs[name].get("_class_name"))) == name}
    return {name: configs[name] for name in configs if name in own or (own and name in ("vae", "scheduler"))}


def model_from_shapes(shapes: Shapes, variant: str = "auto", rotates: bool = False) -> ModelSpec:
    """The model of a transformer's shapes.

    ``variant``: 'auto', or the name of the published model whose kind this is, where shapes cannot tell. ``rotates``:
    the file holds rotary frequencies.

    Raises:
        SpecError: not a CogVideoX transformer, or a position table of unknown grid.
    """
    if TRANSFORMER_MARK not in shapes:
        raise SpecError(not_this("CogVideoX transformer", TRANSFORMER_MARK, shapes))
    try:
        network = _network_from_shapes(shapes, rotates)
    except KeyError as error:
        raise SpecError(f"This CogVideoX transformer lacks {error}. Download the whole file again.") from error
    if variant != "auto":
        network = _as_variant(network, PUBLISHED[variant], "patch_embed.pos_embedding" in shapes)
    base = nearest_published(network)
    network = _with_native_size(network, base, shapes)
    return replace(base, transformer=network, text_tokens=network.max_text_seq_length)


def _network_from_shapes(shapes: Shapes, rotates: bool) -> TransformerSpec:
    patch = _dims(shapes, "patch_embed.proj.weight", 2, 4)
    hidden = patch[0]
    head_dim, = _dims(shapes, "transformer_blocks.0.attn1.norm_q.weight", 1)
    patch_size, patch_size_t = (patch[2], None) if len(patch) == 4 else (2, 2)
    values = patch_size**2 * (patch_size_t or 1)  # of one channel in a token
    in_channels = patch[1] if len(patch) == 4 else patch[1] // values
    out_channels = _dims(shapes, "proj_out.weight", 2)[0] // values
    if hidden % head_dim or out_channels < 1:
        raise SpecError(f"patch_embed.proj.weight {list(patch)}, norm_q {head_dim}, proj_out "
                        f"{list(shapes['proj_out.weight'])}: no CogVideoX transformer has these together. The file is "
                        "damaged or belongs to another model; download it again.")
    found = positions(shapes, rotates)
    ofs = "ofs_embedding.linear_1.weight"
    return TransformerSpec(
        num_attention_heads=hidden // head_dim,
        attention_head_dim=head_dim,
        num_layers=_count(shapes, "transformer_blocks."),
        in_channels=in_channels,
        out_channels=out_channels,
        time_embed_dim=_dims(shapes, "time_embedding.linear_2.weight", 2)[0],
        text_embed_dim=_dims(shapes, "patch_embed.text_proj.weight", 2)[1],
        ofs_embed_dim=_dims(shapes, ofs, 2)[1] if ofs in shapes else None,
        patch_size=patch_size,
        patch_size_t=patch_size_t,
        patch_bias="patch_embed.proj.bias" in shapes,
        attention_bias="transformer_blocks.0.attn1.to_q.bias" in shapes,
        use_rotary_positional_embeddings=found.rotary,
        use_learned_positional_embeddings=found.learned,
    )


class Positions(NamedTuple):
    """How a transformer knows where its tokens are. ``why``: what is to be said of it, if anything."""

    rotary: bool
    learned: bool
    why: str = ""


def positions(shapes: Shapes, rotates: bool) -> Positions:
    """The positions of a transformer, by all that its file tells beside a config.

    The authors' files hold rotary frequencies, or not. Width and heads are 2B's or 5B's in every finetune of these,
    with whatever inputs. A table is 2B's computed one, which the authors store, or the learned one of 5B-I2V.
    """
    patch, table = shapes["patch_embed.proj.weight"], "patch_embed.pos_embedding" in shapes
    if len(patch) == 2:  # 1.5, which has rotary ones only
        return Positions(rotary=True, learned=table)
    takes_image = patch[1] * patch[2] ** 2 > shapes["proj_out.weight"][0]
    size = (patch[0], patch[0] // shapes["transformer_blocks.0.attn1.norm_q.weight"][0])
    small, big = ((spec.hidden_size, spec.num_attention_heads) for spec in (
        PUBLISHED[name].transformer for name in ("2B", "5B")))
    if not rotates and size == small:
        return Positions(False, False, ", 2B's width with an image as input: sinusoidal" if takes_image else "")
    if rotates or size == big:
        if size != big:
            return Positions(True, table, ", with rotary frequencies")
        lost = ", but its table of learned positions is missing: videos will be worse" if takes_image else ""
        return Positions(True, table, "" if table else lost)
    unknown = f", but they do not tell 2B's positions from 5B's at width {patch[0]}"
    if table and not takes_image:
        return Positions(False, False, ", with a stored table of positions as 2B's")
    taken = "learned ones as 5B-I2V's are taken" if table else "rotary ones are taken"
    return Positions(True, table, f"{unknown}; {taken}: set variant to 2B if that is its kind")


def doubt(network: TransformerSpec) -> str:
    """What is to be said of a transformer that takes an image by its channels, but has no table of learned positions
    as 5B-I2V: pose and control models of CogVideoX-Fun have the same channels and keys."""
    is_v1 = network.patch_size_t is None
    doubted = is_v1 and network.condition_channels > 0 and not network.use_learned_positional_embeddings
    return "; or it is a control model, which this pack does not run" if doubted else ""


def _as_variant(network: TransformerSpec, published: ModelSpec, table: bool) -> TransformerSpec:
    want = published.transformer
    is_2b = not want.use_rotary_positional_embeddings  # for text, and finetuned for images: there is no published one
    image = (want.condition_channels > 0, network.condition_channels > 0)
    if want.patch_size_t != network.patch_size_t or not (is_2b or image[0] == image[1]):
        raise SpecError(f"variant {published.name}: the file's shapes say otherwise (patch_size_t "
                        f"{network.patch_size_t}, {network.in_channels} input channels). Set variant to auto.")
    return replace(network, use_rotary_positional_embeddings=not is_2b,
                   use_learned_positional_embeddings=table and not is_2b)


def _with_native_size(network: TransformerSpec, base: ModelSpec, shapes: Shapes) -> TransformerSpec:
    native = base.transformer
    network = replace(network, sample_width=native.sample_width, sample_height=native.sample_height,
                      sample_frames=native.sample_frames, max_text_seq_length=native.max_text_seq_length)
    if network.use_learned_positional_embeddings:
        found = _dims(shapes, "patch_embed.pos_embedding", 3)[1]
        if found != learned_table_length(network):
            raise SpecError(f"patch_embed.pos_embedding: expected {learned_table_length(network)} positions "
                            f"({base.name}), got {found}. Load the pipeline folder, whose config.json says the size.")
    return network


def learned_table_length(network: TransformerSpec) -> int:
    """Positions in ``patch_embed.pos_embedding``: the text's (zeros) and one per token of the native size."""
    frames = (network.sample_frames - 1) // network.temporal_compression_ratio + 1
    rows, columns = network.sample_height // network.patch_size, network.sample_width // network.patch_size
    return network.max_text_seq_length + frames * rows * columns


def vae_from_shapes(shapes: Shapes) -> VAESpec:
    """The VAE of these shapes.

    Raises:
        SpecError: not a CogVideoX VAE.
    """
    if VAE_MARK not in shapes:
        raise SpecError(not_this("CogVideoX VAE", VAE_MARK, shapes))
    try:
        return _vae_from_shapes(shapes)
    except KeyError as error:
        raise SpecError(f"This CogVideoX VAE lacks {error}. Download the whole file again.") from error


def _vae_from_shapes(shapes: Shapes) -> VAESpec:
    levels, resnets = _count(shapes, "encoder.down_blocks."), _count(shapes, "encoder.down_blocks.0.resnets.")
    if levels > MAX_VAE_LEVELS or resnets > MAX_VAE_RESNETS:
        raise SpecError(f"This VAE has {levels} levels of {resnets} blocks: expected the 4 levels of 3 blocks of "
                        "CogVideoX. The file is damaged or belongs to another model; download it again.")
    widths = tuple(_dims(shapes, f"encoder.down_blocks.{i}.resnets.0.conv1.conv.weight", 5)[0] for i in range(levels))
    # The group count is not in the file: 32 in every published VAE, fewer only where 32 does not divide.
    groups = math.gcd(VAESpec().norm_num_groups, *widths)
    return VAESpec(
        in_channels=_dims(shapes, "encoder.conv_in.conv.weight", 5)[1],
        out_channels=_dims(shapes, "decoder.conv_out.conv.weight", 5)[0],
        block_out_channels=widths,
        latent_channels=_dims(shapes, "decoder.conv_in.conv.weight", 5)[1],
        layers_per_block=resnets,
        norm_num_groups=groups,
        use_quant_conv="quant_conv.weight" in shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes,
    )


def text_from_shapes(shapes: Shapes) -> TextSpec:
    """The T5 encoder of shapes by transformers' keys.

    Raises:
        SpecError: not a T5 encoder.
    """
    if TEXT_MARK not in shapes or TEXT_MARK.replace("block.0", "block.1") in shapes:
        raise SpecError(not_this("T5 encoder", TEXT_MARK, shapes))
    try:
        return _text_from_shapes(shapes)
    except KeyError as error:
        raise SpecError(f"This T5 encoder lacks {error}. Download the whole file again.") from error


def _text_from_shapes(shapes: Shapes) -> TextSpec:
    block = "encoder.block.0.layer."
    heads = _dims(shapes, TEXT_MARK, 2)[1]
    gated = f"{block}1.DenseReluDense.wi_0.weight" in shapes
    inner = _dims(shapes, f"{block}0.SelfAttention.q.weight", 2)[0]
    vocab, width = _dims(shapes, "shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight", 2)
    feed_forward = _dims(shapes, f"{block}1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight", 2)[0]
    return TextSpec(
        d_model=width,
        d_kv=inner // heads,
        d_ff=feed_forward,
        num_layers=_count(shapes, "encoder.block."),
        num_heads=heads,
        vocab_size=vocab,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )
