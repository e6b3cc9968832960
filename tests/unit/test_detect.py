"""Specs from config.json dicts and from shapes alone."""

from __future__ import annotations

import re

import pytest
from cogx.model_loaders import detect
from cogx.models.specs import PUBLISHED, SpecError, TransformerSpec
from cogx.scripts.tiny_pipeline import (
    VARIANTS,
    scheduler_config,
    tiny_text_encoder,
    tiny_transformer,
    tiny_vae,
    transformer_config,
    vae_config,
)

TRANSFORMER = {"_class_name": "CogVideoXTransformer3DModel"}


def shapes_of(module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def full_size_shapes(spec: TransformerSpec) -> dict[str, tuple[int, ...]]:
    """Shapes of a full-size transformer, from diffusers on the meta device."""
    import dataclasses

    import torch
    from diffusers import CogVideoXTransformer3DModel

    names = {f.name for f in dataclasses.fields(TransformerSpec)} - {"norm_eps"}
    with torch.device("meta"):
        return shapes_of(CogVideoXTransformer3DModel(**{name: getattr(spec, name) for name in names}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_from_configs(variant):
    vae = {"_class_name": "AutoencoderKLCogVideoX", "latent_channels": 16, **vae_config(variant)}
    spec = detect.model_from_configs({**TRANSFORMER, **transformer_config(variant)}, vae, scheduler_config(variant))
    assert spec.name == variant
    assert spec.latent == PUBLISHED[variant].latent
    assert spec.schedule == PUBLISHED[variant].schedule
    assert spec.text_tokens == (224 if variant.startswith("1.5") else 226)
    assert (spec.native_width, spec.native_height) == ((1360, 768) if spec.is_v1_5 else (96, 64))


def test_configs_decide_where_they_say_something():
    scheduler = {**scheduler_config("5B"), "snr_shift_scale": 2.0}
    vae = {"scaling_factor": 0.9}
    spec = detect.model_from_configs({**TRANSFORMER, **transformer_config("5B")}, vae, scheduler)
    assert spec.schedule.snr_shift_scale == 2.0 and spec.latent.scaling_factor == 0.9


@pytest.mark.parametrize("variant", VARIANTS)
def test_full_size_from_shapes(variant):
    """A single file of a published model is recognised whole."""
    published = PUBLISHED[variant]
    found = detect.model_from_shapes(full_size_shapes(published.transformer))
    assert found == published


@pytest.mark.parametrize("variant", VARIANTS)
def test_tiny_from_shapes(variant):
    if variant == "5B-I2V":
        with pytest.raises(SpecError, match="Load the pipeline folder"):  # an unknown grid of learned positions
            detect.model_from_shapes(shapes_of(tiny_transformer(variant)))
        return
    found = detect.model_from_shapes(shapes_of(tiny_transformer(variant)), "2B" if variant == "2B" else "auto")
    expected = TransformerSpec(**transformer_config(variant))
    for name in ("num_attention_heads", "attention_head_dim", "num_layers", "in_channels", "ofs_embed_dim",
                 "patch_size_t", "text_embed_dim", "time_embed_dim", "use_rotary_positional_embeddings"):
        assert getattr(found.transformer, name) == getattr(expected, name), name


def of_width(name: str, width: int | None = None, image: bool = False, table: bool = False) -> dict:
    """Shapes of a published model's transformer, or one of another width, with an image as input or a table."""
    from dataclasses import replace

    spec = replace(PUBLISHED[name].transformer, in_channels=32 if image else 16, num_layers=1)
    spec = spec if width is None else replace(spec, num_attention_heads=width // 64)
    return {**full_size_shapes(spec), **({"patch_embed.pos_embedding": (1, 17776, spec.hidden_size)} if table else {})}


@pytest.mark.parametrize("shapes, rotates, name, learned, words", [
    (of_width("2B", image=True, table=True), False, "2B", False, "2B's width with an image as input"),
    (of_width("2B", image=True), False, "2B", False, "2B's width with an image as input"),
    (of_width("2B", table=True), False, "2B", False, ""), (of_width("2B"), False, "2B", False, ""),
    (of_width("2B"), True, "5B", False, ", with rotary frequencies"),
    (of_width("5B", image=True, table=True), False, "5B-I2V", True, ""),
    (of_width("5B", image=True), False, "5B-I2V", False, "table of learned positions is missing"),
    (of_width("5B", table=True), False, "5B", True, ""),
    (of_width("5B", 1024, image=True, table=True), False, "5B-I2V", True, "learned ones as 5B-I2V's are taken: set"),
    (of_width("5B", 1024, image=True), True, "5B-I2V", False, "with rotary frequencies"),
    (of_width("5B", 1024, table=True), False, "2B", False, "with a stored table of positions as 2B's"),
    (of_width("5B", 1024), False, "5B", False, "at width 1024; rotary ones are taken: set variant to 2B"),
])
def test_positions_by_all_that_a_file_tells(shapes, rotates, name, learned, words):
    found = detect.model_from_shapes(shapes, "auto", rotates)
    assert (found.name, found.transformer.use_learned_positional_embeddings) == (name, learned)
    assert found.takes_image == (shapes["patch_embed.proj.weight"][1] == 32)
    why = detect.positions(shapes, rotates).why
    assert re.search(words, why) and bool(words) >= bool(why)
    set_to_2b = detect.model_from_shapes(shapes, "2B", rotates)
    assert set_to_2b.name == "2B" and not set_to_2b.transformer.use_learned_positional_embeddings
    assert set_to_2b.schedule.snr_shift_scale == 3.0


def test_variant_that_contradicts_the_shapes():
    with pytest.raises(SpecError, match="Set variant to auto"):
        detect.model_from_shapes(shapes_of(tiny_transformer("5B")), "1.5-5B")


def test_missing_patch_bias_is_seen():
    shapes = shapes_of(tiny_transformer("1.5-5B"))
    assert detect.model_from_shapes(shapes).transformer.patch_bias
    del shapes["patch_embed.proj.bias"]
    assert not detect.model_from_shapes(shapes).transformer.patch_bias


def test_vae_and_text_from_shapes():
    vae = detect.vae_from_shapes(shapes_of(tiny_vae("5B")))
    assert (vae.block_out_channels, vae.layers_per_block, vae.latent_channels) == ((8, 8, 16, 16), 1, 16)
    encoder = tiny_text_encoder()
    text = detect.text_from_shapes(shapes_of(encoder))
    assert text == detect.text_from_config({**encoder.config.to_dict(), "architectures": ["T5EncoderModel"]})


@pytest.mark.parametrize("find, what", [
    (detect.model_from_shapes, "CogVideoX transformer"), (detect.vae_from_shapes, "CogVideoX VAE"),
    (detect.text_from_shapes, "T5 encoder"),
])
def test_other_files_are_named(find, what):
    with pytest.raises(SpecError, match=f"not a {what}"):
        find({"some.weight": (1, 2)})


@pytest.mark.parametrize("find, mark", [
    (detect.model_from_shapes, "patch_embed.text_proj.weight"),
    (detect.vae_from_shapes, "decoder.mid_block.resnets.0.norm1.norm_layer.weight"),
    (detect.text_from_shapes, "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"),
])
def test_incomplete_files(find, mark):
    with pytest.raises(SpecError, match=r"lacks .* Download the whole file again"):
        find({mark: (32, 4)})


def test_wrong_class_and_wrong_schedule():
    with pytest.raises(SpecError, match="expected _class_name CogVideoXTransformer3DModel, got FluxTransformer2DModel"):
        detect.model_from_configs({"_class_name": "FluxTransformer2DModel"})
    with pytest.raises(SpecError, match="expected prediction_type v_prediction"):
        detect.model_from_configs(TRANSFORMER, None, {"prediction_type": "epsilon"})
    with pytest.raises(SpecError, match="expected activation_fn gelu-approximate"):
        detect.model_from_configs({**TRANSFORMER, "activation_fn": "relu"})
    with pytest.raises(SpecError, match="CogVideoX needs a T5 encoder"):
        detect.text_from_config({"architectures": ["BertModel"]})
