"""What the doctor says of good and bad files, and what the loaders' errors borrow from it."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import pytest
import torch
from cogx.model_loaders import doctor, environment, load
from cogx.model_loaders.doctor import examine, identify, what_it_is
from cogx.models.cogvideox.transformer import CogVideoXTransformer
from cogx.models.specs import PUBLISHED, SpecError
from cogx.scripts.tiny_pipeline import VARIANTS, tiny_transformer
from cogx.tests import quantized_writers as writers
from cogx.tests.layout_writers import core_transformer, sat_transformer
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"transformer": "CogVideoX Load Model", "vae": "CogVideoX Load VAE",
         "text_encoder": "CogVideoX Load Text Encoder"}


def weights_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_good_pipelines(tiny_pipelines, variant):
    report = examine(tiny_pipelines / variant)
    text = "\n".join(report.lines)
    assert report.problems == 0 and f"what: CogVideoX {variant} transformer, 0." in text, text
    assert "node: CogVideoX Load Pipeline" in text and text.count("memory: ") == 3 and "problem" not in text


@pytest.mark.parametrize("part", PARTS)
def test_a_part_alone_whatever_its_name(tiny_pipelines, tmp_path, part):
    shutil.copy(weights_of(tiny_pipelines / "5B-I2V" / part), tmp_path / "anything.safetensors")
    for path in (tiny_pipelines / "5B-I2V" / part, tmp_path / "anything.safetensors"):
        if part == "transformer" and path.is_file():
            continue  # its table of 96x64 positions needs the config
        report = examine(path)
        assert report.problems == 0 and f"  node: {PARTS[part]}" in report.lines, report.lines


def full_size_file(path: Path) -> Path:
    """A 5B transformer as far as its header goes; the disk holds only that."""
    with torch.device("meta"):
        shapes = {key: list(value.shape) for key, value in CogVideoXTransformer(
            PUBLISHED["5B"].transformer, torch.bfloat16, "meta", torch.nn).state_dict().items()}
    header, end = {}, 0
    for key, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + end)
    return path


def machine(monkeypatch: pytest.MonkeyPatch, vram: float, ram: float, cpu: bool = False) -> None:
    management = comfy.model_management
    monkeypatch.setattr(management, "is_device_cpu", lambda device: cpu)
    monkeypatch.setattr(management, "get_torch_device", lambda: torch.device("cpu" if cpu else "cuda"))
    monkeypatch.setattr(management, "get_total_memory",
                        lambda device: ram if device == torch.device("cpu") else vram)
    monkeypatch.setattr(management, "unet_dtype", lambda **kwargs: torch.bfloat16)


def test_memory_of_the_full_size(tmp_path, monkeypatch):
    machine(monkeypatch, 24e9, 64e9)
    text = "\n".join(examine(full_size_file(tmp_path / "x.safetensors")).lines)
    assert "what: CogVideoX 5B transformer, 5.57 billion parameters, bf16, 11.1 GB" in text
    assert ("weights 11.1 GB (in bf16); a step at 720x480, 49 frames 1.0 GB more, 2.0 GB with both prompts at once. "
            "Fits.") in text


@pytest.mark.parametrize("vram, ram, cpu, words", [
    (12e9, 64e9, False, "Fits."),
    (8e9, 64e9, False, "Fits with part of the weights in RAM, which is slower."),
    (8e8, 64e9, False, "Does not fit into 0.8 GB and 64.0 GB RAM: a smaller model, size or length."),
    (8e9, 8e9, False, "Does not fit into 8.0 GB and 8.0 GB RAM: a smaller model, size or length."),
    (12e9, 12e9, True, "Fits."),
    (8e9, 8e9, True, "Does not fit into 8.0 GB: a smaller model, size or length."),
])
def test_the_same_on_different_machines(monkeypatch, vram, ram, cpu, words):
    machine(monkeypatch, vram, ram, cpu)
    assert doctor.verdict(10e9, 1e9, can_tile=False) == words


def test_a_decode_that_is_too_large_goes_in_tiles(monkeypatch):
    machine(monkeypatch, 8e9, 64e9)
    assert doctor.verdict(1e9, 20e9, can_tile=True).startswith("Fits in tiles only")


def test_damage_is_named(tiny_pipelines, tmp_path):
    folder = shutil.copytree(tiny_pipelines / "5B", tmp_path / "5B")
    weights = weights_of(folder / "transformer")
    weights.write_bytes(weights.read_bytes()[:-100])
    shutil.rmtree(folder / "vae")
    text_encoder = weights_of(folder / "text_encoder")
    tensors = load_file(text_encoder)
    tensors.pop("encoder.final_layer_norm.weight")
    save_file(tensors, text_encoder)
    report = examine(folder)
    problems = [line for line in report.lines if "problem: " in line]
    assert report.problems == len(problems) == 3
    for line, words in zip(problems, ("is truncated: expected", "Missing folder", "1 of "), strict=True):
        assert words in line
    assert "node: CogVideoX Load Pipeline" not in "\n".join(report.lines)
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert any("expected a CogVideoX pipeline, got FluxPipeline" in line for line in examine(folder).lines)
    assert examine(tmp_path / "none").problems == 1


def test_what_may_be_a_control_model(tmp_path):
    """Fun Pose and Control take 32 channels too, and their pipelines' names begin as ours do."""
    for variant, doubted in (("5B", True), ("2B", True), ("5B-I2V", False), ("1.5-5B-I2V", False)):
        tiny_transformer(variant, in_channels=32).save_pretrained(tmp_path / variant / "transformer")
        took = load.find_model(tmp_path / variant / "transformer").took
        assert ("or it is a control model, which this pack does not run" in took) == doubted, took
    for name in ("CogVideoX_Fun_Pipeline_Inpaint", "CogVideoXFunControlPipeline", "CogVideoXControlnetPipeline"):
        (tmp_path / "5B" / "model_index.json").write_text(json.dumps({"_class_name": name}))
        with pytest.raises(SpecError, match=f"got {name}, which needs control or in-painting"):
            load.check_pipeline(tmp_path / "5B")


def test_parts_without_the_index(tiny_pipelines, tmp_path):
    shutil.copytree(tiny_pipelines / "5B" / "vae", tmp_path / "x" / "vae")
    report = examine(tmp_path / "x")
    assert report.problems == 0 and "parts load one by one" in report.lines[1]


@pytest.mark.parametrize("keys, words", [
    (["transformer.transformer_blocks.0.attn1.to_q.lora_A.weight"],
     "It seems to be a LoRA (load it with CogVideoX Load LoRA)."),
    (["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"], "It seems to be Flux."),
    (["something.weight"], r"Its tensors are ['something.weight'] ..."),
])
def test_other_models_files(tmp_path, keys, words):
    file = tmp_path / "cogvideox_5b.safetensors"
    save_file({key: torch.zeros(2) for key in keys}, file)
    with pytest.raises(SpecError) as error:
        identify(file)
    assert "is no part of a CogVideoX model" in str(error.value) and words in str(error.value)
    assert doctor.is_other_model(file) and not what_it_is(file)  # the loader's own error names the family


def test_other_layouts_and_quantized_files(tmp_path):
    """Each is one of ours, with its layout and formats; a language model in GGUF is not, nor is it a problem."""
    model = tiny_transformer("5B")
    core, sat, gguf = (tmp_path / name for name in ("1.safetensors", "2.pt", "3.gguf"))
    writers.scaled_fp8(core, core_transformer(model), lambda key: key.endswith(".q.weight"))
    torch.save({"module": sat_transformer(model)}, sat)
    writers.write_gguf(gguf, model.state_dict(), lambda key: key.endswith("to_q.weight"))
    for path, words in ((core, "float8_e4m3fn, 0.7 MB, ComfyUI core layout"), (sat, "authors (SAT) layout"),
                        (gguf, "parameters, GGUF Q8_0, 0.")):
        assert identify(path).kind.word == "transformer" and words in identify(path).what
        assert not doctor.is_other_model(path) and examine(path).problems == 0
    assert [identify(path).weights for path in (core, gguf)] == [path.stat().st_size for path in (core, gguf)]
    llama = writers.write_gguf(tmp_path / "4.gguf", {"blk.0.attn_q.weight": torch.zeros(32, 32)}, lambda key: True,
                               architecture="llama")
    save_file({"model.layers.0.mlp.up_proj.SCB": torch.zeros(2)}, tmp_path / "5.safetensors")  # by bitsandbytes
    assert doctor.is_other_model(llama) and doctor.is_other_model(tmp_path / "5.safetensors")


def test_the_survey_counts_what_is_not_ours(tiny_pipelines, tmp_path, monkeypatch):
    files = {"vae": tmp_path / "flux.safetensors", "text_encoders": tmp_path / "t5.safetensors"}
    save_file({"double_blocks.0.x": torch.zeros(2)}, files["vae"])
    shutil.copy(weights_of(tiny_pipelines / "5B" / "text_encoder"), files["text_encoders"])
    (tmp_path / doctor.UNFINISHED / "CogVideoX-5b").mkdir(parents=True)
    shutil.copytree(tiny_pipelines / "2B", tmp_path / "2B")
    (tmp_path / "2B" / doctor.UNFINISHED / "CogVideoX-2b").mkdir(parents=True)  # as in a folder on another disk
    folders = doctor.folders
    monkeypatch.setattr(folders, "pipeline_roots", lambda: [tmp_path])
    monkeypatch.setattr(folders.folder_paths, "get_filename_list",
                        lambda category: [files[category].name] if category in files else [])
    monkeypatch.setattr(folders.folder_paths, "get_full_path", lambda category, name: str(files[category]))
    reports = doctor.survey()
    assert [report.lines[0] for report in reports[:-1]] == [
        str(tmp_path / "2B"), str(folders.EMBEDDED), str(files["text_encoders"])]
    assert reports[-1].lines[0].startswith("3 CogVideoX models and parts; 1 files of other models")
    assert "['CogVideoX-2b', 'CogVideoX-5b']. Download them again" in reports[-1].lines[1]


def test_the_loaders_say_what_a_wrong_file_is(tiny_pipelines, tmp_path, monkeypatch):
    from cogx.nodes.load import LoadModel, LoadPipeline, LoadTextEncoder, LoadVAE

    vae, text = (tiny_pipelines / "5B" / part for part in ("vae", "text_encoder"))
    cases = [(LoadModel, "checkpoint", weights_of(vae), "It is a CogVideoX VAE, 0.20 million parameters, fp32, 0.8 MB: "
              "take 'CogVideoX Load VAE'."),
             (LoadVAE, "vae", text, "fp32, 4.2 MB: take 'CogVideoX Load Text Encoder'"),
             (LoadTextEncoder, "text_encoder", weights_of(vae), "It is a CogVideoX VAE")]
    for node, name, path, words in cases:
        monkeypatch.setattr("cogx.nodes.load.folders.component_path", lambda part, chosen, path=path: path)
        assert words in str(node.validate_inputs(**{name: "x"}))
    broken = shutil.copytree(tiny_pipelines / "5B", tmp_path / "5B")
    shutil.rmtree(broken / "transformer")
    shutil.copytree(vae, broken / "transformer")
    monkeypatch.setattr("cogx.nodes.load.folders.pipeline_path", lambda chosen: broken)
    assert "It is a CogVideoX VAE" in str(LoadPipeline.validate_inputs(pipeline="x"))


def test_packages_against_the_requirements():
    assert environment.package_problems((ROOT / "requirements.txt").read_text()) == []
    assert environment.package_problems("torch>=99 # a comment\n\nnosuchpackage>=1\nsafetensors") == [
        f"torch is {metadata.version('torch')}: expected torch>=99",
        "nosuchpackage is missing: expected nosuchpackage>=1"]
    assert environment.comfyui_problems("0.24.1") == []
    assert environment.comfyui_problems("0.3.9") == ["ComfyUI is 0.3.9: expected >=0.24.0"]


def test_the_card_and_what_it_computes_in(monkeypatch):
    fake = SimpleNamespace(
        get_torch_device=lambda: "cuda:0", is_device_cpu=lambda device: False, should_use_fp16=lambda device: True,
        should_use_bf16=lambda device: False, supports_fp8_compute=lambda device: False,
        get_torch_device_name=lambda device: "cuda:0 Card", get_free_memory=lambda device: 7e9,
        get_total_memory=lambda device: 8e9)
    monkeypatch.setattr(environment.comfy, "model_management", fake)
    assert environment._device_line() == "device: cuda:0 Card, computes in fp32, fp16; 7.0 of 8.0 GB free"


def test_the_command(comfyui_tree, tiny_pipelines, tmp_path):
    """In its own process, as dev.py runs it: a good folder of a model path, and then also a bad file."""
    base = tmp_path / "base"
    (base / "models" / "diffusers").mkdir(parents=True)
    shutil.copytree(tiny_pipelines / "2B", base / "models" / "diffusers" / "Mädchen 2B")
    command = [sys.executable, str(ROOT / "scripts" / "doctor.py"), "--comfyui", str(comfyui_tree)]
    done = subprocess.run([*command, "--base-directory", str(base)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for words in ("ComfyUI 0.", f"torch {torch.__version__}", "RAM: ", "CogVideoX 2B transformer", "Mädchen 2B",
                  "CogX-Demo", "No problems found."):
        assert words in done.stdout, done.stdout
    done = subprocess.run([sys.executable, str(ROOT / "scripts" / "doctor.py"), "--comfyui", str(tmp_path)],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "there is no ComfyUI in" in done.stderr
