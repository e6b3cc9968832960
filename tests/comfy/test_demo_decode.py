"""The embedded model's video, decoded with hardly any memory: the same as untiled."""

from __future__ import annotations

import pytest
import torch
from cogx.model_loaders import load
from cogx.model_loaders.text_encoder import encode
from cogx.models.cogvideox.vae_plan import DEVICE, HOST, PARKED, Budget, Plan
from cogx.samplers import adapter
from cogx.scripts import demo_pipeline
from cogx.tests.comfy.demo import GUIDANCE, STEPS

FOLDER = demo_pipeline.DEMO / "CogX-Demo"
PROMPT = "A red circle glides from left to right over a dark background"
# The highest budget at which each place is taken.
BUDGETS = {DEVICE: Plan(8), "caches": Plan(8, True), PARKED: Plan(8, True, PARKED), HOST: Plan(8, True, HOST)}


@pytest.fixture(scope="module")
def latent() -> torch.Tensor:
    """[1, 16, 5, 8, 12], sampled as ``dev.py demo`` does."""
    model, clip, _ = load.load_pipeline(str(FOLDER))
    with torch.inference_mode():
        positive, negative = (encode(clip, text, "encode")[0] for text in (PROMPT, ""))
        sigmas = adapter.make_sigmas(model, STEPS, "trailing")
        sampler = adapter.sampler_object("cogvideox_ddim", STEPS)
        empty = {"samples": torch.zeros(1, 16, 5, 8, 12)}
        return adapter.sample(model, positive, negative, empty, 0, GUIDANCE, sampler, sigmas)["samples"]


def decode(vae: load.CogVideoXVAE, latent: torch.Tensor, monkeypatch: pytest.MonkeyPatch, smallest: Plan,
           tried: list[Plan]) -> torch.Tensor:
    """With exactly the memory that ``smallest`` needs."""
    device = vae.decode_memory(latent.shape, smallest).device
    real = vae.first_stage_model.decode_chunks

    def seen(z: torch.Tensor, plan: Plan, *args: object) -> object:
        tried.append(plan)
        return real(z, plan, *args)

    monkeypatch.setattr(vae, "budget", lambda: Budget(device, host=1e12))
    monkeypatch.setattr(vae.first_stage_model, "decode_chunks", seen)
    return vae.decode_video(latent, "auto")


@pytest.mark.parametrize("place", BUDGETS)
def test_fp32(latent, monkeypatch, error, place):
    vae, tried = load.load_vae(str(FOLDER / "vae"), "fp32"), []
    with torch.inference_mode():
        whole = vae.decode_video(latent, "off")
        found = decode(vae, latent, monkeypatch, BUDGETS[place], tried)
    assert tried == [BUDGETS[place]]
    assert error(found, whole) <= 1e-5
    steps = (found * 255).round() - (whole * 255).round()
    assert steps.abs().max() <= 1
    assert whole.std() > 0.05  # a picture


@pytest.mark.parametrize("place", BUDGETS)
def test_bf16_is_no_further_from_fp32_than_diffusers_is(latent, monkeypatch, error, place):
    from diffusers import AutoencoderKLCogVideoX

    vae, tried = load.load_vae(str(FOLDER / "vae"), "bf16"), []
    reference = AutoencoderKLCogVideoX.from_pretrained(FOLDER / "vae", torch_dtype=torch.float32)

    def theirs(dtype: torch.dtype) -> torch.Tensor:
        pixels = reference.to(dtype).decode(latent.to(dtype)).sample.float()
        return (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1)  # bcthw -> bthwc

    with torch.inference_mode():
        exact = theirs(torch.float32)
        their_error = error(theirs(torch.bfloat16), exact)
        found = decode(vae, latent, monkeypatch, BUDGETS[place], tried)
    assert vae.vae_dtype == torch.bfloat16 and tried == [BUDGETS[place]]
    assert error(found.float(), exact) <= 1.1 * their_error


def test_tiles_are_not_the_same(latent, error):
    """What the bound of 1e-5 is about: tiles of half the picture."""
    vae = load.load_vae(str(FOLDER / "vae"), "fp32")
    with torch.inference_mode():
        assert error(vae.decode_video(latent, "on", (32, 48), 16), vae.decode_video(latent, "off")) > 1e-3
