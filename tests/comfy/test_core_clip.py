"""A CLIP that core's Load CLIP made gives the embedding of our own, on the newest and the oldest ComfyUI.

Core recognises T5-XXL by its 24 layers and its inner width; the model here has both, and is tiny otherwise, which core
is told through its own ``model_options``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"d_model": 8, "d_kv": 4, "num_heads": 2, "d_ff": 10240, "num_layers": 24, "vocab_size": 32128}

SCRIPT = """
import json, sys
sys.path.insert(0, {tests!r})
import conftest, torch
import comfy.sd, comfy.utils
from cogx.model_loaders.load import load_text_encoder
from cogx.model_loaders.text_encoder import encode
from cogx.models.specs import SpecError

path, config, answer = {path!r}, {config!r}, {{}}
ours = load_text_encoder(path, "fp32")
with torch.inference_mode():
    asked = [("A red circle (softly:1.4) glides.", None), ("many words " * 200, 224)]
    wanted = [encode(ours, prompt, "encode", tokens) for prompt, tokens in asked]
    for kind in ("COGVIDEOX", "SD3", "PIXART", "MOCHI"):
        clip = comfy.sd.load_text_encoder_state_dicts(
            [comfy.utils.load_torch_file(path)], clip_type=getattr(comfy.sd.CLIPType, kind),
            model_options={{"t5xxl_model_config": config, "dtype": torch.float32}})
        try:
            answer[kind] = []
            for (prompt, tokens), (want, count) in zip(asked, wanted):
                got, same = encode(clip, prompt, "encode", tokens)
                assert got[0][0].shape == (1, tokens or 226, config["d_model"]) and count == same
                answer[kind].append(float((got[0][0] - want[0][0]).norm() / want[0][0].norm()))
        except SpecError as error:
            answer[kind] = str(error)
print("ANSWER" + json.dumps(answer))
"""


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    from cogx.scripts.tiny_pipeline import randomize
    from safetensors.torch import save_file
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    model = randomize(T5EncoderModel(T5Config(**CONFIG, feed_forward_proj="gated-gelu", tie_word_embeddings=False)), 0)
    path = tmp_path_factory.mktemp("t5") / "any.safetensors"
    save_file({key: value for key, value in model.state_dict().items() if key != "encoder.embed_tokens.weight"}, path)
    return path


@pytest.mark.parametrize("tree", ["COGX_COMFYUI", "COGX_COMFYUI_OLDEST"])
def test_core_clip_gives_the_same_embedding(encoder, tree):
    assert os.environ.get(tree), f"set {tree}, or run: python dev.py test"
    script = SCRIPT.format(tests=str(ROOT / "tests"), path=str(encoder), config=CONFIG)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "COGX_COMFYUI": os.environ[tree]})
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.rsplit("ANSWER", 1)[1])
    for kind in ("COGVIDEOX", "SD3", "PIXART"):
        assert max(answer[kind]) <= 1e-6, (kind, answer[kind])
    assert "it masks the padding, which CogVideoX attends to. Expected T5-XXL alone" in answer["MOCHI"]
