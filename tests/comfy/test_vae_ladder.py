"""A decode or encode that runs out of memory: each rung is reached, and the picture is the same until tiles."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import comfy.model_management
import pytest
import torch
from cogx.model_loaders import vae_ladder
from cogx.model_loaders.vae import CogVideoXVAE
from cogx.models.cogvideox.vae_plan import DEVICE, HOST, PARKED, Budget, Memory, Plan, choose, smaller_plans
from cogx.models.specs import SpecError, VAESpec

FIRST = Plan(16)
# Everything below the first plan, in the order of the ladder.
LADDER = [Plan(8), Plan(8, True), Plan(8, True, PARKED), Plan(8, True, HOST)]


@pytest.fixture(scope="module")
def vae() -> CogVideoXVAE:
    vae = CogVideoXVAE(VAESpec(block_out_channels=(8, 16, 16, 32), layers_per_block=1, norm_num_groups=4),
                       torch.float32)
    generator = torch.Generator().manual_seed(0)
    for parameter in vae.first_stage_model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return vae


@pytest.fixture(autouse=True)
def first_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_ladder, "choose", lambda *_: FIRST)


def limit(monkeypatch: pytest.MonkeyPatch, vae: CogVideoXVAE, name: str, fits: Callable[..., bool]) -> list[Any]:
    """Runs out of memory in the middle of a video wherever ``fits`` denies a plan. Returns the plans tried."""
    real, tried = getattr(vae.first_stage_model, name), []

    def limited(x: torch.Tensor, plan: Plan, *args: Any, **kwargs: Any) -> Iterator[torch.Tensor]:
        tried.append(plan)
        for i, chunk in enumerate(real(x, plan, *args, **kwargs)):
            if i == 1 and not fits(x, plan):
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore words")
            yield chunk

    monkeypatch.setattr(vae.first_stage_model, name, limited)
    return tried


def latent(videos: int = 1) -> torch.Tensor:
    return torch.randn(videos, 16, 5, 6, 9, generator=torch.Generator().manual_seed(1))


def rungs(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if "Out of memory" in record.message]


@pytest.mark.parametrize("failures", range(6))
def test_decode_goes_down_and_gives_the_same_video(vae, monkeypatch, caplog, error, failures):
    caplog.set_level(logging.INFO, "cogx")
    ladder = [FIRST, FIRST, *LADDER]  # the second time with other models gone
    with torch.inference_mode():
        expected = vae.decode_video(latent())
        tried = limit(monkeypatch, vae, "decode_chunks", lambda _, plan: len(tried) > failures)
        found = vae.decode_video(latent())
    assert error(found, expected) <= 1e-5
    assert tried == ladder[:failures + 1]
    assert len(rungs(caplog)) == failures


@pytest.mark.parametrize("failures", range(6))
def test_encode_goes_down_and_gives_the_same_latent(vae, monkeypatch, caplog, error, failures):
    caplog.set_level(logging.INFO, "cogx")
    frames = torch.rand(17, 48, 72, 3, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = vae.encode(frames)
        tried = limit(monkeypatch, vae, "encode_chunks", lambda _, plan: len(tried) > failures)
        found = vae.encode(frames)
    assert error(found, expected) <= 1e-5
    assert tried == [FIRST, FIRST, *LADDER][:failures + 1]
    assert len(rungs(caplog)) == failures


@pytest.mark.parametrize("tiling", ["auto", "on"])
def test_then_tiles(vae, monkeypatch, caplog, tiling):
    """Only parts of the picture fit."""
    with torch.inference_mode():
        limit(monkeypatch, vae, "decode_chunks", lambda z, _: z.shape[4] < 9)
        found = vae.decode_video(latent(), tiling, (48, 48), 16)
        assert torch.equal(found, vae.decode_video(latent(), "on", (48, 48), 16))
    assert found.shape == (1, 17, 48, 72, 3)
    assert tiling != "auto" or "Next: tiles, which change the picture slightly" in rungs(caplog)[-1]


def test_then_the_cpu(vae, monkeypatch, caplog, error):
    """As on a GPU, where the CPU is another place."""
    with torch.inference_mode():
        expected = vae.decode_video(latent())
        tried = limit(monkeypatch, vae, "decode_chunks", lambda z, plan: z.shape[4] == 9 and plan.rows == 40)
        monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda _: False)
        monkeypatch.setattr("cogx.model_loaders.vae.cpu_plan", lambda *_: Plan(40))
        found = vae.decode_video(latent(), "auto", (48, 48), 16)
    assert tried[-1] == Plan(40) and "Next: the CPU" in rungs(caplog)[-1]
    assert error(found, expected) <= 1e-5


@pytest.mark.parametrize("tiling, last", [("auto", "tiles"), ("off", "free other models and the cache"),
                                          ("on", "free other models and the cache")])
def test_the_end_says_what_was_tried(vae, monkeypatch, tiling, last):
    limit(monkeypatch, vae, "decode_chunks", lambda *_: False)
    with torch.inference_mode(), pytest.raises(torch.cuda.OutOfMemoryError) as caught:
        vae.decode_video(latent(), tiling, (48, 48), 16)
    words = str(caught.value)
    assert words.startswith("Out of memory in decoding 17 frames of 72x48. Tried: ")
    assert last in words and ("set tiling to auto" if tiling == "off" else "smaller size or fewer frames") in words
    assert words.endswith("(CUDA out of memory. Tried to allocate 2.00 GiB.)")
    assert ("values and caches in host memory" in words) == (tiling == "auto")


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, comfy.model_management.InterruptProcessingException])
def test_no_other_error_is_tried_again(vae, monkeypatch, kind):
    calls = []

    def failing(*_: Any) -> Iterator[torch.Tensor]:
        calls.append(1)
        raise kind("another")
        yield

    monkeypatch.setattr(vae.first_stage_model, "decode_chunks", failing)
    with torch.inference_mode(), pytest.raises(kind):
        vae.decode_video(latent())
    assert len(calls) == 1


def test_an_interrupt_stops_within_a_chunk(vae, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "interrupt_processing", True)
    with torch.inference_mode(), pytest.raises(comfy.model_management.InterruptProcessingException):
        vae.decode_video(latent())


def test_videos_that_are_done_are_not_made_again(vae, monkeypatch, error):
    with torch.inference_mode():
        expected = vae.decode_video(latent(3))
        tried = limit(monkeypatch, vae, "decode_chunks", lambda _, plan: plan != FIRST or len(tried) < 3)
        found = vae.decode_video(latent(3))
    assert tried == [FIRST, FIRST, FIRST, FIRST, Plan(8)]  # two are done, the third fails twice
    assert error(found, expected) <= 1e-5


def test_nothing_of_a_failed_try_is_kept(vae, monkeypatch):
    kept: list[weakref.ref] = []
    alive: list[bool] = []
    real = vae.first_stage_model.decode_chunks

    def limited(z: torch.Tensor, plan: Plan, *args: Any) -> Iterator[torch.Tensor]:
        alive.append(any(ref() is not None for ref in kept))
        for chunk in real(z, plan, *args):
            kept.append(weakref.ref(chunk.untyped_storage()))
            if len(kept) < 3:
                raise torch.cuda.OutOfMemoryError("out of memory")
            yield chunk

    monkeypatch.setattr(vae.first_stage_model, "decode_chunks", limited)
    with torch.inference_mode():
        vae.decode_video(latent())
    assert len(alive) == 3 and not any(alive)


def test_other_models_go_before_anything_gets_slower(vae, monkeypatch):
    freed = []
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda size, device, **_: freed.append((size, device)))
    with torch.inference_mode():
        tried = limit(monkeypatch, vae, "decode_chunks", lambda *_: any(size == 1e30 for size, _ in freed))
        vae.decode_video(latent())
    assert tried == [FIRST, FIRST]


# --- The choice ---


def memory(plan: Plan) -> Memory:
    """Like the real ones in its order."""
    host = {DEVICE: 0, PARKED: 5, HOST: 10}[plan.values] + 20 * plan.host_caches
    return Memory(100 - 60 * plan.host_caches - {DEVICE: 0, PARKED: 15, HOST: 25}[plan.values] + (plan.rows or 200) / 8,
                  host)


@pytest.mark.parametrize("free, others, host, expected", [
    (200, 0, 100, Plan(64)), (104, 0, 100, Plan(32)), (60, 0, 100, Plan(64, True)), (41, 0, 100, Plan(8, True)),
    (30, 0, 100, Plan(32, True, PARKED)), (20, 0, 100, Plan(32, True, HOST)), (10, 0, 100, None),
    (30, 30, 100, Plan(64, True)), (30, 170, 100, Plan(64)),  # other models leave before the slow ones are taken
    (50, 150, 100, Plan(64, True)),  # but not for caches on the device
    (60, 0, 10, None), (60, 140, 10, Plan(64)), (30, 0, 22, None),  # the RAM is full
    (30, 30, 49, None)  # where what the others hold goes too
])
def test_choice(free, others, host, expected):
    assert choose(memory, Budget(free, host, others), Plan(40)) == expected


@pytest.mark.parametrize("free, expected", [(200, Plan(40)), (103, Plan(16)), (90, None)])
def test_choice_where_the_memory_is_the_ram(free, expected):
    assert choose(memory, Budget(free, unified=True), Plan(40)) == expected


@pytest.mark.parametrize("plan", [Plan(), Plan(160), Plan(64), Plan(8, True), Plan(32, True, PARKED)])
def test_every_smaller_plan_needs_less(plan):
    spec, shape = VAESpec(), (13, 60, 90)
    from cogx.models.cogvideox.vae_plan import decode_memory

    needs = [decode_memory(spec, shape, 2, p).device for p in (plan, *smaller_plans(plan))]
    assert needs == sorted(needs, reverse=True) and len(set(needs)) == len(needs)
    assert [*smaller_plans(plan)][-1] == Plan(8, True, HOST)
    assert not [*smaller_plans(Plan(8, True, HOST))]


def test_the_budget_counts_what_other_models_hold(monkeypatch):
    class Loaded:
        device = torch.device("cuda", 0)

        def __init__(self, patcher: Any) -> None:
            self.model = patcher

        def model_loaded_memory(self) -> int:
            return 5 * 10**9 + self.model.extra  # of a dead one there is no model to ask

    class Patcher:
        model, extra = object(), 0

    class Own(Patcher):
        model = object()

    management = comfy.model_management
    monkeypatch.setattr(management, "get_free_memory", lambda device: 3e9 if device.type == "cuda" else 20e9)
    monkeypatch.setattr(management, "extra_reserved_memory", lambda: 0.5e9)
    monkeypatch.setattr(management, "current_loaded_models", [Loaded(Patcher()), Loaded(Own()), Loaded(None)])
    budget = vae_ladder.budget_of(torch.device("cuda", 0), Own.model, 0.25e9)
    assert budget == Budget(2.25e9, vae_ladder.RAM_SHARE * 20e9, 5e9)
    for device in ("cpu", "mps"):
        assert vae_ladder.budget_of(torch.device(device)).unified


def test_what_fits_by_no_estimate_is_tried_all_the_same(vae, monkeypatch, caplog):
    monkeypatch.setattr(vae_ladder, "choose", lambda *_: None)
    with torch.inference_mode():
        tried = limit(monkeypatch, vae, "decode_chunks", lambda *_: True)
        vae.decode_video(latent())
    assert tried == [Plan(8, True, HOST)]
    assert "Memory is short for decoding 17 frames of 72x48" in caplog.text


def test_no_ram_is_no_memory(vae, monkeypatch):
    """The next rung, which needs none, is tried."""
    def full(*_: Any, **__: Any) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    host = vae_ladder.HostMemory()
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(torch.cuda.OutOfMemoryError, match="out of RAM"):
        host.make((4,), torch.float32)


def test_an_empty_latent_is_refused(vae):
    with pytest.raises(SpecError, match="Expected a CogVideoX latent"):
        vae.decode_video(torch.zeros(1, 16, 0, 6, 9))


def test_frames_for_a_file_come_from_the_cpu_before_tiles(vae, monkeypatch, error, tmp_path):
    """Tiles hold all frames in memory."""
    def decoded() -> torch.Tensor:
        file, = vae.decode_to_files(latent(), tmp_path, "auto", (48, 48), 16)
        return torch.stack([file.read(i) for i in range(file.shape[0])])[None]

    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda _: False)
    monkeypatch.setattr("cogx.model_loaders.vae.cpu_plan", lambda *_: Plan(40))
    with torch.inference_mode():
        expected, tiles = vae.decode_video(latent()), vae.decode_video(latent(), "on", (48, 48), 16)
        limit(monkeypatch, vae, "decode_chunks", lambda z, plan: z.shape[4] < 9 or plan.rows == 40)
        assert error(decoded(), expected) <= 1e-5 < error(tiles, expected)
        monkeypatch.setattr(vae_ladder, "_free_ram", lambda: 0)  # no room for the CPU's work
        assert torch.equal(decoded(), tiles)
