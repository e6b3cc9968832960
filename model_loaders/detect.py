"""What is in a file: from config.json dicts, or from {key: shape} alone, to a spec.

Pure: no ComfyUI, no torch. File names decide nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

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

Shapes = Mapping[str, tuple[int, ...]]
Config = Mapping[str, Any]

TRANSFORMER_CLASS = "CogVideoXTransformer3DModel"
VAE_CLASS = "AutoencoderKLCogVideoX"
FEED_FORWARDS = ("gated-gelu", "relu", "gated-relu")
TEXT_CLASSES = ("T5EncoderModel", "T5ForConditionalGeneration")
_TRANSFORMER_MARK = "patch_embed.text_proj.weight"
_VAE_MARK = "decoder.mid_block.resnets.0.norm1.norm_layer.weight"
_TEXT_MARK = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


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
        latent = replace(latent, channels=vae.get("latent_channels", latent.channels),
                         **pick(LatentSpec, vae, "vae/config.json"))
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


def is_transformer(shapes: Shapes) -> bool:
    return _TRANSFORMER_MARK in shapes


def is_vae(shapes: Shapes) -> bool:
    return _VAE_MARK in shapes


def is_text_encoder(shapes: Shapes) -> bool:
    return _TEXT_MARK in shapes


def _count(shapes: Shapes, prefix: str) -> int:
    return len({key[len(prefix):].split(".")[0] for key in shapes if key.startswith(prefix)})


def model_from_shapes(shapes: Shapes, variant: str = "auto") -> ModelSpec:
    """The model of a transformer's state dict with diffusers' key names.

    ``variant``: 'auto', or the name of the published model whose kind this is, where shapes cannot tell.

    Raises:
        SpecError: not a CogVideoX transformer, or a position table of unknown grid.
    """
    if not is_transformer(shapes):
        raise SpecError(f"This is not a CogVideoX transformer: expected the key {_TRANSFORMER_MARK}, got "
                        f"{sorted(shapes)[:3]} ... Choose a transformer file with diffusers' key names.")
    try:
        network = _network_from_shapes(shapes)
    except KeyError as error:
        raise SpecError(f"This CogVideoX transformer lacks {error}. Download the whole file again.") from error
    if variant != "auto":
        network = _as_variant(network, PUBLISHED[variant])
    base = nearest_published(network)
    network = _with_native_size(network, base, shapes)
    return replace(base, transformer=network, text_tokens=network.max_text_seq_length)


def _network_from_shapes(shapes: Shapes) -> TransformerSpec:
    patch = shapes["patch_embed.proj.weight"]
    hidden = patch[0]
    head_dim = shapes["transformer_blocks.0.attn1.norm_q.weight"][0]
    patch_size, patch_size_t = (patch[2], None) if len(patch) == 4 else (2, 2)
    temporal = patch_size_t or 1
    in_channels = patch[1] if len(patch) == 4 else patch[1] // (patch_size**2 * temporal)
    learned = "patch_embed.pos_embedding" in shapes
    heads = hidden // head_dim
    # Sincos and RoPE models have the same keys and shapes; 2B is the only published sincos one.
    sincos = patch_size_t is None and not learned and hidden == PUBLISHED["2B"].transformer.hidden_size
    ofs = shapes.get("ofs_embedding.linear_1.weight")
    return TransformerSpec(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=_count(shapes, "transformer_blocks."),
        in_channels=in_channels,
        out_channels=shapes["proj_out.weight"][0] // (patch_size**2 * temporal),
        time_embed_dim=shapes["time_embedding.linear_2.weight"][0],
        text_embed_dim=shapes["patch_embed.text_proj.weight"][1],
        ofs_embed_dim=ofs[1] if ofs else None,
        patch_size=patch_size,
        patch_size_t=patch_size_t,
        patch_bias="patch_embed.proj.bias" in shapes,
        attention_bias="transformer_blocks.0.attn1.to_q.bias" in shapes,
        use_rotary_positional_embeddings=not sincos,
        use_learned_positional_embeddings=learned,
    )


def _as_variant(network: TransformerSpec, published: ModelSpec) -> TransformerSpec:
    want = published.transformer
    if (want.patch_size_t, want.condition_channels > 0) != (network.patch_size_t, network.condition_channels > 0):
        raise SpecError(f"variant {published.name}: the file's shapes say otherwise (patch_size_t "
                        f"{network.patch_size_t}, {network.in_channels} input channels). Set variant to auto.")
    return replace(network, use_rotary_positional_embeddings=want.use_rotary_positional_embeddings)


def _with_native_size(network: TransformerSpec, base: ModelSpec, shapes: Shapes) -> TransformerSpec:
    native = base.transformer
    network = replace(network, sample_width=native.sample_width, sample_height=native.sample_height,
                      sample_frames=native.sample_frames, max_text_seq_length=native.max_text_seq_length)
    table = shapes.get("patch_embed.pos_embedding")
    if table is not None and table[1] != learned_table_length(network):
        raise SpecError(f"patch_embed.pos_embedding: expected {learned_table_length(network)} positions "
                        f"({base.name}), got {table[1]}. Load the pipeline folder, whose config.json says the size.")
    return network


def learned_table_length(network: TransformerSpec) -> int:
    """Positions in ``patch_embed.pos_embedding``: the text's (zeros) and one per token of the native size."""
    frames = (network.sample_frames - 1) // network.temporal_compression_ratio + 1
    rows, columns = network.sample_height // network.patch_size, network.sample_width // network.patch_size
    return network.max_text_seq_length + frames * rows * columns


def vae_from_shapes(shapes: Shapes) -> VAESpec:
    """The VAE of a state dict with diffusers' key names.

    Raises:
        SpecError: not a CogVideoX VAE.
    """
    if not is_vae(shapes):
        raise SpecError(f"This is not a CogVideoX VAE: expected the key {_VAE_MARK}, got {sorted(shapes)[:3]} ... "
                        "Choose a VAE file with diffusers' key names.")
    try:
        return _vae_from_shapes(shapes)
    except KeyError as error:
        raise SpecError(f"This CogVideoX VAE lacks {error}. Download the whole file again.") from error


def _vae_from_shapes(shapes: Shapes) -> VAESpec:
    levels = _count(shapes, "encoder.down_blocks.")
    widths = tuple(shapes[f"encoder.down_blocks.{i}.resnets.0.conv1.conv.weight"][0] for i in range(levels))
    # The group count is not in the file: 32 in every published VAE, fewer only where 32 does not divide.
    groups = math.gcd(VAESpec().norm_num_groups, *widths)
    return VAESpec(
        in_channels=shapes["encoder.conv_in.conv.weight"][1],
        out_channels=shapes["decoder.conv_out.conv.weight"][0],
        block_out_channels=widths,
        latent_channels=shapes["decoder.conv_in.conv.weight"][1],
        layers_per_block=_count(shapes, "encoder.down_blocks.0.resnets."),
        norm_num_groups=groups,
        use_quant_conv="quant_conv.weight" in shapes,
        use_post_quant_conv="post_quant_conv.weight" in shapes,
    )


def text_from_shapes(shapes: Shapes) -> TextSpec:
    """The T5 encoder of a state dict with transformers' key names.

    Raises:
        SpecError: not a T5 encoder.
    """
    if not is_text_encoder(shapes):
        raise SpecError(f"This is not a T5 encoder: expected the key {_TEXT_MARK}, got {sorted(shapes)[:3]} ... "
                        "Choose a T5-v1.1-XXL encoder file.")
    try:
        return _text_from_shapes(shapes)
    except KeyError as error:
        raise SpecError(f"This T5 encoder lacks {error}. Download the whole file again.") from error


def _text_from_shapes(shapes: Shapes) -> TextSpec:
    block = "encoder.block.0.layer."
    heads = shapes[_TEXT_MARK][1]
    gated = f"{block}1.DenseReluDense.wi_0.weight" in shapes
    inner = shapes[f"{block}0.SelfAttention.q.weight"][0]
    vocab, width = shapes["shared.weight"] if "shared.weight" in shapes else shapes["encoder.embed_tokens.weight"]
    return TextSpec(
        d_model=width,
        d_kv=inner // heads,
        d_ff=shapes[f"{block}1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"][0],
        num_layers=_count(shapes, "encoder.block."),
        num_heads=heads,
        vocab_size=vocab,
        feed_forward_proj="gated-gelu" if gated else "relu",
    )
