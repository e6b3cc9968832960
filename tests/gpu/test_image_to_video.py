"""Image to video on a GPU, image encode included, against diffusers' pipeline on the same device: ten steps.

The bounds are those of test_parity.py. What only a GPU shows: where the condition lies, and in which precision.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cogx.models.specs import Geometry
from cogx.samplers import adapter
from cogx.tests.gpu import references
from cogx.tests.gpu.test_parity import check
from torch import Tensor

SEED = 12345
Context = tuple[Tensor, Tensor]


def image() -> Tensor:
    """[1, 64, 96, 3] in 0..1."""
    return torch.rand(1, 64, 96, 3, generator=torch.Generator().manual_seed(1))


def by_us(folder: Path, dtype_name: str, context: Context) -> Tensor:
    from cogx.model_loaders import images
    from cogx.model_loaders.load import load_model, load_vae

    model = load_model(str(folder / "transformer"), dtype_name)
    vae = load_vae(str(folder / "vae"), dtype_name)
    geometry = Geometry(model.model.spec, 96, 64, 17)
    condition, _ = images.encode_condition(vae, geometry, image(), None, images.ImageOptions())
    positive, negative = (images.with_images([[one.float().cpu(), {}]], condition, "diffusers") for one in context)
    latent = {"samples": torch.zeros(1, 16, *references.TINY_SIZE)}
    sampler, sigmas = adapter.sampler_object("cogvideox_ddim", 10), adapter.make_sigmas(model, 10, "trailing")
    return adapter.sample(model, positive, negative, latent, SEED, 6.0, sampler, sigmas)["samples"]


def by_diffusers(folder: Path, dtype: torch.dtype, device: torch.device, context: Context,
                 monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """[B, C, T, H, W], unscaled by the VAE factor; the mean of the posterior, as ours."""
    from cogx.models.cogvideox.outer_sample import padding_noise
    from diffusers import CogVideoXImageToVideoPipeline
    from diffusers.pipelines.cogvideo import pipeline_cogvideox_image2video as module

    monkeypatch.setattr(module, "retrieve_latents", lambda output, generator=None: output.latent_dist.mode())
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(folder, torch_dtype=dtype, text_encoder=None,
                                                             tokenizer=None)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, *references.TINY_SIZE, generator=torch.manual_seed(SEED))
    padding = -noise.shape[2] % (pipeline.transformer.config.patch_size_t or 1)
    if padding:
        noise = torch.cat([padding_noise(noise, padding, SEED), noise], dim=2)
    positive, negative = (one.to(device, dtype) for one in context)
    latents = pipeline(image=image().permute(0, 3, 1, 2), prompt_embeds=positive, negative_prompt_embeds=negative,
                       height=64, width=96, num_frames=17, num_inference_steps=10, guidance_scale=6.0,
                       output_type="latent", latents=noise.permute(0, 2, 1, 3, 4).to(device, dtype)).frames
    return latents.permute(0, 2, 1, 3, 4)[:, :, padding:] / pipeline.vae.config.scaling_factor


@pytest.mark.parametrize("dtype_name, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["5B-I2V", "1.5-5B-I2V"])
def test_ten_steps_from_an_image(variant: str, dtype_name: str, dtype: torch.dtype, device: torch.device,
                                 rehearsal: bool, tiny_pipelines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if rehearsal and dtype == torch.bfloat16:
        pytest.skip("torch pools bf16 in time on CUDA only")
    folder, tokens = tiny_pipelines / variant, 224 if variant.startswith("1.5") else 226
    generator = torch.Generator().manual_seed(3)
    context = tuple(torch.randn(1, tokens, 32, generator=generator).to(dtype) for _ in range(2))
    expected = by_diffusers(folder, torch.float32, device, context, monkeypatch)
    check(expected, lambda: by_diffusers(folder, dtype, device, context, monkeypatch),
          by_us(folder, dtype_name, context), dtype)
