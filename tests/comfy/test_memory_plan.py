"""The memory plan against the estimates that ComfyUI gets, the VAE's planner, and the account of live tensors."""

from __future__ import annotations

import json
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.text_encoders.t5
import pytest
import torch
from cogx.benchmarks.live_memory import peak_of
from cogx.model_loaders.load import load_pipeline
from cogx.model_loaders.memory_now import Run
from cogx.model_loaders.memory_plan import text_memory
from cogx.model_loaders.text_encoder import _network_class
from cogx.models.cogvideox.base_model import CogVideoXConfig, forward_memory
from cogx.models.cogvideox.vae_plan import Plan
from cogx.models.specs import PUBLISHED, Geometry, TextSpec
from cogx.tests.comfy.quantized import DEMO, chosen, demo_tensors
from cogx.tests.comfy_server import ComfyServer, PromptError

GB = 1e9
TOLERANCE = 0.15
STAGES = ("text", "sampling", "encode", "decode")


def native(name: str) -> Geometry:
    spec = PUBLISHED[name]
    return Geometry(spec, spec.native_width, spec.native_height, spec.transformer.sample_frames)


# --- The text encoder ---


@pytest.mark.parametrize("spec", [TextSpec(), TextSpec(d_model=512, d_ff=2048, feed_forward_proj="relu")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens, fused", [(226, True), (224, True), (226, False), (64, True)])
def test_text_estimate(spec: TextSpec, dtype: torch.dtype, tokens: int, fused: bool,
                       monkeypatch: pytest.MonkeyPatch) -> None:
    """As SDClipModel runs it. On a GPU attention is one kernel; elsewhere ComfyUI takes one that keeps scores."""
    attention = comfy.ldm.modules.attention
    chosen = attention.attention_pytorch if fused else attention.attention_basic
    monkeypatch.setattr(comfy.text_encoders.t5, "optimized_attention_for_device", lambda *args, **kwargs: chosen)
    with torch.device("meta"):
        encoder = _network_class(spec)(device="meta", dtype=dtype).t5xxl
    memory = peak_of(lambda: encoder([[5] * tokens]))
    ratio = text_memory(spec, tokens, dtype.itemsize, fused) / memory.peak
    assert abs(ratio - 1) <= TOLERANCE, f"{ratio:.3f} x {memory.describe_peak()}"


# --- What is connected ---


@pytest.fixture(scope="module", params=["5B", "1.5-5B-I2V"])
def loaded(request: pytest.FixtureRequest, tiny_pipelines: Any) -> tuple[Any, Any, Any]:
    return load_pipeline(str(tiny_pipelines / request.param))


def test_connected_networks(loaded: tuple[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its numbers are those that ComfyUI gets from the MODEL and the VAE; it loads, moves and frees nothing."""
    model, clip, vae = loaded

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the plan must not touch what is loaded")

    for name in ("load_models_gpu", "free_memory", "soft_empty_cache"):
        monkeypatch.setattr(comfy.model_management, name, refuse)
    spec = model.model.spec
    geometry = Geometry(spec, 96, 64, 17)
    plan = Run(spec, "auto", model, clip, vae).plan(geometry, 2, "auto")
    frames = 5 + spec.padding_frames(5)
    assert plan.sampling.needs == tuple(
        (name, model.model.memory_required((videos, 16, frames, 8, 12)))
        for name, videos in (("together", 4), ("in_turn", 2), ("one_by_one", 1)))
    chosen = vae.plan(lambda plan: vae.decode_memory((1, 16, 5, 8, 12), plan), 9)
    assert isinstance(chosen, Plan) and plan.decode.choice == chosen
    assert plan.decode.peak == vae.decode_memory((1, 16, 5, 8, 12), chosen).device
    assert (plan.encode is not None) == spec.takes_image
    if plan.encode:
        assert plan.encode.peak == vae.encode_memory((1, 3, 1, 64, 96), plan.encode.choice).device
    assert plan.text.weights == clip.patcher.model_size() and plan.sampling.weights == model.model_size()
    assert plan.decode.weights == vae.model_size() and plan.ram_weights == 0 and plan.fits
    assert plan.text.peak == text_memory(clip.cond_stage_model.text_spec, clip.tokenizer.max_tokens, 4, False)


def test_encode_of_a_video(loaded: tuple[Any, Any, Any]) -> None:
    model, _, vae = loaded
    run, geometry = Run(model.model.spec, "auto", model, vae=vae), Geometry(model.model.spec, 96, 64, 17)
    coding = run.encode(geometry, "video")
    assert coding is not None and coding.peak == vae.encode_memory((1, 3, 17, 64, 96), coding.choice).device
    assert run.encode(geometry, "none") is None and run.encode(geometry, "image") is not None


# --- A published model on a GPU that is not there ---


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """ComfyUI's answers on a machine with a card: ``card(free, ram)``."""
    device, management = torch.device("cuda", 0), comfy.model_management

    def make(free: float, ram: float = 64 * GB) -> None:
        for name in ("get_torch_device", "text_encoder_device", "vae_device"):
            monkeypatch.setattr(management, name, lambda: device)
        monkeypatch.setattr(management, "get_free_memory", lambda dev=None, **_: ram if dev.type == "cpu" else free)
        monkeypatch.setattr(management, "unet_manual_cast", lambda *args: None)
        monkeypatch.setattr(management, "current_loaded_models", [])

    return make


@pytest.mark.parametrize("name", list(PUBLISHED))
def test_published_as_loaded(name: str, card: Any) -> None:
    """Nothing is connected: the numbers are those of a model in its place, and no weight is made."""
    card(80 * GB)
    geometry = native(name)
    config = CogVideoXConfig(geometry.spec)
    config.set_inference_dtype(torch.bfloat16, None)
    model = config.get_model(device="meta")
    plan = Run(geometry.spec, "bf16").plan(geometry, 1, "auto")
    frames = geometry.latent_frames + geometry.spec.padding_frames(geometry.latent_frames)
    shape = (16, frames, *geometry.latent_shape()[3:])
    assert dict(plan.sampling.needs)["together"] == model.memory_required((2, *shape))
    assert plan.sampling.weights == sum(p.nbytes for p in model.diffusion_model.parameters())
    assert plan.text.weights == 2 * 4_762_310_656  # T5-v1.1-XXL's encoder
    assert plan.ram_weights == plan.text.weights + plan.sampling.weights + plan.decode.weights
    assert plan.fits and plan.sampling.choice == "together" and plan.sampling.resident == plan.sampling.weights
    assert (plan.encode is not None) == geometry.spec.takes_image


@pytest.mark.parametrize("dynamic, choices", [
    (False, ["together", "in_turn", "in_turn", None]),  # once loaded, weights stay
    (True, ["together", "together", "in_turn", None]),  # they leave for the other half
])
def test_smaller_cards(card: Any, monkeypatch: pytest.MonkeyPatch, dynamic: bool, choices: list[str | None]) -> None:
    """1.5 at its native size on 24, 12, 5 and 1.5 GB; what would fit, fits."""
    if dynamic:
        monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)
    geometry, seen, resident = native("1.5-5B"), [], []
    for free in (24, 12, 5, 1.5):
        card(free * GB)
        plan = Run(geometry.spec, "bf16").plan(geometry, 1, "none")
        seen.append(plan.sampling.choice)
        resident.append(plan.sampling.resident)
        assert plan.text.resident + plan.text.peak <= free * GB and plan.decode.fits
        assert plan.decode.peak + plan.decode.weights <= free * GB
        assert not plan.sampling.fits or plan.sampling.resident + plan.sampling.peak <= free * GB
    assert seen == choices and not plan.fits
    assert resident[0] == plan.sampling.weights > resident[1] > resident[2] > 0 == resident[3]
    assert plan.instead
    for instead in plan.instead:
        assert Run(geometry.spec, "bf16").plan(instead, 1, "none").fits
        assert f"{instead.frames} frames of {instead.width}x{instead.height}" in plan.words()[-1]


@pytest.mark.parametrize("free, sampling, decode", [(30, True, True), (10, False, True), (0.45, False, False)])
def test_a_cpu_reads_weights_into_the_memory_it_works_in(monkeypatch: pytest.MonkeyPatch, free: float, sampling: bool,
                                                         decode: bool) -> None:
    """5B's weights are 11 GB, those of its VAE 0.4 GB."""
    for name in ("get_torch_device", "text_encoder_device", "vae_device"):
        monkeypatch.setattr(comfy.model_management, name, lambda: torch.device("cpu"))
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *args, **kwargs: free * GB)
    plan = Run(PUBLISHED["5B"], "bf16").plan(Geometry(PUBLISHED["5B"], 96, 64, 9), 1, "none")
    assert (plan.sampling.fits, plan.decode.fits) == (sampling, decode)
    assert plan.sampling.resident == plan.sampling.weights and plan.ram_free == free * GB


# --- The node ---


@pytest.fixture(params=["server", "oldest_server"])
def any_server(request: pytest.FixtureRequest) -> ComfyServer:
    return request.getfixturevalue(request.param)


def graph(**inputs: Any) -> dict[str, Any]:
    given = {"variant": "5B", "width": 720, "height": 480, "length": 49, "batch_size": 1, "weight_dtype": "fp32",
             "encode": "auto", **inputs}
    return {"1": {"class_type": "CogXMemoryPlan", "inputs": given}}


def plan_of(server: ComfyServer, prompt: dict[str, Any]) -> dict[str, Any]:
    output = server.run(prompt).outputs["1"]
    assert output["text"] == ["\n".join(output["plan"][0]["words"])]
    return output["plan"][0]


def test_on_the_server(any_server: ComfyServer) -> None:
    """By name alone; with a pipeline; again, because what is free changes; the STRING is the same JSON."""
    plan = plan_of(any_server, graph())
    assert plan["model"] == "5B" and all(plan[stage] for stage in STAGES if stage != "encode")
    if plan["sampling"]["dtype"] == "float32":
        spec = PUBLISHED["5B"]
        assert plan["sampling"]["together"] == round(forward_memory(spec, (2, 16, 13, 60, 90), 4))
    pipeline = {"class_type": "CogXLoadPipeline",
                "inputs": {"pipeline": "1.5-5B-I2V", "weight_dtype": "auto", "quantization": "none"}}
    tiny = {**graph(width=96, height=64, length=17, model=["2", 0], clip=["2", 1], vae=["2", 2]), "2": pipeline,
            "3": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}}
    for _ in range(2):
        run = any_server.run(tiny)
        plan = run.outputs["1"]["plan"][0]  # a node from the cache has no new output
        assert json.loads(run.outputs["3"]["text"][0]) == plan
        assert plan["model"] == "1.5-5B-I2V" and plan["fits"] and plan["encode"] and plan["ram"]["weights_on_disk"] == 0


@pytest.mark.parametrize("inputs, message", [
    ({"variant": "1.5-5B", "length": 57}, "57 frames: CogVideoX 1.5 needs 16N.1 .*nearest: 49 or 65"),
    ({"variant": "5B-I2V", "width": 480}, "set width 720 and height 480"),
    ({"width": 721}, "width 721: .*nearest: 720 or 736"),
    ({"weight_dtype": "fp16"}, "overflows to a black video"),
    ({"variant": "7B"}, "expected one of"),
    ({"batch_size": 0}, "expected 1 to 64"),
    ({"encode": "sound"}, "sound"),
])
def test_refused_before_the_run(server: ComfyServer, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(PromptError, match=message) as caught:
        server.queue(graph(**inputs))
    assert caught.value.details["node_errors"]


def test_refused_for_the_connected_model(server: ComfyServer) -> None:
    """17 frames are legal for 1.5, 25 are not, whatever ``variant`` says."""
    loader = {"class_type": "CogXLoadPipeline",
              "inputs": {"pipeline": "1.5-5B", "weight_dtype": "auto", "quantization": "none"}}
    with pytest.raises(PromptError, match=r"25 frames: CogVideoX 1\.5 needs 16N.1"):
        server.run({**graph(width=96, height=64, length=25, model=["2", 0]), "2": loader})


def test_quantized_networks_count_as_they_are_held() -> None:
    pipelines = [load_pipeline(str(DEMO), "auto", how) for how in ("none", "fp8_scaled")]
    plain, fp8 = (Run(model.model.spec, "auto", model, clip, vae) for model, clip, vae in pipelines)
    for of_plain, of_fp8, patcher in ((plain.model, fp8.model, pipelines[1][0]),
                                      (plain.text, fp8.text, pipelines[1][1].patcher)):
        assert of_fp8.weights == patcher.model_size() < of_plain.weights
        assert of_fp8.dtype == f"float8_e4m3fn and {of_plain.dtype}"
    quantized = sum(value.numel() for key, value in demo_tensors().items() if chosen(key))
    assert plain.model.weights - fp8.model.weights == pytest.approx(3 * quantized, rel=0.01)
    assert "float8_e4m3fn and float32" in fp8.sampling(native("5B"), 1).words()
