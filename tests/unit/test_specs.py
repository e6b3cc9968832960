"""Frame and size geometry, and what the published models are."""

from __future__ import annotations

import pytest
from cogx.models.specs import (
    PUBLISHED,
    SpecError,
    check_any_geometry,
    check_dtype,
    check_geometry,
    check_latent,
    nearest_on_grid,
    nearest_published,
)
from hypothesis import given
from hypothesis import strategies as st


def test_published_models_are_the_five():
    assert list(PUBLISHED) == ["2B", "5B", "5B-I2V", "1.5-5B", "1.5-5B-I2V"]
    two, five = PUBLISHED["2B"], PUBLISHED["5B"]
    assert two.transformer.hidden_size == 1920 and five.transformer.hidden_size == 3072
    assert (two.latent.scaling_factor, five.latent.scaling_factor) == (1.15258426, 0.7)
    assert (two.schedule.snr_shift_scale, five.schedule.snr_shift_scale) == (3.0, 1.0)
    assert PUBLISHED["1.5-5B-I2V"].transformer.ofs_embed_dim == 512
    assert PUBLISHED["1.5-5B-I2V"].latent.invert_scale_latents


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_native_geometry_is_legal(name):
    spec = PUBLISHED[name]
    geometry = check_geometry(spec.native_width, spec.native_height, spec.transformer.sample_frames, spec)
    assert geometry.latent_shape() == ((1, 16, 21, 96, 170) if spec.is_v1_5 else (1, 16, 13, 60, 90))
    assert nearest_published(spec.transformer) is spec


@pytest.mark.parametrize("name, frames, message", [
    ("5B", 48, "8N\\+1 .native 49.; nearest: 41 or 49"),
    ("5B", 50, "nearest: 49 or 57"),
    ("1.5-5B", 80, "16N\\+1 .native 81.; nearest: 65 or 81"),
    ("1.5-5B", 89, "nearest: 81 or 97"),
    ("2B", 0, "nearest: 1 or 9"),
])
def test_frames_off_the_grid(name, frames, message):
    spec = PUBLISHED[name]
    with pytest.raises(SpecError, match=message):
        check_geometry(spec.native_width, spec.native_height, frames, spec)


def test_frames_for_a_model_not_known_yet():
    check_any_geometry(720, 480, 57)
    with pytest.raises(SpecError, match=r"1\.0 needs 8N\+1 .*nearest: 49 or 57\. CogVideoX 1\.5 .*nearest: 49 or 65"):
        check_any_geometry(720, 480, 50)


@pytest.mark.parametrize("width, height, message", [
    (725, 480, "width 725: CogVideoX needs a multiple of 16; nearest: 720 or 736"),
    (720, 479, "height 479: CogVideoX needs a multiple of 16; nearest: 464 or 480"),
    (720, 3, "nearest: 16 or 32"),
])
def test_size_off_the_grid(width, height, message):
    with pytest.raises(SpecError, match=message):
        check_geometry(width, height, 49, PUBLISHED["5B"])


def test_learned_positions_have_one_size():
    with pytest.raises(SpecError, match="set width 720 and height 480"):
        check_geometry(480, 720, 49, PUBLISHED["5B-I2V"])


@given(st.integers(-100, 5000), st.integers(1, 64), st.integers(0, 8))
def test_nearest_legal_values_bracket_the_value(value, step, offset):
    low, high = nearest_on_grid(value, step, offset, minimum=offset)
    assert (low - offset) % step == 0 and (high - offset) % step == 0
    assert low >= offset
    if value >= offset:
        assert low <= value <= high and high - low in (0, step)


@given(st.sampled_from(list(PUBLISHED)), st.integers(1, 12))
def test_legal_frames_give_odd_latents_and_whole_patches(name, n):
    spec = PUBLISHED[name]
    geometry = check_geometry(spec.native_width, spec.native_height, spec.frame_step * n + 1, spec)
    assert geometry.latent_frames % 2 == 1
    padded = geometry.latent_frames + spec.padding_frames(geometry.latent_frames)
    assert padded % spec.transformer.temporal_patch == 0
    assert padded - geometry.latent_frames < spec.transformer.temporal_patch


@pytest.mark.parametrize("shape, message", [
    ((1, 4, 64, 64), "another model"),
    ((1, 4, 13, 60, 90), "another model"),
    ((1, 16, 13, 60, 91), "width 728"),
])
def test_foreign_latents(shape, message):
    with pytest.raises(SpecError, match=message):
        check_latent(shape, PUBLISHED["5B"])
    check_latent((2, 16, 7, 60, 90), PUBLISHED["5B"])


def test_fp16_is_for_2b_only():
    check_dtype("fp16", PUBLISHED["2B"])
    check_dtype("bf16", PUBLISHED["1.5-5B"])
    with pytest.raises(SpecError, match="choose auto"):
        check_dtype("fp16", PUBLISHED["1.5-5B"])
