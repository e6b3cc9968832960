"""Memory flat in length: a minute against six seconds, sixteen seconds against four. What grows is counted."""

from __future__ import annotations

import gc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import comfy.sample
import folder_paths
import pytest
import torch
from cogx.benchmarks.live_memory import accounting
from cogx.model_loaders import frames, load
from cogx.model_loaders.frames import FileFrames, Format, FrameRange
from cogx.model_loaders.images import encode_video
from cogx.model_loaders.vae import CogVideoXVAE
from cogx.model_loaders.video import StreamedVideo, decode_to_videos
from cogx.models.cogvideox.base_model import CogVideoXConfig
from cogx.models.cogvideox.vae_plan import Plan
from cogx.models.specs import PUBLISHED, Geometry, VAESpec
from cogx.samplers import adapter
from cogx.samplers.long_video import with_context_windows
from cogx.samplers.windows import Windows
from cogx.scripts import demo_pipeline
from cogx.tests.comfy.test_memory import forward
from cogx.tests.comfy.test_vae_memory import decode

BOUND = 1.05
TINY = VAESpec(block_out_channels=(8, 16, 16, 32), layers_per_block=1, norm_num_groups=4)
SIX_SECONDS, MINUTE = 13, 121  # latent frames: 49 and 481 frames at 8 fps
FRAME_BYTES = 32 * 32 * 3 * 4


@pytest.fixture(autouse=True)
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return tmp_path


@pytest.fixture(scope="module")
def vae() -> CogVideoXVAE:
    return CogVideoXVAE(TINY, torch.float32)


def test_the_decoder_of_the_published_size() -> None:
    """On the card, and beside it in host memory, counted on the meta device; a small picture, in two strips."""
    short, long = (decode((count, 2, 2), Plan(8, True)) for count in (SIX_SECONDS, MINUTE))
    assert long.peak == short.peak and long.hosted == short.hosted


def streamed(vae: CogVideoXVAE, z: torch.Tensor, path: Path) -> None:
    (video,) = decode_to_videos(vae, z, Fraction(8), None)
    video.save_to(str(path))


def held(vae: CogVideoXVAE, z: torch.Tensor, path: Path) -> None:
    vae.decode_video(z)


def peak(vae: CogVideoXVAE, way: Callable[..., None], count: int, path: Path, **decode: Any) -> int:
    with accounting() as memory:
        z = torch.zeros(1, 16, count, 4, 4)
        before = memory.live
        way(vae, z, path)
    return memory.peak - before


def test_decode_and_save_with_real_frames(vae: CogVideoXVAE, temp: Path) -> None:
    """All tensors of the node and of Save Video, with its recovery and progress; the IMAGE is the control."""
    short, long = (peak(vae, streamed, count, temp / "a.mp4") for count in (7, 31))  # three chunks, and sixteen
    assert long <= BOUND * short
    assert peak(vae, held, 31, temp) > long + 100 * FRAME_BYTES


def rss_anon() -> int:
    """Bytes of this process that no file backs: what the encoder and numpy hold too, and no page cache."""
    words = Path("/proc/self/status").read_text(encoding="ascii").split("RssAnon:")[1].split()
    return 1024 * int(words[0])


def test_the_process_does_not_grow_while_frames_are_written_and_saved(temp: Path, monkeypatch) -> None:
    """48 seconds of 192x128 in chunks of eight frames through the file and ComfyUI's encoder: 113 MB as an IMAGE."""
    count, shape = 384, (128, 192, 3)
    image = count * 128 * 192 * 3 * 4
    format = Format(torch.float32, torch.device("cpu"), lambda pixels: pixels.add_(1).div_(2))
    seen: list[int] = []

    def rise(frames_: int) -> int:
        seen.clear()
        gc.collect()
        file = FileFrames(format, (frames_, *shape), temp)
        for _ in range(frames_ // 8):
            file.write(torch.rand(1, 3, 8, *shape[:2]).mul_(0.1))
            seen.append(rss_anon())
        before = seen[0]
        StreamedVideo(FrameRange(file, 0, frames_), Fraction(8)).save_to(str(temp / "a.mp4"))
        return max(seen) - before

    read = FileFrames.read

    def watched(self: FileFrames, i: int) -> torch.Tensor:
        if i % 8 == 0:
            seen.append(rss_anon())
        return read(self, i)

    monkeypatch.setattr(frames.FileFrames, "read", watched)
    rise(128)  # the encoder's own memory, which stays in the process
    assert rise(count) - rise(128) < 0.1 * image


def test_encoding_copies_no_video(vae: CogVideoXVAE) -> None:
    """Video to video and whatever else encodes: beside the IMAGE that is given, only latents have its length."""
    spec = PUBLISHED["5B"]
    peaks = []
    for count in (17, 129):
        video = torch.rand(count, 32, 32, 3)
        with accounting() as memory:
            latent, _ = encode_video(vae, Geometry(spec, 32, 32, count), video, "crop", spec)
        assert latent.shape == (1, 16, (count + 3) // 4, 4, 4)
        peaks.append(memory.peak)
    latents = 3 * 2 * 28 * 16 * 4 * 4 * 4  # the moments in parts, whole, and their mean
    assert peaks[1] - peaks[0] <= latents < 0.2 * 112 * FRAME_BYTES


# --- Sampling ---


@pytest.fixture(scope="module")
def model() -> Any:
    return load.load_model(str(demo_pipeline.DEMO / "CogX-Demo" / "transformer"))


def live_at_entry(model: Any, latents: int) -> int:
    """Bytes alive when the network is called, of a video in windows of 5 latent frames."""
    spec = model.model.spec
    text = [[torch.zeros(1, spec.text_tokens, spec.transformer.text_embed_dim), {}]]
    model = with_context_windows(model, Windows(spec, 17, 8, "static", "pyramid", "freenoise", True, "window"))
    network, entries = model.model.diffusion_model, []
    real = network.forward

    def forward_(*inputs: Any, **options: Any) -> torch.Tensor:
        entries.append(memory.live)
        return real(*inputs, **options)

    empty = torch.zeros(1, 16, latents, 2, 2)
    sampler, sigmas = adapter.sampler_object("cogvideox_dpm"), adapter.make_sigmas(model, 2, "trailing")
    with accounting() as memory:
        network.forward = forward_
        try:
            comfy.sample.sample_custom(model, torch.randn(empty.shape), 6.0, sampler, sigmas, text, text, empty,
                                       seed=1, disable_pbar=True)
        finally:
            del network.forward
    return max(entries)


@pytest.fixture(scope="module")
def copies(model: Any) -> float:
    """How many latents of the video's length are alive while the network runs."""
    growth = live_at_entry(model, 33) - live_at_entry(model, 9)
    return growth / (24 * 16 * 2 * 2 * 4)


def test_what_grows_with_the_length_are_a_few_latents(copies: float) -> None:
    """Noise, the latent image, the noisy video and its input to the model, the sampler's own, and the sums of both
    halves of guidance: all in fp32, 0.35 MB for each latent frame of 720x480."""
    assert copies <= 11


@pytest.mark.parametrize("name, seconds", [("2B", (4, 16)), ("5B", (4, 16)), ("1.5-5B", (4, 16))])
def test_sampling_16_seconds_takes_what_4_seconds_take(copies: float, name: str, seconds: tuple[int, int]) -> None:
    """Windows of 4 seconds at native size; bf16 weights on the card, which the bound needs: beside them the latents
    add up to a seventh of a step."""
    spec = PUBLISHED[name]
    config = CogVideoXConfig(spec)
    config.set_inference_dtype(torch.bfloat16, None)
    network = config.get_model(device="meta")
    short, long = (Geometry(spec, spec.native_width, spec.native_height, spec.fps * s + 1) for s in seconds)
    shape = short.latent_shape(2)
    padded = (*shape[:2], shape[2] + spec.padding_frames(shape[2]), *shape[3:])
    step = forward(network, padded).peak
    weights = sum(p.nbytes for p in network.diffusion_model.parameters())
    latent = 16 * shape[3] * shape[4] * 4
    grown = copies * latent * (long.latent_shape(1)[2] - shape[2])
    assert weights + step + grown <= BOUND * (weights + step)
