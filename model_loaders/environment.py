"""What this machine and its Python bring: versions, the card, what it computes in, memory."""

from __future__ import annotations

import platform
import re
import sys
from importlib import metadata
from pathlib import Path

import comfy.model_management
import torch
from packaging.requirements import Requirement

PACK = Path(__file__).resolve().parent.parent


def package_problems(requirements: str) -> list[str]:
    """What of a requirements.txt is missing or too old."""
    problems = []
    for line in requirements.splitlines():
        text = line.split("#")[0].strip()
        if not text:
            continue
        wanted = Requirement(text)
        try:
            version = metadata.version(wanted.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{wanted.name} is missing: expected {text}")
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            problems.append(f"{wanted.name} is {version}: expected {text}")
    return problems


def _device_line() -> str:
    management = comfy.model_management
    device = management.get_torch_device()
    if management.is_device_cpu(device):
        return "device: CPU only; full-size models take hours on it"
    free, total = management.get_free_memory(device), management.get_total_memory(device)
    dtypes = ["fp32"]
    dtypes += ["fp16"] if management.should_use_fp16(device) else []
    dtypes += ["bf16"] if management.should_use_bf16(device) else []
    dtypes += ["fp8"] if management.supports_fp8_compute(device) else []
    return (f"device: {management.get_torch_device_name(device)}, computes in {', '.join(dtypes)}; "
            f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free")


def environment() -> tuple[list[str], int]:
    """Lines about this machine, and how many of them are problems."""
    from comfyui_version import __version__ as comfyui

    management, ram = comfy.model_management, torch.device("cpu")
    lines = [
        f"ComfyUI {comfyui}, Python {platform.python_version()} ({sys.executable}), {platform.system()}",
        f"torch {torch.__version__}" + (f", CUDA {torch.version.cuda}" if torch.cuda.is_available() else ""),
        _device_line(),
        f"RAM: {management.get_free_memory(ram) / 1e9:.1f} of {management.get_total_memory(ram) / 1e9:.1f} GB free",
    ]
    problems = package_problems((PACK / "requirements.txt").read_text(encoding="utf-8"))
    problems += comfyui_problems(comfyui)
    return lines + [f"problem: {problem}" for problem in problems], len(problems)


def comfyui_problems(version: str) -> list[str]:
    """Whether ComfyUI is too old, by what pyproject.toml requires."""
    found = re.search(r'^requires-comfyui = "([^"]+)"', (PACK / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    wanted = found.group(1) if found else ""
    if Requirement(f"comfyui{wanted}").specifier.contains(version, prereleases=True):
        return []
    return [f"ComfyUI is {version}: expected {wanted}"]
