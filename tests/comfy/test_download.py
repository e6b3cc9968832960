"""CogXDownload on a real server, against a small hub on this machine that publishes tiny pipelines."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cogx.model_loaders import folders
from cogx.model_loaders.download import RECORD, UNFINISHED
from cogx.model_loaders.published import REPOSITORIES
from cogx.models.specs import SpecError
from cogx.tests.comfy.graphs import Graph, text_to_video
from cogx.tests.comfy_server import ComfyServer, PromptError
from cogx.tests.hub import Hub

VARIANTS = {"CogVideoX-5b": "5B", "CogVideoX-5b-I2V": "5B-I2V", "CogVideoX-2b": "2B"}


@pytest.fixture(scope="module")
def hub(tiny_pipelines: Path) -> Iterator[Hub]:
    published = {REPOSITORIES[name].repo: (REPOSITORIES[name].revision, tiny_pipelines / variant)
                 for name, variant in VARIANTS.items()}
    with Hub(published) as running:
        yield running


@pytest.fixture(scope="module")
def empty_server(comfyui_tree: Path, hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A ComfyUI without models whose hub is ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.url)
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        running = ComfyServer(comfyui_tree, tmp_path_factory.mktemp("empty"), "--cpu").start()
    yield running
    running.stop()


def graph(repository: str, part: str = "all", download: bool = True) -> Graph:
    return {"1": {"class_type": "CogXDownload",
                  "inputs": {"repository": repository, "part": part, "download": download}}}


def choices(server: ComfyServer, node: str, name: str) -> list[str]:
    info = server.get(f"/object_info/{node}")[node]["input"]["required"][name]
    return info[1]["options"] if info[0] == "COMBO" else info[0]


def text_of(server: ComfyServer, prompt: Graph) -> str:
    return server.run(prompt).outputs["1"]["text"][0]


def test_nothing_is_downloaded_unless_it_is_asked_for(empty_server, hub):
    text = text_of(empty_server, graph("CogVideoX-5b", download=False))
    assert "about 21.5 GB" in text and "CogVideoX licence" in text and str(empty_server.base / "models") in text
    assert text.endswith("Nothing was downloaded: switch download on and queue again.")
    assert not hub.requests and not list((empty_server.base / "models").rglob("*.safetensors"))


def test_download_shows_progress_and_the_pipeline_runs(empty_server, hub, video_of):
    run = empty_server.watch(graph("CogVideoX-5b"))
    states = [event["data"]["nodes"]["1"] for event in run.events
              if event["type"] == "progress_state" and "1" in event["data"]["nodes"]]
    assert len({state["value"] for state in states}) >= 3 and max(state["max"] for state in states) > 4e6  # bytes
    assert any(b"GB: " in preview for preview in run.previews), "the file at work is shown on the node"
    assert "is complete (all)" in run.outputs["1"]["text"][0]
    assert "CogVideoX-5b" in choices(empty_server, "CogXLoadPipeline", "pipeline")
    assert video_of(empty_server, empty_server.run(text_to_video("CogVideoX-5b", steps=1)))["frames"] == 17
    asked = len(hub.requests)
    assert "is complete (all)" in text_of(empty_server, graph("CogVideoX-5b")) and len(hub.requests) == asked


def test_a_single_part_is_listed_as_such(empty_server):
    empty_server.run(graph("CogVideoX-5b-I2V", "transformer"))
    assert "CogVideoX-5b-I2V/transformer" in choices(empty_server, "CogXLoadModel", "checkpoint")
    assert "CogVideoX-5b-I2V" not in choices(empty_server, "CogXLoadPipeline", "pipeline")
    assert not any("I2V" in name for name in choices(empty_server, "CogXLoadVAE", "vae"))
    load = {"class_type": "CogXLoadModel", "inputs": {
        "checkpoint": "CogVideoX-5b-I2V/transformer", "weight_dtype": "auto", "quantization": "none"}}
    size = {"class_type": "CogXImageSize", "inputs": {"image": ["3", 0], "model": ["1", 0]}}
    image = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 1, "color": 0}}
    empty_server.run({"1": load, "2": size, "3": image, "4": {
        "class_type": "PreviewAny", "inputs": {"source": ["2", 0]}}})


def test_interrupt_stops_it_and_it_goes_on(empty_server, hub):
    hub.pause = 0.05

    def on_event(event: dict[str, Any]) -> None:
        if event["type"] == "progress_state" and event["data"]["nodes"].get("1", {}).get("value", 0) > 0:
            empty_server.post("/interrupt", {"prompt_id": event["data"]["prompt_id"]})

    with pytest.raises(PromptError, match="interrupted"):
        empty_server.watch(graph("CogVideoX-2b"), on_event)
    hub.pause = 0.0
    assert "CogVideoX-2b" not in choices(empty_server, "CogXLoadPipeline", "pipeline")
    assert "2b" in text_of(empty_server, graph("CogVideoX-2b"))
    assert "CogVideoX-2b" in choices(empty_server, "CogXLoadPipeline", "pipeline")


def test_errors_are_words(empty_server, hub):
    hub.refuse = (401, "GatedRepo")
    with pytest.raises(PromptError, match=r"zai-org/CogVideoX1\.5-5B asks for a login: accept its licence at https://"):
        empty_server.run(graph("CogVideoX1.5-5B"))
    hub.refuse = None
    with pytest.raises(PromptError, match="'CogVideoX-9b' not in"):
        empty_server.run(graph("CogVideoX-9b"))
    assert empty_server.alive()


def test_what_is_unfinished_is_never_listed(tmp_path, monkeypatch):
    (tmp_path / UNFINISHED / "CogVideoX-5b" / "vae").mkdir(parents=True)
    (tmp_path / UNFINISHED / "CogVideoX-5b" / RECORD).write_text("{}")
    (tmp_path / UNFINISHED / "CogVideoX-5b" / "model_index.json").write_text('{"_class_name": "CogVideoXPipeline"}')
    monkeypatch.setattr(folders, "pipeline_roots", lambda: [tmp_path])
    assert folders.pipeline_names() == [folders.EMBEDDED.name] and folders.partial_folders() == []


def test_the_first_folder_that_can_be_written_is_taken(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    places = [tmp_path / "file" / "diffusers", tmp_path / "read-only", tmp_path / "new" / "diffusers"]
    places[1].mkdir()
    monkeypatch.setattr(folders.folder_paths, "get_folder_paths", lambda category: [str(place) for place in places])
    monkeypatch.setattr(folders.os, "access", lambda place, mode: Path(place) != places[1])  # root may write all
    assert folders.download_root("CogVideoX-5b") == places[2]
    (places[1] / "CogVideoX-5b").mkdir()
    assert folders.download_root("CogVideoX-5b") == places[1], "it is there already"
    (places[1] / "CogVideoX-5b").rmdir()
    places.pop()
    with pytest.raises(SpecError, match=r"None of .*read-only.* can be written to\. .*extra_model_paths\.yaml"):
        folders.download_root("CogVideoX-5b")
    assert os.listdir(tmp_path / "read-only") == []
