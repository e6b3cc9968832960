"""Decoding a loop: the first frame follows the last, wherever the loop is cut open."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cogx.model_loaders import frames, load
from cogx.model_loaders.vae import CogVideoXVAE
from cogx.models.cogvideox.vae_plan import LOOP_LEAD, lead_of_loop
from cogx.models.specs import VAESpec
from cogx.scripts import demo_pipeline

STEP = 1 / 255  # of 8 bit


@pytest.fixture(scope="module")
def vae() -> CogVideoXVAE:
    """The embedded model's: trained, so that what it forgets is what a real one forgets."""
    return load.load_vae(str(demo_pipeline.DEMO / "CogX-Demo" / "vae"), "fp32")


@pytest.fixture(autouse=True)
def as_the_executor_does():
    with torch.inference_mode():
        yield


def circle(frames: int, columns: int = 6) -> torch.Tensor:
    """The latent of a disc that goes round in ``frames`` latent frames: [1, 3, 4 * frames, H, W] in 0..1 -> latent."""
    angle = torch.arange(4 * frames) / (4 * frames) * 2 * torch.pi
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(8.0 * columns), indexing="ij")
    distance = ((y - 16 - 8 * angle.sin()[:, None, None]) ** 2 + (x - 24 - 8 * angle.cos()[:, None, None]) ** 2).sqrt()
    disc = (7 - distance).clamp(0, 1)[..., None]
    return disc * torch.tensor([0.9, 0.2, 0.1]) + (1 - disc) * 0.15


def loop_latent(vae: CogVideoXVAE, count: int) -> torch.Tensor:
    """[1, 16, count, 4, 6], periodic: of the middle of three rounds."""
    return vae.encode_video(circle(count).repeat(3, 1, 1, 1))[:, :, count:2 * count]


def steps_between(video: torch.Tensor) -> torch.Tensor:
    """Mean change from each frame to the next, the last one to the first: [T]."""
    return (video - video.roll(-1, 0)).abs().mean((1, 2, 3))


@pytest.mark.parametrize("count", [8, 7])
def test_the_last_frame_meets_the_first(vae, count):
    z = loop_latent(vae, count)
    loop = vae.decode_video(z, closed_loop=True)[0]
    assert loop.shape[0] == 4 * count
    changes = steps_between(loop)
    assert changes[-1] <= 1.05 * changes[:-1].max()
    assert changes.min() > 0.2 * changes.max()  # it moves all the time


@pytest.mark.parametrize("shift", [2, 6])
def test_a_loop_is_the_same_wherever_it_is_cut(vae, shift):
    """Chunks are pairs, so an even shift keeps them. What 8 latent frames do not reach is the only difference: below a
    fifth of an 8-bit step for a latent whose end has nothing to do with its beginning."""
    z = torch.cat([loop_latent(vae, 4), loop_latent(vae, 4).flip(4)], dim=2)
    loop = vae.decode_video(z, closed_loop=True)[0]
    rolled = vae.decode_video(z.roll(-shift, 2), closed_loop=True)[0]
    assert (rolled - loop.roll(-4 * shift, 0)).abs().max() < 0.2 * STEP
    plain = vae.decode_video(z)[0]  # the control: without, it is another video
    assert (vae.decode_video(z.roll(-shift, 2))[0] - plain.roll(-4 * shift, 0)).abs().max() > 10 * STEP


@pytest.mark.parametrize("count", [1, 5])
def test_more_lead_changes_nothing_that_can_be_seen(vae, monkeypatch, count):
    z = loop_latent(vae, 8)[:, :, :count]
    loop = vae.decode_video(z, closed_loop=True)[0]
    assert loop.shape[0] == 4 * count
    monkeypatch.setattr(frames, "lead_of_loop", lambda n: 2 * LOOP_LEAD + n % 2)
    assert (vae.decode_video(z, closed_loop=True)[0] - loop).abs().max() < 0.2 * STEP


def test_streamed_in_tiles_and_in_batches(vae, tmp_path: Path):
    z = torch.cat([loop_latent(vae, 5), loop_latent(vae, 5).flip(3)])
    loops = vae.decode_video(z, closed_loop=True)
    files = vae.decode_to_files(z, tmp_path, closed_loop=True)
    for file, loop in zip(files, loops, strict=True):
        assert torch.equal(frames.FrameRange(file, 0, 20).image(), loop)
        assert file.shape[0] == 20
    tiled = vae.decode_video(z[:1], "on", (32, 32), 16, closed_loop=True)
    assert tiled.shape == loops[:1].shape and (tiled - loops[:1]).abs().mean() < 10 * STEP


def test_the_number_that_is_decoded_is_even():
    assert all((count + lead_of_loop(count)) % 2 == 0 for count in range(1, 50))
    assert CogVideoXVAE(VAESpec(block_out_channels=(8, 16, 16, 32), layers_per_block=1, norm_num_groups=4),
                        torch.float32).decode_video(torch.zeros(1, 16, 3, 2, 2), closed_loop=True).shape[1] == 12
