"""The transformer against diffusers' ``CogVideoXTransformer3DModel``: fp32, relative error <= 1e-5."""

from __future__ import annotations

from dataclasses import replace

import comfy.ops
import pytest
import torch
from cogx.model_loaders.detect import model_from_configs
from cogx.models.cogvideox.transformer import CogVideoXTransformer
from cogx.models.specs import SpecError
from cogx.scripts.tiny_pipeline import VARIANTS, tiny_transformer

# Latent (T, H, W): the native size, a taller one, a wider one; even and odd counts.
NATIVE = (5, 8, 12)
SIZES = [NATIVE, (3, 12, 8), (4, 6, 16), (1, 8, 12)]


def pair(variant: str, **overrides):
    reference = tiny_transformer(variant, **overrides)
    config = {"_class_name": "CogVideoXTransformer3DModel", **reference.config}
    if variant.startswith("1.5"):
        config["patch_bias"] = True  # diffusers creates the bias whatever the config says
    channels = config["in_channels"]  # the network takes any number; detection refuses what no node could fill
    known = channels if channels in (16, 32) else 32
    spec = replace(model_from_configs({**config, "in_channels": known}).transformer, in_channels=channels)
    ours = CogVideoXTransformer(spec, torch.float32, "cpu", comfy.ops.disable_weight_init)
    result = ours.load_state_dict(reference.state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    return ours.eval(), reference


def reference_rope(reference, frames: int, height: int, width: int):
    """As the pipelines compute it."""
    from diffusers import CogVideoXPipeline

    if not reference.config.use_rotary_positional_embeddings:
        return None
    pipeline = CogVideoXPipeline.__new__(CogVideoXPipeline)
    pipeline.vae_scale_factor_spatial = 8
    pipeline.register_modules(transformer=reference)
    return pipeline._prepare_rotary_positional_embeddings(8 * height, 8 * width, frames, torch.device("cpu"))


def inputs(reference, size, batch=2):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, reference.config.in_channels, *size, generator=generator)
    tokens = reference.config.max_text_seq_length
    context = torch.randn(batch, tokens, reference.config.text_embed_dim, generator=generator)
    timestep = torch.tensor([999.0, 41.0])[:batch]
    ofs = torch.full((batch,), 2.0) if reference.config.ofs_embed_dim else None
    return x, timestep, context, ofs


def run_reference(reference, x, timestep, context, ofs):
    """[B, C, T, H, W] in and out; an odd count of 1.5 is padded at the front and the padding dropped.

    The noisy latent's first frame is repeated, the image's moves: the pipeline puts it on the first padded frame.
    """
    padding = -x.shape[2] % (reference.config.patch_size_t or 1)
    if padding:
        noisy, image = x[:, :16], x[:, 16:]
        image = torch.cat([image[:, :, :1], torch.zeros_like(image[:, :, :1]), image[:, :, 1:]], dim=2)
        x = torch.cat([torch.cat([noisy[:, :, :1], noisy], dim=2), image], dim=1)
    x = x.permute(0, 2, 1, 3, 4)  # bcthw -> btchw
    rope = reference_rope(reference, x.shape[1], *x.shape[3:])
    out = reference(x, context, timestep, ofs=ofs, image_rotary_emb=rope, return_dict=False)[0]
    return out.permute(0, 2, 1, 3, 4)[:, :, padding:]


# diffusers refuses other sizes of a model with learned positions; so do we (tested below).
CASES = [(variant, size) for variant in VARIANTS for size in SIZES if variant != "5B-I2V" or size[1:] == NATIVE[1:]]


@pytest.mark.parametrize("variant, size", CASES)
def test_forward_equals_diffusers(variant, size, error):
    ours, reference = pair(variant)
    x, timestep, context, ofs = inputs(reference, size)
    expected = run_reference(reference, x, timestep, context, ofs)
    assert error(ours(x, timestep, context, ofs=ofs), expected) <= 1e-5


@pytest.mark.parametrize("in_channels", [33, 48])
@pytest.mark.parametrize("variant", ["5B", "1.5-5B"])
def test_more_input_channels(variant, in_channels, error):
    ours, reference = pair(variant, in_channels=in_channels)
    x, timestep, context, ofs = inputs(reference, NATIVE)
    assert error(ours(x, timestep, context, ofs=ofs), run_reference(reference, x, timestep, context, ofs)) <= 1e-5


def test_joined_prompts_have_no_position_beyond_the_table(error):
    """Text tokens beyond the table's part take no image position: two prompts joined differ by their text alone."""
    ours, reference = pair("5B-I2V")
    x, _, context, _ = inputs(reference, NATIVE)
    grid = ours.patch_embed.native_grid()
    text, image = ours.patch_embed(x, torch.cat([context, context], dim=1), grid)
    alone, same = ours.patch_embed(x, context, grid)
    assert torch.equal(image, same) and torch.equal(text[:, :226], alone)
    assert torch.allclose(text[:, 226:], ours.patch_embed.text_proj(context), atol=1e-6)


def test_learned_positions_refuse_another_size():
    ours, reference = pair("5B-I2V")
    x, timestep, context, _ = inputs(reference, (5, 12, 8))
    with pytest.raises(SpecError, match="learned positions for 12x8 only"):
        ours(x, timestep, context)


def test_odd_rows_are_refused():
    ours, reference = pair("5B")
    x, timestep, context, _ = inputs(reference, (5, 7, 12))
    with pytest.raises(SpecError, match="multiples of 2"):
        ours(x, timestep, context)


def test_block_replacement_and_wrapper_see_the_call(error):
    """``patches_replace["dit"]`` and the DIFFUSION_MODEL wrapper are honoured and change nothing by themselves."""
    import comfy.patcher_extension as extension

    ours, reference = pair("5B")
    x, timestep, context, _ = inputs(reference, NATIVE)
    seen: list[str] = []

    def replacement(args, extra):
        seen.append(f"block of {args['img'].shape[1]} and {args['txt'].shape[1]} tokens")
        return extra["original_block"](args)

    def wrapper(executor, *args, **kwargs):
        assert args[0] is x and args[-1]["marker"] == 1
        seen.append("wrapper")
        return executor(*args, **kwargs)

    options = {"patches_replace": {"dit": {("double_block", 1): replacement}}, "marker": 1}
    extension.add_wrapper(extension.WrappersMP.DIFFUSION_MODEL, wrapper, options)
    patched = ours(x, timestep, context, transformer_options=options)
    assert seen == ["wrapper", "block of 120 and 226 tokens"]
    assert torch.equal(patched, ours(x, timestep, context))


def test_feed_forward_answers_a_call():
    """A node pack may call it whole; a block calls its halves."""
    ours, reference = pair("5B")
    x = torch.randn(2, 5, ours.spec.hidden_size, generator=torch.Generator().manual_seed(1))
    expected = reference.transformer_blocks[0].ff(x)
    assert torch.allclose(ours.transformer_blocks[0].ff(x), expected, atol=1e-6)
