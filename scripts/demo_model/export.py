"""Writes the trained networks as pipeline folders in the layout of the published ones, in fp16."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from . import train_text, train_transformer, train_vae
from .networks import VARIANTS, make_scheduler

MAIN = "CogX-Demo"  # complete; the others are transformers and model_index.json, see scripts/demo_pipeline.py
OTHERS = {"5B-I2V": "CogX-Demo-I2V", "1.5-5B-I2V": "CogX-Demo-1.5-I2V"}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "spiece.model")


def save(network: Any, folder: Path) -> None:
    """As save_pretrained does it; contiguous, because safetensors refuses views."""
    for parameter in network.parameters():
        parameter.data = parameter.data.contiguous()
    network.to(torch.float16).save_pretrained(folder)


def model_index(pipeline: str) -> dict[str, Any]:
    from diffusers import __version__

    parts = {"scheduler": ["diffusers", "CogVideoXDDIMScheduler"],
             "text_encoder": ["transformers", "T5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"],
             "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
             "vae": ["diffusers", "AutoencoderKLCogVideoX"]}
    return {"_class_name": pipeline, "_diffusers_version": __version__, **parts}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def export(work: Path, tokenizer: Path, output: Path) -> None:
    """Writes ``output/CogX-Demo`` and, for each other variant, a folder with what differs.

    Raises:
        RuntimeError: a training is not done; nothing is written then.
    """
    transformers = {name: train_transformer.load(work, name) for name in VARIANTS}
    main = output / MAIN
    for folder in (main, *(output / name for name in OTHERS.values())):
        shutil.rmtree(folder, ignore_errors=True)
    save(transformers["5B"], main / "transformer")
    save(train_vae.load(work), main / "vae")
    save(train_text.load(work), main / "text_encoder")
    make_scheduler().save_pretrained(main / "scheduler")
    (main / "tokenizer").mkdir()
    for name in TOKENIZER_FILES:
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, main / "tokenizer" / name)
    write_json(main / "model_index.json", model_index("CogVideoXPipeline"))
    for variant, name in OTHERS.items():
        save(transformers[variant], output / name / "transformer")
        write_json(output / name / "model_index.json", model_index("CogVideoXImageToVideoPipeline"))
        if VARIANTS[variant].is_1_5:  # as in the published folder; it makes diffusers scale the image otherwise
            config = json.loads((main / "vae" / "config.json").read_text(encoding="utf-8"))
            write_json(output / name / "vae" / "config.json", {**config, "invert_scale_latents": True})
