"""Reading headers, indexes and configs; each damaged file has its own words."""

from __future__ import annotations

import json
import time

import pytest
import torch
from cogx.model_loaders.files import check_shapes, kind_of, main_dtype, read_header, read_json, weight_files
from cogx.models.specs import SpecError
from safetensors.torch import save_file


@pytest.fixture()
def weights(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(40, dtype=torch.bfloat16)}, path, metadata={"k": "v"})
    return path


def test_header(weights):
    tensors, metadata = read_header(weights)
    assert tensors["a"].shape == (2, 3) and tensors["b"].dtype == "BF16"
    assert metadata == {"k": "v"}
    assert main_dtype(tensors) == "BF16"


@pytest.mark.parametrize("damage, message", [
    (lambda data: data[:-7], "is truncated: expected"),
    (lambda data: data[:40], "truncated"),
    (lambda data: b"<html>not found</html>", "not a safetensors file"),
    (lambda data: b"", "not a safetensors file"),
    (lambda data: data[:8] + b"\xff" * (len(data) - 8), "header is damaged"),
    (lambda data: b"\x02" + b"\0" * 7 + b"[]", "header is damaged"),
    (lambda data: b"\x0a" + b"\0" * 7 + b'{"a": "b"}', "header is damaged"),
    (lambda data: b"\x09" + b"\0" * 7 + b'{"a": {}}', "header is damaged"),
])
def test_damaged_file(weights, damage, message):
    weights.write_bytes(damage(weights.read_bytes()))
    with pytest.raises(SpecError, match=message):
        read_header(weights)


@pytest.mark.parametrize("entry", [
    {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}, {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [-1, -1], "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
    {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}, {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]},
    {"dtype": "F32", "shape": [1] * 9, "data_offsets": [0, 4]}, {"dtype": "F32", "shape": "1", "data_offsets": [0, 4]},
    {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}, {"dtype": [], "shape": [1], "data_offsets": [0, 4]},
])
def test_header_that_contradicts_itself(tmp_path, entry):
    """Of the right length, so that only the entry is wrong."""
    raw = json.dumps({"a": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(4))
    with pytest.raises(SpecError, match="header is damaged"):
        read_header(path)


def test_one_file_or_shards(tmp_path, weights):
    assert weight_files(tmp_path) == [weights]
    variant = tmp_path / "model.fp16.safetensors"
    save_file({"a": torch.zeros(1)}, variant)
    assert weight_files(tmp_path) == [weights]
    variant.unlink()
    shard = tmp_path / "model-2.safetensors"
    save_file({"c": torch.zeros(1)}, shard)
    with pytest.raises(SpecError, match=r"expected one \.safetensors file"):
        weight_files(tmp_path)
    index = {"weight_map": {"a": weights.name, "b": weights.name, "c": shard.name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(weight_files(tmp_path)) == {weights, shard}
    shard.unlink()
    with pytest.raises(SpecError, match=r"lacks .'model-2\.safetensors'."):
        weight_files(tmp_path)


def test_no_weights(tmp_path):
    (tmp_path / "weights.bin").touch()
    with pytest.raises(SpecError, match=r"got \['weights\.bin'\]\. Download the weights in safetensors format"):
        weight_files(tmp_path)
    with pytest.raises(SpecError, match="Missing folder"):
        weight_files(tmp_path / "none")


def test_json(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(SpecError, match="Missing file"):
        read_json(file)
    file.write_text("{")
    with pytest.raises(SpecError, match=r"not valid JSON .* Correct it, or download it again"):
        read_json(file)
    file.write_text('\ufeff{"a": 1}', encoding="utf-8")  # with the mark that Windows editors put in front
    assert read_json(file) == {"a": 1}
    file.write_text("[]")
    with pytest.raises(SpecError, match="expected a JSON object, got list"):
        read_json(file)


def test_shapes_that_do_not_fit():
    check_shapes({"a": (1,), "extra": (2,)}, {"a": (1,)}, "here")
    with pytest.raises(SpecError, match=r"here: 1 of 2 weights are missing, such as \['b'\]"):
        check_shapes({"a": (1,)}, {"a": (1,), "b": (2,)}, "here")
    with pytest.raises(SpecError, match=r"a: expected \[2\], got \[1\]"):
        check_shapes({"a": (1,)}, {"a": (2,)}, "here")
    with pytest.raises(SpecError, match=r"here: 1 weights more than its config\.json says"):
        check_shapes({"a": (1,), "transformer_blocks.1.x": (1,)}, {"a": (1,)}, "here")


def test_what_cannot_be_read_is_said(tmp_path):
    """A link to itself, as a file of another user or a drive that is gone: no raw error, which would stop ComfyUI from
    listing any node of the pack."""
    loop = tmp_path / "model_index.json"
    loop.symlink_to(loop)
    for read in (read_json, read_header, kind_of):
        with pytest.raises(SpecError, match="cannot be read"):
            read(loop)


@pytest.mark.parametrize("shape", [["a", 10**10], [2**62] * 9, [10**6] * 100_000, [-1, -6], [True, 6]])
def test_a_shape_is_looked_at_before_it_is_computed_with(tmp_path, shape):
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 24]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(24))
    start = time.process_time()
    with pytest.raises(SpecError, match="header is damaged"):
        read_header(path)
    assert time.process_time() - start < 1
