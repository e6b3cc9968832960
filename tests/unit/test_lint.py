"""The linter over everything, and the type checker over the pure modules."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

TYPED = ["models.specs", "models.noise_schedule", "models.cogvideox.positions", "models.cogvideox.image_condition",
         "models.cogvideox.pixels", "model_loaders.detect", "model_loaders.files", "model_loaders.download",
         "model_loaders.published", "model_loaders.lora_keys", "model_loaders.lora_scale", "model_loaders.gguf_blocks",
         "model_loaders.gguf_files", "model_loaders.quantized_files", "model_loaders.saved_spec", "model_loaders.keys",
         "model_loaders.families", "model_loaders.latent_files", "model_loaders.recovery_settings",
         "model_loaders.memory_plan", "model_loaders.sources", "models.smaller",
         "samplers.schedules", "samplers.guidance", "samplers.inversion", "samplers.windows",
         "samplers.colour", "samplers.extend", "samplers.prompts", "samplers.plan", "nodes.validation"]


def run(cwd: Path, *command: str) -> str:
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ruff():
    pytest.importorskip("ruff", reason="pip install ruff, or run: python dev.py test")
    run(ROOT, "ruff", "check", "--no-cache", ".")


def test_mypy_on_the_pure_modules(tmp_path):
    """Under the name ``cogx``: the folder's own name may be no Python name, and the imports are relative."""
    pytest.importorskip("mypy", reason="pip install mypy, or run: python dev.py test")
    (tmp_path / "cogx").symlink_to(ROOT, target_is_directory=True)
    modules = [part for name in TYPED for part in ("-m", f"cogx.{name}")]
    output = run(tmp_path, "mypy", "--config-file", str(ROOT / "pyproject.toml"), *modules)
    assert f"{len(TYPED)} source files" in output
