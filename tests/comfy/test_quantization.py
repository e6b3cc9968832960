"""Quantized weights: made while loading, and as files hold them. In process, on the demo model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.quant_ops
import comfy.sample
import numpy as np
import pytest
import torch
from cogx.model_loaders import load, quantization, save, text_encoder
from cogx.model_loaders.saved_spec import spec_metadata
from cogx.models.specs import SpecError
from cogx.samplers import adapter
from cogx.scripts.demo_model import evaluate
from cogx.tests import quantized_writers as writers
from cogx.tests.comfy.demo import GUIDANCE, STEPS, TEXT_TOKENS
from cogx.tests.comfy.quantized import DEMO, TRANSFORMER, chosen, demo_tensors, forward, saved
from cogx.tests.layout_writers import core_transformer, sat_transformer
from safetensors import safe_open
from safetensors.torch import load_file, save_file


@pytest.fixture(autouse=True)
def as_the_executor_runs() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def reference() -> torch.Tensor:
    with torch.inference_mode():
        return forward(load.load_model(str(TRANSFORMER)))


@pytest.fixture(scope="module")
def q8_0(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return writers.write_gguf(tmp_path_factory.mktemp("gguf") / "demo.gguf", demo_tensors(), chosen,
                              metadata=spec_metadata(load.find_model(TRANSFORMER).spec))


def quantized_model(name: str, q8_0: Path) -> Any:
    return load.load_model(str(q8_0)) if name == "Q8_0" else load.load_model(str(TRANSFORMER), "auto", name)


BOUNDS = {"fp8_e4m3fn": 0.06, "fp8_scaled": 0.06, "int8": 0.03, "Q8_0": 0.02}


@pytest.mark.parametrize("name", BOUNDS)
def test_forward_of_the_demo_model(name, q8_0, reference, error, record_property):
    model = quantized_model(name, q8_0)
    held = {key.removesuffix(".weight") for key, value in model.model.diffusion_model.named_parameters()
            if isinstance(value, comfy.quant_ops.QuantizedTensor)}
    assert held == {key.removesuffix(".weight") for key in demo_tensors() if chosen(key)} and len(held) == 48
    found = error(forward(model), reference)
    record_property("error", found)
    assert 1e-4 < found <= BOUNDS[name]


def test_multiplied_in_fp8(monkeypatch, reference, error):
    """As on a card that can: both factors in fp8, what is multiplied scaled to its largest value."""
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device=None: True)
    multiplied = forward(load.load_model(str(TRANSFORMER), "auto", "fp8_scaled"))
    unpacked = forward(load.load_model(str(TRANSFORMER), "auto", "fp8_e4m3fn"))
    assert error(multiplied, reference) <= 0.06
    assert error(multiplied, unpacked) > 1e-3, "the same numbers: it was not multiplied in fp8"
    model = load.load_model(str(TRANSFORMER), "auto", "fp8_scaled")
    linear = model.model.diffusion_model.transformer_blocks[0].ff.net[2]
    x = torch.randn(1, 3, linear.in_features, generator=torch.Generator().manual_seed(0)) * 1000
    assert error(linear(x), torch.nn.functional.linear(x, linear.weight.dequantize(), linear.bias)) < 0.05
    assert not linear(torch.zeros_like(x)).sub(linear.bias).any()


def test_e5m2_is_never_multiplied(monkeypatch, tmp_path):
    """Two bits are enough for weights and too few for what is multiplied with them."""
    path = str(writers.rows_fp8(tmp_path / "x.safetensors", demo_tensors(), chosen, torch.float8_e5m2))
    unpacked = forward(load.load_model(path))
    monkeypatch.setattr(comfy.model_management, "supports_fp8_compute", lambda device=None: True)
    assert torch.equal(forward(load.load_model(path)), unpacked)


@pytest.mark.parametrize("name, bound", [("mxfp8", 0.04), ("nvfp4", 0.12)])
def test_the_formats_of_blackwell_unpacked(monkeypatch, tmp_path, reference, error, name, bound):
    """Made here as on such a card, and unpacked as on one that only reads such a file."""
    monkeypatch.setattr(load, "check_quantization", lambda *args: None)
    assert error(forward(load.load_model(str(TRANSFORMER), "auto", name)), reference) <= bound
    form, weight = quantization.FORMATS[name], torch.randn(2208, 256) * 0.02
    parts = quantization.quantized(weight, form)
    monkeypatch.setattr(quantization, "_ROWS", 10**6)
    whole = quantization.quantized(weight, form)
    assert torch.equal(parts.data.view(torch.uint8), whole.data.view(torch.uint8))
    assert all(torch.equal(scale, whole.companions[key]) for key, scale in parts.companions.items())


# --- The demo evaluation ---


@pytest.fixture(scope="module")
def generate() -> Callable[[Any, list[evaluate.Case]], np.ndarray]:
    """The videos of a model for some cases, as the shipped workflow makes them: uint8 [N, F, H, W, 3]."""
    with torch.inference_mode():
        clip = load.load_text_encoder(str(DEMO / "text_encoder"), max_tokens=TEXT_TOKENS)
        vae = load.load_vae(str(DEMO / "vae"))

    def run(model: Any, cases: list[evaluate.Case]) -> np.ndarray:
        positive = torch.cat([text_encoder.encode(clip, case.prompt, "encode")[0][0][0] for case in cases])
        negative = text_encoder.encode(clip, "", "encode")[0][0][0].expand(len(cases), -1, -1)
        empty = torch.zeros(1, 16, 5, 8, 12)
        noise = torch.cat([comfy.sample.prepare_noise(empty, case.seed) for case in cases])
        latent = comfy.sample.sample_custom(
            model, noise, GUIDANCE, adapter.sampler_object("cogvideox_ddim"),
            adapter.make_sigmas(model, STEPS, "trailing"), [[positive, {}]], [[negative, {}]],
            torch.zeros_like(noise), seed=0, disable_pbar=True)
        return (vae.decode(latent).float().numpy() * 255).round().astype(np.uint8)

    return run


@pytest.mark.parametrize("quarter, name", [(0, "fp8_scaled"), (1, "int8"), (2, "Q8_0")])
def test_demo_evaluation_stays_as_it_is(quarter, name, q8_0, generate, record_property):
    """A quarter of the held-out cases for each format. What goes wrong is made unquantized too, and counts only if that
    is right: the drop can only be overestimated."""
    cases = evaluate.held_out_cases()[quarter::4]
    videos = generate(quantized_model(name, q8_0), cases)
    seen = [evaluate.look(video) for video in videos]
    wrong = [case for case, look in zip(cases, seen, strict=True) if not right(case, look)]
    plain = generate(load.load_model(str(TRANSFORMER)), wrong) if wrong else []
    lost = [case.prompt for case, video in zip(wrong, plain, strict=True) if right(case, evaluate.look(video))]
    record_property("wrong", len(wrong))
    assert len(lost) <= 0.03 * len(cases), lost


def right(case: evaluate.Case, look: evaluate.Seen) -> bool:
    return all(getattr(case.scene, name) == getattr(look, name) for name in ("shape", "colour", "motion"))


# --- Files ---


def unpacked(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a quantized file, unpacked by hand."""
    from gguf import GGMLQuantizationType, GGUFReader, quants

    if path.suffix == ".gguf":
        return {each.name: torch.from_numpy(quants.dequantize(each.data, each.tensor_type).copy())
                for each in GGUFReader(path).tensors}
    found = load_file(path)
    out = {}
    for key, value in tensors.items():
        layer = key.removesuffix(".weight")
        scale = next((found[name] for name in (f"{layer}.weight_scale", f"{layer}.scale_weight") if name in found), 1.0)
        if f"{layer}.Q4_0_qweight" in found:
            raw = found[f"{layer}.Q4_0_qweight"].numpy()
            out[key] = torch.from_numpy(quants.dequantize(raw, GGMLQuantizationType.Q4_0))
        else:
            out[key] = found[key].float() * scale if found[key].dtype == torch.float8_e4m3fn else value
    return out


@pytest.mark.parametrize("kind", ["plain_fp8", "scaled_fp8", "noted_fp8", "metadata_fp8", "blocks_in_safetensors",
                                  "Q8_0", "Q5_1"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_files_compute_as_their_unpacked_weights(tmp_path, error, kind, prefix):
    """fp8 as it was published over time, and GGUF blocks: all but int8, which is multiplied as int8."""
    tensors, path = demo_tensors(), tmp_path / f"x.{'gguf' if kind[0] == 'Q' else 'safetensors'}"
    named = {prefix + key: value for key, value in tensors.items()}

    def choose(key: str) -> bool:
        return chosen(key.removeprefix(prefix))

    if kind[0] == "Q":
        writers.write_gguf(path, named, choose, kind)
    else:
        getattr(writers, kind)(path, named, choose)
    plain = saved(tmp_path / "plain.safetensors", unpacked(path, named))
    ours, expected = (forward(load.load_model(str(each), variant="5B")) for each in (path, plain))
    assert error(ours, expected) <= 1e-5


@pytest.fixture(scope="module")
def other_layouts() -> dict[str, dict[str, torch.Tensor]]:
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel.from_pretrained(TRANSFORMER)
    return {"core": core_transformer(model), "SAT": sat_transformer(model)}


OF_OTHERS = {"core": re.compile(r"blocks\.\d+\.(q|k|v|attn_out|ff_proj|ff_out)\.weight"),
             "SAT": re.compile(r".*\.layers\.\d+\.(attention|mlp)\.\w+\.weight")}


@pytest.mark.parametrize("layout, held", [("core", 48), ("SAT", 24)])  # 8 blocks; SAT joins q, k and v of each
@pytest.mark.parametrize("kind", ["plain_fp8", "scaled_fp8", "noted_fp8", "plain_int8", "blocks_in_safetensors",
                                  "Q8_0"])
def test_quantized_in_the_layouts_of_others(tmp_path, error, other_layouts, kind, layout, held):
    """What the layout has apart stays quantized, what it has joined is unpacked."""
    tensors, path = other_layouts[layout], tmp_path / f"x.{'gguf' if kind[0] == 'Q' else 'safetensors'}"
    write = writers.write_gguf if kind[0] == "Q" else getattr(writers, kind)
    write(path, tensors, lambda key: bool(OF_OTHERS[layout].fullmatch(key)))
    if kind == "plain_fp8":  # in a torch file
        torch.save(load_file(path), tmp_path / "x.pt")
        path = path.with_suffix(".pt")
    model = load.load_model(str(path), variant="5B")
    quantized = [value for value in model.model.diffusion_model.parameters()
                 if isinstance(value, comfy.quant_ops.QuantizedTensor)]
    assert len(quantized) == held == len(load.find_model(path, "5B").layers)
    readable = path if kind[0] == "Q" else tmp_path / "x.safetensors"
    plain = saved(tmp_path / "plain.safetensors", unpacked(readable, tensors))
    ours, expected = forward(model), forward(load.load_model(str(plain), variant="5B"))
    assert error(ours, expected) <= (0.03 if kind == "plain_int8" else 1e-5)


def test_an_int8_file(tmp_path, error):
    path = writers.plain_int8(tmp_path / "x.safetensors", demo_tensors(), chosen)
    model = load.load_model(str(path))
    assert model.model.diffusion_model.transformer_blocks[0].attn1.to_q.quant_format == "int8_tensorwise"
    plain = saved(tmp_path / "plain.safetensors", demo_tensors())
    assert error(forward(model), forward(load.load_model(str(plain)))) <= 0.03


@pytest.mark.parametrize("dtype, bound", [(torch.float8_e4m3fn, 0.06), (torch.float8_e5m2, 0.12)])
def test_fp8_of_rows_gets_one_scale(tmp_path, error, caplog, dtype, bound):
    """ComfyUI's layers know no other; on a CPU they would pass, on a GPU they fail or read the first of the scales."""
    tensors = demo_tensors()
    path = writers.rows_fp8(tmp_path / "x.safetensors", tensors, chosen, dtype)
    model = load.load_model(str(path), variant="5B")
    held = {key: value for key, value in model.model.diffusion_model.named_parameters()
            if isinstance(value, comfy.quant_ops.QuantizedTensor)}
    assert len(held) == 48 and all(value._qdata.dtype == dtype for value in held.values())
    assert all(value._params.scale.numel() == 1 for value in held.values())
    plain = load.load_model(str(saved(tmp_path / "plain.safetensors", tensors)), variant="5B")
    assert 1e-4 < error(forward(model), forward(plain)) <= bound
    assert "48 layers are fp8 with a scale for each row" in caplog.text


@pytest.mark.parametrize("name", writers.K_PACKERS)
def test_gguf_k_files(tmp_path, error, name):
    """A tiny transformer whose widths are whole blocks of 256; an embedding packed too, as converters do."""
    from cogx.scripts.tiny_pipeline import tiny_transformer

    tensors = tiny_transformer("5B", num_attention_heads=4, attention_head_dim=64, num_layers=1,
                               time_embed_dim=256, text_embed_dim=256).state_dict()
    path = writers.write_gguf(tmp_path / "x.gguf", tensors, lambda key: chosen(key) or "text_proj.w" in key, name)
    plain = saved(tmp_path / "plain.safetensors", unpacked(path, tensors))
    ours, expected = (forward(load.load_model(str(each), variant="5B")) for each in (path, plain))
    assert error(ours, expected) <= 1e-5


T5_NAMES = {"shared": "token_embd", "encoder.final_layer_norm": "enc.output_norm", "encoder.block.": "enc.blk.",
            "layer.0.SelfAttention.relative_attention_bias": "attn_rel_b", "layer.0.SelfAttention.": "attn_",
            "layer.0.layer_norm": "attn_norm", "layer.1.layer_norm": "ffn_norm", "DenseReluDense.wi_0": "ffn_gate",
            "layer.1.ffn_gate": "ffn_gate", "layer.1.DenseReluDense.wi_1": "ffn_up",
            "layer.1.DenseReluDense.wo": "ffn_down"}


def t5_name(key: str) -> str:
    for theirs, llama in T5_NAMES.items():
        key = key.replace(theirs, llama)
    return key


def test_text_encoders(tmp_path, error):
    """Scaled fp8 as Comfy-Org publishes T5, GGUF with its table of words packed too, and made while loading."""
    tensors = load_file(next((DEMO / "text_encoder").glob("*.safetensors")))
    linear = quantization.QUANTIZED_LAYERS["text_encoder"]

    def encode(path: Path, how: str = "none") -> torch.Tensor:
        clip = load.load_text_encoder(str(path), "auto", how, TEXT_TOKENS)
        return text_encoder.encode(clip, "A red circle moves up.", "encode")[0][0][0]

    plain = encode(DEMO / "text_encoder")
    fp8 = writers.scaled_fp8(tmp_path / "t5.safetensors", tensors,
                             lambda key: bool(linear.fullmatch(key.removesuffix(".weight"))))
    gguf = writers.write_gguf(tmp_path / "t5.gguf", {t5_name(key): value for key, value in tensors.items()},
                              lambda key: tensors_2d(key, tensors), architecture="t5encoder")
    assert error(encode(fp8), plain) <= 0.06
    assert error(encode(gguf), plain) <= 0.02
    assert error(encode(DEMO / "text_encoder", "fp8_scaled"), plain) <= 0.06
    assert error(encode(DEMO / "text_encoder", "int8"), plain) <= 0.03


def tensors_2d(key: str, tensors: dict[str, torch.Tensor]) -> bool:
    shape = next(value.shape for name, value in tensors.items() if t5_name(name) == key)
    return len(shape) == 2 and shape[1] % 32 == 0


# --- With ComfyUI's patches and memory manager ---

KEYS = [f"diffusion_model.transformer_blocks.{block}.{layer}.weight" for block in range(8)
        for layer in ("attn1.to_q", "ff.net.2")]


def with_lora(model: Any) -> Any:
    """The model with a change of two weights in each block, as large as the weights."""
    generator = torch.Generator().manual_seed(3)
    clone = model.clone()
    patches = {}
    for key in KEYS:
        shape = model.model.state_dict()[key].shape
        rows, columns = shape[0], 512 if "net.2" in key else 128
        patches[key] = ("diff", (torch.randn(rows, columns, generator=generator) * 0.06,))
    assert set(clone.add_patches(patches)) == set(KEYS)
    return clone


@pytest.mark.parametrize("name", ["fp8_scaled", "int8", "Q8_0"])
def test_patches_and_partial_loading(name, q8_0, error, reference):
    """A LoRA merged at full load, applied on the fly when loaded in part, and gone when unloaded."""
    model = quantized_model(name, q8_0)
    before = forward(model)
    expected = forward(with_lora(load.load_model(str(TRANSFORMER))))
    assert error(expected, reference) > 0.1
    patched = with_lora(model)
    merged = forward(patched)
    assert error(merged, expected) <= BOUNDS[name]
    comfy.model_management.unload_model_and_clones(patched)
    patched.load(torch.device("cpu"), lowvram_model_memory=1)
    block = patched.model.diffusion_model.transformer_blocks[0]
    assert block.attn1.to_q.weight_function, "it was not loaded in part"
    assert error(forward(patched, load=False), expected) <= BOUNDS[name]
    patched.detach()
    assert torch.equal(forward(model), before)


def test_a_copy_is_quantized_alike(q8_0):
    """What multi-GPU and TorchCompileModel load anew."""
    for model in (load.load_model(str(TRANSFORMER), "auto", "fp8_scaled"), load.load_model(str(q8_0))):
        copy = model.deepclone_multigpu(new_load_device=torch.device("cpu"))
        assert copy.model is not model.model
        assert torch.equal(forward(copy), forward(model))
        ours, theirs = model.model.state_dict(), copy.model.state_dict()
        assert ours.keys() == theirs.keys() and any(key.endswith("comfy_quant") for key in ours)


# --- What is refused ---


def test_refused_before_the_run(monkeypatch, q8_0, tmp_path):
    for name in ("mxfp8", "nvfp4"):
        with pytest.raises(SpecError, match=rf"quantization {name}: expected an NVIDIA card of the Blackwell.*Choose"):
            quantization.check_quantization(name, {})
    layers = load.find_model(q8_0).layers
    with pytest.raises(SpecError, match=r"int8: the file is quantized already \(gguf_Q8_0\)"):
        quantization.check_quantization("int8", layers)
    quantization.check_quantization("fp8_scaled", {"a": {"format": "float8_e4m3fn"}})
    int8 = writers.plain_int8(tmp_path / "x.safetensors", demo_tensors(), chosen)
    monkeypatch.delitem(comfy.quant_ops.QUANT_ALGOS, "int8_tensorwise")
    with pytest.raises(SpecError, match=r"quantization int8: expected ComfyUI 0\.30 or newer.*got 0\."):
        quantization.check_quantization("int8", {})
    with pytest.raises(SpecError, match=r"x\.safetensors, which is quantized as int8_tensorwise: expected ComfyUI"):
        load.find_model(int8)


SMOOTH = "pre_quant_scale"


@pytest.mark.parametrize("form, name, refused", [
    ("float8_e4m3fn", SMOOTH, True), ("float8_e4m3fn", "weight_scale_2", True), ("int8_tensorwise", SMOOTH, True),
    ("gguf_Q8_0", "weight_scale", True), ("nvfp4", SMOOTH, False), ("int8_tensorwise", "input_scale", False)])
def test_scales_that_this_comfyui_leaves_out_are_refused(monkeypatch, form, name, refused):
    """The host loads what its table names, and drops the rest without a word; 0.24 reads no pre_quant_scale at all."""
    from cogx.model_loaders.quantized_files import Described

    algorithms = comfy.quant_ops.QUANT_ALGOS
    both = {"weight_scale", "weight_scale_2", "input_scale"}
    monkeypatch.setitem(algorithms, "nvfp4", {**algorithms["nvfp4"], "parameters": both | {SMOOTH}})
    monkeypatch.setitem(algorithms, "int8_tensorwise", {"parameters": {"weight_scale"}})
    source = Described([], {}, {"a": {"format": form}}, {}, {"a": {name}})
    words = rf"x: a has a {name}, which this ComfyUI does not apply to {form}, .* Update ComfyUI, or take another file"
    if refused:
        with pytest.raises(SpecError, match=words):
            quantization.check_stored(source, "x")
        return
    quantization.check_stored(source, "x")
    if name == SMOOTH:
        monkeypatch.setitem(algorithms, "nvfp4", {**algorithms["nvfp4"], "parameters": both})
        with pytest.raises(SpecError, match=words):
            quantization.check_stored(source, "x")


def test_what_smooths_the_input_stays(tmp_path, monkeypatch, error):
    """nvfp4 with pre_quant_scale, held as it is, and unpacked by the saver and by the reader of joined weights."""
    monkeypatch.setattr(load, "check_quantization", lambda *args: None)
    layer, path = "transformer_blocks.0.ff.net.2", tmp_path / "x.safetensors"
    model = load.load_model(str(TRANSFORMER), "auto", "nvfp4")
    save.save_model(model, path)
    scale = torch.rand(512, generator=torch.Generator().manual_seed(0)) + 0.5
    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
    save_file({**load_file(path), f"{layer}.{SMOOTH}": scale}, path, metadata)
    smooth = load.load_model(str(path))
    assert error(forward(smooth), forward(model)) > 1e-3
    save.save_model(smooth, tmp_path / "none.safetensors", "none")
    assert error(forward(load.load_model(str(tmp_path / "none.safetensors"))), forward(smooth)) <= 1e-5
    stored = dict(load.find_model(path).pieces(torch.float32))[f"{layer}.weight"]
    plain = replace(stored, companions={key: value for key, value in stored.companions.items() if key != SMOOTH})
    ours, without = (quantization.dequantized(each, torch.float32) for each in (stored, plain))
    assert torch.equal(ours, without * scale)


def test_the_nodes_offer_what_there_is():
    from cogx.nodes import load as nodes

    assert ["none", *quantization.FORMATS] == nodes.QUANTIZATIONS


@pytest.mark.parametrize("fp16, bf16, of_2b, of_5b", [(True, True, torch.float16, torch.bfloat16),
                                                      (True, False, torch.float16, torch.float32),
                                                      (False, False, torch.float32, torch.float32)])
def test_automatic_dtype_by_model_and_card(monkeypatch, tiny_pipelines, fp16, bf16, of_2b, of_5b):
    """An Ampere card and newer, an older one, a CPU; and what is not quantized is held in the same dtype."""
    monkeypatch.setattr(comfy.model_management, "should_use_fp16", lambda *args, **kwargs: fp16)
    monkeypatch.setattr(comfy.model_management, "should_use_bf16", lambda *args, **kwargs: bf16)
    for variant, expected in (("2B", of_2b), ("5B", of_5b)):
        for how in ("none", "fp8_scaled"):
            model = load.load_model(str(tiny_pipelines / variant / "transformer"), "auto", how).model
            assert model.get_dtype_inference() == expected
            assert model.diffusion_model.proj_out.weight.dtype == expected


def test_the_memory_manager_counts_quantized_bytes(q8_0):
    plain, fp8 = load.load_model(str(TRANSFORMER)), load.load_model(str(TRANSFORMER), "auto", "fp8_scaled")
    values = sum(value.numel() for key, value in demo_tensors().items() if chosen(key))
    assert abs(plain.model_size() - fp8.model_size() - 3 * values) < 0.01 * values
    assert abs(plain.model_size() - load.load_model(str(q8_0)).model_size() - (4 - 34 / 32) * values) < 0.01 * values
