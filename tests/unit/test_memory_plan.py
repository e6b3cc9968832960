"""The arithmetic of the memory plan: what stays on the device, what is chosen, and the words."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from cogx.model_loaders.memory_plan import (
    IN_TURN,
    ONE_BY_ONE,
    TOGETHER,
    MemoryPlan,
    Place,
    plan_coding,
    plan_sampling,
    plan_text,
)
from cogx.models.cogvideox.vae_plan import HOST, Memory, Plan
from cogx.models.smaller import nearest_fitting, shorter, smaller
from cogx.models.specs import PUBLISHED, Geometry, check_geometry

SMALLEST = Plan(8, True, HOST)


def card(limit: float, kept: float = 1.0) -> Place:
    return Place("cuda:0", limit, kept, streams=True)


@pytest.mark.parametrize("limit, choice, resident", [
    (17.0, TOGETHER, 10.0),  # 10 of weights, 1.5 times 4 for both halves of two videos
    (16.0, TOGETHER, 10.0),
    (15.9, IN_TURN, 10.0),
    (13.0, IN_TURN, 10.0),  # 2 for one half of both, 1 that is kept
    (12.0, IN_TURN, 9.0),
    (3.0, IN_TURN, 0.0),
    (1.9, ONE_BY_ONE, 0.0),
    (0.9, None, 0.0),
])
def test_sampling_on_a_card(limit, choice, resident):
    """One video takes 1, two videos' two halves 4: the estimate is linear."""
    stage = plan_sampling(10.0, float, 2, "bfloat16", card(limit))
    assert (stage.choice, stage.resident) == (choice, resident)
    assert stage.peak == {TOGETHER: 4.0, IN_TURN: 2.0}.get(choice, 1.0)
    numbers = stage.numbers()
    assert numbers["fits"] == (choice is not None) and numbers["streamed"] == 10 - resident
    assert [numbers[name] for name in (TOGETHER, IN_TURN, ONE_BY_ONE)] == [4, 2, 1]


@pytest.mark.parametrize("limit, choice, resident", [(7.0, TOGETHER, 2.0), (6.0, TOGETHER, 1.0), (5.9, IN_TURN, 2.9),
                                                     (0.5, None, 0.0)])
def test_weights_that_yield_cost_no_room(limit, choice, resident):
    """Dynamic VRAM: 1 is kept, the rest is for the forward and then for weights."""
    stage = plan_sampling(10.0, float, 2, "bfloat16", replace(card(limit), yields=True))
    assert stage.choice == choice and stage.resident == pytest.approx(resident)


@pytest.mark.parametrize("limit, choice", [(13.0, TOGETHER), (12.0, IN_TURN), (10.9, None)])
def test_a_cpu_streams_nothing(limit, choice):
    stage = plan_sampling(10.0, float, 1, "float32", Place("cpu", limit, 0, streams=False))
    assert (stage.choice, stage.resident) == (choice, 10.0)


@pytest.mark.parametrize("limit, resident, fits", [(12.0, 10.0, True), (4.0, 3.0, True), (0.4, 0.0, False)])
def test_text(limit, resident, fits):
    stage = plan_text(10.0, 0.5, "bfloat16", card(limit))
    assert (stage.resident, stage.fits) == (resident, fits)


def plan(place: Place, vae: Plan | None, **changes: object) -> MemoryPlan:
    gigabytes = replace(place, limit=place.limit * 1e9, kept=place.kept * 1e9)
    coding = plan_coding(0.4e9, lambda plan: Memory(2e9, 0.5e9 if plan.host_caches else 0), vae, SMALLEST, "bfloat16",
                         place.device)
    made = MemoryPlan(
        geometry=Geometry(PUBLISHED["5B"], 720, 480, 49), batch=1,
        text=plan_text(9.5e9, 0.2e9, "bfloat16", gigabytes), encode=None, decode=coding,
        sampling=plan_sampling(11e9, lambda videos: 0.75e9 * videos, 1, "bfloat16", gigabytes),
        free={place.device: {"free": 1, "obtainable": 2}}, ram_free=8e9, ram_weights=0.0)
    return replace(made, **changes)


def test_words_of_what_fits():
    words = plan(card(8.0), Plan(64, True)).words()
    assert words[0] == "CogVideoX 5B, 49 frames of 720x480, batch 1"
    assert words[2:] == [
        "text: 0.20 GB beside 9.50 GB of weights (bfloat16), 7.00 GB on cuda:0, 2.50 GB streamed from RAM",
        "sampling: 0.75 GB beside 11.00 GB of weights (bfloat16), 6.25 GB on cuda:0, 4.75 GB streamed from RAM; "
        "the halves of guidance run in turn",
        "decode: 2.00 GB beside 0.40 GB of weights (bfloat16) on cuda:0; strips of 64 rows, caches in host memory, "
        "0.50 GB of RAM",
        "RAM: up to 0.70 GB needed, 8.00 GB free",
        "Everything fits."]


def test_words_of_what_does_not():
    full = plan(card(0.5), None, instead=(Geometry(PUBLISHED["5B"], 720, 480, 41),), ram_free=0.1e9)
    words = full.words()
    assert words[-3].endswith("; more than there is, so tiles will be used, which change the picture slightly")
    assert words[-2].endswith("0.10 GB free; the system may swap")
    assert words[-1] == ("Does not fit: sampling, decode. By the estimate this would fit: 41 frames of 720x480.")
    assert replace(full, instead=()).words()[-1].endswith("No smaller video would fit either.")


def test_json():
    numbers = plan(card(20.0), Plan(64)).numbers()
    assert json.loads(json.dumps(numbers)) == numbers and numbers["fits"]
    assert numbers["encode"] is None and numbers["sampling"]["choice"] == "together"
    assert numbers["decode"]["plan"] == {"rows": 64, "host_caches": False, "values": "device",
                                         "words": "strips of 64 rows, all on the device"}
    assert numbers["ram"]["needed"] == numbers["ram"]["frames"] == 49 * 720 * 480 * 3 * 4
    assert plan(card(0.5), None).numbers()["decode"]["plan"] is None


def test_ram_counts_what_a_cpu_works_on_and_what_is_still_on_disk():
    on_card, on_cpu = plan(card(20.0), Plan(64, True)), plan(Place("cpu", 20.0, 0, streams=False), Plan(64))
    assert on_card.ram_needed == on_card.frames_in_ram + 0.5e9
    assert on_cpu.ram_needed == on_cpu.frames_in_ram + 2e9
    assert replace(on_card, ram_weights=3e9).ram_needed == on_card.ram_needed + 3e9
    assert replace(on_card, batch=2).ram_needed == 2 * on_card.frames_in_ram + 0.5e9


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_smaller_videos_are_legal_and_the_nearest_comes_first(name):
    spec = PUBLISHED[name]
    asked = Geometry(spec, spec.native_width, spec.native_height, spec.transformer.sample_frames)
    for candidates in (list(shorter(asked)), list(smaller(asked))):
        for one in candidates:
            check_geometry(one.width, one.height, one.frames, spec)
        volumes = [one.width * one.height * one.frames for one in candidates]
        assert volumes == sorted(volumes, reverse=True)
        assert all(volume < asked.width * asked.height * asked.frames for volume in volumes)
    assert next(shorter(asked)).frames == asked.frames - spec.frame_step
    one_size = spec.transformer.use_learned_positional_embeddings
    assert [bool(list(smaller(asked)))] == [not one_size]
    limit = asked.width * asked.height * asked.frames // 2
    found = nearest_fitting(asked, lambda one: one.width * one.height * one.frames <= limit)
    assert len(found) == 2 - one_size and found[0].frames < asked.frames
    assert nearest_fitting(asked, lambda one: False) == []
