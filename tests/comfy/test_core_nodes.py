"""Core's own nodes on our MODEL and VAE, through a real server: each runs, and what has a reference is compared."""

from __future__ import annotations

import pytest
import torch
from cogx.tests.comfy.graphs import image_to_video, latent_only, patched_model, text_to_video, with_core_ksampler
from safetensors.torch import save_file

TINY_SHAPE = (1, 16, 5, 8, 12)


def base_graph(variant="5B", steps=4):
    return latent_only(text_to_video(variant, steps=steps, sampler="cogvideox_ddim", dynamic_cfg=False))


@pytest.fixture(scope="module")
def lora(server):
    """A LoRA with the generic key names that core maps by itself."""
    path = server.base / "models" / "loras" / "tiny.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for block in range(2):
        name = f"diffusion_model.transformer_blocks.{block}.attn1.to_q"
        weights[f"{name}.lora_A.weight"] = torch.randn(4, 64, generator=generator)
        weights[f"{name}.lora_B.weight"] = torch.randn(64, 4, generator=generator)
    save_file(weights, path)
    return path.name


CASES = {
    "EasyCache": {"reuse_threshold": 0.2, "start_percent": 0.15, "end_percent": 0.95, "verbose": False},
    "TorchCompileModel": {"backend": "inductor"},
    "NAGuidance": {"nag_scale": 5.0, "nag_alpha": 0.5, "nag_tau": 1.5},
    "ContextWindowsManual": {
        "context_length": 3, "context_overlap": 1, "context_schedule": "standard_static", "context_stride": 1,
        "closed_loop": False, "fuse_method": "pyramid", "dim": 2, "freenoise": True, "cond_retain_index_list": "",
        "split_conds_to_windows": False, "latent_retain_index_list": "", "causal_window_fix": True},
}


@pytest.mark.parametrize("variant", ["5B", "1.5-5B"])
@pytest.mark.parametrize("node", list(CASES))
def test_model_patches(server, saved_latent, error, node, variant):
    plain = saved_latent(server, server.run(base_graph(variant)))
    patched = saved_latent(server, server.run(patched_model(base_graph(variant), node, **CASES[node])))
    assert patched.shape == TINY_SHAPE and torch.isfinite(patched).all()
    if node == "TorchCompileModel":
        assert error(patched, plain) <= 1e-4
    elif node != "EasyCache":  # EasyCache may find nothing to skip in four steps
        assert error(patched, plain) > 1e-3, "the node did nothing"


def test_easycache_skips(server, saved_latent, error):
    graph = base_graph(steps=30)
    plain = saved_latent(server, server.run(graph))
    eager = {**CASES["EasyCache"], "reuse_threshold": 2.0}
    cached = saved_latent(server, server.run(patched_model(graph, "EasyCache", **eager)))
    assert torch.isfinite(cached).all() and error(cached, plain) > 1e-6
    assert "EasyCache - skipped" in server.log and "skipped 0/30" not in server.log.rsplit("EasyCache - ", 1)[1][:20]


@pytest.mark.parametrize("freenoise", [False, True])
def test_context_windows_that_cover_everything(server, saved_latent, error, freenoise):
    """One window longer than the video changes nothing (text and ofs are not sliced by accident)."""
    inputs = {**CASES["ContextWindowsManual"], "context_length": 8, "freenoise": freenoise}
    plain = saved_latent(server, server.run(base_graph()))
    windowed = saved_latent(server, server.run(patched_model(base_graph(), "ContextWindowsManual", **inputs)))
    assert error(windowed, plain) <= 1e-5


def test_lora(server, saved_latent, lora, error):
    plain = saved_latent(server, server.run(base_graph()))
    inputs = {"lora_name": lora, "strength_model": 1.0}
    with_lora = saved_latent(server, server.run(patched_model(base_graph(), "LoraLoaderModelOnly", **inputs)))
    assert error(with_lora, plain) > 1e-3
    assert "lora key not loaded" not in server.log
    off = patched_model(base_graph(), "LoraLoaderModelOnly", **{**inputs, "strength_model": 0.0})
    assert error(saved_latent(server, server.run(off)), plain) == 0


@pytest.fixture(scope="module")
def other_model(tiny_pipelines, comfyui_tree):
    """A second 5B pipeline with other weights."""
    from cogx.scripts import tiny_pipeline

    folder = tiny_pipelines / "Other5B"
    tiny_pipeline.make(folder, comfyui_tree / "comfy" / "text_encoders" / "t5_tokenizer", "5B", seed=1)
    return folder.name


def merged(graph, other, ratio):
    graph = patched_model(graph, "ModelMergeSimple", model1=["1", 0], model2=["21", 0], ratio=ratio)
    del graph["20"]["inputs"]["model"]
    graph["21"] = {"class_type": "CogXLoadModel", "inputs": {
        "checkpoint": f"{other}/transformer", "weight_dtype": "auto", "quantization": "none"}}
    return graph


def test_model_merge(server, saved_latent, other_model, error):
    """Ratio 1 is the first model, 0 the second, between them neither."""
    first = saved_latent(server, server.run(base_graph()))
    second = saved_latent(server, server.run(_with_model(base_graph(), other_model)))
    one, zero, half = (saved_latent(server, server.run(merged(base_graph(), other_model, r))) for r in (1.0, 0.0, 0.5))
    assert error(one, first) <= 1e-5 and error(zero, second) <= 1e-5
    assert error(half, first) > 1e-2 and error(half, second) > 1e-2


def _with_model(graph, other):
    """The graph with the transformer of another pipeline, everything else from the first."""
    graph = patched_model(graph, "CogXLoadModel", checkpoint=f"{other}/transformer", weight_dtype="auto",
                          quantization="none")
    del graph["20"]["inputs"]["model"]
    return graph


def test_saved_model_loads_again(server, other_model):
    """ModelSave's file, its key prefix included, is read by CogXLoadModel's code, weight for weight."""
    import shutil
    from pathlib import Path

    from cogx.model_loaders import load

    graph = {"1": {"class_type": "CogXLoadModel", "inputs": {
        "checkpoint": f"{other_model}/transformer", "weight_dtype": "auto", "quantization": "none"}},
        "2": {"class_type": "ModelSave", "inputs": {"model": ["1", 0], "filename_prefix": "saved/model"}}}
    server.run(graph)
    file = next((server.base / "output" / "saved").glob("model_*.safetensors"))
    again = load.load_model(str(file)).model.diffusion_model.state_dict()
    folder = Path(server.base) / "models" / "diffusers" / other_model / "transformer"
    expected = load.load_model(str(folder)).model.diffusion_model.state_dict()
    shutil.rmtree(file.parent)
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[key], expected[key]) for key in again)


@pytest.mark.parametrize("variant, dtype", [("5B", "fp32"), ("5B", "bf16"), ("1.5-5B", "fp32"), ("1.5-5B-I2V", "fp32")])
def test_train_lora(server, variant, dtype):
    """Two steps of core's LoRA training, on a sampled latent; the LoRA is saved and has our keys."""
    graph = base_graph(variant, steps=1)
    positive = ["2", 0]
    if variant.endswith("I2V"):
        graph = latent_only(image_to_video(variant))
        positive = ["4", 0]
    graph["20"] = {"class_type": "TrainLoraNode", "inputs": {
        "model": ["1", 0], "latents": ["5", 0], "positive": positive, "batch_size": 1, "grad_accumulation_steps": 1,
        "steps": 2, "learning_rate": 0.001, "rank": 2, "optimizer": "AdamW", "loss_function": "MSE", "seed": 0,
        "training_dtype": dtype, "lora_dtype": "fp32", "quantized_backward": False, "algorithm": "LoRA",
        "gradient_checkpointing": True, "checkpoint_depth": 1, "offloading": False, "existing_lora": "[None]",
        "bucket_mode": False, "bypass_mode": False}}
    save = {"lora": ["20", 0], "prefix": f"loras/{variant}-{dtype}", "steps": ["20", 2]}
    graph["21"] = {"class_type": "SaveLoRA", "inputs": save}
    server.run(graph)
    files = list((server.base / "output" / "loras").glob(f"{variant}-{dtype}_2_steps_*.safetensors"))
    from safetensors import safe_open

    with safe_open(files[0], framework="pt") as file:
        keys = list(file.keys())
        up = [key for key in keys if "attn1.to_q" in key and "up" in key]
        assert up and any(file.get_tensor(key).abs().sum() > 0 for key in up), "nothing was learnt"
    assert any("transformer_blocks.0.ff.net.2" in key for key in keys)


def test_core_samplers_need_no_node_of_ours(server, saved_latent, error):
    """KSampler against CogXSampler with core's sampler and schedule; SamplerCustomAdvanced with ours."""
    ours = text_to_video("5B", steps=6, sampler="euler", schedule="normal", dynamic_cfg=False)
    expected = saved_latent(server, server.run(latent_only(ours)))
    core = with_core_ksampler(base_graph(), "euler", "normal", steps=6)
    assert error(saved_latent(server, server.run(core)), expected) <= 1e-6

    exact = saved_latent(server, server.run(base_graph(steps=6)))
    graph = base_graph(steps=6)
    graph["5"] = {"class_type": "SamplerCustomAdvanced", "inputs": {
        "noise": ["11", 0], "guider": ["12", 0], "sampler": ["13", 0], "sigmas": ["14", 0], "latent_image": ["4", 0]}}
    graph["11"] = {"class_type": "RandomNoise", "inputs": {"noise_seed": 42}}
    graph["12"] = {"class_type": "CFGGuider", "inputs": {
        "model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], "cfg": 6.0}}
    graph["13"] = {"class_type": "CogXSamplerSelect", "inputs": {"sampler": "cogvideox_ddim"}}
    graph["14"] = {"class_type": "CogXScheduler", "inputs": {
        "model": ["1", 0], "steps": 6, "schedule": "trailing", "denoise": 1.0}}
    assert error(saved_latent(server, server.run(graph)), exact) <= 1e-6


def test_dynamic_guidance_node(server, saved_latent, error):
    ours = latent_only(text_to_video("5B", steps=6, sampler="euler", schedule="simple", dynamic_cfg=True))
    core = with_core_ksampler(patched_model(base_graph(), "CogXDynamicGuidance", steps=6), "euler", "simple", steps=6)
    assert error(saved_latent(server, server.run(core)), saved_latent(server, server.run(ours))) <= 1e-6


@pytest.mark.parametrize("variant", ["5B", "1.5-5B"])
def test_core_ksampler_with_denoise_and_mask(server, saved_latent, error, variant):
    """An encoded video, a mask over its right half, denoise 0.6: the left half stays, the right changes."""
    graph = base_graph(variant, steps=2)
    graph["30"] = {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 48, "height": 64}}
    graph["31"] = {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 96, "height": 64}}
    graph["32"] = {"class_type": "MaskComposite", "inputs": {
        "destination": ["31", 0], "source": ["30", 0], "x": 48, "y": 0, "operation": "add"}}
    graph["33"] = {"class_type": "SetLatentNoiseMask", "inputs": {"samples": ["5", 0], "mask": ["32", 0]}}
    second = with_core_ksampler(graph, "euler", "simple", steps=6, denoise=0.6)["5"]
    second["inputs"]["latent_image"] = ["33", 0]
    graph["34"] = second
    graph["35"] = {"class_type": "SaveLatent", "inputs": {"samples": ["34", 0], "filename_prefix": "latents/masked"}}
    run = server.run(graph)
    before, after = saved_latent(server, run, "9"), saved_latent(server, run, "35")
    assert error(after[..., :5], before[..., :5]) <= 1e-3
    assert error(after[..., 7:], before[..., 7:]) > 0.05


@pytest.mark.parametrize("decode, inputs", [
    ("VAEDecode", {}),
    ("VAEDecodeTiled", {"tile_size": 64, "overlap": 32, "temporal_size": 16, "temporal_overlap": 4}),
])
@pytest.mark.parametrize("frames, expected", [(17, 17), (9, 9), (1, 1)])
def test_core_decode(server, video_of, decode, inputs, frames, expected):
    graph = text_to_video("5B", steps=1)
    graph["4"]["inputs"]["length"] = frames
    graph["6"] = {"class_type": decode, "inputs": {"samples": ["5", 0], "vae": ["1", 2], **inputs}}
    video = video_of(server, server.run(graph))
    assert video["frames"] == expected and video["size"] == (96, 64)


def test_core_encode_and_back(server, saved_latent, video_of):
    """VAEEncode reads a batch of images as one video."""
    graph = text_to_video("5B", steps=1)
    graph["10"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["6", 0], "vae": ["1", 2]}}
    graph["11"] = {"class_type": "VAEEncodeTiled", "inputs": {
        "pixels": ["6", 0], "vae": ["1", 2], "tile_size": 64, "overlap": 32, "temporal_size": 64,
        "temporal_overlap": 8}}
    for node, source in (("12", "10"), ("13", "11")):
        save = {"samples": [source, 0], "filename_prefix": "latents/encoded"}
        graph[node] = {"class_type": "SaveLatent", "inputs": save}
    run = server.run(graph)
    assert saved_latent(server, run, "12").shape == saved_latent(server, run, "13").shape == TINY_SHAPE


def test_tiling_of_our_decode(server, error):
    """'on' makes tiles, which is close to the exact decode and not equal; 'auto' on a CPU is exact."""
    import numpy as np
    from PIL import Image

    def frames(tiling):
        graph = text_to_video("5B", steps=1)
        graph["6"]["inputs"].update(tiling=tiling, tile_width=64, tile_height=64, tile_overlap=32)
        graph["7"] = {"class_type": "SaveImage", "inputs": {"images": ["6", 0], "filename_prefix": f"tiles/{tiling}"}}
        del graph["8"]
        run = server.run(graph)
        images = [np.asarray(Image.open(server.output(run, "7", i))) for i in range(17)]
        return torch.from_numpy(np.stack(images)).double()

    exact, auto, tiled = frames("off"), frames("auto"), frames("on")
    assert torch.equal(exact, auto)
    assert 1e-3 < error(tiled, exact) < 0.2


@pytest.mark.parametrize("variant", ["5B", "1.5-5B"])
def test_batch_equals_one_by_one(server, saved_latent, error, variant):
    """The first video of a batch of two is the video of a batch of one: its noise is the same."""
    graph = base_graph(variant)
    single = saved_latent(server, server.run(graph))
    graph["4"]["inputs"]["batch_size"] = 2
    batch = saved_latent(server, server.run(graph))
    assert error(batch[:1], single) <= 1e-4 and error(batch[1:], single) > 0.1


def test_core_merges_reach_the_learned_positions(tiny_pipelines):
    """Core's own merge node, and its LoRA loader with a difference of the table; saved under the published key."""
    import comfy.lora
    import comfy.sd
    from cogx.model_loaders.load import load_model
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    key = "diffusion_model.patch_embed.pos_embedding.weight"
    one, two = (load_model(str(tiny_pipelines / "5B-I2V" / "transformer"), "fp32") for _ in range(2))
    table = one.model.diffusion_model.patch_embed.pos_embedding.weight
    before = table.clone()
    two.model.diffusion_model.patch_embed.pos_embedding.weight.data.fill_(1.0)
    merged, = ModelMergeSimple().merge(one, two, 0.25)
    merged.patch_model()
    after = merged.model.diffusion_model.patch_embed.pos_embedding.weight
    assert torch.allclose(after, 0.25 * before + 0.75, atol=1e-6)
    saved = merged.state_dict_for_saving()
    assert torch.allclose(saved["model.diffusion_model.patch_embed.pos_embedding"], after)
    assert not any(name.endswith("pos_embedding.weight") for name in saved)
    merged.unpatch_model()
    difference = {"diffusion_model.patch_embed.pos_embedding.diff": torch.ones_like(before)}
    patched, _ = comfy.sd.load_lora_for_models(one, None, difference, 0.5, 0)
    assert list(patched.patches) == [key]
    patched.patch_model()
    assert torch.allclose(patched.model.diffusion_model.patch_embed.pos_embedding.weight, before + 0.5, atol=1e-6)
    patched.unpatch_model()
