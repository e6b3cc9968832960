"""The shipped workflows on the oldest and the newest ComfyUI: nodes registered, an MP4 of the right shape."""

from __future__ import annotations

import pytest
from cogx.tests.comfy.graphs import image_to_video, text_to_video, video_to_video

NODES = ["CogXLoadPipeline", "CogXLoadModel", "CogXLoadTextEncoder", "CogXLoadVAE", "CogXTextEncode", "CogXEmptyLatent",
         "CogXSampler", "CogXSamplerSelect", "CogXScheduler", "CogXDynamicGuidance", "CogXDecode", "CogXImageToVideo",
         "CogXVideoToVideo", "CogXImageSize", "CogXInversion", "CogXLoadLatent", "CogXMemoryPlan", "CogXSaveModel",
         "CogXLoadLora", "CogXDownload", "CogXContextWindows", "CogXRIFLEx", "CogXPromptSequence", "CogXDecodeVideo",
         "CogXExtend"]


@pytest.fixture(params=["newest", "oldest"])
def any_server(request):
    return request.getfixturevalue("server" if request.param == "newest" else "oldest_server")


def test_nodes_are_registered_with_tooltips(any_server):
    info = any_server.get("/object_info")
    for node in NODES:
        assert info[node]["display_name"].startswith("CogVideoX ")
        assert info[node]["search_aliases"] and info[node]["description"]
        for group in ("required", "optional"):
            for name, definition in info[node]["input"].get(group, {}).items():
                assert definition[1].get("tooltip"), f"{node}.{name} has no tooltip"


@pytest.mark.parametrize("variant, fps", [("5B", 8), ("1.5-5B", 16)])
def test_workflow_makes_a_video(any_server, video_of, variant, fps):
    video = video_of(any_server, any_server.run(text_to_video(variant, steps=2)))
    assert video["frames"] == 17 and video["size"] == (96, 64) and video["fps"] == fps
    assert "mp4" in video["format"]


def test_progress_previews_and_text(any_server):
    """Steps and decode chunks are reported, a preview comes with each step, and the token count is in the history."""
    run = any_server.watch(text_to_video("5B", steps=4), preview="latent2rgb")
    states = [event["data"]["nodes"] for event in run.events if event["type"] == "progress_state"]
    steps = {(node["value"], node["max"]) for nodes in states for key, node in nodes.items() if key == "5"}
    assert {(1, 4), (2, 4), (3, 4), (4, 4)} <= steps
    chunks = {(node["value"], node["max"]) for nodes in states for key, node in nodes.items() if key == "6"}
    assert {(1, 2), (2, 2)} <= chunks
    assert len([preview for preview in run.previews if b"\xff\xd8" in preview[:200]]) >= 3
    assert run.outputs["2"]["text"][0].endswith("of 226 tokens")


def test_interrupt_within_a_step(any_server):
    """An interrupt after the second of 500 steps ends the run soon after, and the server goes on."""
    from cogx.tests.comfy_server import PromptError

    seen = []

    def on_event(event):
        if event["type"] == "progress_state" and "5" in event["data"]["nodes"]:
            value = event["data"]["nodes"]["5"]["value"]
            if value >= 2 and not seen:
                any_server.post("/interrupt", {"prompt_id": event["data"]["prompt_id"]})
            if value >= 2:
                seen.append(value)

    with pytest.raises(PromptError, match="interrupted"):
        any_server.watch(text_to_video("5B", steps=500, seed=99), on_event)
    assert max(seen) < 100
    assert any_server.alive()


@pytest.mark.parametrize("variant, fps", [("5B-I2V", 8), ("1.5-5B-I2V", 16)])
def test_image_workflow_makes_a_video(any_server, video_of, variant, fps):
    graph = image_to_video(variant, end="cogx_end.jpg")
    graph["5"]["inputs"]["steps"] = 2
    video = video_of(any_server, any_server.run(graph))
    assert video["frames"] == 17 and video["size"] == (96, 64) and video["fps"] == fps


def test_video_workflow_makes_a_video(any_server, video_of):
    video = video_of(any_server, any_server.run(video_to_video("5B", 0.3)))
    assert video["frames"] == 17 and video["size"] == (96, 64)
