"""What is quantized in a file, in every form that people publish: plain names and shapes, and one weight per layer."""

from __future__ import annotations

import json

import pytest
import torch
from cogx.model_loaders.files import TensorInfo
from cogx.model_loaders.quantized_files import StoredWeight, describe, gather
from cogx.models.specs import SpecError
from cogx.tests import quantized_writers as writers
from safetensors.torch import load_file, save_file

PLAIN = {"a.b.weight": torch.randn(6, 64), "a.b.bias": torch.randn(6), "norm.weight": torch.randn(64)}
FP8, FULL = "float8_e4m3fn", {"full_precision_matrix_mult": True}


@pytest.mark.parametrize("write, conf, dtype", [
    (writers.plain_fp8, {"format": FP8, **FULL}, "F8_E4M3"),
    (writers.scaled_fp8, {"format": FP8, **FULL}, "F8_E4M3"),
    (writers.noted_fp8, {"format": FP8}, "F8_E4M3"),
    (writers.metadata_fp8, {"format": FP8}, "F8_E4M3"),
    (writers.plain_int8, {"format": "int8_tensorwise"}, "I8"),
    (writers.blocks_in_safetensors, {"format": "gguf_Q4_0"}, "Q4_0"),
    (writers.write_gguf, {"format": "gguf_Q8_0"}, "Q8_0"),
])
def test_plain_names_and_one_weight_per_layer(tmp_path, write, conf, dtype):
    name = "x.gguf" if write is writers.write_gguf else "x.safetensors"
    path = write(tmp_path / name, PLAIN, lambda key: key == "a.b.weight")
    _, tensors, layers, *_ = describe([path])
    assert layers == {"a.b": conf}
    assert tensors == {"a.b.weight": (dtype, (6, 64)), "a.b.bias": ("F32", (6,)), "norm.weight": ("F32", (64,))}
    if path.suffix == ".gguf":
        return
    values = gather(load_file(path), layers, tensors)
    assert set(values) == set(PLAIN)
    weight = values["a.b.weight"]
    assert isinstance(weight, StoredWeight) and weight.shape == (6, 64) and weight.conf == conf
    # No calibrated scale: the ones that old files hold are placeholders.
    assert set(weight.companions) == (set() if dtype == "Q4_0" else {"weight_scale"})
    assert set(weight.entries("l")) == {"l.weight", "l.comfy_quant", *(f"l.{name}" for name in weight.companions)}


def test_packed_formats_have_the_shape_that_they_stand_for(tmp_path):
    path = tmp_path / "x.safetensors"
    note = torch.tensor(list(json.dumps({"format": "nvfp4"}).encode()), dtype=torch.uint8)
    save_file({"a.weight": torch.zeros(32, 24, dtype=torch.uint8), "a.weight_scale": torch.zeros(128, 4),
               "a.weight_scale_2": torch.ones(()), "a.comfy_quant": note}, path)
    assert describe([path]).tensors == {"a.weight": TensorInfo("U8", (32, 48))}


BAD = [
    ({"a.weight_scale_inv": torch.ones(6)}, {}, r"is quantized by block-wise scaling"),
    ({"a.weight_zero_point": torch.ones(6)}, {}, r"is quantized by a method with zero points"),
    ({"a.SCB": torch.ones(6)}, {}, r"is quantized by bitsandbytes \(a\.SCB\), which ComfyUI cannot read"),
    ({"a.comfy_quant": torch.tensor(list(b"{"), dtype=torch.uint8)}, {}, "notes on quantization are damaged"),
    ({"a.comfy_quant": torch.tensor(list(b"[1]"), dtype=torch.uint8)}, {}, "notes on quantization are damaged"),
    ({"a.comfy_quant": torch.tensor(list(b"[" * 4000), dtype=torch.uint8)}, {}, "notes on quantization are damaged"),
    ({}, {"_quantization_metadata": "{}"}, "notes on quantization are damaged"),
    ({}, {"_quantization_metadata": '{"layers": {"a": {"format": 3}}}'}, "notes on quantization are damaged"),
    ({}, {"_quantization_metadata": '{"layers": {"a": {"format": "int3"}}}'}, r"a is quantized as 'int3', which this"),
    ({}, {"_quantization_metadata": '{"layers": {"gone": {"format": "nvfp4"}}}'}, "gone is noted as nvfp4 and has no"),
    ({}, {"_quantization_metadata": '{"layers": {"a": {"format": "nvfp4"}}}'}, "its weight_scale is missing"),
]


@pytest.mark.parametrize("extra, metadata, words", BAD)
def test_what_cannot_be_read_is_refused_in_words(tmp_path, extra, metadata, words):
    path = tmp_path / "x.safetensors"
    save_file({"a.weight": torch.zeros(6, 64), **extra}, path, metadata=metadata)
    with pytest.raises(SpecError, match=words):
        describe([path])


def scaled(form: str, weight: tuple[int, ...], **scales: tuple[int, ...]) -> dict[str, torch.Tensor]:
    note = torch.tensor(list(json.dumps({"format": form}).encode()), dtype=torch.uint8)
    return {"a.weight": torch.zeros(weight, dtype=torch.uint8), "a.comfy_quant": note,
            **{f"a.{name}": torch.zeros(shape) for name, shape in scales.items()}}


GOOD_SCALES = [(FP8, (6, 64), {"weight_scale": shape}) for shape in ((), (1,), (1, 1), (6,), (6, 1))] + [
    (FP8, (6, 64), {"scale_weight": (), "scale_input": (1,)}),
    ("int8_tensorwise", (6, 64), {"weight_scale": (6, 1)}), ("mxfp8", (160, 160), {"weight_scale": (256, 8)}),
    ("nvfp4", (32, 40), {"weight_scale": (128, 8), "weight_scale_2": (), "pre_quant_scale": (80,)}),
]
BAD_SCALES = [
    (FP8, (6, 64), {"weight_scale": (3,)}, "weight_scale", r"\[\] or \[1\] or \[1, 1\] or \[6\] or \[6, 1\]"),
    (FP8, (6, 64), {"weight_scale": (1, 64)}, "weight_scale", r".*\[6, 1\]"),  # of the columns
    (FP8, (6, 64), {"scale_weight": (6, 2)}, "scale_weight", r".*\[6, 1\]"),  # of blocks
    (FP8, (6, 64), {"weight_scale": (), "input_scale": (6,)}, "input_scale", r"\[\] or \[1\] or \[1, 1\]"),
    (FP8, (6, 64), {"weight_scale": (), "pre_quant_scale": (6,)}, "pre_quant_scale", r"\[64\]"),
    ("int8_tensorwise", (6, 64), {"weight_scale": (0,)}, "weight_scale", r".*\[6, 1\]"),
    ("mxfp8", (160, 160), {"weight_scale": (160, 5)}, "weight_scale", r"\[256, 8\]"),  # not in tiles
    ("nvfp4", (32, 40), {"weight_scale": (128, 4), "weight_scale_2": ()}, "weight_scale", r"\[128, 8\]"),
    ("nvfp4", (32, 40), {"weight_scale": (128, 8), "weight_scale_2": (32,)}, "weight_scale_2", r"\[\] or .*"),
]


@pytest.mark.parametrize("form, weight, scales", GOOD_SCALES)
def test_scales_that_fit(tmp_path, form, weight, scales):
    save_file(scaled(form, weight, **scales), tmp_path / "x.safetensors")
    found = describe([tmp_path / "x.safetensors"])
    assert found.layers == {"a": {"format": form}}
    names = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
    assert found.companions == {"a": {names.get(name, name) for name in scales}}


@pytest.mark.parametrize("form, weight, scales, name, expected", BAD_SCALES)
def test_scales_that_do_not(tmp_path, form, weight, scales, name, expected):
    save_file(scaled(form, weight, **scales), tmp_path / "x.safetensors")
    got = ", ".join(map(str, scales[name]))
    with pytest.raises(SpecError, match=rf"a\.{name}: expected the shape {expected} for a weight .*, got \[{got}\]\."):
        describe([tmp_path / "x.safetensors"])


def test_scales_of_rows_are_columns(tmp_path):
    """Some tools write one scale per row as a list: times the weight it would scale the columns."""
    path = tmp_path / "x.safetensors"
    save_file({"a.weight": torch.ones(6, 6, dtype=torch.int8), "a.weight_scale": torch.arange(6.0)}, path)
    _, tensors, layers, *_ = describe([path])
    weight = gather(load_file(path), layers, tensors)["a.weight"]
    assert weight.companions["weight_scale"].shape == (6, 1)


@pytest.mark.parametrize("value, kept", [(0.25, True), (1.0, False)])
def test_a_calibrated_scale_is_kept(tmp_path, value, kept):
    path = tmp_path / "x.safetensors"
    save_file({"a.weight": torch.ones(6, 6).to(torch.float8_e4m3fn), "a.scale_weight": torch.ones(1),
               "a.scale_input": torch.full((1,), value)}, path)
    _, tensors, layers, *_ = describe([path])
    assert ("input_scale" in gather(load_file(path), layers, tensors)["a.weight"].companions) == kept
