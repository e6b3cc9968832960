"""Makes the embedded demo model from nothing.

    python -m scripts.demo_model.train --tokenizer COMFYUI/comfy/text_encoders/t5_tokenizer

Run it from the pack's folder, with the host's Python. Cut off, it goes on from its last checkpoint when run again.
``--stages`` chooses some of the stages; then several transformers can be trained at the same time, one process with one
thread for each core.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from . import latents, train_text, train_transformer, train_vae
from .export import export
from .networks import VARIANTS

STAGES = ("vae", "text", "latents", *VARIANTS, "export")


def run(stage: str, work: Path, tokenizer_folder: Path, output: Path) -> None:
    from transformers import T5TokenizerFast

    tokenizer = T5TokenizerFast.from_pretrained(tokenizer_folder)
    if stage == "vae":
        train_vae.train(work)
    elif stage == "text":
        train_text.train(work, tokenizer)
    elif stage == "latents":
        latents.prepare(work, train_vae.load(work))
    elif stage == "export":
        export(work, tokenizer_folder, output)
    else:
        train_transformer.train(work, stage, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m scripts.demo_model.train", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the T5 tokenizer")
    parser.add_argument("--work", type=Path, default=Path(".host/demo_model"), help="checkpoints, clips and log")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="where the pipeline folders go")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for stage in options.stages:
        run(stage, options.work, options.tokenizer, options.output)


if __name__ == "__main__":
    main()
