"""ComfyUI's own ways to run a MODEL on a GPU, each through a real server: the dynamic memory manager with a LoRA,
--novram, and TorchCompileModel. Each must give the latents of the plain run (whole model in GPU memory).

Tolerances, relative L2 after four steps: 1e-3 in fp32 (other kernels, other order of sums), 5e-2 in bf16.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cogx.tests.comfy.graphs import latent_only, patched_model, text_to_video
from cogx.tests.comfy_server import ComfyServer
from cogx.tests.gpu.references import relative_error
from safetensors.torch import load_file, save_file

TOLERANCES = {"fp32": 1e-3, "bf16": 5e-2}
VARIANT = "5B"
LORA = "tiny.safetensors"
DYNAMIC = "DynamicVRAM support detected and enabled"
SERVER_PACKAGES = ("aiohttp", "comfyui_frontend_package", "sqlalchemy", "alembic", "av")


@pytest.fixture(scope="module", autouse=True)
def server_can_start(comfyui_tree: Path) -> None:
    missing = [name for name in SERVER_PACKAGES if importlib.util.find_spec(name) is None]
    if missing or not (comfyui_tree / "main.py").is_file():
        pytest.skip(f"no whole ComfyUI here: {'lacks ' + ', '.join(missing) if missing else 'main.py is not there'}")


Start = Callable[..., Any]


@pytest.fixture(scope="module")
def start(comfyui_tree: Path, tiny_pipelines: Path, tmp_path_factory: pytest.TempPathFactory, rehearsal: bool) -> Start:
    """A context manager that starts a server with the given arguments, the tiny pipelines and a LoRA."""

    @contextmanager
    def run(*arguments: str) -> Iterator[ComfyServer]:
        base = tmp_path_factory.mktemp("gpu")
        (base / "models" / "loras").mkdir(parents=True)
        (base / "models" / "diffusers").symlink_to(tiny_pipelines, target_is_directory=True)
        write_lora(base / "models" / "loras" / LORA, tiny_pipelines / VARIANT)
        server = ComfyServer(comfyui_tree, base, *(("--cpu",) if rehearsal else arguments)).start()
        try:
            yield server
        finally:
            server.stop()

    return run


def write_lora(file: Path, pipeline: Path) -> None:
    """A LoRA of rank 4 with generic keys on the queries and the MLP of the first block."""
    weights = load_file(next((pipeline / "transformer").glob("*.safetensors")))
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0.ff.net.0.proj"):
        rows, columns = weights[f"{layer}.weight"].shape
        tensors[f"diffusion_model.{layer}.lora_up.weight"] = torch.randn(rows, 4, generator=generator)
        tensors[f"diffusion_model.{layer}.lora_down.weight"] = torch.randn(4, columns, generator=generator) * 0.2
    save_file(tensors, file)


def graph(dtype: str, node: str = "", **inputs: Any) -> dict[str, Any]:
    """Four steps of cogvideox_ddim to a saved latent, with a core node on the MODEL if one is named."""
    made = latent_only(text_to_video(VARIANT, steps=4, seed=7, sampler="cogvideox_ddim", dynamic_cfg=False))
    made["1"]["inputs"]["weight_dtype"] = dtype
    return patched_model(made, node, **inputs) if node else made


def lora_graph(dtype: str) -> dict[str, Any]:
    return graph(dtype, "LoraLoaderModelOnly", lora_name=LORA, strength_model=1.0)


def latents(server: ComfyServer, prompt: dict[str, Any]) -> torch.Tensor:
    found = load_file(server.output(server.run(prompt), "9"))["latent_tensor"]
    assert torch.isfinite(found).all()
    return found


Plain = dict[tuple[str, bool], torch.Tensor]


@pytest.fixture(scope="module")
def plain(start: Start) -> Plain:
    """(dtype, with the LoRA) -> latents with the whole model in GPU memory."""
    with start("--disable-dynamic-vram", "--highvram") as server:
        return {(dtype, lora): latents(server, lora_graph(dtype) if lora else graph(dtype))
                for dtype in TOLERANCES for lora in (False, True)}


@pytest.fixture(scope="module")
def dynamic(start: Start, rehearsal: bool) -> Iterator[ComfyServer]:
    with start() as server:
        if DYNAMIC not in server.log and not rehearsal:
            pytest.skip("ComfyUI did not turn its dynamic memory manager on here; see its log for the reason")
        yield server


def test_the_lora_changes_the_latents(plain: Plain) -> None:
    """Else the comparisons below say nothing about it."""
    assert relative_error(plain["fp32", True], plain["fp32", False]) > 1e-2


@pytest.mark.parametrize("lora", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_dynamic_memory_manager(dynamic: ComfyServer, plain: Plain, dtype: str, lora: bool) -> None:
    found = latents(dynamic, lora_graph(dtype) if lora else graph(dtype))
    assert relative_error(found, plain[dtype, lora]) <= TOLERANCES[dtype]


def test_a_lora_is_taken_off_again(dynamic: ComfyServer, plain: Plain) -> None:
    """With, then without, on one loaded model."""
    latents(dynamic, lora_graph("fp32"))
    prompt = graph("fp32")
    prompt["5"]["inputs"]["seed"] = 8  # another seed first: ComfyUI must not answer from its cache
    latents(dynamic, prompt)
    assert relative_error(latents(dynamic, graph("fp32")), plain["fp32", False]) <= TOLERANCES["fp32"]


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_torch_compile(dynamic: ComfyServer, plain: Plain, dtype: str) -> None:
    found = latents(dynamic, graph(dtype, "TorchCompileModel", backend="inductor"))
    assert relative_error(found, plain[dtype, False]) <= TOLERANCES[dtype]


def test_novram(start: Start, plain: Plain) -> None:
    with start("--novram") as server:
        for (dtype, lora), expected in plain.items():
            found = latents(server, lora_graph(dtype) if lora else graph(dtype))
            assert relative_error(found, expected) <= TOLERANCES[dtype], (dtype, lora)
