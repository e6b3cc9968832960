"""The estimates that ComfyUI plans with against what torch really allocates, at native size in bf16.

tests/comfy/test_memory.py compares them with an account of tensors; only here the workspaces inside kernels count.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sample
import pytest
import torch
from cogx.model_loaders.load import load_model
from cogx.model_loaders.vae import CogVideoXVAE
from cogx.model_loaders.vae_ladder import HostMemory
from cogx.models.cogvideox.base_model import CogVideoXConfig
from cogx.models.cogvideox.vae_plan import HOST, PARKED, Plan
from cogx.models.specs import PUBLISHED, VAESpec
from cogx.tests.gpu.references import relative_error

BF16 = torch.bfloat16
TRANSFORMER_BOUND = 1.15
# cuDNN may turn input and output of a 3-D convolution into another layout in its workspace.
VAE_BOUND = 1.5


def allocated_by(run: Any, device: torch.device) -> int:
    """Bytes at the peak beyond what was there before; the second run, so that libraries have their handles."""
    for _ in range(2):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
    # "Active" is also what a copy on another stream still holds.
    return torch.cuda.memory_stats(device)["active_bytes.all.peak"] - before


def check(allocated: int, estimate: float, bound: float) -> None:
    ratio = allocated / estimate
    words = f"allocated {allocated / 2**30:.2f} GiB, {ratio:.2f} x the estimate of {estimate / 2**30:.2f} GiB"
    assert 1 / bound <= ratio <= bound, words


def skip_without_room(needed: float, device: torch.device) -> None:
    free = torch.cuda.mem_get_info(device)[0]
    if free < needed:
        pytest.skip(f"needs {needed / 2**30:.1f} GiB of free GPU memory, has {free / 2**30:.1f}")


@pytest.fixture(autouse=True)
def needs_cuda(rehearsal: bool) -> None:
    if rehearsal:
        pytest.skip("a CPU does not count what it allocates")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("variant", ["2B", "5B", "1.5-5B"])
def test_transformer(variant: str, batch: int, device: torch.device) -> None:
    """Two layers: what is alive at once does not depend on how many follow."""
    spec = PUBLISHED[variant]
    spec = replace(spec, transformer=replace(spec.transformer, num_layers=2))
    config = CogVideoXConfig(spec)
    config.set_inference_dtype(BF16, None)
    model = config.get_model(device=device)
    frames = (spec.transformer.sample_frames - 1) // 4 + 1
    shape = (batch, 16, frames + spec.padding_frames(frames), spec.native_height // 8, spec.native_width // 8)
    estimate = model.memory_required(shape)
    skip_without_room(1.5 * estimate, device)
    for parameter in model.diffusion_model.parameters():
        parameter.normal_(std=0.02)
    x = torch.randn(shape, device=device, dtype=BF16)
    context = torch.randn(batch, spec.text_tokens, 4096, device=device, dtype=BF16)
    timestep = torch.full((batch,), 500.0, device=device)
    check(allocated_by(lambda: model.diffusion_model(x, timestep, context), device), estimate, TRANSFORMER_BOUND)


@pytest.fixture(scope="module")
def vae(device: torch.device) -> CogVideoXVAE:
    with device:
        vae = CogVideoXVAE(VAESpec(), BF16)
    for parameter in vae.first_stage_model.parameters():
        parameter.normal_(std=0.02)
    return vae


@pytest.mark.parametrize("plan", [Plan(64), Plan(32), Plan(32, True), Plan(16, True, PARKED), Plan(8, True, HOST)],
                         ids=str)
@pytest.mark.parametrize("which", ["decode", "encode"])
def test_vae(which: str, plan: Plan, vae: CogVideoXVAE, device: torch.device) -> None:
    """480x720, 25 frames: four chunks hold as much at once as a whole clip does."""
    shape = (1, 16, 7, 60, 90) if which == "decode" else (1, 3, 25, 480, 720)
    estimate = getattr(vae, f"{which}_memory")(shape, plan).device
    skip_without_room(2 * estimate, device)
    x = torch.randn(shape, dtype=BF16)
    chunks = getattr(vae.first_stage_model, f"{which}_chunks")

    def run() -> None:
        with HostMemory() as host:
            for chunk in chunks(x.to(device), plan, host.make):
                del chunk

    check(allocated_by(run, device), estimate, VAE_BOUND)


@contextmanager
def capped(reserved: float, device: torch.device) -> Iterator[None]:
    """torch's allocator runs out of memory beyond so many bytes."""
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(reserved / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def test_sampling_in_less_than_a_forward_needs(tiny_pipelines: Path, device: torch.device,
                                               caplog: pytest.LogCaptureFixture) -> None:
    """A real out-of-memory error: the halves of guidance run in turn, and the video is the same; then the end, in
    words. Tiny weights and a native clip, so that the activations are what there is."""
    caplog.set_level(logging.WARNING, "cogx")
    model = load_model(str(tiny_pipelines / "5B" / "transformer"), "fp32")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1, 16, 13, 60, 90, generator=generator)
    positive, negative = ([[text, {}]] for text in torch.randn(2, 1, 226, 32, generator=generator))

    def run() -> torch.Tensor:
        return comfy.sample.sample(model, noise, 2, 6.0, "euler", "simple", positive, negative,
                                   torch.zeros_like(noise), disable_pbar=True, seed=1)

    run()
    gc.collect()
    comfy.model_management.soft_empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_reserved(device)
    expected = run()
    peak = torch.cuda.max_memory_reserved(device) - before
    assert not caplog.messages
    with capped(before + 0.75 * peak, device):
        found = run()
    assert [line.split(": ")[1] for line in caplog.messages] == [
        "free other models and the cache, and try again.", "run the conditions of guidance in turn, and try again."]
    assert relative_error(found, expected) <= 1e-3
    with capped(before + 0.1 * peak, device), pytest.raises(torch.OutOfMemoryError, match="this would fit"):
        run()


def test_decode_in_less_than_the_card_seems_to_have(vae: CogVideoXVAE, device: torch.device,
                                                    caplog: pytest.LogCaptureFixture) -> None:
    """A real out-of-memory error: caches and residuals go to host memory, and the video is the same."""
    caplog.set_level(logging.WARNING, "cogx")
    z = torch.randn(1, 16, 5, 60, 90, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = vae.decode_video(z)
        assert not caplog.messages
        comfy.model_management.soft_empty_cache()
        before = torch.cuda.memory_reserved(device)
        with capped(before + VAE_BOUND * vae.decode_memory(z.shape, Plan(8, True, PARKED)).device, device):
            found = vae.decode_video(z)
    assert any("caches in host memory" in line for line in caplog.messages)
    assert not any("tiles" in line for line in caplog.messages)
    assert relative_error(found, expected) <= 5e-2  # of bf16, whose strips round differently
