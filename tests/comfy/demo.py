"""How the tests run the embedded model: the same cases, noise and steps, whichever program samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from cogx.scripts.demo_model.evaluate import Case
from cogx.scripts.demo_model.train_vae import psnr
from cogx.tests.comfy.graphs import Graph
from cogx.tests.comfy_server import ComfyServer

STEPS, GUIDANCE, TEXT_TOKENS = 25, 2.0, 32  # dev.py's demo settings


def save_pictures(graph: Graph) -> Graph:
    """The same with the decoded frames saved as pictures (node 9), without the losses of a video."""
    kept = {key: node for key, node in graph.items() if node["class_type"] not in ("CreateVideo", "SaveVideo")}
    return {**kept, "9": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "demo/frame"}}}


def pictures(server: ComfyServer, run: Any, node: str = "9") -> np.ndarray:
    """Saved frames: uint8 [F, H, W, 3]."""
    from PIL import Image

    files = [server.output(run, node, index) for index in range(len(run.outputs[node]["images"]))]
    return np.stack([np.asarray(Image.open(file).convert("RGB")) for file in files])


def noise_of(seed: int, frames: int = 5) -> torch.Tensor:
    """ComfyUI's noise for the seed, in the order of diffusers' pipelines: [1, T, C, h, w]."""
    import comfy.sample

    return comfy.sample.prepare_noise(torch.zeros(1, 16, frames, 8, 12), seed).permute(0, 2, 1, 3, 4)  # bcthw->btchw


def remembered(generate: Callable[[Case], np.ndarray]) -> Callable[[Case], np.ndarray]:
    """Makes each video once."""
    made: dict[int, np.ndarray] = {}

    def once(case: Case) -> np.ndarray:
        if case.seed not in made:
            made[case.seed] = generate(case)
        return made[case.seed]

    return once


def first_frame_psnr(generate: Callable[[Case], np.ndarray], cases: Sequence[Case]) -> float:
    """Of the first frames against the images that were given: the mean over the cases, in dB."""
    return float(np.mean([psnr(generate(case)[0], case.image) for case in cases if case.image is not None]))
