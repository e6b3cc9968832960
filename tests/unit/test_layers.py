"""The layer rule of the pack, on its import graph: nodes -> model_loaders, samplers -> models."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LAYERS = ("nodes", "model_loaders", "samplers", "models")
FILES = [file for layer in LAYERS for file in sorted((ROOT / layer).rglob("*.py"))]

ALLOWED = {"nodes": {"nodes", "model_loaders", "samplers", "models"}, "model_loaders": {"model_loaders", "models"},
           "samplers": {"samplers", "models"}, "models": {"models"}}

# Pure files test without ComfyUI and without a GPU.
PURE = {"models/specs.py", "models/noise_schedule.py", "models/cogvideox/positions.py",
        "models/cogvideox/image_condition.py", "models/cogvideox/pixels.py", "model_loaders/detect.py",
        "model_loaders/files.py", "model_loaders/download.py", "model_loaders/published.py",
        "model_loaders/lora_keys.py", "model_loaders/lora_scale.py", "model_loaders/gguf_blocks.py",
        "model_loaders/gguf_files.py", "model_loaders/quantized_files.py", "model_loaders/saved_spec.py",
        "model_loaders/keys.py", "model_loaders/families.py", "model_loaders/latent_files.py",
        "model_loaders/recovery_settings.py", "model_loaders/memory_plan.py", "models/smaller.py", "models/turns.py",
        "models/cogvideox/vae_plan.py", "samplers/schedules.py", "samplers/guidance.py", "samplers/reference.py",
        "samplers/inversion.py", "samplers/windows.py", "samplers/colour.py", "samplers/prompts.py",
        "samplers/plan.py", "samplers/plan_picture.py", "samplers/extend.py", "nodes/validation.py"}
HOST = ("comfy", "comfy_api", "folder_paths", "server", "latent_preview", "nodes", "execution")

# Start-up imports the nodes: nothing heavy, and no dependency whose absence would stop the pack from loading.
START_UP = {"__init__.py", *(f"nodes/{f.name}" for f in (ROOT / "nodes").glob("*.py")), "model_loaders/folders.py",
            "model_loaders/files.py", "model_loaders/lora_scale.py", "model_loaders/download.py",
            "model_loaders/published.py", "model_loaders/memory_plan.py", "models/smaller.py", "models/specs.py",
            "models/cogvideox/vae_plan.py", "samplers/schedules.py",
            "models/turns.py", "samplers/windows.py", "samplers/extend.py"}
LAZY = ("diffusers", "transformers", "huggingface_hub", "accelerate", "safetensors", "einops", "torch", "gguf")


def imports(file: Path, top_level_only: bool = False) -> list[str]:
    """Absolute dotted names that ``file`` imports; those of the pack begin with 'cogx.'."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    package = ["cogx", *file.relative_to(ROOT).parts[:-1]]
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found += [f"{module}.{alias.name}" for alias in node.names]
    return found


def name(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("file", FILES, ids=name)
def test_arrows(file):
    layer = file.relative_to(ROOT).parts[0]
    inside = {imported.split(".")[1] for imported in imports(file) if imported.startswith("cogx.")}
    assert inside <= ALLOWED[layer], f"{name(file)} may import {ALLOWED[layer]} only"


@pytest.mark.parametrize("file", sorted(PURE))
def test_pure_files_know_no_comfyui(file):
    host = [imported for imported in imports(ROOT / file) if imported.split(".")[0] in HOST]
    assert not host


def test_samplers_meet_comfyui_in_three_files_only():
    attach = ("adapter.py", "extend_video.py", "long_video.py")
    others = [file for file in FILES if name(file).startswith("samplers/") and file.name not in attach]
    assert not [name(file) for file in others for imported in imports(file) if imported.split(".")[0] in HOST]


@pytest.mark.parametrize("file", sorted(START_UP))
def test_start_up_imports_nothing_heavy(file):
    if not (ROOT / file).exists():
        pytest.fail(f"{file} is gone; correct START_UP")
    heavy = [imported for imported in imports(ROOT / file, top_level_only=True) if imported.split(".")[0] in LAZY]
    assert not heavy


@pytest.mark.parametrize("file", FILES, ids=name)
def test_no_print_and_no_absolute_imports_of_the_pack(file):
    tree = ast.parse(file.read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert not [call.lineno for call in calls if call.func.id == "print"]
    assert not [imported for imported in imports(file) if imported.split(".")[0] in LAYERS]
