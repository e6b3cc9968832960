"""The image condition against the rules of both references, by hand; fitting images; sizes that are proposed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cogx.models.cogvideox.image_condition import (
    augmented,
    check_image,
    condition_latent,
    model_condition,
    padded_condition,
)
from cogx.models.cogvideox.pixels import as_rgb, fitted
from cogx.models.specs import PUBLISHED, SpecError, TransformerSpec, nearest_published, propose_size


def latent(seed: int, count: int = 1) -> torch.Tensor:
    """What the VAE gives for one picture: [count, 16, 1, 4, 6]."""
    return torch.randn(count, 16, 1, 4, 6, generator=torch.Generator().manual_seed(seed))


def by_hand(name: str, reference: str, image: torch.Tensor, frames: int) -> list[torch.Tensor]:
    """The condition frame by frame, [B, C, h, w] each, of ``frames`` sampled frames, 1.5's padding frame included.

    authors: sat/sample_video.py. ``image = encode_first_stage(image)``, which multiplies with the scale factor, and in
    1.5 ``image / scale_factor``; then ``concat([image, zeros(T - 1)])`` with T = 22 for 81 frames.
    diffusers: prepare_latents. ``image_latents * f``, or ``1 / f * image_latents`` with ``invert_scale_latents``; then
    ``cat([image_latents, zeros(T - 1)])`` of T padded frames.
    """
    scale = {"5B-I2V": {"authors": 0.7, "diffusers": 0.7}, "1.5-5B-I2V": {"authors": 1.0, "diffusers": 1 / 0.7}}
    first = image[:, :, 0] * scale[name][reference]
    return [first] + [torch.zeros_like(first)] * (frames - 1)


@pytest.mark.parametrize("reference", ["authors", "diffusers"])
@pytest.mark.parametrize("name, latent_frames, sampled", [
    ("5B-I2V", 13, 13), ("5B-I2V", 1, 1), ("1.5-5B-I2V", 21, 22), ("1.5-5B-I2V", 41, 42), ("1.5-5B-I2V", 22, 22)])
def test_condition_frame_by_frame(name, reference, latent_frames, sampled):
    image = latent(0, 2)
    made = model_condition(condition_latent(latent_frames, image, None), (2, 16, sampled, 4, 6), PUBLISHED[name],
                           reference)
    expected = by_hand(name, reference, image, sampled)
    assert made.shape[2] == len(expected)
    for index, frame in enumerate(expected):
        assert torch.equal(made[:, :, index], frame), index


def test_auto_is_the_authors_where_they_differ():
    old, new = PUBLISHED["5B-I2V"], PUBLISHED["1.5-5B-I2V"]
    assert [old.image_scale(r) for r in ("auto", "diffusers", "authors")] == [0.7] * 3
    assert [new.image_scale(r) for r in ("auto", "diffusers", "authors")] == [1.0, 1 / 0.7, 1.0]
    plain = replace(new, latent=replace(new.latent, invert_scale_latents=False))
    assert plain.image_scale("diffusers") == 0.7 and plain.image_scale("authors") == 1.0


def test_end_image_is_on_the_last_frame():
    start, end = latent(0), latent(1)
    made = model_condition(condition_latent(21, start, end), (1, 16, 22, 4, 6), PUBLISHED["1.5-5B-I2V"], "authors")
    assert torch.equal(made[:, :, 0], start[:, :, 0]) and torch.equal(made[:, :, 21], end[:, :, 0])
    assert not made[:, :, 1:21].any()
    alone = condition_latent(5, None, end)
    assert not alone[:, :, :4].any() and torch.equal(alone[:, :, 4:], end)


def test_one_image_serves_a_batch_of_the_other():
    made = condition_latent(3, latent(0, 2), latent(1))
    assert made.shape == (2, 16, 3, 4, 6) and torch.equal(made[0, :, 2], made[1, :, 2])


def test_padding_moves_the_first_frame():
    condition = torch.cat([latent(0), latent(1), latent(2)], dim=2)
    padded = padded_condition(condition, 1)
    assert torch.equal(padded[:, :, 0], condition[:, :, 0]) and not padded[:, :, 1].any()
    assert torch.equal(padded[:, :, 2:], condition[:, :, 1:])
    assert padded_condition(condition, 0) is condition


@pytest.mark.parametrize("start, end, frames, message", [
    (None, None, 5, r"No image: expected start_image, end_image or both"),
    (latent(0, 2), latent(1, 3), 5, r"2 start images and 3 end images: expected the same number"),
    (latent(0), latent(1), 1, r"end_image with a length of 1: expected a longer video"),
])
def test_images_that_make_no_condition(start, end, frames, message):
    with pytest.raises(SpecError, match=message):
        condition_latent(frames, start, end)


@pytest.mark.parametrize("condition, noise, message", [
    ((1, 16, 13, 4, 6), (1, 16, 13, 4, 8), r"for 48x32 and 49 frames, the latent is for 64x32 and 49 frames"),
    ((1, 16, 13, 4, 6), (1, 16, 7, 4, 6), r"for 48x32 and 49 frames, the latent is for 48x32 and 25 frames"),
    ((1, 4, 13, 4, 6), (1, 16, 13, 4, 6), r"latent shape \[1, 4, 13, 4, 6\]: CogVideoX 5B-I2V needs \[batch, 16"),
    ((1, 16, 4, 6), (1, 16, 13, 4, 6), r"latent shape \[1, 16, 4, 6\]"),
    ((2, 16, 13, 4, 6), (1, 16, 13, 4, 6), r"2 images in the conditioning and 1 video in the latent.*ImageFromBatch"),
    ((2, 16, 13, 4, 6), (3, 16, 13, 4, 6), r"2 images in the conditioning and 3 videos in the latent"),
])
def test_condition_of_another_latent(condition, noise, message):
    with pytest.raises(SpecError, match=message):
        model_condition(torch.zeros(condition), noise, PUBLISHED["5B-I2V"], "auto")


def test_padded_latent_is_named_by_its_own_frames():
    with pytest.raises(SpecError, match=r"for 48x32 and 17 frames, the latent is for 48x32 and 33 frames"):
        model_condition(torch.zeros(1, 16, 5, 4, 6), (1, 16, 10, 4, 6), PUBLISHED["1.5-5B-I2V"], "auto")


def test_image_and_model_belong_together():
    check_image(PUBLISHED["5B-I2V"], True, "x")
    check_image(PUBLISHED["5B"], False, "x")
    with pytest.raises(SpecError, match=r"holds an image, and CogVideoX 5B is a text-to-video model"):
        check_image(PUBLISHED["5B"], True, "The positive conditioning")
    with pytest.raises(SpecError, match=r"holds no image, and CogVideoX 5B-I2V .*\(CogXImageToVideo\) between"):
        check_image(PUBLISHED["5B-I2V"], False, "The positive conditioning")


def test_augmentation_is_that_of_the_references():
    """``add_noise_to_first_frame`` on [B, C, T, H, W] in -1..1, with the same draws."""
    images = torch.rand(2, 4, 6, 3, generator=torch.Generator().manual_seed(0))
    found = augmented(images, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    image = images.permute(0, 3, 1, 2)[:, :, None] * 2 - 1
    sigma = torch.exp(torch.normal(mean=-3.0, std=0.5, size=(2,), generator=generator))
    image = image + torch.randn(image.shape, generator=generator) * sigma[:, None, None, None, None]
    assert torch.allclose(found * 2 - 1, image[:, :, 0].permute(0, 2, 3, 1), atol=1e-6)


def test_channels():
    image = torch.rand(1, 4, 6, 4, generator=torch.Generator().manual_seed(0))
    assert as_rgb(image[..., :3])[1] is None
    rgb, note = as_rgb(image)
    assert "RGBA" in note and torch.equal(rgb, image[..., :3] * image[..., 3:])
    grey, note = as_rgb(image[..., :1])
    assert "grey" in note and grey.shape[-1] == 3 and torch.equal(grey[..., 2:], image[..., :1])
    with pytest.raises(SpecError, match=r"2 channels: expected 3 \(RGB\), 1 \(grey\) or 4 \(RGBA\)"):
        as_rgb(image[..., :2])


def ramp(width: int, height: int) -> torch.Tensor:
    """Brightness rises from left to right: [1, height, width, 3]."""
    return torch.linspace(0, 1, width).expand(1, height, width)[..., None].expand(1, height, width, 3)


@pytest.mark.parametrize("size", [(40, 16), (16, 40), (97, 33), (8, 8), (3, 1000)])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_fitted_size(fit, size):
    made = fitted(torch.rand(2, size[1], size[0], 3), 32, 16, fit)
    assert made.shape == (2, 16, 32, 3) and made.min() >= 0 and made.max() <= 1


def test_a_picture_of_the_right_size_is_left_alone():
    image = torch.rand(1, 16, 32, 3)
    assert fitted(image, 32, 16, "pad") is image


def test_crop_keeps_the_centre():
    assert torch.equal(fitted(ramp(64, 16), 32, 16, "crop"), ramp(64, 16)[:, :, 16:48])


def test_pad_adds_black_edges_and_keeps_the_aspect():
    made = fitted(torch.ones(1, 16, 16, 3), 32, 16, "pad")
    assert not made[:, :, :8].any() and not made[:, :, 24:].any()
    assert torch.equal(made[:, :, 8:24], torch.ones(1, 16, 16, 3))


def test_stretch_distorts():
    made = fitted(ramp(64, 16), 32, 16, "stretch")
    assert torch.allclose(made, ramp(32, 16), atol=0.02)


@pytest.mark.parametrize("name, image, expected", [
    ("1.5-5B-I2V", (1920, 1080), (1360, 768)), ("1.5-5B-I2V", (1080, 1920), (768, 1360)),
    ("1.5-5B-I2V", (1000, 1000), (768, 768)), ("1.5-5B-I2V", (640, 480), (1024, 768)),
    ("1.5-5B-I2V", (480, 640), (768, 1024)), ("1.5-5B-I2V", (4000, 1000), (1360, 768)),
    ("5B-I2V", (1080, 1920), (720, 480)), ("5B", (1080, 1920), (480, 720)), ("5B", (640, 480), (640, 480)),
    ("2B", (100, 99), (480, 480)),
])
def test_proposed_sizes(name, image, expected):
    from cogx.models.specs import check_geometry

    spec = PUBLISHED[name]
    assert propose_size(*image, spec) == expected
    check_geometry(*expected, spec.transformer.sample_frames, spec)


def test_other_input_channels_are_refused():
    for channels in (33, 48, 17):
        with pytest.raises(SpecError, match=f"{channels} input channels: expected 16 .text to video. or 32"):
            nearest_published(TransformerSpec(in_channels=channels))
