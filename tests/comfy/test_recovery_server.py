"""A render that is never lost, on real servers: killed, interrupted, failed in decode, and brought back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cogx.model_loaders.latent_files import list_files, read_latent, read_run
from cogx.tests.comfy.graphs import Graph, latent_only, text_to_video, with_core_ksampler
from cogx.tests.comfy_server import ComfyServer, PromptError, Run
from PIL import Image
from safetensors.torch import save_file


@pytest.fixture(params=["newest", "oldest"])
def any_server(request: pytest.FixtureRequest) -> Iterator[ComfyServer]:
    """With every run saved, and nothing saved yet; afterwards as it was."""
    server = request.getfixturevalue("server" if request.param == "newest" else "oldest_server")
    shutil.rmtree(folder_of(server), ignore_errors=True)
    server.post("/settings", {"CogX.Recovery.MinimumSeconds": 0})
    yield server
    server.post("/settings", {"CogX.Recovery.MinimumSeconds": 60})
    shutil.rmtree(folder_of(server), ignore_errors=True)


newest_only = pytest.mark.parametrize("any_server", ["newest"], indirect=True)


def folder_of(server: ComfyServer) -> Path:
    return server.base / "output" / "cogx_recovery"


def new_seed(counter: list[int] = [10_000]) -> int:  # noqa: B006 - nothing may come from the server's cache
    counter[0] += 1
    return counter[0]


def render(variant: str = "5B", **sampler: Any) -> Graph:
    return text_to_video(variant, seed=new_seed(), **{"steps": 2, **sampler})


def frames(graph: Graph) -> Graph:
    """The same up to the decoded frames, as PNG files."""
    kept = {key: node for key, node in graph.items() if node["class_type"] not in ("CreateVideo", "SaveVideo")}
    return {**kept, "7": {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": "frames"}}}


def loaded(graph: Graph, name: str = "newest") -> Graph:
    """The graph with a saved latent in the place of its sampling (node 5)."""
    used = {"1", "5", "6", "7", "8", "9"}
    kept = {key: node for key, node in graph.items() if key in used}
    return {**kept, "5": {"class_type": "CogXLoadLatent", "inputs": {"file": name}}}


def pixels(server: ComfyServer, run: Run) -> list[bytes]:
    return [Image.open(server.output(run, "7", index)).tobytes() for index in range(len(run.outputs["7"]["images"]))]


@pytest.mark.parametrize("variant, core", [("1.5-5B", False), ("5B", True)])
def test_saved_and_loaded_to_the_bit(any_server, saved_latent, variant, core):
    """After CogXSampler and core's KSampler; by CogXLoadLatent and core's LoadLatent."""
    graph = latent_only(render(variant))
    if core:
        graph = with_core_ksampler(graph, "euler", "simple", steps=2)
    sampled = saved_latent(any_server, any_server.run(graph))
    file, = list_files(folder_of(any_server))
    latent, description = read_latent(file)
    assert torch.equal(latent, sampled) and description.model == variant
    run = any_server.run(loaded(graph, file.name))
    assert torch.equal(saved_latent(any_server, run), sampled)
    assert run.outputs["5"]["text"] == [f"{file.name}: {description.describe()}"]
    cores = {"class_type": "LoadLatent", "inputs": {"latent": f"cogx_recovery/{file.name} [output]"}}
    assert torch.equal(saved_latent(any_server, any_server.run({**loaded(graph), "5": cores})), sampled)
    assert file.name in any_server.get("/object_info/CogXLoadLatent")["CogXLoadLatent"]["input"]["required"]["file"][1][
        "options"]


@newest_only
def test_newest_follows_the_folder(any_server, saved_latent):
    """It is run again when it means another file; a name from after the start is taken; a copy has any name."""
    first, second = (latent_only(render()) for _ in range(2))
    sampled = [saved_latent(any_server, any_server.run(first))]
    assert torch.equal(saved_latent(any_server, any_server.run(loaded(first))), sampled[0])
    sampled.append(saved_latent(any_server, any_server.run(second)))
    assert torch.equal(saved_latent(any_server, any_server.run(loaded(first))), sampled[1])
    older = list_files(folder_of(any_server))[1]
    older.rename(older.with_name("the good one.safetensors"))
    assert torch.equal(saved_latent(any_server, any_server.run(loaded(first, "the good one.safetensors"))), sampled[0])


def test_an_interrupted_run_leaves_a_video(any_server):
    def stop(event: dict[str, Any]) -> None:
        nodes = event["data"].get("nodes", {}) if event["type"] == "progress_state" else {}
        if nodes.get("5", {}).get("value", 0) >= 2:
            any_server.post("/interrupt", {"prompt_id": event["data"]["prompt_id"]})

    graph = frames(render(steps=500))
    with pytest.raises(PromptError, match="interrupted"):
        any_server.watch(graph, stop)
    file, = list_files(folder_of(any_server))
    step = read_run(file).step
    assert 2 <= step < 100 and file.stem.endswith(f"_step{step}")
    run = any_server.run(loaded(graph))
    assert len(run.outputs["7"]["images"]) == 17
    assert run.outputs["5"]["text"][0].endswith(f"not complete: stopped at step {step} of 500")


def test_a_failed_decode_names_the_file(any_server):
    """A linked input passes validation; the error comes while running."""
    graph = render()
    graph["20"] = {"class_type": "PrimitiveInt", "inputs": {"value": 300}}
    graph["6"]["inputs"].update(tiling="on", tile_overlap=["20", 0])
    with pytest.raises(PromptError) as caught:
        any_server.run(graph)
    file, = list_files(folder_of(any_server))
    details = caught.value.details
    assert f"The sampled latent is saved in {file}. 'CogVideoX Load Latent' brings it back." in str(caught.value)
    assert details["exception_type"].endswith(".SpecError") and details["node_id"] == "6"


@newest_only
def test_bad_files_are_refused_before_the_run(any_server):
    folder = folder_of(any_server)
    graph = latent_only(render())

    def refused(name: Any, message: str) -> None:
        with pytest.raises(PromptError, match=message) as caught:
            any_server.queue(loaded(graph, name))
        assert caught.value.details["node_errors"] and any_server.alive()

    refused("newest", r"'newest' not found: expected a file in .*cogx_recovery; found \[\]\. Runs over 0 seconds are")
    any_server.run(graph)
    file, = list_files(folder)
    for name in ("no_such.safetensors", "../cogx_recovery/" + file.name, str(file), 5, {"a": 1}, "x" * 5000):
        refused(name, rf"not found: expected a file in .*found \['{file.name}'\]")
    file.write_bytes(file.read_bytes()[:-9])
    refused(file.name, "is no whole latent file: it is truncated, damaged")
    save_file({"weight": torch.zeros(1)}, file)
    refused("newest", "expected a latent that CogX saved, got another safetensors file")


class Killed(Exception):
    pass


def test_a_server_that_is_killed_while_decoding_loses_nothing(comfyui_tree, tiny_pipelines, tmp_path, server):
    """The next one makes the very frames that another server makes without being killed."""
    diffusers = tmp_path / "models" / "diffusers"
    diffusers.parent.mkdir(parents=True)
    diffusers.symlink_to(tiny_pipelines, target_is_directory=True)
    victim = ComfyServer(comfyui_tree, tmp_path, *server.arguments).start()
    victim.post("/settings", {"CogX.Recovery.MinimumSeconds": 0})
    graph = frames(render("1.5-5B", sampler="cogvideox_dpm"))

    def kill(event: dict[str, Any]) -> None:
        if event["type"] == "executing" and event["data"]["node"] == "6":
            victim.kill()
            raise Killed

    try:
        with pytest.raises(Killed):
            victim.watch(graph, kill)
        assert not list((tmp_path / "output").glob("frames*"))
        victim.start()
        recovered = pixels(victim, victim.run(loaded(graph)))
    finally:
        victim.stop()
    assert len(recovered) == 17 and recovered == pixels(server, server.run(graph))
