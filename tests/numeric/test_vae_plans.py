"""The VAE under every plan against diffusers' ``AutoencoderKLCogVideoX``: fp32, relative error <= 1e-5.

Memory that nobody has written yet holds NaN in all of these tests, so that a value read too early shows.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import comfy.ops
import pytest
import torch
from cogx.model_loaders.detect import vae_from_config
from cogx.models.cogvideox import fields
from cogx.models.cogvideox.strips import Statistics
from cogx.models.cogvideox.vae import CogVideoXVAENetwork
from cogx.models.cogvideox.vae_plan import DEVICE, HOST, PARKED, Plan
from cogx.scripts.tiny_pipeline import randomize, vae_config
from torch import Tensor

EXACT = 1e-5
NO_WORSE = 1.1

# The last level of the decoder has as many channels as the one before, half as many (as published), more, and so few
# that the level before does not fit into its memory.
CONFIGS: dict[str, dict[str, Any]] = {
    "equal": {},
    "published": {"block_out_channels": (8, 16, 16, 32), "layers_per_block": 2},
    "wider": {"block_out_channels": (16, 8, 8, 32), "temporal_compression_ratio": 8},
    "steep": {"block_out_channels": (4, 16, 8, 8), "temporal_compression_ratio": 2},
    # diffusers gives its quantising convolutions the channels of pixels: they run with as many in the latent only.
    "three levels": {"block_out_channels": (8, 16, 16), "norm_eps": 1e-3, "latent_channels": 3, "use_quant_conv": True,
                     "use_post_quant_conv": True},
}
PLACES = [(host_caches, values) for values in (DEVICE, PARKED, HOST) for host_caches in (False, True)]


@dataclass(frozen=True)
class Pair:
    ours: CogVideoXVAENetwork
    reference: Any

    @property
    def ratio(self) -> int:
        return self.ours.spec.spatial_ratio

    def latent(self, frames: int, rows: int, columns: int, seed: int = 0) -> Tensor:
        size = 1, self.ours.spec.latent_channels, frames, rows, columns
        return torch.randn(size, generator=torch.Generator().manual_seed(seed))

    def pixels(self, frames: int, rows: int, columns: int, seed: int = 0) -> Tensor:
        """rows and columns of the latent."""
        size = 1, 3, frames, self.ratio * rows, self.ratio * columns
        return torch.rand(size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@cache
def pair(name: str, dtype: torch.dtype = torch.float32) -> Pair:
    """Ours and theirs with the same weights, rounded to ``dtype``; the reference in fp32."""
    from diffusers import AutoencoderKLCogVideoX

    config = {**vae_config("5B"), **CONFIGS[name]}
    levels = len(config["block_out_channels"])
    torch.manual_seed(0)
    reference = randomize(AutoencoderKLCogVideoX(
        **config, down_block_types=("CogVideoXDownBlock3D",) * levels,
        up_block_types=("CogVideoXUpBlock3D",) * levels), 0).to(dtype).float()
    spec = vae_from_config({"_class_name": "AutoencoderKLCogVideoX", **reference.config})
    ours = CogVideoXVAENetwork(spec, dtype, "cpu", comfy.ops.disable_weight_init).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return Pair(ours, reference)


@pytest.fixture(autouse=True)
def nan_in_new_memory() -> Iterator[None]:
    """torch then fills ``empty``; that it warns is of no interest here."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("latents", [1, 2, 3, 6])
@pytest.mark.parametrize("name", CONFIGS)
def test_decode(name: str, latents: int, error: Callable[[Tensor, Tensor], float]) -> None:
    """7 rows and 5 columns, in strips of one latent row, of unequal ones, and whole."""
    both = pair(name)
    z = both.latent(latents, 7, 5)
    expected = both.reference.decode(z).sample
    for i, places in enumerate(PLACES):
        plan = Plan((8, None, 24)[i % 3 if latents != 3 else 0], *places)
        assert error(both.ours.decode(z, plan), expected) <= EXACT, plan


@pytest.mark.parametrize("frames", [1, 2, 7, 12, 17])
@pytest.mark.parametrize("name", CONFIGS)
def test_encode(name: str, frames: int, error: Callable[[Tensor, Tensor], float]) -> None:
    both = pair(name)
    x = both.pixels(frames, 7, 5)
    expected = both.reference.encode(x).latent_dist.mode()
    for i, places in enumerate(PLACES):
        plan = Plan((8, None, 24)[i % 3 if frames != 17 else 0], *places)
        assert error(both.ours.encode(x, plan), expected) <= EXACT, plan


@pytest.mark.parametrize("seed", range(16))
def test_random_plans(seed: int, error: Callable[[Tensor, Tensor], float]) -> None:
    """Any size, also one row or one column of the latent, and any strip height, also no multiple of 8."""
    choice = random.Random(seed)
    both = pair(choice.choice(list(CONFIGS)))
    rows, columns = choice.randint(1, 12), choice.randint(1, 4)
    plans = [Plan(choice.choice([1, 8, 12, 16, 40, 1000]), *choice.choice(PLACES)) for _ in range(3)]
    z = both.latent(choice.randint(1, 6), rows, columns, seed)
    x = both.pixels(choice.randint(1, 18), rows, columns, seed)
    decoded, encoded = both.reference.decode(z).sample, both.reference.encode(x).latent_dist.mode()
    for plan in plans:
        assert error(both.ours.decode(z, plan), decoded) <= EXACT, plan
        assert error(both.ours.encode(x, plan), encoded) <= EXACT, plan


class Lazy(fields.HostLink):
    """The other extreme of a copy engine: it does nothing until it must, and then all in order."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._queue: deque[tuple[int, Tensor, Tensor]] = deque()
        self._count = 0

    def _later(self, target: Tensor, source: Tensor) -> int:
        self._count += 1
        self._queue.append((self._count, target, source))
        return self._count

    def fetch(self, source: Tensor) -> tuple[Tensor, int]:
        copy = torch.empty(source.shape, dtype=source.dtype)
        return copy, self._later(copy, source)

    def arrived(self, copy: Tensor, event: int) -> Tensor:
        while self._queue and self._queue[0][0] <= event:
            _, target, source = self._queue.popleft()
            target.copy_(source)
        return copy

    def store(self, target: Tensor, values: Tensor) -> None:
        self._later(target, values.clone())

    def finish(self) -> None:
        self.arrived(torch.empty(0), self._count)


@pytest.mark.parametrize("name", CONFIGS)
def test_copies_may_be_late(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing reads host memory, or what comes from there, but through the link; what is ahead is never stale."""
    both = pair(name)
    z, x = both.latent(5, 5, 3), both.pixels(17, 5, 3)
    plans = [Plan(8, True, values) for values in (DEVICE, PARKED, HOST)]
    expected = [(both.ours.decode(z, plan), both.ours.encode(x, plan)) for plan in plans]
    monkeypatch.setattr(fields, "HostLink", Lazy)
    for plan, (decoded, encoded) in zip(plans, expected, strict=True):
        assert torch.equal(both.ours.decode(z, plan), decoded), plan
        assert torch.equal(both.ours.encode(x, plan), encoded), plan


def test_one_network_runs_many_videos(error: Callable[[Tensor, Tensor], float]) -> None:
    """Two that take turns chunk by chunk, one that is left half-way, and a batch: no run sees another's caches."""
    both = pair("published")
    first, second = both.latent(7, 3, 2, 1), both.latent(6, 2, 3, 2)
    runs = [both.ours.decode_chunks(z, Plan(8, True, values)) for z, values in ((first, HOST), (second, PARKED))]
    next(both.ours.decode_chunks(first, Plan(8)))
    chunks = [[next(run) for run in runs] for _ in range(3)]
    for i, z in enumerate((first, second)):
        assert error(torch.cat([part[i] for part in chunks], dim=2), both.reference.decode(z).sample) <= EXACT
    batch = torch.cat([first, -first])
    assert error(both.ours.decode(batch, Plan(8)), both.reference.decode(batch).sample) <= EXACT


def test_a_checkpoint_may_end_it() -> None:
    """It is called for each strip of each pass, and what it raises passes through."""
    both, calls = pair("equal"), []

    def checkpoint() -> None:
        calls.append(1)
        if len(calls) == 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(both.ours.decode_chunks(both.latent(3, 8, 2), Plan(8), checkpoint=checkpoint))
    assert len(calls) == 50


@pytest.mark.parametrize("latents", [1, 5])
def test_bf16_is_as_near_as_that_of_diffusers(latents: int, error: Callable[[Tensor, Tensor], float]) -> None:
    both, low = pair("published", torch.bfloat16), torch.bfloat16
    z = both.latent(latents, 8, 12).to(low)
    expected = both.reference.decode(z.float()).sample
    theirs = error(both.reference.to(low).decode(z).sample, expected)
    both.reference.float()
    for plan in (Plan(), Plan(8), Plan(24, True), Plan(8, True, PARKED), Plan(16, True, HOST)):
        assert error(both.ours.decode(z, plan), expected) <= NO_WORSE * theirs, plan


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shift", [0, 30, 300])
def test_statistics_of_strips(shift: float, dtype: torch.dtype) -> None:
    """Mean and variance of values far from zero, whose mean drifts from strip to strip, against fp64."""
    values = torch.randn(8, 3, 50, 40, generator=torch.Generator().manual_seed(0)) + shift
    values = (values + torch.linspace(-1, 1, 50)[:, None]).to(dtype)
    statistics = Statistics(4)
    for rows in values.split([16, 16, 10, 8], dim=2):
        statistics.add(rows.contiguous())
    mean, variance = statistics.combined()
    exact = values.double().view(4, -1)
    half_a_digit = torch.finfo(torch.float32).eps * shift  # fp32 can not hold the mean better
    assert (mean - exact.mean(1)).abs().max() <= 1e-5 + half_a_digit
    assert ((variance - exact.var(1, correction=0)) / exact.var(1, correction=0)).abs().max() <= 1e-5
