"""The image condition and masks inside ComfyUI's sampling, in process: what the network sees, and what comes out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.sample
import comfy.utils
import pytest
import torch
from cogx.model_loaders import load
from cogx.model_loaders import vae as vae_module
from cogx.model_loaders.images import (
    END_IMAGE_NOTE,
    ImageOptions,
    count_videos,
    encode_condition,
    encode_video,
    with_images,
)
from cogx.models.cogvideox.image_condition import augmented, condition_latent
from cogx.models.cogvideox.outer_sample import MASKED_SECOND_STAGE
from cogx.models.cogvideox.tiles import count_tiles
from cogx.models.specs import Geometry, SpecError
from cogx.samplers import adapter
from torch import Tensor

I2V = ["5B-I2V", "1.5-5B-I2V"]


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def noise_of(seed: int, frames: int = 5, count: int = 1) -> Tensor:
    return torch.randn(count, 16, frames, 8, 12, generator=torch.Generator().manual_seed(seed))


def model_of(tiny_pipelines, variant):
    return load.load_model(str(tiny_pipelines / variant / "transformer"))


def conditionings(model, condition: Tensor | None = None, reference: str = "authors"):
    texts = torch.randn(2, 1, model.model.spec.text_tokens, 32, generator=torch.Generator().manual_seed(5))
    plain = [[[text, {}]] for text in texts]
    return plain if condition is None else [with_images(one, condition, reference) for one in plain]


def sample(model, prompts, noise, latent=None, mask=None, sampler="cogvideox_ddim", denoise=1.0, steps=4):
    latent = torch.zeros_like(noise) if latent is None else latent
    sigmas = adapter.make_sampler_sigmas(model, sampler, steps, "trailing", denoise)
    return comfy.sample.sample_custom(model, noise, 6.0, adapter.sampler_object(sampler), sigmas, *prompts, latent,
                                      noise_mask=mask, seed=3, disable_pbar=True)


@contextmanager
def conditions_seen(model) -> Iterator[list[Tensor]]:
    """The condition channels of each call of the network, after its padding: [B, 16, T, h, w]."""
    seen: list[Tensor] = []
    embed = model.model.diffusion_model.patch_embed
    handle = embed.register_forward_pre_hook(lambda module, args: seen.append(args[0][:, 16:].clone()))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.mark.parametrize("variant", I2V)
def test_the_network_sees_the_image_on_its_first_frame_only(tiny_pipelines, variant):
    model = model_of(tiny_pipelines, variant)
    start, end = noise_of(1, 1), noise_of(2, 1)
    with conditions_seen(model) as seen:
        sample(model, conditionings(model, condition_latent(5, start, end)), noise_of(0), steps=1)
    scale = model.model.spec.image_scale("authors")
    for condition in seen:
        assert condition.shape[2] == (6 if model.model.spec.is_v1_5 else 5)
        assert torch.equal(condition[:1, :, :1], start * scale) and torch.equal(condition[:1, :, -1:], end * scale)
        assert not condition[:, :, 1:-1].any()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("retain, first, last", [("", False, False), ("0", True, False), ("0,-1", True, True)])
@pytest.mark.parametrize("variant", I2V)
def test_context_windows(tiny_pipelines, variant, retain, first, last, causal):
    """Windows shorter than the video: ``cond_retain_index_list`` gives each of them the image at its own start."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    model = ContextWindowsManualNode.execute(
        model_of(tiny_pipelines, variant), context_length=4, context_overlap=2, context_schedule="standard_static",
        context_stride=1, closed_loop=False, fuse_method="pyramid", dim=2, freenoise=False,
        cond_retain_index_list=retain, causal_window_fix=causal).result[0]
    start, end = noise_of(1, 1), noise_of(2, 1)
    with conditions_seen(model) as seen:
        out = sample(model, conditionings(model, condition_latent(9, start, end)), noise_of(0, 9), steps=1)
    scale = model.model.spec.image_scale("authors")
    assert torch.isfinite(out).all() and len(seen) > 2
    assert torch.equal(seen[0][:1, :, :1], start * scale) and torch.equal(seen[-1][:1, :, -1:], end * scale)
    for window in seen[1:-1]:
        assert torch.equal(window[:1, :, :1], start * scale if first else torch.zeros_like(start))
        assert torch.equal(window[:1, :, -1:], end * scale if last else torch.zeros_like(end))
        assert not window[:, :, 1:-1].any()


@pytest.mark.parametrize("variant", I2V)
def test_batch_with_an_image_each(tiny_pipelines, error, variant):
    model = model_of(tiny_pipelines, variant)
    pictures, noise = torch.cat([noise_of(1, 1), noise_of(2, 1)]), noise_of(0, count=2)
    batch = sample(model, conditionings(model, condition_latent(5, pictures, None)), noise)
    for i in range(2):
        alone = conditionings(model, condition_latent(5, pictures[i:i + 1], None))
        assert error(batch[i:i + 1], sample(model, alone, noise[i:i + 1])) <= 1e-5


@pytest.mark.parametrize("variant", I2V)
def test_one_condition_serves_a_batch(tiny_pipelines, variant):
    """Core repeats it: the same numbers as one condition for each video."""
    model, condition = model_of(tiny_pipelines, variant), condition_latent(5, noise_of(1, 1), None)
    noise = noise_of(0, count=3)
    outs = [sample(model, conditionings(model, one), noise) for one in (condition, condition.repeat_interleave(3, 0))]
    assert torch.equal(*outs)


def test_image_to_video_node_repeats_several_images_only(vae, monkeypatch):
    """Videos in the LATENT, and images in the conditioning."""
    from cogx.nodes import image as module
    from cogx.nodes.image import ImageToVideo

    monkeypatch.setattr(module, "_report", lambda cls, notes: None)  # there is no server

    def run(images: int, batch_size: int) -> tuple[int, Tensor]:
        pictures = torch.cat([image(3, seed) for seed in range(images)])
        positive, _, latent = ImageToVideo.execute([[torch.zeros(1), {}]], [], vae, *GEOMETRY, batch_size,
                                                   pictures).result
        return latent["samples"].shape[0], positive[0][1]["concat_latent_image"]

    videos, condition = run(1, 3)
    assert videos == 3 and condition.shape[0] == 1
    videos, condition = run(2, 2)
    assert videos == condition.shape[0] == 4
    assert torch.equal(condition[0], condition[1]) and not torch.equal(condition[1], condition[2])


@pytest.mark.parametrize("start, end, batch_size", [(49, None, 2), (None, 65, 1), (1, 33, 2)])
def test_a_video_as_an_image_is_refused_before_it_is_encoded(start, end, batch_size):
    """Such as Get Video Components wired to start_image."""
    from cogx.nodes.image import ImageToVideo

    start, end = (count and torch.zeros(1, 1, 1, 3).expand(count, -1, -1, -1) for count in (start, end))
    with pytest.raises(SpecError, match=r"videos: expected at most 64.*Video to Video.*ImageFromBatch"):
        ImageToVideo.execute([], [], None, *GEOMETRY, batch_size, start, end)


def test_a_batch_of_64_is_allowed():
    pictures = torch.zeros(32, 1, 1, 3)
    assert count_videos(pictures, None, 2) == count_videos(pictures[:1], pictures, 2) == 64


def masks() -> dict[str, Tensor]:
    """As nodes give them: a picture, one for each of 17 frames, and one for each video and latent frame."""
    picture = torch.zeros(1, 1, 64, 96)
    picture[..., 48:] = 1
    frames = torch.zeros(17, 1, 64, 96)
    frames[9:, :, :, 24:] = 1
    videos = torch.zeros(2, 1, 5, 8, 12)
    videos[0, :, 2:], videos[1, ..., :3] = 1, 0.5
    return {"picture": picture, "frames": frames, "videos": videos}


@pytest.mark.parametrize("kind", ["picture", "frames", "videos"])
@pytest.mark.parametrize("sampler", ["cogvideox_ddim", "cogvideox_dpm", "euler"])
@pytest.mark.parametrize("variant", ["5B", "1.5-5B"])
def test_masks_keep_to_the_bit(tiny_pipelines, error, variant, sampler, kind):
    model, mask = model_of(tiny_pipelines, variant), masks()[kind]
    latent = noise_of(1, count=2) * 1.3
    out = sample(model, conditionings(model), noise_of(0, count=2), latent, mask, sampler, denoise=0.75)
    kept = comfy.utils.reshape_mask(mask, latent.shape) == 0
    assert kept.any() and not kept.all()
    assert torch.equal(out[kept], latent[kept])
    assert error(out[~kept], latent[~kept]) > 0.05


def test_a_mask_in_two_stages_warns(tiny_pipelines, error, caplog):
    """Split SIGMAS: what the first stage keeps is noisy, the second stage knows no other latent, and says so once."""
    model, mask, latent = model_of(tiny_pipelines, "5B"), masks()["picture"], noise_of(1)
    sigmas = adapter.make_sigmas(model, 4, "trailing")

    def stage(noise: Tensor, start: Tensor, part: Tensor) -> Tensor:
        return comfy.sample.sample_custom(model, noise, 6.0, adapter.sampler_object("cogvideox_ddim"), part,
                                          *conditionings(model), start, noise_mask=mask, seed=3, disable_pbar=True)

    def warnings() -> int:
        return [record.getMessage() for record in caplog.records].count(MASKED_SECOND_STAGE)

    first = stage(noise_of(0), latent, sigmas[:3])
    assert error(first[..., :6], latent[..., :6]) > 0.1 and warnings() == 0
    second = stage(torch.zeros_like(first), first, sigmas[2:])
    assert torch.equal(second[..., :6], first[..., :6]) and warnings() == 1
    stage(noise_of(0), latent, sigmas)
    assert warnings() == 1


def test_a_mask_without_noise_at_the_last_level_is_no_second_stage(tiny_pipelines, caplog):
    """As a detailer runs: no noise, and none in the latent."""
    model = model_of(tiny_pipelines, "5B")
    sigmas = torch.tensor([float(model.model.model_sampling.sigma_min), 0.0])
    comfy.sample.sample_custom(
        model, torch.zeros(1, 16, 5, 8, 12), 6.0, adapter.sampler_object("euler"), sigmas, *conditionings(model),
        noise_of(1), noise_mask=masks()["picture"], seed=3, disable_pbar=True)
    assert MASKED_SECOND_STAGE not in caplog.text


GEOMETRY = (96, 64, 17)


@pytest.fixture(scope="module")
def vae(tiny_pipelines):
    return load.load_vae(str(tiny_pipelines / "5B-I2V" / "vae"))


@pytest.fixture(scope="module")
def geometry(tiny_pipelines):
    return Geometry(model_of(tiny_pipelines, "5B-I2V").model.spec, *GEOMETRY)


def image(channels: int, seed: int = 0) -> Tensor:
    return torch.rand(1, 64, 96, channels, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("channels, note", [(3, None), (1, "grey image"), (4, "RGBA image")])
def test_channels_of_images(vae, geometry, channels, note):
    condition, notes = encode_condition(vae, geometry, image(channels), None, ImageOptions())
    assert condition.shape == (1, 16, 5, 8, 12) and not condition[:, :, 1:].any()
    assert [found.split(" (")[0] for found in notes] == ([note] if note else [])
    with pytest.raises(SpecError, match=r"2 channels: expected 3 \(RGB\)"):
        encode_condition(vae, geometry, image(2), None, ImageOptions())


def test_end_image_says_that_no_model_was_trained_for_it(vae, geometry):
    condition, notes = encode_condition(vae, geometry, None, image(3), ImageOptions())
    assert notes == [END_IMAGE_NOTE] and condition[:, :, -1].any() and not condition[:, :, :-1].any()


def test_posterior(vae, geometry):
    """A draw is seeded, and differs from the mean."""
    def encoded(**options):
        return encode_condition(vae, geometry, image(3), None, ImageOptions(**options))[0]

    mean, one = encoded(), encoded(posterior="sample", seed=1)
    assert torch.equal(one, encoded(posterior="sample", seed=1))
    assert not torch.allclose(one, mean, atol=1e-3) and not torch.equal(one, encoded(posterior="sample", seed=2))
    assert torch.equal(mean, encoded(seed=1))


def test_the_draw_follows_the_augmentation_in_one_stream(vae, geometry):
    """One generator for both: what the draw takes comes after what the augmentation took."""
    options = ImageOptions(posterior="sample", noise_augmentation=True, seed=1)
    generator = torch.Generator().manual_seed(1)
    noisy = augmented(image(3), generator)
    expected = vae.encode_video(noisy[:, None], generator)
    anew = vae.encode_video(noisy[:, None], torch.Generator().manual_seed(1))
    found = encode_condition(vae, geometry, image(3), None, options)[0][:, :, :1]
    assert torch.equal(found, expected) and not torch.allclose(found, anew, atol=1e-3)


def test_images_of_a_batch_are_encoded_one_by_one(vae, geometry):
    both = torch.cat([image(3, 1), image(3, 2)])
    batch = encode_condition(vae, geometry, both, None, ImageOptions())[0]
    for i in range(2):
        alone = encode_condition(vae, geometry, both[i:i + 1], None, ImageOptions())[0]
        assert torch.equal(batch[i:i + 1], alone)


def test_videos(vae, geometry):
    video = torch.rand(20, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    latent, notes = encode_video(vae, geometry, video, "crop", geometry.spec)
    assert torch.equal(latent, vae.encode(video[:17])) and notes == ["the first 17 of 20 frames are used"]
    with pytest.raises(SpecError, match=r"has 12 frames: expected at least the length of 17. Set length to 9 \(CogV"):
        encode_video(vae, geometry, video[:12], "crop", geometry.spec)


def test_sample_of_a_tiled_encode_is_one_draw(vae, monkeypatch):
    """Out of memory: the moments are blended, and one draw is made of the whole, not one of each tile."""
    def out_of_memory(*_):
        raise torch.cuda.OutOfMemoryError("out of memory")

    frames = torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(vae, "_encode_exact", out_of_memory)
    monkeypatch.setattr(vae_module, "DEFAULT_TILE", (48, 48))
    monkeypatch.setattr(vae_module, "DEFAULT_OVERLAP", 16)
    moments = vae._encode_in_tiles(vae._to_video(frames), (48, 48), 16, [])
    assert count_tiles((64, 96), (48, 48), 16) == 6
    mean, logvar = moments.chunk(2, dim=1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
    expected = mean + (0.5 * logvar.clamp(-30, 20)).exp() * noise
    assert torch.allclose(vae.encode_video(frames, torch.Generator().manual_seed(1)), expected, atol=1e-5)
