"""LoRAs trained with peft on the demo model, in every layout: our merge against peft's own. And the node."""

from __future__ import annotations

import json
import re

import pytest
import torch
from cogx.model_loaders import load
from cogx.model_loaders.lora import LoraFile, _patches, load_lora
from cogx.model_loaders.lora_keys import Change
from cogx.model_loaders.lora_scale import Scale
from cogx.models.specs import SpecError
from cogx.tests.comfy import lora_files
from cogx.tests.comfy.graphs import latent_only, patched_model, text_to_video
from cogx.tests.comfy.quantized import chosen
from cogx.tests.comfy_server import PromptError
from cogx.tests.quantized_writers import write_gguf
from safetensors.torch import load_file, save_file

ONE = "transformer_blocks.3.attn1.to_k.weight"


@pytest.fixture(scope="module")
def model():
    return load.load_model(str(lora_files.DEMO), "fp32")


def lora_config(**values):
    from peft import LoraConfig

    settings = {"r": lora_files.RANK, "lora_alpha": lora_files.ALPHA, "target_modules": lora_files.ATTENTION}
    return LoraConfig(**{**settings, **values})


@pytest.fixture(scope="module")
def trained():
    return lora_files.train(lora_config)


def weights(patcher):
    """Every weight as ComfyUI merges it."""
    cpu = torch.device("cpu")
    return {key: patcher.patch_weight_to_device(f"diffusion_model.{key}", device_to=cpu, return_weight=True)
            for key, _ in patcher.model.diffusion_model.named_parameters()}


def check_merge(patcher, trained, error):
    """Every weight as peft merges it, the changed ones really changed."""
    ours = weights(patcher)
    assert ours.keys() == trained.merged.keys()
    assert error(trained.merged[ONE], trained.base[ONE]) > 1e-2, "the training changed too little to judge by"
    assert max(error(ours[key], trained.merged[key]) for key in ours) <= 1e-6


@pytest.mark.parametrize("layout", lora_files.LAYOUTS)
def test_layouts(model, trained, error, tmp_path, layout):
    path = lora_files.LAYOUTS[layout](trained, tmp_path)
    renamed = path.rename(path.with_stem("2B kohya")) if layout in ("core", "fun", "kohya") else path
    patched, report = load_lora(model, renamed, 1.0)
    check_merge(patched, trained, error)
    words = {"peft": "lora_alpha 2 in adapter_config.json", "diffusers": "lora_alpha 2 in its metadata",
             "diffusers_without_prefix": "lora_alpha 2 in bare.json", "finetrainers": "lora_alpha 2 in its metadata",
             "kohya": "scale 0.5 (alpha 2 in the file, rank 4) x strength 1 = 0.5", "fun": "2 keys of a text encoder",
             "sat": "scale 0.25 (rank 4; SAT trains with alpha 1)",
             "diffusers_in_half_scale": "the file does not say"}
    assert words.get(layout, "") in report
    assert "match nothing" not in report


# What else peft can train, saved by peft itself.
OTHERS = {
    "dora": ("LoraConfig", {"r": 4, "lora_alpha": 2, "use_dora": True}),
    "rslora": ("LoraConfig", {"r": 4, "lora_alpha": 3, "use_rslora": True}),
    "patterns": ("LoraConfig", {
        "r": 4, "lora_alpha": 2, "rank_pattern": {"to_q": 2, "transformer_blocks.1.attn1.to_k": 8},
        "alpha_pattern": {"to_v": 6, "transformer_blocks.1.attn1.to_k": 1}}),
    "convolution": ("LoraConfig", {"r": 4, "lora_alpha": 2,
                                   "target_modules": ["to_k", "patch_embed.proj", "proj_out"]}),
    "convolution_dora": ("LoraConfig", {"r": 4, "lora_alpha": 2, "use_dora": True,
                                        "target_modules": ["to_k", "patch_embed.proj"]}),
    "loha": ("LoHaConfig", {"r": 4, "alpha": 2}),
    "lokr": ("LoKrConfig", {"r": 4, "alpha": 2}),
    "lokr_full": ("LoKrConfig", {"r": 200, "alpha": 80}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_else_peft_trains(model, error, tmp_path, name):
    import peft

    kind, settings = OTHERS[name]
    settings = {"target_modules": lora_files.ATTENTION, **settings}
    trained = lora_files.train(lambda: getattr(peft, kind)(**settings), tmp_path)
    patched, report = load_lora(model, tmp_path / "adapter_model.safetensors", 1.0)
    check_merge(patched, trained, error)
    assert "match nothing" not in report


def test_dora_in_other_layouts(model, error, tmp_path):
    """dora_scale as LyCORIS writes it, [out, 1], also of a fused projection; half strength is half the way."""
    trained = lora_files.train(lambda: lora_config(use_dora=True))
    magnitudes = {module: roles["lora_magnitude_vector"][:, None] for module, roles in trained.tensors.items()}
    values = load_file(lora_files.kohya(trained, tmp_path))
    values |= {f"lora_unet_{module.replace('.', '_')}.dora_scale": value for module, value in magnitudes.items()}
    save_file(values, tmp_path / "x.safetensors")
    check_merge(load_lora(model, tmp_path / "x.safetensors", 1.0)[0], trained, error)
    half = weights(load_lora(model, tmp_path / "x.safetensors", 0.5)[0])[ONE]
    assert error(half, (trained.base[ONE] + trained.merged[ONE]) / 2) <= 1e-6

    values = load_file(lora_files.fused_diffusers(trained, tmp_path))
    for block in range(8):
        name = f"transformer_blocks.{block}.attn1"
        values[f"diffusion_model.{name}.to_qkv.dora_scale"] = torch.cat(
            [magnitudes[f"{name}.{third}"] for third in lora_files.ATTENTION[:3]])
        values[f"{name}.to_out.0.dora_scale"] = magnitudes[f"{name}.to_out.0"]
    save_file(values, tmp_path / "x.safetensors")
    check_merge(load_lora(model, tmp_path / "x.safetensors", 1.0)[0], trained, error)


@pytest.mark.parametrize("shape, expected", [((1, 6), slice(None)), ((12, 1), slice(4, 8)), ((12,), slice(4, 8))])
def test_magnitudes_of_a_fused_projection(shape, expected):
    """Of rows each part has its own, those of the columns are the same for all three."""
    tensors = {"up": torch.ones(12, 2), "down": torch.ones(2, 6), "magnitude": torch.arange(float(max(shape)))}
    tensors["magnitude"] = tensors["magnitude"].reshape(shape)
    change = Change("layer", {name: name for name in tensors}, third=1)
    patch, = _patches(change, LoraFile("x", tensors, {}), Scale(1.0, ""), torch.Size((4, 6))).values()
    assert torch.equal(patch.weights[1].flatten(), torch.arange(float(max(shape)))[expected])


def test_dora_is_streamed_whole(model, tmp_path):
    """What ComfyUI's memory manager sets aside for a patch covers all three tensors, and it can rebuild the adapter."""
    import comfy.lora
    from comfy.memory_management import vram_aligned_size

    trained = lora_files.train(lambda: lora_config(use_dora=True), tmp_path, steps=1)
    patched, _ = load_lora(model, tmp_path / "adapter_model.safetensors", 1.0)
    adapter = patched.patches[f"diffusion_model.{ONE}"][0][1]
    size = [0]
    again = comfy.lora.prefetch_prepared_value(adapter, size, None, None, False)
    assert size[0] == sum(map(vram_aligned_size, trained.tensors[ONE.removesuffix(".weight")].values()))
    assert type(again) is type(adapter) and torch.equal(again.weights[1], adapter.weights[1])


def test_strengths_and_chains(model, trained, error, tmp_path):
    """0 changes nothing to the bit, negative takes away, several add up; the model that goes in stays as it is."""
    path = lora_files.kohya(trained, tmp_path)
    base, change = trained.base[ONE], trained.merged[ONE] - trained.base[ONE]
    once, _ = load_lora(model, path, 0.75)
    twice, _ = load_lora(once, path, -1.5)
    assert error(weights(once)[ONE], base + 0.75 * change) <= 1e-6
    assert error(weights(twice)[ONE], base - 0.75 * change) <= 1e-6
    off, _ = load_lora(model, path, 0.0)
    assert all(torch.equal(value, trained.base[key]) for key, value in weights(off).items())
    assert all(torch.equal(value, trained.base[key]) for key, value in weights(model).items())


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_core_loader(model, trained, error, tmp_path, prefix):
    """LoraLoaderModelOnly's code on our MODEL, for the names that core maps by itself."""
    import comfy.sd

    values = load_file(lora_files.kohya(trained, tmp_path))
    if prefix != "lora_unet_":
        values = {f"{prefix}{module}.{role}": values[f"lora_unet_{module.replace('.', '_')}.{role}"]
                  for module in trained.tensors for role in ("lora_down.weight", "lora_up.weight", "alpha")}
    check_merge(comfy.sd.load_lora_for_models(model, None, values, 1.0, 0.0)[0], trained, error)


# --- quantized models ---


def quantized_by_comfyui(format_name):
    """The demo model with the projections of its blocks quantized by ComfyUI's own operations."""
    import comfy.ops
    from cogx.models.cogvideox.base_model import CogVideoXConfig
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    def make(folder):
        component = load.find_model(lora_files.DEMO)
        config = CogVideoXConfig(component.spec)
        config.set_inference_dtype(torch.float32, None)
        config.custom_operations = comfy.ops.mixed_precision_ops(compute_dtype=torch.float32)
        made = config.get_model()
        state = dict(component.pieces(torch.float32))
        layout = QUANT_ALGOS[format_name]["comfy_tensor_layout"]
        words = torch.tensor(list(json.dumps({"format": format_name}).encode()), dtype=torch.uint8)
        for key in [key for key in state if ".attn1.to_" in key and key.endswith(".weight")]:
            tensor = QuantizedTensor.from_float(state.pop(key), layout, scale="recalculate")
            state.update(tensor.state_dict(key))
            state[key.removesuffix("weight") + "comfy_quant"] = words
        made.load_model_weights(state)
        return load._patcher_class(True)(made, load_device=torch.device("cpu"), offload_device=torch.device("cpu"))

    return make


def fp8_step(expected, tensor):
    """Between two neighbours: an eighth of the value (three bits), or the smallest subnormal."""
    return expected.abs() / 8 + 2**-9 * tensor.params.scale


def int8_step(expected, tensor):
    return torch.ones_like(expected) * tensor.params.scale


def q8_0_step(expected, tensor):
    """A block of 32 has the scale of its largest value."""
    return (expected.unflatten(1, (-1, 32)).abs().amax(2) / 127).repeat_interleave(32, dim=1)


def gguf(folder):
    tensors = load_file(lora_files.DEMO / "diffusion_pytorch_model.safetensors")
    return load.load_model(str(write_gguf(folder / "x.gguf", tensors, chosen)), "fp32", variant="5B")


QUANTIZED = {"float8_e4m3fn": (quantized_by_comfyui("float8_e4m3fn"), fp8_step),
             "int8_tensorwise": (quantized_by_comfyui("int8_tensorwise"), int8_step),
             "gguf_Q8_0": (gguf, q8_0_step)}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_models(trained, tmp_path, kind):
    """The stored weight plus peft's change, within one step of the quantization; the change is all there."""
    make, step = QUANTIZED[kind]
    quantized = make(tmp_path)
    patched, report = load_lora(quantized, lora_files.diffusers(trained, tmp_path), 1.0)
    ours, before = weights(patched), weights_before(quantized)
    for key in trained.tensors:
        stored, change = before[f"{key}.weight"], trained.merged[f"{key}.weight"] - trained.base[f"{key}.weight"]
        got = ours[f"{key}.weight"]
        assert (got.dequantize() - (stored + change)).abs().le(step(stored + change, got) * 1.001).all()
        share = ((got.dequantize() - stored) * change).sum() / change.square().sum()
        assert abs(share - 1) < 0.05
    assert "changes the weights by" in report


def weights_before(patcher):
    parameters = patcher.model.diffusion_model.named_parameters()
    return {key: value.dequantize() if hasattr(value, "params") else value for key, value in parameters}


# --- what does not fit ---


def changed(trained, tmp_path, change):
    values = load_file(lora_files.diffusers(trained, tmp_path))
    path = tmp_path / "changed.safetensors"
    save_file(change(values), path)
    return path


def test_no_key_matches(model, trained, tmp_path):
    """Another program's LoRA: three keys of each are shown."""
    path = changed(trained, tmp_path, lambda values: {k.replace("transformer_blocks", "double_blocks"): v
                                                      for k, v in values.items()})
    with pytest.raises(SpecError) as caught:
        load_lora(model, path, 1.0)
    words = str(caught.value)
    assert words.count("double_blocks") == 3 and words.count(".weight'") + words.count(".bias'") == 6
    assert "transformer_blocks" in words


def test_another_models_lora(model, trained, tmp_path, monkeypatch):
    """A width of 2B: both shapes and the published model are named."""
    wide = {"lora_A.weight": (4, 1920), "lora_B.weight": (1920, 4)}
    path = changed(trained, tmp_path, lambda values: {
        k: torch.zeros(next(shape for end, shape in wide.items() if k.endswith(end))) for k in values})
    with pytest.raises(SpecError, match=r"trained for another model: transformer_blocks.0.attn1.to_.*weight has the "
                                        r"shape \[128, 128\] in this model and \[1920, 1920\] \(CogVideoX 2B\)"):
        load_lora(model, path, 1.0)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_values_that_are_none(model, trained, tmp_path, value):
    """One of a whole file is found, wherever it is."""
    keys = list(load_file(lora_files.diffusers(trained, tmp_path)))
    for key in (keys[0], keys[3], keys[-1]):
        def damage(values, key=key):
            values[key].view(-1)[5] = float(value)
            return values

        with pytest.raises(SpecError, match=f"{re.escape(key)} holds NaN or infinite values"):
            load_lora(model, changed(trained, tmp_path, damage), 1.0)


def test_keys_that_do_not_fit_are_told(model, trained, error, tmp_path, caplog):
    """A text-to-video LoRA on an image-to-video model, and stray keys: the rest is used, one warning each."""
    extra = {"transformer.patch_embed.proj.lora_A.weight": torch.zeros(4, 32, 2, 2),
             "transformer.patch_embed.proj.lora_B.weight": torch.zeros(128, 4, 1, 1),
             "transformer.controlnet.0.lora_A.weight": torch.zeros(4, 4)}
    path = changed(trained, tmp_path, lambda values: {k: v / 2**0.5 for k, v in values.items()} | extra)
    with caplog.at_level("WARNING", logger="cogx"):
        patched, report = load_lora(model, path, 1.0)
    check_merge(patched, trained, error)
    assert ("1 modules have another shape in this model and are left out: patch_embed.proj.weight has the shape "
            "[128, 64] in this model and [128, 128] in the LoRA") in report
    assert "1 of 67 keys match nothing in this model and are left out, such as ['transformer.controlnet.0" in report
    assert len(caplog.records) == 2


def test_settings_of_another_lora(model, trained, tmp_path):
    path = lora_files.peft(trained, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 64, "lora_alpha": 1}))
    _, report = load_lora(model, path, 1.0)
    assert "scale 1 (the file does not say" in report
    assert "lora_alpha 1 in adapter_config.json is not used: it is for rank 64, the LoRA has 4." in report


def test_a_resized_lora_in_fp8(model, trained, error, tmp_path):
    """Dynamic in the metadata, alpha in each module: the settings are not needed. One that lacks its alpha is told."""
    values = load_file(lora_files.kohya(trained, tmp_path))
    in_fp8 = {key: value.to(torch.float8_e4m3fn) for key, value in values.items()}
    said = {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}
    save_file(in_fp8, tmp_path / "fp8.safetensors", said)
    save_file({key: value.float() for key, value in in_fp8.items()}, tmp_path / "plain.safetensors")
    (ours, report), (plain, _) = (load_lora(model, tmp_path / f"{name}.safetensors", 1.0) for name in ("fp8", "plain"))
    assert error(weights(ours)[ONE], weights(plain)[ONE]) <= 1e-6
    assert error(weights(ours)[ONE], trained.merged[ONE]) <= 0.06 and "alpha 2 in the file" in report
    assert "is not used" not in report
    save_file({key: value for key, value in values.items() if not key.endswith(".alpha")},
              tmp_path / "bare.safetensors", said)
    report = load_lora(model, tmp_path / "bare.safetensors", 1.0)[1]
    assert "the file does not say" in report and "ss_network_alpha 'Dynamic' in its metadata is no number" in report


def test_exports_of_sat(model, trained, error, tmp_path):
    """They have diffusers' keys and do not say that alpha is 1. The node names the remedy, and the remedy works."""
    path = changed(trained, tmp_path, lambda values: {k: v * lora_files.ALPHA**0.5 for k, v in values.items()})
    _, report = load_lora(model, path, 1.0)
    assert "exported from SAT, its alpha is 1: set strength 0.25, or write" in report and "into changed.json" in report
    check_merge(load_lora(model, path, 0.25)[0], trained, error)
    (tmp_path / "changed.json").write_text(json.dumps({"lora_alpha": 1}))
    patched, report = load_lora(model, path, 1.0)
    check_merge(patched, trained, error)
    assert "exported from SAT" not in report


class Code:
    def __reduce__(self):
        import os

        return os.mkdir, (self.path,)


def test_pickles_with_code_are_never_run(model, tmp_path):
    Code.path = str(tmp_path / "executed")
    torch.save({"x.lora_A.weight": Code()}, tmp_path / "x.pt")
    with pytest.raises(SpecError, match=r"holds code or is damaged: it asks for \w+\.mkdir\. It was refused"):
        load_lora(model, tmp_path / "x.pt", 1.0)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name, content, message", [
    ("x.safetensors", b"<html>", "not a safetensors file"), ("x.pt", b"<html>", "got something else"),
    ("x.pt", b"", "got something else"), ("x.pt", b"PK\x03\x04" + b"\0" * 50, "damaged"),
    ("x.pt", b"GGUF", "got a GGUF file"),
])
def test_files_that_are_none(model, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SpecError, match=message):
        load_lora(model, tmp_path / name, 1.0)


# --- the node ---


def tiny_lora(folder):
    """For the tiny 5B pipeline: alpha in the file, with generic names for core and with diffusers'."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    generic, ours = {}, {}
    for block in range(2):
        name = f"transformer_blocks.{block}.attn1.to_q"
        down, up = torch.randn(4, 64, generator=generator), torch.randn(64, 4, generator=generator)
        generic |= {f"diffusion_model.{name}.lora_down.weight": down, f"diffusion_model.{name}.lora_up.weight": up,
                    f"diffusion_model.{name}.alpha": torch.tensor(2.0)}
        ours |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    save_file(generic, folder / "generic.safetensors")
    settings = {"transformer.r": 4, "transformer.lora_alpha": 2}
    save_file(ours, folder / "größe.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    save_file({"a.lora_A.weight": torch.zeros(1)}, folder / "foreign.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "generic.safetensors").read_bytes()[:-9])


@pytest.mark.parametrize("name", ["server", "oldest_server"])
def test_node(request, saved_latent, error, name):
    """Equal to core's loader; strength 0 to no LoRA; the scale is shown; what is wrong is refused in words."""
    server = request.getfixturevalue(name)
    tiny_lora(server.base / "models" / "loras")
    base = latent_only(text_to_video("5B", steps=3, sampler="cogvideox_ddim", dynamic_cfg=False))

    def graph(file, strength=1.0):
        return patched_model(base, "CogXLoadLora", lora=file, strength=strength)

    plain = saved_latent(server, server.run(base))
    core = saved_latent(server, server.run(patched_model(
        base, "LoraLoaderModelOnly", lora_name="generic.safetensors", strength_model=1.0)))
    run = server.run(graph("größe.safetensors"))
    assert error(saved_latent(server, run), core) <= 1e-6 < 1e-3 < error(core, plain)
    assert "scale 0.5 (lora_alpha 2 in its metadata, rank 4) x strength 1 = 0.5" in run.outputs["20"]["text"][0]
    assert error(saved_latent(server, server.run(graph("größe.safetensors", 0.0))), plain) == 0
    for file, message in (("cut.safetensors", "is truncated: expected"), ("none.safetensors", "not found: expected")):
        with pytest.raises(PromptError, match=message) as caught:
            server.queue(graph(file))
        assert caught.value.details["node_errors"]
    with pytest.raises(PromptError, match="of which none matches"):
        server.run(graph("foreign.safetensors"))
