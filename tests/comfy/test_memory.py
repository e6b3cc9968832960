"""The memory that this pack asks of ComfyUI against what its transformers really hold, at the published sizes in bf16.

Measured on the meta device by accounting (benchmarks/live_memory.py): activations that are alive at once. Weights and
inputs are not counted. Attention counts its output but no matrix of scores, and RoPE its output, as the fused CUDA
kernels do; workspaces inside kernels are not seen. The VAE: test_vae_memory.py.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import pytest
import torch
from cogx.benchmarks.live_memory import LiveMemory, accounting
from cogx.models.cogvideox import base_model
from cogx.models.cogvideox.base_model import CogVideoXConfig, CogVideoXModel, has_rope_kernel
from cogx.models.specs import PUBLISHED, Geometry, ModelSpec
from cogx.samplers.adapter import _attention_beside, _TwiceTheVideos

ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 0.15
TRANSFORMER_TOLERANCE = 0.05  # one copy more of the residual stream would be 1/7
DTYPE = torch.bfloat16


def meta(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def check(estimate: float, memory: LiveMemory, tolerance: float = TOLERANCE) -> None:
    ratio = estimate / memory.peak
    words = f"estimate {estimate / 2**20:.1f} MiB is {ratio:.3f} x the {memory.describe_peak()}"
    assert abs(ratio - 1) <= tolerance, words


@pytest.fixture(scope="module", params=PUBLISHED)
def model(request: pytest.FixtureRequest) -> CogVideoXModel:
    config = CogVideoXConfig(PUBLISHED[request.param])
    config.set_inference_dtype(DTYPE, None)
    return config.get_model(device="meta")


@pytest.fixture(autouse=True)
def rope_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The account takes RoPE as one operation, wherever it runs."""
    monkeypatch.setattr(base_model, "has_rope_kernel", lambda: True)


def sizes_of(spec: ModelSpec) -> list[Geometry]:
    """The native clip, a shorter or smaller one, and one that is hardly longer than its text."""
    width, height, step = spec.native_width, spec.native_height, spec.frame_step
    small = [(width, height, 3 * step + 1), (width, height, step + 1)]
    if not spec.transformer.use_learned_positional_embeddings:
        small = [(480, 320, 2 * step + 1), (96, 64, step + 1)]
    return [Geometry(spec, *size) for size in [(width, height, spec.transformer.sample_frames), *small]]


def model_input_shape(geometry: Geometry, batch: int) -> tuple[int, ...]:
    """[B, C, T, H, W] that ComfyUI plans with: padding frames included, noise channels only."""
    b, c, t, h, w = geometry.latent_shape(batch)
    return b, c, t + geometry.spec.padding_frames(t), h, w


def cuda_attention(_: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
    """What a CUDA run uses; on a CPU ComfyUI would choose a sliced attention."""
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


def forward(model: CogVideoXModel, shape: tuple[int, ...],
            attention: Callable[..., torch.Tensor] = cuda_attention) -> LiveMemory:
    spec = model.spec
    batch = shape[0]
    x = meta(batch, spec.transformer.in_channels, *shape[2:])
    context = meta(batch, spec.text_tokens, spec.transformer.text_embed_dim)
    timestep, ofs = meta(batch, dtype=torch.float32), meta(batch, dtype=torch.float32)
    options = {"optimized_attention_override": attention}
    with accounting() as memory:
        out = model.diffusion_model(x, timestep, context, ofs=ofs, transformer_options=options)
    assert out.shape == shape
    return memory


@pytest.mark.parametrize("size", range(3))
@pytest.mark.parametrize("batch", [1, 2])
def test_transformer_estimate(model: CogVideoXModel, batch: int, size: int) -> None:
    """The estimate follows the size: text tokens weigh more in a small clip."""
    shape = model_input_shape(sizes_of(model.spec)[size], batch)
    check(model.memory_required(shape), forward(model, shape), TRANSFORMER_TOLERANCE)


@pytest.mark.parametrize("expected, name, state", [
    (True, "cuda", {}), (False, "eager", {}), (False, "cuda", {"available": False}),
    (False, "cuda", {"disabled": True}), (False, "cuda", {"capabilities": ["quantize_per_tensor_fp8"]})])
def test_what_counts_as_a_kernel_for_rope(monkeypatch: pytest.MonkeyPatch, expected: bool, name: str,
                                          state: dict[str, Any]) -> None:
    """Read from ComfyUI's list of backends, of which the plain one always knows RoPE."""
    kitchen = comfy.quant_ops.ck
    eager = kitchen.list_backends()["eager"]
    assert eager["available"] and "apply_rope1" in eager["capabilities"]
    backends = {"eager": eager, name: {**eager, "disabled": False, **state}}
    monkeypatch.setattr(kitchen, "list_backends", lambda: backends)
    assert has_rope_kernel() is expected


def test_estimate_without_a_kernel_for_rope(model: CogVideoXModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """ComfyUI then turns queries and keys by plain operations, as it does in training."""
    monkeypatch.setattr(base_model, "has_rope_kernel", lambda: False)
    monkeypatch.setattr(comfy.model_management, "in_training", True)
    shape = model_input_shape(sizes_of(model.spec)[1], 2)
    check(model.memory_required(shape), forward(model, shape), TRANSFORMER_TOLERANCE)


def test_estimate_with_the_features_of_an_inverted_video(model: CogVideoXModel) -> None:
    """Each video has its reference beside it in the batch, and a row of keys and values of both."""
    shape = model_input_shape(sizes_of(model.spec)[0], 2)
    attention = partial(_attention_beside, cuda_attention)
    check(_TwiceTheVideos(model).memory_required((1, *shape[1:])), forward(model, shape, attention))


def test_the_benchmark_reports_them_on_a_cpu(tmp_path: Path) -> None:
    """benchmarks/run.py without a GPU: overhead per step at tiny size, and the same account at full size."""
    output = tmp_path / "table.md"
    command = [sys.executable, str(ROOT / "benchmarks" / "run.py"), "--cpu", "--variants", "2B", "--contenders", "cogx",
               "--rounds", "1", "--repeat", "1", "--measures", "overhead", "live-forward-1", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in output.read_text(encoding="utf-8").splitlines() if "| cogx |" in line]
    assert [row[0] for row in rows] == ["| sampling step around a network that does nothing",
                                        "| transformer forward, batch 1"]
    assert rows[0][2].endswith(" ms") and float(rows[1][2]) > 0
