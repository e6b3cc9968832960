"""The VAE against diffusers' ``AutoencoderKLCogVideoX``: fp32, relative error <= 1e-5."""

from __future__ import annotations

import comfy.ops
import pytest
import torch
from cogx.model_loaders.detect import vae_from_config, vae_from_shapes
from cogx.models.cogvideox.tiles import blend_tiles, tile_starts
from cogx.models.cogvideox.vae import CogVideoXVAENetwork
from cogx.models.cogvideox.vae_plan import chunk_bounds
from cogx.scripts.tiny_pipeline import tiny_vae


@pytest.fixture(scope="module")
def pair():
    reference = tiny_vae("5B")
    spec = vae_from_config({"_class_name": "AutoencoderKLCogVideoX", **reference.config})
    ours = CogVideoXVAENetwork(spec, torch.float32, "cpu", comfy.ops.disable_weight_init).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return ours, reference


@pytest.mark.parametrize("frames", [1, 5, 9, 17, 49])
def test_encode_equals_diffusers(pair, frames, error):
    ours, reference = pair
    x = torch.rand(1, 3, frames, 64, 96, generator=torch.Generator().manual_seed(frames)) * 2 - 1
    assert error(ours.encode(x), reference.encode(x).latent_dist.mode()) <= 1e-5


@pytest.mark.parametrize("frames", [1, 5, 9, 17, 49])
def test_decode_equals_diffusers(pair, frames, error):
    ours, reference = pair
    latents = (frames - 1) // 4 + 1
    z = torch.randn(1, 16, latents, 8, 12, generator=torch.Generator().manual_seed(frames))
    out = ours.decode(z)
    assert error(out, reference.decode(z).sample) <= 1e-5
    if latents % 2:
        assert out.shape[2] == frames


def test_batch_and_another_size(pair, error):
    ours, reference = pair
    z = torch.randn(2, 16, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    assert error(ours.decode(z), reference.decode(z).sample) <= 1e-5


def test_moments_equal_diffusers(pair, error):
    ours, reference = pair
    x = torch.rand(1, 3, 9, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert error(torch.cat(list(ours.encode_chunks(x)), dim=2), reference._encode(x)) <= 1e-5


@pytest.mark.parametrize("frames, size, expected", [
    (1, 2, [(0, 1)]), (2, 2, [(0, 2)]), (3, 2, [(0, 3)]), (5, 2, [(0, 3), (3, 5)]),
    (4, 2, [(0, 2), (2, 4)]), (17, 8, [(0, 9), (9, 17)]), (5, 8, [(0, 5)]), (12, 8, [(0, 12)]),
])
def test_chunks_are_those_of_the_reference(frames, size, expected):
    assert chunk_bounds(frames, size) == expected


def test_detected_from_shapes(pair):
    ours, reference = pair
    shapes = {key: tuple(value.shape) for key, value in reference.state_dict().items()}
    found = vae_from_shapes(shapes)
    assert found.block_out_channels == ours.spec.block_out_channels
    assert found.layers_per_block == ours.spec.layers_per_block
    assert found.latent_channels == 16


def test_tiles_cover_and_blend_to_the_identity():
    """With a network that does nothing, tiling must give back its input, whatever the overlap."""
    z = torch.randn(1, 2, 3, 13, 22, generator=torch.Generator().manual_seed(0))
    tiles: list[tuple[int, ...]] = []

    def identity(part):
        tiles.append(tuple(part.shape[3:]))
        return part

    assert torch.allclose(blend_tiles(z, (6, 8), 2, 1.0, identity), z, atol=1e-6)
    assert tiles == [(6, 8)] * (len(tile_starts(13, 6, 4)) * len(tile_starts(22, 8, 6)))
