"""Image to video and video to video through a real server, against diffusers' pipelines from the same noise."""

from __future__ import annotations

import av
import numpy as np
import pytest
import torch
from cogx.models.cogvideox.outer_sample import padding_noise
from cogx.tests.comfy.graphs import (
    PROMPT,
    image_to_video,
    latent_only,
    patched_model,
    video_to_video,
    with_core_ksampler,
)
from PIL import Image

STEPS, CFG, SEED = 10, 6.0, 42
SHAPE = (1, 16, 5, 8, 12)
I2V = ["5B-I2V", "1.5-5B-I2V"]


def picture(seed: int, size: tuple[int, int] = (96, 64), mode: str = "RGB") -> Image.Image:
    """Smooth, so that resizing it means something."""
    values = np.random.default_rng(seed).integers(0, 256, (5, 6, len(mode)), dtype=np.uint8)
    return Image.fromarray(values.squeeze(), mode).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def images(server):
    """Files in the server's input folder."""
    folder = server.base / "input"
    for name, image in (("a", picture(1)), ("b", picture(2)), ("wide", picture(3, (130, 64))),
                        ("rgba", picture(4, mode="RGBA")), ("grey", picture(5, mode="L"))):
        image.save(folder / f"{name}.png")
    return {name: f"{name}.png" for name in ("a", "b", "wide", "rgba", "grey")}


@pytest.fixture(scope="module")
def clip(server):
    """A lossless video of 20 frames, 96x64."""
    path = server.base / "input" / "clip.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "bgr0"
        for i in range(20):
            shifted = picture(6, (160, 64)).crop((2 * i, 0, 2 * i + 96, 64))
            container.mux(stream.encode(av.VideoFrame.from_image(shifted).reformat(format="bgr0")))
        container.mux(stream.encode())
    return path


def frames_of(path) -> list[np.ndarray]:
    """As ComfyUI reads it: its conversion to RGB is not exact, whatever the file holds. [H, W, 3] in 0..1 each."""
    from comfy_api.latest import InputImpl

    return list(InputImpl.VideoFromFile(str(path)).get_components().images.numpy())


def comfy_noise(spec_patch: int | None) -> torch.Tensor:
    """ComfyUI's noise for the seed with the padding frame of 1.5: [1, 16, T, 8, 12]."""
    noise = torch.randn(SHAPE, generator=torch.manual_seed(SEED))
    padding = -SHAPE[2] % (spec_patch or 1)
    return torch.cat([padding_noise(noise, padding, SEED), noise], dim=2) if padding else noise


def mode_of(output, generator=None, sample_mode="sample"):
    return output.latent_dist.mode()


def load(name, folder):
    import diffusers

    pipeline = getattr(diffusers, name).from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def i2v_latents(folder, image, posterior: str, seed: int, monkeypatch) -> torch.Tensor:
    """Final latents of diffusers' image-to-video pipeline, [B, C, T, H, W], unscaled by the VAE factor."""
    from diffusers.pipelines.cogvideo import pipeline_cogvideox_image2video as module

    if posterior == "mean":
        monkeypatch.setattr(module, "retrieve_latents", mode_of)
    pipeline = load("CogVideoXImageToVideoPipeline", folder)
    config = pipeline.transformer.config
    noise = comfy_noise(config.patch_size_t)
    latents = pipeline(
        image, PROMPT, "", height=64, width=96, num_frames=17, num_inference_steps=STEPS, guidance_scale=CFG,
        latents=noise.transpose(1, 2), output_type="latent", generator=torch.Generator().manual_seed(seed),
        max_sequence_length=config.max_text_seq_length).frames
    return latents.transpose(1, 2)[:, :, noise.shape[2] - SHAPE[2]:] / pipeline.vae.config.scaling_factor


@pytest.mark.parametrize("posterior", ["mean", "sample"])
@pytest.mark.parametrize("variant", I2V)
def test_graph_equals_pipeline(server, tiny_pipelines, images, saved_latent, error, monkeypatch, variant, posterior):
    graph = image_to_video(variant, images["a"], reference="diffusers", posterior=posterior, augmentation_seed=9)
    ours = saved_latent(server, server.run(latent_only(graph)))
    expected = i2v_latents(tiny_pipelines / variant, picture(1), posterior, 9, monkeypatch)
    assert error(ours, expected) <= 1e-4


def run(server, saved_latent, graph):
    return saved_latent(server, server.run(latent_only(graph)))


def test_what_reference_changes(server, images, saved_latent, error):
    """Nothing in 1.0; the scale in 1.5, where auto is the authors'."""
    for variant, differs in (("5B-I2V", False), ("1.5-5B-I2V", True)):
        auto, diffusers, authors = (run(server, saved_latent, image_to_video(variant, images["a"], reference=reference))
                                    for reference in ("auto", "diffusers", "authors"))
        assert torch.equal(auto, authors)
        assert (error(diffusers, authors) > 1e-3) if differs else torch.equal(diffusers, authors)


def test_the_model_input_changes_nothing_but_the_checks(server, images, saved_latent):
    graph = image_to_video("1.5-5B-I2V", images["a"])
    expected = run(server, saved_latent, graph)
    del graph["4"]["inputs"]["model"]
    assert torch.equal(run(server, saved_latent, graph), expected)


def v2v_latents(folder, video, strength: float, monkeypatch) -> torch.Tensor:
    """Final latents of diffusers' video-to-video pipeline from ComfyUI's noise and the mean of the posterior.

    The pipeline takes no video with a padding frame: for 1.5 it gets the noised latent, whose padding frame is a
    noised copy of the first one.
    """
    from diffusers.pipelines.cogvideo import pipeline_cogvideox_video2video as module

    pipeline = load("CogVideoXVideoToVideoPipeline", folder)
    patch = pipeline.transformer.config.patch_size_t
    noise = comfy_noise(patch).transpose(1, 2)
    monkeypatch.setattr(module, "retrieve_latents", mode_of)
    monkeypatch.setattr(module, "randn_tensor", lambda shape, **options: noise.reshape(shape))
    given = {"video": video}
    if patch:
        pixels = pipeline.video_processor.preprocess_video(video, height=64, width=96)
        latent = pipeline.vae.encode(pixels).latent_dist.mode() * pipeline.vae.config.scaling_factor
        pipeline.scheduler.set_timesteps(STEPS)
        timesteps, _ = pipeline.get_timesteps(STEPS, pipeline.scheduler.timesteps, strength, "cpu")
        padded = torch.cat([latent[:, :, :1], latent], dim=2).transpose(1, 2)
        given = {"latents": pipeline.scheduler.add_noise(padded, noise, timesteps[:1])}
    latents = pipeline(prompt=PROMPT, negative_prompt="", height=64, width=96, num_inference_steps=STEPS,
                       strength=strength, guidance_scale=CFG, output_type="latent",
                       max_sequence_length=pipeline.transformer.config.max_text_seq_length, **given).frames
    return latents.transpose(1, 2)[:, :, -SHAPE[2]:] / pipeline.vae.config.scaling_factor


@pytest.mark.parametrize("strength", [0.3, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("variant", ["5B", "1.5-5B"])
def test_video_to_video_equals_pipeline(server, tiny_pipelines, clip, saved_latent, error, monkeypatch, variant,
                                        strength):
    graph = video_to_video(variant, strength)
    graph["10"]["inputs"]["file"] = clip.name
    ours = run(server, saved_latent, graph)
    with torch.inference_mode():
        expected = v2v_latents(tiny_pipelines / variant, frames_of(clip)[:17], strength, monkeypatch)
    assert error(ours, expected) <= 1e-4


@pytest.mark.parametrize("sampler, schedule", [("euler", "normal"), ("ddim", "simple"), ("dpmpp_2m", "sgm_uniform")])
@pytest.mark.parametrize("variant", I2V)
def test_core_ksampler_equals_ours(server, images, saved_latent, variant, sampler, schedule):
    ours = image_to_video(variant, images["a"])
    ours["5"]["inputs"].update(sampler=sampler, schedule=schedule, steps=6)
    core = with_core_ksampler(ours, sampler, schedule, steps=6)
    assert torch.equal(run(server, saved_latent, core), run(server, saved_latent, ours))


@pytest.mark.parametrize("variant", I2V)
def test_sampler_custom_advanced_equals_ours(server, images, saved_latent, variant):
    graph = image_to_video(variant, images["a"])
    expected = run(server, saved_latent, graph)
    graph["5"] = {"class_type": "SamplerCustomAdvanced", "inputs": {
        "noise": ["21", 0], "guider": ["22", 0], "sampler": ["23", 0], "sigmas": ["24", 0], "latent_image": ["4", 2]}}
    graph["21"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": SEED}}
    graph["22"] = {"class_type": "CFGGuider", "inputs": {
        "model": ["1", 0], "positive": ["4", 0], "negative": ["4", 1], "cfg": CFG}}
    graph["23"] = {"class_type": "CogXSamplerSelect", "inputs": {"sampler": "cogvideox_ddim"}}
    graph["24"] = {"class_type": "CogXScheduler", "inputs": {
        "model": ["1", 0], "steps": STEPS, "schedule": "trailing", "denoise": 1.0}}
    assert torch.equal(run(server, saved_latent, graph), expected)


@pytest.mark.parametrize("variant", I2V)
def test_batch_of_images_equals_one_by_one(server, images, saved_latent, error, variant):
    """Two images, one prompt: each video is that of its image alone, from the same noise."""
    graph = image_to_video(variant, images["a"])
    graph["11"] = {"class_type": "LoadImage", "inputs": {"image": images["b"]}}
    graph["12"] = {"class_type": "ImageBatch", "inputs": {"image1": ["10", 0], "image2": ["11", 0]}}
    graph["4"]["inputs"]["start_image"] = ["12", 0]
    answer = server.run(latent_only(graph))
    batch = saved_latent(server, answer)
    assert "2 images: each becomes a video of its own" in answer.outputs["4"]["text"]
    for index, name in enumerate("ab"):
        single = image_to_video(variant, images[name])
        single["13"] = {"class_type": "CogXEmptyLatent", "inputs": {
            "width": 96, "height": 64, "length": 17, "batch_size": 2}}
        single["14"] = {"class_type": "LatentFromBatch", "inputs": {
            "samples": ["13", 0], "batch_index": index, "length": 1}}
        single["5"]["inputs"]["latent_image"] = ["14", 0]
        assert error(batch[index:index + 1], run(server, saved_latent, single)) <= 1e-5
    assert error(batch[:1], batch[1:]) > 0.1


def test_batch_size_is_videos_of_each_image(server, images, saved_latent, error):
    one = run(server, saved_latent, image_to_video("5B-I2V", images["a"]))
    two = run(server, saved_latent, image_to_video("5B-I2V", images["a"], batch_size=2))
    assert two.shape[0] == 2 and error(two[:1], one) <= 1e-5 and error(two[1:], one) > 0.1


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_fit_of_another_aspect(server, images, saved_latent, fit):
    """130 pixels become 96: cut, shrunk with black edges, or squeezed; only what the choice says."""
    fitted = {"crop": picture(3, (130, 64)).crop((17, 0, 113, 64))}.get(fit)
    latent = run(server, saved_latent, image_to_video("5B-I2V", images["wide"], fit=fit))
    assert torch.isfinite(latent).all()
    if fitted is not None:
        fitted.save(server.base / "input" / "cropped.png")
        assert torch.equal(run(server, saved_latent, image_to_video("5B-I2V", "cropped.png")), latent)
    else:
        assert not torch.equal(run(server, saved_latent, image_to_video("5B-I2V", images["wide"])), latent)


def test_noise_augmentation_is_seeded(server, images, saved_latent, error):
    plain = run(server, saved_latent, image_to_video("5B-I2V", images["a"], augmentation_seed=3))
    noisy = {"noise_augmentation": True}
    one, again, other = (run(server, saved_latent, image_to_video("5B-I2V", images["a"], **noisy,
                                                                  augmentation_seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(one, again) and error(one, plain) > 1e-4 and error(other, one) > 1e-4


def test_image_size(server, images):
    """The proposed size of a portrait picture goes straight into the node."""
    picture(7, (48, 96)).save(server.base / "input" / "portrait.png")
    graph = latent_only(image_to_video("5B-I2V", "portrait.png"))
    graph["12"] = {"class_type": "CogXImageSize", "inputs": {"image": ["10", 0], "model": ["1", 0]}}
    graph["4"]["inputs"].update(width=["12", 0], height=["12", 1])
    answer = server.run(graph)
    assert answer.outputs["12"]["text"] == ["96x64"]  # learned positions: one size, whatever the picture


def test_mask_keeps_what_it_covers(server, clip, saved_latent, error):
    """Core's SetLatentNoiseMask on the latent of a video: bit-equal outside, new inside."""
    for variant in ("5B", "1.5-5B"):
        graph = video_to_video(variant, 0.8)
        graph["10"]["inputs"]["file"] = clip.name
        graph["30"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 48, "height": 64}}
        graph["31"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 96, "height": 64}}
        graph["32"] = {"class_type": "MaskComposite", "inputs": {
            "destination": ["31", 0], "source": ["30", 0], "x": 48, "y": 0, "operation": "add"}}
        graph["33"] = {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["4", 0], "mask": ["32", 0]}}
        graph["5"]["inputs"]["latent_image"] = ["33", 0]
        graph["34"] = {"class_type": "SaveLatent", "inputs": {"samples": ["4", 0], "filename_prefix": "latents/known"}}
        answer = server.run(latent_only(graph))
        before, after = saved_latent(server, answer, "34"), saved_latent(server, answer)
        assert torch.equal(after[..., :6], before[..., :6])
        assert error(after[..., 6:], before[..., 6:]) > 0.05


@pytest.mark.parametrize("variant", I2V)
def test_core_nodes_on_the_model(server, images, saved_latent, error, variant):
    graph = image_to_video(variant, images["a"])
    plain = run(server, saved_latent, graph)
    nag = run(server, saved_latent, patched_model(graph, "NAGuidance", nag_scale=5.0, nag_alpha=0.5, nag_tau=1.5))
    assert torch.isfinite(nag).all() and error(nag, plain) > 1e-3


def test_decoded_workflow(server, video_of):
    for name in ("image_to_video", "image_to_video_1.5"):
        graph = image_to_video("1.5-5B-I2V" if "1.5" in name else "5B-I2V")
        graph["5"]["inputs"]["steps"] = 2
        video = video_of(server, server.run(graph))
        assert video["frames"] == 17 and video["size"] == (96, 64) and video["fps"] == (16 if "1.5" in name else 8)
