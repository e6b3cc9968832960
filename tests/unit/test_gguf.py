"""GGUF: block formats against the gguf package, and headers, sound and damaged."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from cogx.model_loaders.gguf_blocks import FORMATS, dequantize, quantize
from cogx.model_loaders.gguf_files import read_gguf_header, read_gguf_tensors
from cogx.models.specs import SpecError
from cogx.tests.quantized_writers import K_PACKERS, packed, write_gguf
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def weights(rows: int = 24, columns: int = 768) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * 0.05


def error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    return float((ours - reference).norm() / reference.norm())


@pytest.mark.parametrize("name", FORMATS)
def test_unpacks_as_the_package_does(name):
    """Bit by bit, on blocks of random bytes: every field of every block, infinite scales included."""
    kind, form = GGMLQuantizationType[name], FORMATS[name]
    assert GGML_QUANT_SIZES[kind] == (form.size, form.type_size)
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(0, 256, (64, 3 * form.type_size), dtype=torch.uint8, generator=generator)
    with np.errstate(invalid="ignore"):
        expected = quants.dequantize(data.numpy(), kind)
    np.testing.assert_array_equal(dequantize(data, name, torch.float32).numpy(), expected)


@pytest.mark.parametrize("name", [*K_PACKERS, "Q8_0", "Q4_0", "Q5_1"])
def test_unpacks_what_others_packed(name):
    """The tests' own packer of the K types; the package's of the others."""
    data = packed(weights().numpy(), name)
    ours = dequantize(torch.from_numpy(data), name, torch.float32)
    np.testing.assert_array_equal(ours.numpy(), quants.dequantize(data, GGMLQuantizationType[name]))
    assert error(ours, weights()) < {"Q8_0": 0.01, "Q6_K": 0.03, "Q5_K": 0.05, "Q5_1": 0.05}.get(name, 0.1)


@pytest.mark.parametrize("name, bound", {"Q4_0": 0.09, "Q4_1": 0.08, "Q5_0": 0.05, "Q5_1": 0.04, "Q8_0": 0.006,
                                         "Q2_K": 0.35, "Q3_K": 0.19, "Q4_K": 0.08, "Q5_K": 0.04, "Q6_K": 0.02,
                                         "IQ4_NL": 0.09, "IQ4_XS": 0.09}.items())
def test_packs_to_within_a_step(name, bound):
    """What a LoRA is merged with. Zeros stay zeros; packing what was unpacked changes next to nothing."""
    once = dequantize(quantize(weights(), name), name, torch.float32)
    assert error(once, weights()) < bound
    assert error(dequantize(quantize(once, name), name, torch.float32), once) < bound / 2
    assert not dequantize(quantize(torch.zeros(2, 256), name), name, torch.float32).any()


def test_rounding_by_chance_keeps_the_mean():
    """A change of a tenth of a step is not lost on average."""
    flat = torch.full((64, 256), 0.1)
    flat[:, ::32] = 12.7  # the step is 0.1
    assert dequantize(quantize(flat + 0.01, "Q8_0"), "Q8_0", torch.float32)[:, 1].unique().numel() == 1
    chance = dequantize(quantize(flat + 0.01, "Q8_0", seed=1), "Q8_0", torch.float32)
    kept = torch.ones(256, dtype=torch.bool)
    kept[::32] = False
    assert abs(float(chance[:, kept].mean()) - 0.11) < 0.002


T5 = {"token_embd.weight": (96, 32), "enc.blk.0.attn_q.weight": (32, 32), "enc.blk.1.attn_rel_b.weight": (32, 4),
      "enc.blk.1.ffn_gate.weight": (64, 32), "enc.blk.1.ffn_norm.weight": (32,), "enc.output_norm.weight": (32,),
      "dec.blk.0.attn_q.weight": (32, 32)}


def test_t5_has_the_names_of_transformers(tmp_path):
    tensors = {key: torch.randn(shape) for key, shape in T5.items()}
    path = write_gguf(tmp_path / "t5.gguf", tensors, lambda key: "attn_q" in key, architecture="t5encoder")
    header = read_gguf_header(path)
    assert {key: (info.dtype, info.shape) for key, info in header.info().items()} == {
        "shared.weight": ("F32", (96, 32)),
        "encoder.block.0.layer.0.SelfAttention.q.weight": ("Q8_0", (32, 32)),
        "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight": ("F32", (32, 4)),
        "encoder.block.1.layer.1.DenseReluDense.wi_0.weight": ("F32", (64, 32)),
        "encoder.block.1.layer.1.layer_norm.weight": ("F32", (32,)),
        "encoder.final_layer_norm.weight": ("F32", (32,))}
    read = read_gguf_tensors(path, header)
    assert torch.equal(read["shared.weight"], tensors["token_embd.weight"])
    assert read["encoder.block.0.layer.0.SelfAttention.q.weight"].shape == (32, 34)


def sound(path: Path, shape: list[int] | None = None, alignment: int = 64) -> Path:
    """Tensors, one of them noted with another shape and one packed that is no weight; a vocabulary; an alignment."""
    writer = GGUFWriter(str(path), "cogvideox")
    writer.add_custom_alignment(alignment)
    writer.add_array("tokenizer.ggml.tokens", [f"token {i}" for i in range(300)])
    writer.add_array("some.numbers", list(range(40)))
    writer.add_array("comfy.gguf.orig_shape.patch_embed.proj.weight", shape or [4, 8, 2, 2])
    writer.add_tensor("patch_embed.proj.weight", packed(weights(4, 32).numpy(), "Q8_0"),
                      raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("positions", packed(weights(4, 32).numpy(), "Q8_0").reshape(1, 4, 34),
                      raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("bias", np.arange(6, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_noted_shapes_and_alignment(tmp_path):
    path = sound(tmp_path / "a.gguf")
    header = read_gguf_header(path)
    assert header.info()["patch_embed.proj.weight"] == ("Q8_0", (4, 8, 2, 2))
    assert header.tensors["patch_embed.proj.weight"].offset % 64 == 0
    read = read_gguf_tensors(path, header)
    assert read["bias"].tolist() == [0, 1, 2, 3, 4, 5] and read["bias"].dtype == torch.float16
    values = dequantize(read["patch_embed.proj.weight"], "Q8_0", torch.float32).reshape(4, 32)
    assert error(values, weights(4, 32)) < 0.01
    assert torch.equal(read["positions"], values[None])


def damaged(path: Path, at: int, value: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[at:at + len(value)] = value
    path.write_bytes(data)
    return path


def vocabulary(path: Path, count: int) -> Path:
    """A file whose metadata is a list of ``count`` strings; all zeros, as a download that was cut off can be, so that
    each is an empty string."""
    with open(path, "wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 8, count))
        file.truncate(2**28)
    return path


def test_what_cannot_be_read_is_refused_in_words(tmp_path, monkeypatch):
    path = tmp_path / "a.gguf"
    cases = [
        (lambda: path.write_bytes(b""), "ends within its header"),
        (lambda: damaged(sound(path), 0, b"GGML"), "does not begin with GGUF"),
        (lambda: damaged(sound(path), 4, struct.pack("<I", 1)), "expected version 2 or 3"),
        (lambda: damaged(sound(path), 8, struct.pack("<Q", 2**40)), "claims 1099511627776 tensors"),
        (lambda: vocabulary(path, 20_000_000), "claims 20000000 strings"),
        (lambda: path.write_bytes(sound(path).read_bytes()[:-60]), "is truncated: expected"),
        (lambda: path.write_bytes(sound(path).read_bytes()[:2000]), "ends within its header"),
        (lambda: sound(path, shape=[4, 8, 2, 3]), "which is not 128 values"),
        (lambda: write_gguf(path, {"a": weights(2, 32)}, lambda key: False, architecture="llama"),
         r"got a GGUF file of the architecture 'llama'"),
        (lambda: damaged(sound(path), sound(path).read_bytes().index(struct.pack("<QQI", 32, 4, 8)) + 16,
                         struct.pack("<I", 199)), "is of the GGUF type 199, which is unknown"),
        (lambda: damaged(sound(path), sound(path).read_bytes().index(struct.pack("<QQI", 32, 4, 8)) + 16,
                         struct.pack("<I", 26)), "is of the GGUF type I32, which this version cannot unpack"),
    ]
    for make, words in cases:
        make()
        with pytest.raises(SpecError, match=words):
            read_gguf_header(path)
    path.unlink()
    with pytest.raises(SpecError, match="Missing file"):
        read_gguf_header(path)
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(SpecError, match="pip install gguf"):
        read_gguf_header(sound_without_writer(path))


def sound_without_writer(path: Path) -> Path:
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    return path


@given(at=st.integers(0, 3000), value=st.binary(min_size=1, max_size=12))
@settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_mutated_headers_give_clear_errors_or_a_header(tmp_path, at, value):
    path = tmp_path / "fuzz.gguf"
    if not path.exists():
        sound(path)
    good = path.read_bytes()
    try:
        read_gguf_header(damaged(path, at, value))
    except SpecError:
        pass
    finally:
        path.write_bytes(good)
