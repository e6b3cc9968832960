"""DDIM inversion on a real server: the shipped workflow, core's nodes around it, progress, interrupts, bad input."""

from __future__ import annotations

import json
from typing import Any

import av
import numpy as np
import pytest
import torch
from cogx.tests.comfy.graphs import API, Graph, text_to_video
from cogx.tests.comfy_server import PromptError

FRAMES, WIDTH, HEIGHT = 17, 96, 64


@pytest.fixture(params=["newest", "oldest"])
def any_server(request):
    return request.getfixturevalue("server" if request.param == "newest" else "oldest_server")


def put_video(server) -> str:
    """A video in the server's input folder: a bright bar that moves to the right."""
    path = server.base / "input" / "bar.mp4"
    path.parent.mkdir(exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for i in range(FRAMES):
            frame = np.full((HEIGHT, WIDTH, 3), 40, dtype=np.uint8)
            frame[:, 4 * i:4 * i + 16] = 220
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path.name


def inversion(server, pipeline: str = "5B", steps: int = 4, **inputs: Any) -> Graph:
    """The shipped workflow on a tiny pipeline and a tiny video, encoded by core's VAE Encode."""
    graph = json.loads((API / "inversion.json").read_text(encoding="utf-8"))
    graph["1"]["inputs"]["pipeline"] = pipeline
    graph["4"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["11", 0], "vae": ["1", 2]}}
    graph["10"]["inputs"]["file"] = put_video(server)
    graph["12"]["inputs"].update(steps=steps, **inputs)
    graph["15"]["inputs"]["steps"] = steps
    return graph


def latents(graph: Graph) -> Graph:
    """The same up to the sampled latent, which node 9 saves; node 16 saves the encoded video."""
    kept = {key: node for key, node in graph.items() if key not in ("6", "7", "8")}
    for node, source in (("9", "5"), ("16", "4")):
        save = {"samples": [source, 0], "filename_prefix": f"latents/inversion{node}"}
        kept[node] = {"class_type": "SaveLatent", "inputs": save}
    return kept


def through(graph: Graph, class_type: str, after: bool, **inputs: Any) -> Graph:
    """A core node on the MODEL, before or after the inversion."""
    graph["20"] = {"class_type": class_type, "inputs": {"model": ["12", 0] if after else ["1", 0], **inputs}}
    graph["13" if after else "12"]["inputs"]["model"] = ["20", 0]
    return graph


@pytest.mark.parametrize("variant", ["5B", "1.5-5B"])
def test_workflow_makes_a_video(any_server, video_of, variant):
    video = video_of(any_server, any_server.run(inversion(any_server, variant, steps=2)))
    assert video["frames"] == FRAMES and video["size"] == (WIDTH, HEIGHT) and "mp4" in video["format"]


@pytest.mark.parametrize("variant", ["2B", "5B", "1.5-5B"])
def test_the_video_comes_back(server, saved_latent, error, variant):
    """The same prompt, no guidance: closer with more steps."""
    errors = []
    for steps in (5, 50):
        graph = inversion(server, variant, steps, features=False)
        graph["13"]["inputs"].update(positive=["3", 0], cfg=1.0)
        run = server.run(latents(graph))
        errors.append(error(saved_latent(server, run), saved_latent(server, run, "16")))
    assert errors[1] < 0.15 and errors[1] < errors[0] / 3, errors


CASES = {
    "EasyCache": {"reuse_threshold": 2.0, "start_percent": 0.15, "end_percent": 0.95, "verbose": False},
    "NAGuidance": {"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 1.5},
    "CogXDynamicGuidance": {"steps": 12},
}


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("node", list(CASES))
def test_other_patches(server, saved_latent, error, node, after):
    plain = saved_latent(server, server.run(latents(inversion(server, steps=12))))
    graph = through(inversion(server, steps=12), node, after, **CASES[node])
    patched = saved_latent(server, server.run(latents(graph)))
    assert torch.isfinite(patched).all() and error(patched, plain) > 1e-6, "the node did nothing"
    assert error(patched, plain) < 2


def test_progress_and_interrupt(any_server):
    """Each inversion step is reported with a preview, an interrupt ends it, and the server goes on."""
    run = any_server.watch(latents(inversion(any_server, steps=3)), preview="latent2rgb")
    states = [event["data"]["nodes"] for event in run.events if event["type"] == "progress_state"]
    steps = {(node["value"], node["max"]) for nodes in states for key, node in nodes.items() if key == "12"}
    assert {(1, 3), (2, 3), (3, 3)} <= steps and len(run.previews) >= 6

    seen: list[int] = []

    def on_event(event: dict[str, Any]) -> None:
        if event["type"] == "progress_state" and "12" in event["data"]["nodes"]:
            value = event["data"]["nodes"]["12"]["value"]
            if value >= 2 and not seen:
                any_server.post("/interrupt", {"prompt_id": event["data"]["prompt_id"]})
            if value >= 2:
                seen.append(value)

    with pytest.raises(PromptError, match="interrupted"):
        any_server.watch(latents(inversion(any_server, steps=500)), on_event)
    assert max(seen) < 100
    any_server.run(latents(inversion(any_server, steps=1)))


def failed(server, graph: Graph, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        server.run(graph)
    assert server.alive()


def test_bad_input(server):
    graph = latents(inversion(server, steps=1))
    empty = text_to_video("5B")["4"]
    failed(server, {**graph, "4": empty}, r"latent_image is empty \(all zeros\): expected an encoded video")

    graph["5"]["inputs"]["latent_image"] = ["17", 0]
    other = {"class_type": "CogXEmptyLatent", "inputs": {"width": 96, "height": 64, "length": 9, "batch_size": 1}}
    failed(server, {**graph, "17": other}, r"inverted video has the shape \[1, 16, 5, 8, 12\] .*\[1, 16, 3, 8, 12\]")

    graph = latents(inversion(server, "1.5-5B", steps=1))
    graph["17"] = {"class_type": "CogXLoadModel", "inputs": {
        "checkpoint": "5B/transformer", "weight_dtype": "auto", "quantization": "none"}}
    graph["13"]["inputs"]["model"] = ["17", 0]
    failed(server, graph, r"The noise has 6 frames, the latent 5: expected the same\. .*connect the model that")
