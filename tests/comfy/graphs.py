"""API-format graphs for the tests, from the shipped workflows and from core's nodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

API = Path(__file__).resolve().parents[2] / "workflows" / "api"
PROMPT = "A red circle glides from left to right."

Graph = dict[str, Any]


def text_to_video(pipeline: str, **sampler: Any) -> Graph:
    """The shipped workflow on a tiny pipeline: 96x64 pixels, 17 frames. Keyword arguments set the sampler's inputs."""
    name = "text_to_video_1.5" if pipeline.startswith("1.5") else "text_to_video"
    graph = json.loads((API / f"{name}.json").read_text(encoding="utf-8"))
    graph["1"]["inputs"]["pipeline"] = pipeline
    graph["2"]["inputs"]["text"] = PROMPT
    graph["4"]["inputs"].update(width=96, height=64, length=17)
    graph["5"]["inputs"].update({"steps": 10, **sampler})
    return graph


def image_to_video(pipeline: str, start: str | None = "cogx_start.jpg", end: str | None = None, **inputs: Any) -> Graph:
    """The shipped workflow on a tiny pipeline: 96x64 pixels, 17 frames, cogvideox_ddim, 10 steps; ``start`` and
    ``end`` are files in the server's input folder. Keyword arguments set the inputs of CogXImageToVideo."""
    graph = _tiny("image_to_video_1.5" if "1.5" in pipeline else "image_to_video", pipeline)
    for name, node, file in (("start_image", "10", start), ("end_image", "11", end)):
        graph["4"]["inputs"].pop(name, None)
        if file is not None:
            graph["4"]["inputs"][name] = [node, 0]
            graph[node] = {"class_type": "LoadImage", "inputs": {"image": file}}
        else:
            graph.pop(node, None)
    graph["4"]["inputs"].update(inputs)
    return graph


def video_to_video(pipeline: str, denoise: float, **inputs: Any) -> Graph:
    """The shipped workflow, likewise. Keyword arguments set the inputs of CogXVideoToVideo."""
    graph = _tiny("video_to_video", pipeline)
    graph["4"]["inputs"].update(inputs)
    graph["5"]["inputs"]["denoise"] = denoise
    return graph


def _tiny(name: str, pipeline: str) -> Graph:
    graph = json.loads((API / f"{name}.json").read_text(encoding="utf-8"))
    graph["1"]["inputs"]["pipeline"] = pipeline
    graph["2"]["inputs"]["text"] = PROMPT
    graph["4"]["inputs"].update(width=96, height=64, length=17)
    graph["5"]["inputs"].update(steps=10, sampler="cogvideox_ddim", dynamic_cfg=False)
    return graph


def latent_only(graph: Graph) -> Graph:
    """The same up to the sampled latent (node 5), saved as a file (node 9)."""
    after = ("CogXDecode", "CreateVideo", "SaveVideo")
    kept = {key: node for key, node in graph.items() if node["class_type"] not in after}
    save = {"samples": ["5", 0], "filename_prefix": "latents/test"}
    return {**kept, "9": {"class_type": "SaveLatent", "inputs": save}}


def with_core_ksampler(graph: Graph, sampler: str, scheduler: str, steps: int = 4, denoise: float = 1.0) -> Graph:
    """Core's KSampler in place of ours."""
    old = graph["5"]["inputs"]
    inputs = {key: old[key] for key in ("model", "positive", "negative", "latent_image", "seed", "cfg")}
    inputs.update(steps=steps, sampler_name=sampler, scheduler=scheduler, denoise=denoise)
    return {**graph, "5": {"class_type": "KSampler", "inputs": inputs}}


def patched_model(graph: Graph, class_type: str, **inputs: Any) -> Graph:
    """A core node between the loader and everything that takes its MODEL."""
    graph = json.loads(json.dumps(graph))
    for node in graph.values():
        for key, value in node["inputs"].items():
            if value == ["1", 0]:
                node["inputs"][key] = ["20", 0]
    graph["20"] = {"class_type": class_type, "inputs": {"model": ["1", 0], **inputs}}
    return graph
