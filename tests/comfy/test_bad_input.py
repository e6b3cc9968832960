"""Bad input: one clear error each (expected, got, remedy), at validation if it can be known then. The server lives."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from cogx.tests.comfy.graphs import image_to_video, latent_only, text_to_video, video_to_video, with_core_ksampler
from cogx.tests.comfy_server import PromptError
from safetensors.torch import load_file, save_file


@pytest.fixture()
def damaged(server, tiny_pipelines):
    """A copy of the tiny 5B pipeline to damage; its name is what the loader node takes."""
    folder = tiny_pipelines / "Damaged"
    shutil.copytree(tiny_pipelines / "5B", folder)
    yield folder
    shutil.rmtree(folder)


def refused(server, graph, message: str) -> None:
    """At validation: nothing runs."""
    with pytest.raises(PromptError, match=message) as caught:
        server.queue(graph)
    assert caught.value.details["node_errors"]
    assert server.alive()


def failed(server, graph, message: str) -> None:
    """While running."""
    with pytest.raises(PromptError, match=message) as caught:
        server.run(graph)
    assert "exception_message" in caught.value.details
    assert server.alive()


def remove(name):
    return lambda folder: (folder / name).unlink()


def truncate(name):
    def damage(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: len(data) // 2])

    return damage


def edit(name, **values):
    def damage(folder):
        config = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**config, **values}))

    return damage


def drop(name):
    return lambda folder: shutil.rmtree(folder / name)


def reshape(name, key):
    def damage(folder):
        weights = load_file(folder / name)
        weights[key] = torch.zeros(3, 3)
        save_file(weights, folder / name)

    return damage


TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("damage, message", [
    (remove(TRANSFORMER), r"transformer: expected a \.safetensors file.*Download the weights"),
    (remove("transformer/config.json"), r"Missing file: .*transformer/config\.json\. Download it again"),
    (remove("text_encoder/model.safetensors"), r"text_encoder: expected a \.safetensors file"),
    (remove("vae/config.json"), r"Missing file: .*vae/config\.json"),
    (drop("vae"), r"Missing folder: .*vae\. Download the whole pipeline folder again"),
    (drop("text_encoder"), r"Missing folder: .*text_encoder"),
    (truncate(TRANSFORMER), r"is truncated: expected \d+ bytes, got \d+\. Download it again"),
    (truncate("vae/diffusion_pytorch_model.safetensors"), r"is truncated: expected"),
    (edit("model_index.json", _class_name="FluxPipeline"), r"expected a CogVideoX pipeline, got FluxPipeline"),
    (edit("transformer/config.json", _class_name="FluxTransformer2DModel"),
     r"expected _class_name CogVideoXTransformer3DModel, got FluxTransformer2DModel"),
    (edit("vae/config.json", _class_name="AutoencoderKL"), r"expected _class_name AutoencoderKLCogVideoX"),
    (edit("transformer/config.json", num_layers=100_000), r"expected 100000 layers .* got 2 in the weights"),
    (edit("transformer/config.json", num_attention_heads="four"), r"num_attention_heads is 'four', expected a whole"),
    (edit("transformer/config.json", num_attention_heads=-4), r"num_attention_heads is -4, expected a whole number"),
    (edit("vae/config.json", block_out_channels="x"), r"block_out_channels is 'x', expected a list of whole numbers"),
    (edit("vae/config.json", norm_num_groups=3), r"norm_num_groups 3 does not divide block_out_channels"),
    (edit("vae/config.json", scaling_factor=None), r"scaling_factor is None, expected a number"),
    (edit("vae/config.json", scaling_factor=0), r"scaling_factor is 0, expected a number"),
    (edit("vae/config.json", layers_per_block=2), r"\d+ of \d+ weights are missing"),
    (edit("scheduler/scheduler_config.json", beta_start="x"), r"beta_start is 'x', expected a number"),
    (edit("scheduler/scheduler_config.json", num_train_timesteps=10), r"expected num_train_timesteps 1000, got 10"),
    (edit("text_encoder/config.json", feed_forward_proj="silu"), r"expected feed_forward_proj to be one of"),
    (edit("vae/config.json", block_out_channels=[8, 8, 16, 32]), r"(have another shape|are missing)"),
    (edit("text_encoder/config.json", d_model=64), r"config\.json says d_model 64, the weights 32"),
    (reshape(TRANSFORMER, "norm_final.weight"), r"norm_final\.weight: expected \[64\], got \[3, 3\]"),
    (edit("scheduler/scheduler_config.json", prediction_type="epsilon"), r"expected prediction_type v_prediction"),
])
def test_damaged_pipeline(server, damaged, damage, message):
    damage(damaged)
    refused(server, text_to_video("Damaged"), message)


def test_damaged_tokenizer(server, damaged):
    (damaged / "tokenizer" / "tokenizer.json").write_text("{")
    failed(server, text_to_video("Damaged"), r"The tokenizer in .*tokenizer cannot be read .*Download it again")


def test_hidden_files_of_other_systems_do_not_matter(server, damaged):
    (damaged / "transformer" / "._diffusion_pytorch_model.safetensors").write_bytes(b"macOS")
    server.run(latent_only(text_to_video("Damaged", steps=1)))


def test_unknown_pipeline_says_where_to_put_it(server):
    refused(server, text_to_video("NoSuchModel"), r"'NoSuchModel' not found: expected a folder with "
            r"model_index\.json in .*Put the whole Hugging Face folder there")


@pytest.mark.parametrize("node, inputs, message", [
    ("4", {"length": 48}, r"48 frames: CogVideoX 1\.0 needs 8N\+1 .*nearest: 41 or 49"),
    ("4", {"width": 100}, r"width 100: CogVideoX needs a multiple of 16; nearest: 96 or 112"),
    ("4", {"height": 65}, r"height 65: .*nearest: 64 or 80"),
    ("4", {"length": 0}, r"length 0: expected 1 to"),
    ("1", {"weight_dtype": "fp16"}, r"weight_dtype fp16: 5B was trained in bf16 and overflows .*choose auto"),
    ("1", {"weight_dtype": "int3"}, r"weight_dtype 'int3': expected one of \['auto', 'bf16', 'fp16', 'fp32'\]"),
    ("5", {"sampler": "no_such"}, r"not in"),
    ("4", {"length": "many"}, r"length 'many': expected a whole number"),
    ("6", {"tile_overlap": 300}, r"tile_overlap 300: expected 0 to 239; nearest: 239"),
    ("6", {"tile_overlap": -8}, r"tile_overlap -8: expected 0 to 239; nearest: 0"),
    ("6", {"tile_overlap": 64, "tile_width": 65}, r"tile_overlap 64: expected 0 to 63"),
    ("1", {"pipeline": "../diffusers/5B"}, r"'\.\./diffusers/5B' not found"),
    ("1", {"pipeline": "/etc"}, r"'/etc' not found"),
    ("1", {"pipeline": 5}, r"'5' not found"),
    ("1", {"pipeline": "x" * 5000}, r"x' not found"),
])
def test_refused_at_validation(server, node, inputs, message):
    graph = text_to_video("5B")
    graph[node]["inputs"].update(inputs)
    refused(server, graph, message)


def test_fp16_of_1_5_is_refused(server):
    graph = text_to_video("1.5-5B")
    graph["1"]["inputs"]["weight_dtype"] = "fp16"
    refused(server, graph, "1.5-5B was trained in bf16 and overflows to a black video in fp16")


def test_explicit_timesteps_are_checked(server):
    graph = latent_only(text_to_video("5B"))
    graph["10"] = {"class_type": "CogXScheduler", "inputs": {
        "model": ["1", 0], "steps": 4, "schedule": "trailing", "denoise": 1.0, "timesteps": "100,200"}}
    graph["11"] = {"class_type": "SamplerCustom", "inputs": {
        "model": ["1", 0], "add_noise": True, "noise_seed": 0, "cfg": 6.0, "positive": ["2", 0], "negative": ["3", 0],
        "sampler": ["12", 0], "sigmas": ["10", 0], "latent_image": ["4", 0]}}
    graph["12"] = {"class_type": "CogXSamplerSelect", "inputs": {"sampler": "cogvideox_ddim"}}
    graph["9"]["inputs"]["samples"] = ["11", 0]
    refused(server, graph, r"timesteps '100,200': expected falling numbers")


def test_frames_of_1_0_on_1_5(server):
    """Legal for 1.0 and not for 1.5: known once the model is there, and before the sampling."""
    graph = text_to_video("1.5-5B")
    graph["4"]["inputs"]["length"] = 25
    failed(server, graph, r"25 frames: CogVideoX 1\.5 needs 16N\+1 .*nearest: 17 or 33")


def test_other_size_of_learned_positions(server):
    graph = text_to_video("5B-I2V")
    graph["4"]["inputs"].update(width=112)
    failed(server, graph, r"112x64: 5B-I2V has learned positions for 96x64 only; set width 96 and height 64")


def test_same_without_the_check_in_the_latent_node(server):
    graph = text_to_video("5B-I2V")
    graph["4"]["inputs"].update(width=112)
    del graph["4"]["inputs"]["model"]
    failed(server, graph, r"learned positions for 96x64 only")


@pytest.fixture()
def foreign_latent(server):
    """A LATENT file of an image model: [1, 4, 8, 12], not empty."""
    path = server.base / "input" / "foreign.latent"
    path.parent.mkdir(exist_ok=True)
    save_file({"latent_tensor": torch.ones(1, 4, 8, 12), "latent_format_version_0": torch.tensor([])}, path)
    return {"class_type": "LoadLatent", "inputs": {"latent": "foreign.latent"}}


@pytest.mark.parametrize("core", [False, True], ids=["CogXSampler", "KSampler"])
def test_latent_of_another_model(server, foreign_latent, core):
    graph = text_to_video("5B", steps=2)
    graph["4"] = foreign_latent
    if core:
        graph = with_core_ksampler(graph, "euler", "simple")
    failed(server, latent_only(graph), r"belongs to another model: CogVideoX 5B needs \[batch, 16, frames")


def test_latent_of_another_model_in_decode(server, foreign_latent):
    graph = text_to_video("5B")
    graph["5"] = foreign_latent
    for key in "234":
        del graph[key]
    failed(server, graph, r"Expected a CogVideoX latent")


def test_empty_latent_of_another_node_becomes_ours(server, saved_latent):
    """Core turns an empty image latent into one of the model's kind: one frame."""
    graph = text_to_video("5B", steps=1)
    graph["4"] = {"class_type": "EmptyLatentImage", "inputs": {"width": 96, "height": 64, "batch_size": 1}}
    assert saved_latent(server, server.run(latent_only(graph))).shape == (1, 16, 1, 8, 12)


def test_clip_and_vae_of_another_family(server, tiny_pipelines):
    """A CLIP whose tokenizer is not ours, and core's own reading of a VAE."""
    graph = text_to_video("5B", steps=1)
    graph["1b"] = {"class_type": "VAELoader", "inputs": {"vae_name": "pixel_space"}}
    graph["6"]["inputs"]["vae"] = ["1b", 0]
    failed(server, graph, r"Expected a CogVideoX VAE, got \w+\. Load it with")


def test_nan_weights_stop_after_the_first_step(server, damaged):
    weights = load_file(damaged / TRANSFORMER)
    weights["proj_out.bias"][:] = float("nan")
    save_file(weights, damaged / TRANSFORMER)
    failed(server, text_to_video("Damaged", steps=3),
           r"The first step of CogVideoX 5B gave NaN or infinite values .* sampling stopped\. .*check the file")


def test_text_embedding_of_another_width(server, tiny_pipelines, damaged):
    """A T5 of another width than the transformer was trained with."""
    from cogx.scripts import tiny_pipeline

    tiny_pipeline.TEXT_DIM, width = 64, tiny_pipeline.TEXT_DIM
    try:
        tiny_pipeline.tiny_text_encoder().save_pretrained(damaged / "text_encoder")
    finally:
        tiny_pipeline.TEXT_DIM = width
    failed(server, text_to_video("Damaged", steps=1),
           r"has 64 values per token, CogVideoX 5B needs 32: it comes from another text encoder")


def test_image_given_to_a_text_model(server):
    graph = image_to_video("5B")
    failed(server, graph, r"The conditioning of this node holds an image, and CogVideoX 5B is a text-to-video model: "
           r"expected an image-to-video model\. Load CogVideoX-5b-I2V")
    del graph["4"]["inputs"]["model"]
    failed(server, graph, r"The positive conditioning holds an image, and CogVideoX 5B is a text-to-video model")


@pytest.mark.parametrize("variant", ["5B-I2V", "1.5-5B-I2V"])
@pytest.mark.parametrize("core", [False, True], ids=["CogXSampler", "KSampler"])
def test_text_alone_given_to_an_image_model(server, variant, core):
    graph = text_to_video(variant, steps=2)
    if core:
        graph = with_core_ksampler(graph, "euler", "simple")
    failed(server, graph, rf"The positive conditioning holds no image, and CogVideoX {variant} is an image-to-video "
           r"model: put the node 'CogVideoX Image to Video' \(CogXImageToVideo\) between the prompts and the sampler")


def test_image_on_the_positive_conditioning_only(server):
    graph = image_to_video("5B-I2V")
    graph["5"]["inputs"]["negative"] = ["3", 0]
    failed(server, graph, r"The negative conditioning holds no image, and CogVideoX 5B-I2V")


def test_no_image_at_all(server):
    refused(server, image_to_video("5B-I2V", start=None), r"No image: expected start_image, end_image or both")


@pytest.mark.parametrize("inputs, message", [
    ({"length": 48}, r"48 frames: CogVideoX 1\.0 needs 8N\+1 .*nearest: 41 or 49"),
    ({"width": 100}, r"width 100: CogVideoX needs a multiple of 16; nearest: 96 or 112"),
    ({"height": 0}, r"height 0: expected 16 to 4096; nearest: 16"),
])
@pytest.mark.parametrize("make", [image_to_video, lambda variant: video_to_video(variant, 0.5)], ids=["I2V", "V2V"])
def test_sizes_off_the_grid(server, make, inputs, message):
    graph = make("5B-I2V")
    graph["4"]["inputs"].update(inputs)
    refused(server, graph, message)


@pytest.mark.parametrize("variant, inputs, message", [
    ("5B-I2V", {"width": 112}, r"112x64: 5B-I2V has learned positions for 96x64 only; set width 96 and height 64"),
    ("1.5-5B-I2V", {"length": 25}, r"25 frames: CogVideoX 1\.5 needs 16N\+1 .*nearest: 17 or 33"),
])
def test_sizes_that_this_model_cannot_make(server, variant, inputs, message):
    failed(server, image_to_video(variant, **inputs), message)


@pytest.mark.parametrize("inputs, message", [
    ({"fit": "zoom"}, r"zoom.* not in"),
    ({"reference": "mine"}, r"mine.* not in"),
    ({"posterior": "median"}, r"median.* not in"),
])
def test_unknown_choices_of_the_image_node(server, inputs, message):
    refused(server, image_to_video("5B-I2V", **inputs), message)


def test_video_shorter_than_the_length(server):
    graph = video_to_video("5B", 0.5, length=89)
    failed(server, graph, r"The video has 81 frames: expected at least the length of 89\. Set length to 81 .CogVideoX "
           r"1\.0., or give a longer video")
    del graph["4"]["inputs"]["model"]
    failed(server, graph, r"Set length to 81 \(CogVideoX 1\.0\) or 81 \(CogVideoX 1\.5\)")


def test_rgba_image(server):
    """A picture with transparency goes on, and the node says what became of it. Load Image makes grey files RGB."""
    graph = image_to_video("5B-I2V")
    graph["12"] = {"class_type": "SolidMask", "inputs": {"value": 0.5, "width": 96, "height": 64}}
    graph["13"] = {"class_type": "JoinImageWithAlpha", "inputs": {"image": ["10", 0], "alpha": ["12", 0]}}
    graph["4"]["inputs"]["start_image"] = ["13", 0]
    text, = server.run(latent_only(graph)).outputs["4"]["text"]
    assert text.startswith("RGBA image (4 channels): what is transparent became black")


def test_end_image_on_a_model_that_was_not_trained_for_it(server):
    answer = server.run(latent_only(image_to_video("5B-I2V", end="cogx_end.jpg")))
    text, = answer.outputs["4"]["text"]
    assert text.startswith("end_image: none of the published CogVideoX models was trained with a last frame")
    assert "Image to video: end_image: none of the published" in server.log


def test_images_for_another_latent(server):
    graph = image_to_video("1.5-5B-I2V")
    graph["12"] = {"class_type": "CogXEmptyLatent", "inputs": {"width": 96, "height": 64, "length": 33,
                                                               "batch_size": 1}}
    graph["5"]["inputs"]["latent_image"] = ["12", 0]
    failed(server, graph, r"for 96x64 and 17 frames, the latent is for 96x64 and 33 frames: set the same width")
    graph["12"]["inputs"].update(width=112, length=17)
    failed(server, graph, r"for 96x64 and 17 frames, the latent is for 112x64 and 17 frames")


def test_different_numbers_of_start_and_end_images(server):
    graph = image_to_video("5B-I2V", end="cogx_end.jpg")
    graph["12"] = {"class_type": "ImageBatch", "inputs": {"image1": ["10", 0], "image2": ["11", 0]}}
    graph["13"] = {"class_type": "ImageBatch", "inputs": {"image1": ["12", 0], "image2": ["11", 0]}}
    graph["4"]["inputs"].update(start_image=["12", 0], end_image=["13", 0])
    failed(server, graph, r"2 start images and 3 end images: expected the same number of both, or one of either")


@pytest.mark.parametrize("make", [image_to_video, lambda variant: video_to_video(variant, 0.5)], ids=["I2V", "V2V"])
def test_vae_of_another_family_for_images(server, make):
    graph = make("5B-I2V")
    graph["1b"] = {"class_type": "VAELoader", "inputs": {"vae_name": "pixel_space"}}
    graph["4"]["inputs"]["vae"] = ["1b", 0]
    failed(server, graph, r"Expected a CogVideoX VAE, got \w+\. Load it with")


def test_pipeline_with_other_input_channels(server, damaged):
    edit("transformer/config.json", in_channels=33)(damaged)
    refused(server, text_to_video("Damaged"), r"has 33 input channels: expected 16 \(text to video\) or 32 \(image")
