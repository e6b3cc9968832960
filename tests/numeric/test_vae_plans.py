"""The VAE under every plan against diffusers' ``AutoencoderKLCogVideoX``: fp32, relative error <= 1e-5."""

from __future__ import annotations

import comfy.ops
import pytest
import torch
from cogx.model_loaders.detect import vae_from_config
from cogx.models.cogvideox.vae import CogVideoXVAENetwork
from cogx.models.cogvideox.vae_plan import DEVICE, HOST, PARKED, Plan
from cogx.scripts.tiny_pipeline import tiny_vae

PLANS = [Plan(rows, host_caches, values) for rows in (8, 24, None)
         for host_caches, values in ((False, DEVICE), (True, DEVICE), (True, PARKED), (True, HOST))]


@pytest.fixture(scope="module")
def pair():
    reference = tiny_vae("5B")
    spec = vae_from_config({"_class_name": "AutoencoderKLCogVideoX", **reference.config})
    ours = CogVideoXVAENetwork(spec, torch.float32, "cpu", comfy.ops.disable_weight_init).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours, reference


@pytest.mark.parametrize("latents", [1, 2, 3, 4, 6, 7])
def test_decode(pair, latents, error):
    ours, reference = pair
    z = torch.randn(1, 16, latents, 7, 5, generator=torch.Generator().manual_seed(latents))
    expected = reference.decode(z).sample
    for plan in PLANS:
        assert error(ours.decode(z, plan), expected) <= 1e-5, plan


@pytest.mark.parametrize("frames", [1, 2, 5, 9, 12, 17, 22, 25])
def test_encode(pair, frames, error):
    ours, reference = pair
    x = torch.rand(1, 3, frames, 56, 40, generator=torch.Generator().manual_seed(frames)) * 2 - 1
    expected = reference.encode(x).latent_dist.mode()
    for plan in PLANS:
        assert error(ours.encode(x, plan), expected) <= 1e-5, plan
