"""CogXExtend: equal to the same done by hand, stopped and queued again, and what it refuses."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cogx.model_loaders import chunk_files, load
from cogx.model_loaders.chunk_files import ChunkFiles, NotComparable, digest, run_identity
from cogx.model_loaders.latent_files import list_files
from cogx.models.specs import SpecError
from cogx.nodes.decode import Decode
from cogx.nodes.extend import Extend
from cogx.nodes.image import ImageToVideo, VideoToVideo
from cogx.nodes.sample import Sampler
from cogx.samplers.colour import correction
from cogx.samplers.extend import faded
from cogx.tests.comfy.graphs import Graph, text_to_video
from cogx.tests.comfy.test_image_model import conditionings
from cogx.tests.comfy_server import ComfyServer, PromptError, Run
from comfy.weight_adapter import LoRAAdapter
from PIL import Image
from torch import Tensor

STEPS = 6
SAMPLING = {"seed": 7, "steps": STEPS, "cfg": 4.0, "sampler": "cogvideox_ddim", "schedule": "trailing",
            "denoise": 0.85, "dynamic_cfg": False}
TILING = {"tiling": "auto", "tile_width": 360, "tile_height": 240, "tile_overlap": 64}


class Direct(Extend):
    """Called without a server."""

    hidden = SimpleNamespace(prompt=None, unique_id=None)


@pytest.fixture
def inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def pipeline(folder: Any, variant: str) -> tuple[Any, Any]:
    return (load.load_model(str(folder / variant / "transformer")), load.load_vae(str(folder / variant / "vae")))


def frames_of(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 64, 96, 3, generator=torch.Generator().manual_seed(seed))


def extended(model: Any, vae: Any, video: Tensor, positive: Any, negative: Any, **inputs: Any) -> Tensor:
    settings = {"chunks": 1, "length": 17, "overlap": 9, "match_colors": "full", **SAMPLING, **TILING, **inputs}
    return Direct.execute(model, positive, negative, vae, video, **settings).args[0]


def by_hand(model: Any, vae: Any, video: Tensor, positive: Any, negative: Any, length: int, overlap: int,
            **sampling: Any) -> Tensor:
    """One chunk with the pack's other nodes; 0.2 x 5 steps are one, at whose start the frames taken over are let go."""
    spec, last = model.model.spec, video[-overlap:]
    known = VideoToVideo.execute(vae, last, 96, 64, overlap).args[0]["samples"]
    rest = (length - overlap) // 4
    latent = torch.cat([known, *[known[:, :, -1:]] * rest], dim=2)
    mask = torch.ones(1, 1, *latent.shape[2:])
    mask[:, :, :known.shape[2]] = 0.5
    if spec.takes_image:
        positive, negative, _ = ImageToVideo.execute(positive, negative, vae, 96, 64, length, 1, last[:1]).args
    calls: list[float] = []

    def mask_at(sigma: Tensor, mask: Tensor, extra_options: Any) -> Tensor:
        calls.append(float(sigma.max()))
        return (mask > 0.5).float() if len(set(calls)) < 5 else torch.ones_like(mask)

    model = model.clone()
    model.set_model_denoise_mask_function(mask_at)
    sampled = Sampler.execute(model, positive, negative, {"samples": latent, "noise_mask": mask},
                              **{**SAMPLING, **sampling}).args[0]
    assert len(set(calls)) == 5, "steps"
    made = Decode.execute(sampled, vae, **TILING).args[0]
    correction(made[:overlap], last, "full").apply_(made)
    return torch.cat([video[:-overlap], faded(last, made[:overlap]), made[overlap:]])


@pytest.mark.parametrize("variant, length, overlap", [("2B", 17, 9), ("5B", 17, 9), ("5B-I2V", 17, 9),
                                                      ("1.5-5B", 33, 17), ("1.5-5B-I2V", 17, 9)])
def test_one_chunk_is_that_made_by_hand(inference, tiny_pipelines, variant, length, overlap):
    model, vae = pipeline(tiny_pipelines, variant)
    positive, negative = conditionings(model)
    video = frames_of(20)
    kept = video.clone()
    out = extended(model, vae, video, positive, negative, length=length, overlap=overlap)
    assert torch.equal(out, by_hand(model, vae, kept, positive, negative, length, overlap))
    assert out.shape[0] == 20 + length - overlap and torch.equal(video, kept)
    assert torch.equal(out[:20 - overlap], video[:20 - overlap]) and not torch.equal(out[:20], video)


def test_chunks_are_chunks_of_what_there_is(inference, tiny_pipelines):
    """Two chunks are one, extended by one with the next seed; each has its own prompt, and the last one goes on."""
    model, vae = pipeline(tiny_pipelines, "5B")
    one, two = (conditionings(model)[index] for index in (0, 1))
    video = frames_of(17)
    turns = [[one[0][0], {"cogx_turn": (0, 2)}], [two[0][0], {"cogx_turn": (1, 2)}]]
    first = extended(model, vae, video, one, one)
    second = extended(model, vae, first, two, one, seed=8)
    third = extended(model, vae, second, two, one, seed=9)
    assert torch.equal(extended(model, vae, video, turns, one, chunks=3), third)
    assert not torch.equal(extended(model, vae, first, one, one, seed=8), second)


def test_settings_reach_the_sampling(inference, tiny_pipelines):
    model, vae = pipeline(tiny_pipelines, "5B")
    positive, negative = conditionings(model)
    video = frames_of(17)
    plain = extended(model, vae, video, positive, negative)
    for change in ({"cfg": 1.0}, {"seed": 8}, {"sampler": "euler"}, {"dynamic_cfg": True}, {"denoise": 1.0},
                   {"match_colors": "off"}, {"match_colors": "soft"}, {"schedule": "beta"}):
        assert not torch.equal(extended(model, vae, video, positive, negative, **change), plain), change


def test_sizes_and_lengths_are_refused(inference, tiny_pipelines):
    model, vae = pipeline(tiny_pipelines, "1.5-5B")
    positive, negative = conditionings(model)
    for video, inputs, words in [
            (frames_of(20)[:, :60], {"length": 17}, "images of 96x60: height 60: .* nearest: 48 or 64. Scale or crop"),
            (frames_of(8), {"length": 17}, "8 frames: expected at least the overlap of 9. Set overlap to 1,"),
            (frames_of(20), {"length": 25}, "CogVideoX 1.5 needs 16N.1 .*; nearest: 17 or 33."),
            (frames_of(20), {"length": 17, "denoise": 0.1}, "of 6 steps leaves no step to run: .* at least 0.17"),
            (frames_of(20), {"length": 17, "overlap": 5}, "1.5 needs 8N.1 frames; nearest: 1 or 9.")]:
        with pytest.raises(SpecError, match=words):
            extended(model, vae, video, positive, negative, **inputs)


# --- What is found again ---


def test_what_can_be_told_apart():
    """Each differs from all others, and equals itself."""
    adapter = [LoRAAdapter({"a"}, (torch.full((2, 2), value), torch.ones(2, 2), 1.0, None, None, None))
               for value in (1.0, 2.0)]
    values = [None, True, 1, 1.0, "1", torch.ones(2), torch.ones(1, 2), torch.ones(2).half(), [1, [2]], [[1], 2],
              [1, 2], {"a": 1}, {"b": 1}, {"a": 2}, adapter[0], adapter[1], ["ab", "c"], ["a", "bc"]]
    assert len({digest(value) for value in values}) == len(values)
    assert digest({"a": 1, "b": (2,)}) == digest({"b": [2], "a": 1})
    with pytest.raises(NotComparable, match="SimpleNamespace"):
        digest([1, {"control": SimpleNamespace()}])


def prompt_of(lora: str = "a", strength: float = 1.0, video: str = "a.png", ids: str = "123") -> Graph:
    load_id, lora_id, node = ids
    return {load_id: {"class_type": "Load", "inputs": {"name": "model"}},
            lora_id: {"class_type": "Lora", "inputs": {"model": [load_id, 0], "file": lora, "strength": strength}},
            node: {"class_type": "CogXExtend",
                   "inputs": {"model": [lora_id, 0], "vae": [load_id, 2], "images": ["8", 0], "chunks": 1}},
            "8": {"class_type": "LoadImage", "inputs": {"image": video}},
            "9": {"class_type": "Other", "inputs": {"seed": 5}}}


def test_what_a_run_works_with(tmp_path):
    """The nodes before it, whatever their ids; its file; its patches. Not known: a node that is not in the prompt."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")

    def identity(prompt: Graph | None, node: str = "3", **patches: Any) -> str | None:
        return run_identity(SimpleNamespace(cached_patcher_init=(None, (str(file), "auto")), patches=patches), prompt,
                              node)

    plain = identity(prompt_of())
    assert plain == identity(prompt_of(ids="745"), "5") == identity({**prompt_of(), "9": {}})
    others = [identity(prompt_of("b")), identity(prompt_of(video="b.png")), identity(prompt_of(strength=0.5)),
              identity(prompt_of(), key=[(1.0, None)])]
    file.write_bytes(b"other weights")
    others.append(identity(prompt_of()))
    assert len({plain, *others}) == 6 and None not in others
    assert identity(None) is identity(prompt_of(), "77") is identity({"3": prompt_of()["3"]}) is None
    assert identity(prompt_of(), key=[(1.0, SimpleNamespace())]) is None


@pytest.fixture
def files(tmp_path, monkeypatch) -> ChunkFiles:
    monkeypatch.setattr(chunk_files, "recovery_folder", lambda: tmp_path)
    return ChunkFiles("model")


FACTS = {"model": "5B", "fps": 8, "seed": 1, "sampler": "euler", "steps": 4, "cfg": 6.0, "dtype": "float32",
         "seconds": 1.0}


def test_chunks_come_back_to_the_bit_or_not_at_all(files, caplog):
    caplog.set_level("INFO", "cogx")
    latent, known = torch.randn(1, 16, 5, 8, 12), torch.randn(1, 16, 3, 8, 12)
    key = files.key(["prompt", 1])
    assert files.find(key, known) is None
    files.save(key, latent, known, **FACTS)
    noise = known.norm() * torch.nn.functional.normalize(torch.randn(known.shape).flatten(), dim=0).view(known.shape)
    for begun_from in (known, known + 0.009 * noise):  # what a GPU may give another time
        found = ChunkFiles("model").find(key, begun_from)
        assert found is not None and torch.equal(found, latent)
    for begun_from in (known + 0.011 * noise, known[:, :, :2], torch.zeros_like(known), known.flip(2)):
        assert files.find(key, begun_from) is None
    assert caplog.text.count("the frames before it have changed") == 4
    assert ChunkFiles("other").key(["prompt", 1]) != key != files.key(["prompt", 2])
    file, = list_files(files.folder)
    file.write_bytes(file.read_bytes()[:-5])
    assert files.find(key, known) is None and "is no whole latent file" in caplog.text
    assert files.key([SimpleNamespace()]) is None and ChunkFiles(None).key(1) is None
    files.save(None, latent, known, **FACTS)
    assert len(list_files(files.folder)) == 1


def test_the_oldest_chunks_go_first_and_none_of_this_run(files, monkeypatch):
    latent, known = torch.randn(1, 16, 5, 8, 12), torch.randn(1, 16, 1, 8, 12)
    earlier = ChunkFiles("model")
    names = [earlier.key(index) for index in range(3)]
    for index, name in enumerate(names):
        earlier.save(name, latent, known, **FACTS)
        chunk_files.os.utime(earlier.folder / f"{name}.safetensors", (index, index))
    (files.folder / "mine.safetensors").write_bytes(b"not a chunk")
    chunk_files.os.utime(files.folder / "mine.safetensors", (0, 0))
    monkeypatch.setattr(chunk_files, "MOST_BYTES", 3 * latent.nbytes)  # two, with what is kept beside them
    new = [files.key(index) for index in range(5, 9)]
    files.save(new[0], latent, known, **FACTS)
    kept = {path.stem for path in list_files(files.folder)}
    assert kept == {"mine", names[2], new[0]}
    for name in new[1:]:
        files.save(name, latent, known, **FACTS)
    assert {path.stem for path in list_files(files.folder)} == {"mine", *new}


def test_saving_can_be_switched_off(files, monkeypatch):
    monkeypatch.setenv("COGX_RECOVERY", "0")
    assert files.key(1) is None


# --- On servers ---


@pytest.fixture(params=["newest", "oldest"])
def any_server(request: pytest.FixtureRequest) -> Iterator[ComfyServer]:
    server = request.getfixturevalue("server" if request.param == "newest" else "oldest_server")
    shutil.rmtree(server.base / "output" / "cogx_recovery", ignore_errors=True)
    yield server
    shutil.rmtree(server.base / "output" / "cogx_recovery", ignore_errors=True)


def graph_of(chunks: int = 3, text: str = "A red circle.", **inputs: Any) -> Graph:
    """A sampled video of 17 frames and ``chunks`` more of 8 new frames, as pictures (node 7)."""
    graph = text_to_video("5B", steps=2)
    graph["2"]["inputs"]["text"] = text
    graph["10"] = {"class_type": "CogXExtend", "inputs": {
        **{name: graph["5"]["inputs"][name] for name in ("model", "positive", "negative")}, "vae": ["1", 2],
        "images": ["6", 0], "chunks": chunks, "length": 17, "overlap": 9, "match_colors": "full", **SAMPLING, **TILING,
        **inputs}}
    kept = {key: node for key, node in graph.items() if node["class_type"] not in ("CreateVideo", "SaveVideo")}
    return {**kept, "7": {"class_type": "SaveImage", "inputs": {"images": ["10", 0], "filename_prefix": "extended"}}}


def pixels(server: ComfyServer, run: Run, node: str = "7") -> list[bytes]:
    return [Image.open(server.output(run, node, index)).tobytes() for index in range(len(run.outputs[node]["images"]))]


def progress_of(run: Run) -> list[tuple[int, int]]:
    states = [event["data"]["nodes"].get("10", {}) for event in run.events if event["type"] == "progress_state"]
    return [(int(state["value"]), int(state["max"])) for state in states if state.get("max", 1) > 1]


def test_queued_again_it_goes_on(any_server):
    """Interrupted in the second chunk of three: what is finished is not sampled again, and the video is the same. One
    more chunk and another prompt then, without taking what is stale."""
    server, steps = any_server, 10
    folder = server.base / "output" / "cogx_recovery" / "extend"
    graph = graph_of(steps=steps)
    each = 1 + 8 + 2  # chunks of the VAE when encoding, steps of 10 at 0.85, chunks of the VAE when decoding

    def stop(event: dict[str, Any]) -> None:
        nodes = event["data"].get("nodes", {}) if event["type"] == "progress_state" else {}
        if nodes.get("10", {}).get("value", 0) >= each + 2:  # encoded, and one step
            server.post("/interrupt", {"prompt_id": event["data"]["prompt_id"]})

    with pytest.raises(PromptError, match="interrupted"):
        server.watch(graph, stop)
    finished = len(list_files(folder))
    assert finished in (1, 2)  # a fast server may have sampled the second when the word arrives

    def found(graph: Graph) -> tuple[int, list[bytes], Run]:
        before = server.log.count("Found the finished chunk")
        run = server.watch(graph)
        return server.log.count("Found the finished chunk") - before, pixels(server, run), run

    count, video, run = found(graph)
    assert count == finished and len(video) == 17 + 3 * 8 and len(list_files(folder)) == 3
    bar = progress_of(run)
    assert {total for _, total in bar} == {3 * each} and bar == sorted(bar) and bar[-1][0] == 3 * each
    assert len(bar) > 10

    count, longer, _ = found(graph_of(chunks=4, steps=steps))
    # The frames that a chunk takes over are faded with it.
    assert count == 3 and longer[:32] == video[:32] and len(longer) == 17 + 4 * 8
    count, other, _ = found(graph_of(chunks=1, steps=steps, text="A blue square."))
    assert count == 0 and other[17:] != video[17:25]
    shutil.rmtree(folder)
    server.post("/free", {"unload_models": True, "free_memory": True})
    count, again, _ = found(graph)
    assert count == 0 and again == video


def test_a_prompt_of_the_sequence_for_each_chunk(server):
    """The same as a node for each chunk, with a prompt and a seed of its own."""
    prompts = ["A red circle.", "A blue square."]
    graph = graph_of(chunks=2, text=prompts[0], denoise=1.0)
    whole, clip = graph["10"], graph["2"]["inputs"]["clip"]
    graph["11"] = {"class_type": "CogXPromptSequence", "inputs": {"clip": clip, "text": "\n".join(prompts),
                                                                  "max_tokens": "auto"}}
    graph["12"] = {**graph["2"], "inputs": {**graph["2"]["inputs"], "text": prompts[1]}}
    graph["13"] = {**whole, "inputs": {**whole["inputs"], "chunks": 1}}
    graph["14"] = {**whole, "inputs": {**whole["inputs"], "chunks": 1, "images": ["13", 0], "positive": ["12", 0],
                                       "seed": SAMPLING["seed"] + 1}}
    graph["15"] = {**graph["7"], "inputs": {"images": ["14", 0], "filename_prefix": "by_node"}}
    whole["inputs"]["positive"] = ["11", 0]
    run = server.run(graph)
    assert len(pixels(server, run)) == 17 + 2 * 8 and pixels(server, run) == pixels(server, run, "15")


@pytest.mark.parametrize("inputs, words", [
    ({"overlap": 8}, "overlap 8: CogVideoX 1.0 needs 4N\\+1 frames; nearest: 5 or 9."),
    ({"overlap": 17}, "overlap 17: expected less than length 17; nearest: 13."),
    ({"length": 20}, "length: 20 frames: .*nearest: 17 or 25"),
    ({"tile_overlap": 1000}, "tile_overlap 1000: expected")])
def test_refused_before_the_run(server, inputs, words):
    with pytest.raises(PromptError, match=words):
        server.queue(graph_of(**inputs))
