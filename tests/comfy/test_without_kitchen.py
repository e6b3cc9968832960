"""With a comfy-kitchen that is too old for it, ComfyUI starts; 0.24 does without any. Then unquantized models load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cogx.model_loaders import load
from cogx.tests import quantized_writers as writers
from cogx.tests.comfy.quantized import TRANSFORMER, chosen, demo_tensors, forward

CONFTEST = Path(__file__).resolve().parent.parent / "conftest.py"
SCRIPT = """
import importlib.util, sys, types
sys.modules["comfy_kitchen"] = None if sys.argv[3] == "none" else types.ModuleType("comfy_kitchen")
found = importlib.util.spec_from_file_location("conftest", sys.argv[1])
found.loader.exec_module(importlib.util.module_from_spec(found))
import torch
from cogx.model_loaders import load
from cogx.models.specs import SpecError
from cogx.nodes.load import LoadModel
from cogx.tests.comfy.quantized import DEMO, TRANSFORMER, forward
assert "comfy_kitchen.tensor" not in sys.modules
with torch.inference_mode():
    torch.save(forward(load.load_pipeline(str(DEMO))[0]).clone(), sys.argv[2] + "/out.pt")
for what in (lambda: load.load_model(str(TRANSFORMER), "auto", "fp8_scaled"),
             lambda: load.load_text_encoder(str(DEMO / "text_encoder"), "auto", "int8"),
             *(lambda name=name: load.load_model(f"{sys.argv[2]}/{name}") for name in ("x.gguf", "x.safetensors"))):
    try:
        what()
    except SpecError as error:
        assert "expected the Python package comfy-kitchen that" in str(error), error
        assert "pip install -r requirements.txt in ComfyUI's folder" in str(error), error
    else:
        raise AssertionError("it loaded")
assert "comfy-kitchen" in LoadModel.validate_inputs(quantization="int8", checkpoint="CogX-Demo/transformer")
"""


@pytest.mark.parametrize("tree, which", [("COGX_COMFYUI", "old"), ("COGX_COMFYUI_OLDEST", "none")])
def test_unquantized_models_load(tmp_path, error, tree, which):
    writers.write_gguf(tmp_path / "x.gguf", demo_tensors(), chosen)
    writers.scaled_fp8(tmp_path / "x.safetensors", demo_tensors(), chosen)
    child = subprocess.run([sys.executable, "-c", SCRIPT, str(CONFTEST), str(tmp_path), which], text=True,
                           env={**os.environ, "COGX_COMFYUI": os.environ[tree]}, capture_output=True, timeout=300)
    assert child.returncode == 0, child.stderr[-2000:]
    with torch.inference_mode():
        expected = forward(load.load_model(str(TRANSFORMER)))
    assert error(torch.load(tmp_path / "out.pt"), expected) <= 1e-5
