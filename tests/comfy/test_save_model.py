"""CogXSaveModel: what is saved loads as the same model, and nothing is left where saving fails."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cogx.model_loaders import load, quantization, save
from cogx.models.specs import PUBLISHED, SpecError
from cogx.scripts.tiny_pipeline import VARIANTS
from cogx.tests import quantized_writers as writers
from cogx.tests.comfy.graphs import latent_only, text_to_video
from cogx.tests.comfy.quantized import TRANSFORMER, chosen, demo_tensors, forward
from cogx.tests.comfy_server import PromptError
from safetensors import safe_open
from safetensors.torch import load_file


@pytest.fixture(autouse=True)
def as_the_executor_runs() -> Iterator[None]:
    with torch.inference_mode():
        yield


def with_lora(model: Any) -> Any:
    clone = model.clone()
    generator = torch.Generator().manual_seed(3)
    shapes = {key: value.shape for key, value in model.model.named_parameters()}
    keys = ["diffusion_model.transformer_blocks.0.attn1.to_q.weight", "diffusion_model.proj_out.weight"]
    clone.add_patches({key: ("diff", (torch.randn(shapes[key], generator=generator) * 0.05,)) for key in keys})
    return clone


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_comes_back_whole(tiny_pipelines, tmp_path, variant):
    """Sizes, positions and schedule too: of unusual widths and grids no shape tells them."""
    model = load.load_model(str(tiny_pipelines / variant / "transformer"))
    path = tmp_path / "任意.safetensors"
    save.save_model(model, path)
    again = load.load_model(str(path))
    assert again.model.spec == model.model.spec
    assert torch.equal(forward(again), forward(model))
    source = next((tiny_pipelines / variant / "transformer").glob("*.safetensors"))
    assert set(load_file(path)) == set(load_file(source))
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("quantize", ["none", "fp8_e4m3fn", "fp8_scaled", "int8", "nvfp4"])
def test_saved_quantized_is_loaded_quantized(tmp_path, monkeypatch, quantize):
    """Made by the saver or by the loader: the same file contents, the same numbers."""
    for module in (load, save):
        monkeypatch.setattr(module, "check_quantization", lambda *args: None)
    plain, made = load.load_model(str(TRANSFORMER)), load.load_model(str(TRANSFORMER), "auto", quantize)
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save.save_model(plain, paths[0], quantize)
    save.save_model(made, paths[1])
    expected = forward(made)
    for path in paths:
        model = load.load_model(str(path))
        assert torch.equal(forward(model), expected)
        assert {key for key in model.model.state_dict() if "comfy_quant" in key} == {
            key for key in made.model.state_dict() if "comfy_quant" in key}


@pytest.mark.parametrize("merge", [False, True])
def test_the_loaders_dtype_is_written(tmp_path, merge):
    """Under dynamic VRAM a parameter stays as in the file until it is used, and only its module knows its dtype."""
    model, paths = load.load_model(str(TRANSFORMER), "bf16"), [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    save.save_model(with_lora(model), paths[0], merge_loras=merge)
    in_file = {key: value.float() for key, value in demo_tensors().items()}
    model.model.diffusion_model.load_state_dict(in_file, assign=True)  # as a ModelPatcherDynamic is filled
    estimate = save._estimate(model, save.AS_LOADED)
    save.save_model(with_lora(model), paths[1], merge_loras=merge)
    first, second = map(load_file, paths)
    assert {value.dtype for value in second.values()} == {torch.bfloat16}
    assert all(torch.allclose(value, second[key], rtol=2**-6, atol=1e-3) for key, value in first.items())
    assert paths[1].stat().st_size <= estimate < 2 * paths[1].stat().st_size


def test_gguf_is_saved_as_it_is_or_unpacked(tmp_path):
    source = writers.write_gguf(tmp_path / "x.gguf", demo_tensors(), chosen, "Q5_0")
    model = load.load_model(str(source), variant="5B")
    kept, unpacked = tmp_path / "kept.safetensors", tmp_path / "unpacked.safetensors"
    save.save_model(model, kept)
    save.save_model(model, unpacked, "none")
    expected = forward(model)
    for path in (kept, unpacked):
        assert torch.allclose(forward(load.load_model(str(path))), expected, atol=1e-5)
    assert load.find_model(kept).layers == load.find_model(source).layers and not load.find_model(unpacked).layers
    with pytest.raises(SpecError, match="the file is quantized already"):
        save.save_model(model, tmp_path / "no.safetensors", "fp8_scaled")


@pytest.mark.parametrize("held", ["none", "fp8_scaled"])
def test_loras_are_merged_only_if_asked(tmp_path, held):
    model = load.load_model(str(TRANSFORMER), "auto", held)
    patched = with_lora(model)
    before, after = forward(model), forward(patched)  # the weights in memory are now the merged ones
    assert (before - after).norm() > 0.05 * before.norm()
    plain, merged = tmp_path / "plain.safetensors", tmp_path / "merged.safetensors"
    words = save.save_model(patched, plain)
    assert "2 weights have LoRAs or merges that are not in the file" in words
    forward(patched)
    assert "LoRAs" not in save.save_model(patched, merged, merge_loras=True)
    assert torch.equal(forward(load.load_model(str(plain))), before)
    assert torch.equal(forward(load.load_model(str(merged))), after)
    if held == "none":
        path = tmp_path / "both.safetensors"
        save.save_model(patched, path, "fp8_scaled", merge_loras=True)
        assert (forward(load.load_model(str(path))) - after).norm() < 0.06 * after.norm()


@pytest.mark.parametrize("held, quantize", [("none", "as_loaded"), ("none", "int8"), ("fp8_scaled", "as_loaded"),
                                            ("int8", "as_loaded"), ("fp8_scaled", "none")])
def test_a_merge_that_is_no_number_is_not_written(tmp_path, held, quantize):
    model = load.load_model(str(TRANSFORMER), "auto", held).clone()
    change = torch.zeros(128, 128)
    change[3, 3] = float("inf")
    model.add_patches({"diffusion_model.transformer_blocks.0.attn1.to_q.weight": ("diff", (change,))})
    with pytest.raises(SpecError, match=r"blocks\.0\.attn1\.to_q\.weight: expected finite values.*merge_loras"):
        save.save_model(model, tmp_path / "x.safetensors", quantize, merge_loras=True)
    assert not list(tmp_path.iterdir())
    save.save_model(model, tmp_path / "x.safetensors", quantize)


def test_what_the_file_says(tmp_path):
    """Plain safetensors, whose metadata says all; what ComfyUI and others look for is where they do."""
    path = tmp_path / "x.safetensors"
    words = save.save_model(load.load_model(str(TRANSFORMER), "auto", "fp8_scaled"), path)
    assert words.startswith("x.safetensors: CogVideoX 5B, 0.00 GB") and path.stat().st_size < 4_000_000
    with safe_open(path, "pt") as opened:
        metadata, keys = opened.metadata(), set(opened.keys())
        note = bytes(opened.get_tensor("transformer_blocks.0.attn1.to_q.comfy_quant").tolist())
    assert metadata["cogx.variant"] == "5B" and json.loads(metadata["cogx.spec"])["transformer"]["num_layers"] == 8
    assert json.loads(note) == {"format": "float8_e4m3fn"}
    assert set(demo_tensors()) <= keys
    length = int.from_bytes(path.read_bytes()[:8], "little")
    for key, entry in json.loads(path.read_bytes()[8:8 + length]).items():
        width = {"F32": 4, "BF16": 2}.get(entry.get("dtype"), 1)
        assert key == "__metadata__" or (8 + length + entry["data_offsets"][0]) % width == 0, f"{key} is misaligned"
    with pytest.raises(SpecError, match=r"variant 2B: .* says 5B\. Set variant to auto"):
        load.find_model(path, "2B")


def damaged_note(path: Path, spec: str) -> None:
    from safetensors.torch import save_file

    save_file(demo_tensors(), path, metadata={"cogx.spec": spec})


@pytest.mark.parametrize("spec", ["{", "[]", "{}", '{"transformer": {}, "latent": {}, "schedule": {}}', "deep"])
def test_a_damaged_note_is_refused(tmp_path, spec):
    path = tmp_path / "x.safetensors"
    if spec == "deep":  # a network that nobody should try to build
        from dataclasses import asdict

        spec = json.dumps(asdict(PUBLISHED["5B"])).replace('"num_layers": 42', '"num_layers": 1000000000')
    damaged_note(path, spec)
    with pytest.raises(SpecError, match=r"cogx\.spec is damaged|expected 1000000000 layers"):
        load.find_model(path)


def test_nothing_is_left_where_it_fails(tmp_path, monkeypatch):
    model = load.load_model(str(TRANSFORMER))
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"older")
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda folder: usage(10**12, 10**12, 10**6))
        with pytest.raises(SpecError, match=r"expected 0\.0 GB of free disk for the file, got 0\.0 GB"):
            save.save_model(model, path)
    written = save._append
    for failure in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fail_at_the_third(file: Any, base: int, tensor: torch.Tensor, failure: BaseException = failure) -> Any:
            if file.tell() > base + 10_000:
                raise failure
            return written(file, base, tensor)

        with monkeypatch.context() as patch:
            patch.setattr(save, "_append", fail_at_the_third)
            with pytest.raises((SpecError, KeyboardInterrupt), match=r"could not be written: No space left|"):
                save.save_model(model, path)
        assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == b"older"
    monkeypatch.setattr(save, "_check_space", lambda *args: None)
    with pytest.raises(SpecError, match=r"could not be written: .* Free some space, or choose a folder"):
        save.save_model(model, Path("/proc/x.safetensors"))


def test_only_our_models(tmp_path):
    Other = namedtuple("Other", "model")
    with pytest.raises(SpecError, match="Expected a CogVideoX model from this pack's loaders, got dict"):
        save.save_model(Other({}), tmp_path / "x.safetensors")


def test_save_load_run_on_the_server(server, saved_latent):
    """Quantized on loading, sampled, saved; then the saved file in its place: identical latents."""
    graph = latent_only(text_to_video("5B", steps=3, sampler="cogvideox_ddim", dynamic_cfg=False))
    graph["1"]["inputs"]["quantization"] = "fp8_scaled"
    graph["30"] = {"class_type": "CogXSaveModel", "inputs": {
        "model": ["1", 0], "filename_prefix": "diffusion_models/mine/saved", "quantization": "as_loaded"}}
    run = server.run(graph)
    first = saved_latent(server, run)
    assert "saved_00001_.safetensors: CogVideoX 5B" in run.outputs["30"]["text"][0]
    graph["31"] = {"class_type": "CogXLoadModel", "inputs": {
        "checkpoint": "mine/saved_00001_.safetensors", "weight_dtype": "auto", "quantization": "none"}}
    del graph["30"]
    graph["5"]["inputs"]["model"] = ["31", 0]
    assert torch.equal(saved_latent(server, server.run(graph)), first)
    for node, name, value, words in (("1", "quantization", "int3", "expected one of"),
                                     ("1", "quantization", "nvfp4", "Blackwell")):
        bad = {**graph, node: {**graph[node], "inputs": {**graph[node]["inputs"], name: value}}}
        with pytest.raises(PromptError, match=words):
            server.run(bad)


def test_the_saver_offers_what_there_is():
    from cogx.nodes import save as nodes

    assert [save.AS_LOADED, "none", *quantization.FORMATS] == nodes.CHOICES
    assert nodes.SaveModel.validate_inputs(quantization="as_loaded") is True
    problem = nodes.SaveModel.validate_inputs(quantization="nvfp4")
    assert "quantization nvfp4: expected an NVIDIA card" in str(problem)


def test_names_stay_below_the_output_folder(tmp_path, monkeypatch):
    import folder_paths
    from cogx.model_loaders.folders import free_output_name

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    first = free_output_name("diffusion_models/a")
    assert first == tmp_path / "diffusion_models" / "a_00001_.safetensors"
    first.touch()
    assert free_output_name("diffusion_models/a").name == "a_00002_.safetensors"
    for outside in ("../a", "/etc/a", "..", "", "a/../../b"):
        with pytest.raises(SpecError, match="expected a name below"):
            free_output_name(outside)
