"""The whole graph through a real server against diffusers' pipelines, from the same noise: final latents <= 1e-4."""

from __future__ import annotations

import pytest
import torch
from cogx.models.cogvideox.outer_sample import padding_noise
from cogx.tests.comfy.graphs import PROMPT, latent_only, text_to_video

STEPS, CFG, SEED = 10, 6.0, 12345


def comfy_noise(seed: int) -> torch.Tensor:
    """ComfyUI's noise for a seed: [1, 16, 5, 8, 12]."""
    return torch.randn(1, 16, 5, 8, 12, generator=torch.manual_seed(seed), dtype=torch.float32)


def pipeline_latents(folder, sampler: str, dynamic: bool, seed: int = SEED) -> torch.Tensor:
    """Final latents of ``CogVideoXPipeline`` from ComfyUI's noise, [B, C, T, H, W], unscaled by the VAE factor."""
    from diffusers import CogVideoXDPMScheduler, CogVideoXPipeline

    pipeline = CogVideoXPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if sampler == "cogvideox_dpm":
        pipeline.scheduler = CogVideoXDPMScheduler.from_config(pipeline.scheduler.config)
    noise = comfy_noise(seed)
    padding = -noise.shape[2] % (pipeline.transformer.config.patch_size_t or 1)
    if padding:
        noise = torch.cat([padding_noise(noise, padding, seed), noise], dim=2)
    latents = pipeline(
        PROMPT, "", height=64, width=96, num_frames=17, num_inference_steps=STEPS, guidance_scale=CFG,
        use_dynamic_cfg=dynamic, latents=noise.permute(0, 2, 1, 3, 4), output_type="latent",
        max_sequence_length=pipeline.transformer.config.max_text_seq_length,
        generator=torch.Generator().manual_seed(seed)).frames
    return latents.permute(0, 2, 1, 3, 4)[:, :, padding:] / pipeline.vae.config.scaling_factor


@pytest.mark.parametrize("dynamic", [False, True], ids=["fixed", "dynamic"])
@pytest.mark.parametrize("sampler", ["cogvideox_ddim", "cogvideox_dpm"])
@pytest.mark.parametrize("variant", ["2B", "5B", "1.5-5B"])
def test_graph_equals_pipeline(server, tiny_pipelines, saved_latent, error, variant, sampler, dynamic):
    graph = latent_only(text_to_video(variant, sampler=sampler, steps=STEPS, cfg=CFG, seed=SEED, dynamic_cfg=dynamic))
    ours = saved_latent(server, server.run(graph))
    assert error(ours, pipeline_latents(tiny_pipelines / variant, sampler, dynamic)) <= 1e-4


def test_decoded_frames_equal_pipeline(server, tiny_pipelines, saved_latent):
    """Through CogXDecode and SaveImage: at most one step of 8 bit from the pipeline's frames."""
    import numpy as np
    from PIL import Image

    graph = text_to_video("5B", sampler="cogvideox_ddim", steps=4, seed=SEED, dynamic_cfg=False)
    graph["7"] = {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "frames/test"}}
    del graph["8"]
    graph["9"] = latent_only(graph)["9"]
    run = server.run(graph)
    frames = np.stack([np.asarray(Image.open(server.output(run, "7", i))) for i in range(17)]).astype(int)

    from diffusers import AutoencoderKLCogVideoX

    vae = AutoencoderKLCogVideoX.from_pretrained(tiny_pipelines / "5B" / "vae")
    with torch.inference_mode():
        pixels = vae.decode(saved_latent(server, run)).sample[0].permute(1, 2, 3, 0)
    expected = ((pixels / 2 + 0.5).clamp(0, 1).numpy() * 255).astype(int)
    assert np.abs(frames - expected).max() <= 1
