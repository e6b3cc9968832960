"""Decode to VIDEO: the video of CogXDecode, CreateVideo and SaveVideo, without all frames in memory."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import shutil
import weakref
from collections import namedtuple
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import comfy.model_management
import folder_paths
import numpy as np
import pytest
import torch
from cogx.model_loaders import frames as frames_module
from cogx.model_loaders import vae_ladder
from cogx.model_loaders.vae import CogVideoXVAE
from cogx.model_loaders.video import StreamedVideo, decode_to_videos
from cogx.models.cogvideox.vae_plan import Plan
from cogx.models.specs import PUBLISHED, SpecError, VAESpec
from cogx.nodes.decode import Decode, DecodeVideo
from cogx.tests.comfy.demo import pictures
from cogx.tests.comfy.graphs import Graph, text_to_video
from comfy_api.latest import InputImpl, Types
from comfy_api.latest._input_impl import video_types

INTERRUPT = comfy.model_management.InterruptProcessingException
RATE = Fraction(8)
TINY = VAESpec(block_out_channels=(8, 16, 16, 32), layers_per_block=1, norm_num_groups=4)
SLICES = [(0.0, 0.0), (0.5, 1.0), (0.3, 0.5), (-1.0, 0.5), (1.0, 0.0), (1.0, 3.0), (9.0, 1.0)]


def tiny_vae(dtype: torch.dtype) -> CogVideoXVAE:
    vae = CogVideoXVAE(TINY, dtype)
    generator = torch.Generator().manual_seed(0)
    for parameter in vae.first_stage_model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return vae


@pytest.fixture(scope="module")
def vae() -> CogVideoXVAE:
    return tiny_vae(torch.float32)


@pytest.fixture(autouse=True)
def temp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """ComfyUI's temporary folder, which is not there yet; as after a run of ComfyUI's, inference mode is on."""
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return tmp_path / "temp"


@pytest.fixture(autouse=True)
def as_the_executor_does() -> Any:
    with torch.inference_mode():
        yield


def latent(videos: int = 1, frames: int = 5) -> torch.Tensor:
    return 2 * torch.randn(videos, 16, frames, 4, 6, generator=torch.Generator().manual_seed(1))


def audio(seconds: float = 3.0) -> dict[str, Any]:
    return {"waveform": torch.rand(1, 2, int(8000 * seconds), generator=torch.Generator().manual_seed(2)),
            "sample_rate": 8000}


def streamed(vae: CogVideoXVAE, samples: torch.Tensor, sound: Any = None, tiling: str = "auto") -> StreamedVideo:
    (video,) = decode_to_videos(vae, samples, RATE, sound, tiling)
    return video


def core(vae: CogVideoXVAE, samples: torch.Tensor, sound: Any = None, tiling: str = "auto") -> Any:
    """What Create Video makes of CogXDecode's frames."""
    images = vae.decode_video(samples, tiling).flatten(0, 1)
    return InputImpl.VideoFromComponents(Types.VideoComponents(images=images, audio=sound, frame_rate=RATE))


def encoded(monkeypatch: pytest.MonkeyPatch, video: Any, path: Path, **options: Any) -> list[tuple[str, np.ndarray]]:
    """The frames that reach ComfyUI's encoder, which is not always deterministic: their format, and their values."""
    seen = []

    def from_ndarray(values: np.ndarray, format: str) -> av.VideoFrame:
        seen.append((format, values.copy()))
        return av.VideoFrame.from_ndarray(values, format=format)

    spy = SimpleNamespace(open=av.open, AudioFrame=av.AudioFrame, VideoFrame=SimpleNamespace(from_ndarray=from_ndarray))
    with monkeypatch.context() as patch:
        patch.setattr(video_types, "av", spy)
        video.save_to(str(path), metadata={"prompt": {"1": "a"}}, **options)
    return seen


def same(a: list[tuple[str, np.ndarray]], b: list[tuple[str, np.ndarray]]) -> bool:
    return len(a) == len(b) > 0 and all(
        x == y and (v == w).all() for (x, v), (y, w) in zip(a, b, strict=True))


def files_in(folder: Path) -> list[str]:
    """Open files there, of this process: without a name they are not in the folder's list."""
    assert not folder.exists() or not list(folder.iterdir())
    return [name for name in map(_target, Path("/proc/self/fd").iterdir()) if name.startswith(str(folder))]


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:  # the listing's own
        return ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tiling", ["auto", "on"])
def test_the_frames_and_the_file_are_those_of_decode(monkeypatch, tmp_path, dtype, tiling):
    vae = tiny_vae(dtype)
    ours, theirs = streamed(vae, latent(), audio(), tiling), core(vae, latent(), audio(), tiling)
    expected = theirs.get_components()
    for _ in range(2):  # the second time as the first
        assert same(*(encoded(monkeypatch, video, tmp_path / "a.mp4") for video in (ours, theirs)))
        found = ours.get_components()
        assert torch.equal(found.images, expected.images) and found.images.dtype == expected.images.dtype
    assert found.audio is not None and found.frame_rate == RATE
    assert expected.images.std() > 0.05
    deep = {"bit_depth": 10, "crf": 10}
    assert same(*(encoded(monkeypatch, video, tmp_path / "a.mp4", **deep) for video in (theirs, ours)))
    for question in ("get_dimensions", "get_duration", "get_frame_count", "get_frame_rate", "get_container_format",
                     "get_bit_depth"):
        assert getattr(ours, question)() == getattr(theirs, question)()
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.metadata["prompt"] == '{"1": "a"}'
        assert container.streams.video[0].format.name == "yuv420p10le"
        assert len(container.streams.audio) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_half_precision_between_nodes(monkeypatch, dtype):
    vae = tiny_vae(dtype)
    monkeypatch.setattr(vae, "vae_output_dtype", lambda: torch.float16)
    ours, theirs = streamed(vae, latent()), core(vae, latent())
    assert torch.equal(ours.get_components().images, theirs.get_components().images)


def test_nothing_is_encoded_to_learn_what_it_is(vae, monkeypatch):
    video = streamed(vae, latent())
    monkeypatch.setattr(frames_module.FileFrames, "read", None)
    assert (video.get_dimensions(), video.get_frame_count(), video.get_duration()) == ((48, 32), 17, 17 / 8)


def frames_of_file(video: Any) -> np.ndarray:
    data = io.BytesIO()
    video.save_to(data)
    data.seek(0)
    with av.open(data) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("strict", [False, True])
def test_slices_are_the_frames_that_core_cuts_out(vae, strict):
    """Core cuts the encoded file, so its frames are a little worse; ours are the decoded ones. Core's own refuses what
    reaches over the end even if it is not strict, so it is compared with that of a video file."""
    ours, images = streamed(vae, latent(), audio()), vae.decode_video(latent())[0]
    file = InputImpl.VideoFromFile(core(vae, latent(), audio()).get_stream_source())
    for start, duration in SLICES:
        cut, expected = (video.as_trimmed(start, duration, strict_duration=strict) for video in (ours, file))
        if expected is None or start > ours.get_duration():
            assert cut is None
            continue
        theirs, found = expected.get_components(), cut.get_components()
        count = cut.get_frame_count()
        assert len(found.images) == len(theirs.images) == count
        distances = [float((images[i:i + count] - theirs.images).abs().mean()) for i in range(len(images) - count + 1)]
        first = min(range(len(distances)), key=distances.__getitem__)
        assert torch.equal(found.images, images[first:first + count])
        assert found.audio["waveform"].shape[-1] / 8000 == pytest.approx(cut.get_duration(), abs=1e-3)
        assert len(frames_of_file(cut)) == count


def test_a_slice_of_a_slice(vae):
    video = streamed(vae, latent(), audio()).as_trimmed(0.5, 1.25).as_trimmed(0.25, 0.5)
    images = core(vae, latent()).get_components().images
    assert torch.equal(video.get_components().images, images[6:10])
    assert torch.equal(video.get_components().audio["waveform"], audio()["waveform"][..., 6000:10000])


def test_the_videos_of_a_batch(vae):
    videos = decode_to_videos(vae, latent(3), RATE, None)
    images = vae.decode_video(latent(3))
    for video, expected in zip(videos, images, strict=True):
        assert torch.equal(video.get_components().images, expected)


def test_the_file_goes_with_the_video_and_outlives_the_vae_and_the_folder(vae, temp):
    network = tiny_vae(torch.float32)
    gone, video = weakref.ref(network), streamed(network, latent())
    expected = network.decode_video(latent())[0]
    del network
    gc.collect()
    assert gone() is None
    part = video.as_trimmed(1.0, 0.0)
    assert len(files_in(temp)) == 1
    shutil.rmtree(temp)  # as another ComfyUI does at its start
    assert torch.equal(video.get_components().images, expected)
    del video
    assert torch.equal(part.get_components().images, expected[8:])
    del part
    gc.collect()
    assert files_in(temp) == []


@pytest.mark.parametrize("kind", [INTERRUPT, RuntimeError])
def test_a_decode_that_stops_leaves_no_file(vae, monkeypatch, temp, kind):
    real, seen = vae.first_stage_model.decode_chunks, []

    def stopping(*args: Any) -> Any:
        for i, chunk in enumerate(real(*args)):
            if i == 1:
                seen.extend(files_in(temp))
                raise kind
            yield chunk

    monkeypatch.setattr(vae.first_stage_model, "decode_chunks", stopping)
    with pytest.raises(kind) as stopped:
        streamed(vae, latent())
    assert len(seen) == 1
    assert files_in(temp) == [], stopped  # the error is still alive


def test_a_decode_that_runs_out_of_memory_begins_the_file_anew(vae, monkeypatch, temp):
    expected = vae.decode_video(latent(2))
    real, tried = vae.first_stage_model.decode_chunks, []

    def limited(z: torch.Tensor, plan: Plan, *args: Any) -> Any:
        tried.append(plan)
        for i, chunk in enumerate(real(z, plan, *args)):
            if i == 1 and len(tried) in (2, 3):
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
            yield chunk

    monkeypatch.setattr(vae.first_stage_model, "decode_chunks", limited)
    monkeypatch.setattr(vae_ladder, "smaller_plans", lambda plan: [plan])
    videos = decode_to_videos(vae, latent(2), RATE, None)
    assert len(tried) == 4  # the first once, the second three times
    for video, images in zip(videos, expected, strict=True):
        assert torch.equal(video.get_components().images, images)
    assert len(files_in(temp)) == 2


def test_saving_can_be_stopped_and_leaves_no_file(vae, monkeypatch, tmp_path):
    video, read = streamed(vae, latent(frames=17)), frames_module.FileFrames.read
    seen = []  # the encoder writes nothing before it has seen some fifty frames

    def stop_after(self: Any, i: int) -> torch.Tensor:
        seen.append((tmp_path / "a.mp4").exists())
        if i == 60:
            comfy.model_management.interrupt_current_processing()
        return read(self, i)

    monkeypatch.setattr(frames_module.FileFrames, "read", stop_after)
    with pytest.raises(INTERRUPT):
        video.save_to(str(tmp_path / "a.mp4"))
    assert seen[-1] and len(seen) == 61
    assert not (tmp_path / "a.mp4").exists()


def test_a_disk_without_room_is_named_before_anything_is_decoded(vae, monkeypatch, temp):
    usage = namedtuple("usage", "total used free")
    size = 2 * 17 * 48 * 32 * 3 * vae.vae_dtype.itemsize
    monkeypatch.setattr(frames_module.shutil, "disk_usage", lambda _: usage(0, 0, size - 1))
    monkeypatch.setattr(vae.first_stage_model, "decode_chunks", None)
    with pytest.raises(SpecError, match=r"decoded frames take 0.0 GB in .*temp: expected that much free space, found "
                                        r"0.0 GB. Free some space, start ComfyUI with --temp-directory"):
        decode_to_videos(vae, latent(2), RATE, None)
    monkeypatch.undo()


def test_a_disk_that_fills_up_says_so_and_names_the_latent(vae, monkeypatch, temp):
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell():
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(frames_module.tempfile, "TemporaryFile", lambda **_: Full())
    monkeypatch.setattr("cogx.model_loaders.recovery.find_saved", lambda _: Path("saved.safetensors"))
    with pytest.raises(SpecError, match=r"temporary folder is full. Free some .* is saved in saved.safetensors"):
        streamed(vae, latent())


def test_writes_that_take_only_a_part(vae, monkeypatch):
    class Slow(io.BytesIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data[:1000]))

    expected = vae.decode_video(latent())[0]
    monkeypatch.setattr(frames_module.tempfile, "TemporaryFile", lambda **_: Slow())
    assert torch.equal(streamed(vae, latent()).get_components().images, expected)


def test_what_the_nodes_are_given(vae):
    """A batch, its audio, frames per second of the input before those of the model, and a loop."""
    model = SimpleNamespace(model=SimpleNamespace(spec=PUBLISHED["1.5-5B"]))
    inputs = ({"samples": latent(2)}, vae, "auto", 360, 240, 64)
    loops = vae.decode_video(latent(2), closed_loop=True)
    assert torch.equal(Decode.execute(*inputs, True).args[0], loops.flatten(0, 1))
    for fps, rate in ((5.5, Fraction(11, 2)), (0, Fraction(16))):
        videos = DecodeVideo.execute(*inputs, fps, audio(), model, True).args[0]
        for video, loop in zip(videos, loops, strict=True):
            found = video.get_components()
            assert torch.equal(found.images, loop) and found.frame_rate == rate
            assert torch.equal(found.audio["waveform"], audio()["waveform"])


# --- On the server, both versions ---


@pytest.fixture(scope="module", params=["server", "oldest_server"])
def any_server(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)


def graph_of_both(prefix: str, **decode: Any) -> Graph:
    """The shipped graph, and beside it our VIDEO in every core node that takes one."""
    graph = text_to_video("5B", steps=2)
    save = graph["8"]["inputs"]
    inputs = {**graph["6"]["inputs"], "fps": 8, **decode}
    graph["30"] = {"class_type": "CogXDecodeVideo", "inputs": inputs}
    cut = {"start_time": 0.5, "duration": 1.0, "strict_duration": True}
    for node, video in (("31", ["30", 0]), ("36", ["35", 0])):
        graph[node] = {"class_type": "SaveVideo", "inputs": {**save, "video": video,
                                                             "filename_prefix": f"video/{prefix}{node}"}}
    graph["32"] = {"class_type": "GetVideoComponents", "inputs": {"video": ["30", 0]}}
    graph["35"] = {"class_type": "Video Slice", "inputs": {"video": ["30", 0], **cut}}
    for node, images in (("33", ["32", 0]), ("34", ["6", 0])):
        graph[node] = {"class_type": "SaveImage", "inputs": {"images": images, "filename_prefix": f"{prefix}{node}"}}
    return graph


def test_in_cores_nodes_twice_from_the_cache_and_without_the_vae(any_server, video_of):
    folder = any_server.base / "temp"
    before = set(folder.glob("*"))  # of other tests
    first = any_server.run(graph_of_both("a"))
    any_server.post("/free", {"unload_models": True})
    second = any_server.watch(graph_of_both("b"))
    cached = [node for event in second.events if event["type"] == "execution_cached" for node in event["data"]["nodes"]]
    assert "30" in cached and "31" not in cached
    for run in (first, second):
        assert video_of(any_server, run, "31") == video_of(any_server, run, "8")
        assert (pictures(any_server, run, "33") == pictures(any_server, run, "34")).all()
        assert video_of(any_server, run, "36")["frames"] == 8
    with av.open(str(any_server.output(second, "31"))) as container:
        assert json.loads(container.metadata["prompt"])["30"]["class_type"] == "CogXDecodeVideo"
    assert set(folder.glob("*")) == before


def test_frames_per_second_of_the_model(any_server, video_of):
    graph = graph_of_both("c", fps=0, model=["1", 0])
    assert video_of(any_server, any_server.run(graph), "31")["fps"] == 8


def test_reads_that_give_only_a_part(vae, monkeypatch):
    class Slow(io.BytesIO):
        def readinto(self, buffer: Any) -> int:
            return super().readinto(memoryview(buffer).cast("B")[:1000])

    expected = vae.decode_video(latent())[0]
    monkeypatch.setattr(frames_module.tempfile, "TemporaryFile", lambda **_: Slow())
    video = streamed(vae, latent())
    assert torch.equal(video.get_components().images, expected)
    video._frames.file._file.truncate(5000)
    with pytest.raises(OSError, match="Frame 0 of 17 is not in the temporary file"):
        video.get_components()
