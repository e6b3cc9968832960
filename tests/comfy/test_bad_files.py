"""Bad files given to the loaders: a clear error each. Fuzzed headers: nothing but clear errors, at once, in little
memory."""

from __future__ import annotations

import io
import json
import resource
import struct
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from cogx.model_loaders.find import find_model, find_text_encoder, find_vae
from cogx.models.specs import SpecError
from cogx.scripts.tiny_pipeline import tiny_text_encoder, tiny_transformer, tiny_vae
from cogx.tests.layout_writers import sat_transformer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

FIND = {"transformer": find_model, "vae": find_vae, "text_encoder": find_text_encoder}
FUZZ = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
SECONDS, MEMORY_MB = 20, 300


@pytest.fixture(scope="module")
def shapes() -> dict[str, dict[str, list[int]]]:
    modules = {"transformer": tiny_transformer("5B"), "vae": tiny_vae("5B"),
               "text_encoder": tiny_text_encoder(vocab_size=100)}
    return {name: {key: list(value.shape) for key, value in module.state_dict().items()}
            for name, module in modules.items()}


def write(path: Path, header: dict[str, Any], size: int) -> None:
    """A safetensors file of zeros that take no room on the disk."""
    raw = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + size)


def header_of(shapes: dict[str, list[int]], dtype: str = "BF16") -> tuple[dict[str, Any], int]:
    header, offset = {}, 0
    for key, shape in shapes.items():
        size = 2
        for length in shape:
            size *= length
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    return header, offset


def only_clear_errors(find: Any, path: Path) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    try:
        find(path)
    except SpecError as error:
        assert len(str(error)) > 20
    assert time.monotonic() - start < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_MB * 1024


SIDES = st.one_of(st.integers(0, 4), st.sampled_from([64, 100, 255, 2**20, 2**31, 2**33]))


@pytest.mark.parametrize("component", FIND)
def test_fuzzed_shapes(shapes, tmp_path, component):
    """The file is sound, its tensors are not those of any model: other shapes, names and counts."""
    keys = sorted(shapes[component])

    @FUZZ
    @given(st.data())
    def fuzz(data: Any) -> None:
        changed = dict(shapes[component])
        for key in data.draw(st.lists(st.sampled_from(keys), min_size=1, max_size=4)):
            what = data.draw(st.sampled_from(["shape", "side", "drop", "name", "more"]))
            shape = list(changed.get(key, [1]))
            if what == "shape":
                changed[key] = data.draw(st.lists(st.integers(0, 70), max_size=6))
            elif what == "side" and shape:
                shape[data.draw(st.integers(0, len(shape) - 1))] = data.draw(SIDES)
                changed[key] = shape
            elif what == "drop":
                changed.pop(key, None)
            elif what == "name":
                changed[data.draw(st.text(max_size=20))] = changed.pop(key, [1])
            else:
                changed[key.replace(".0.", f".{data.draw(st.integers(0, 10**9))}.")] = shape
        header, size = header_of(changed)
        if size < 2**40:  # what a file system can hold
            write(tmp_path / "x.safetensors", header, size)
            only_clear_errors(FIND[component], tmp_path / "x.safetensors")

    fuzz()


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
                    max_leaves=5)
ENTRY = st.fixed_dictionaries({}, optional={"dtype": JSON | st.just("F32"), "shape": JSON, "data_offsets": JSON})


def test_fuzzed_headers(shapes, tmp_path):
    """Entries of any JSON, and bytes of the header changed."""
    header, size = header_of(shapes["transformer"])
    path = tmp_path / "x.safetensors"

    @FUZZ
    @given(st.sampled_from(sorted(header)), ENTRY | JSON, JSON, st.lists(st.tuples(st.integers(0, 30_000),
                                                                                 st.integers(0, 255)), max_size=3))
    def fuzz(key: str, entry: Any, metadata: Any, flips: list[tuple[int, int]]) -> None:
        write(path, {**header, key: entry, "__metadata__": metadata}, size)
        with open(path, "r+b") as file:
            for place, value in flips:
                file.seek(place)
                file.write(bytes([value]))
        only_clear_errors(find_model, path)

    fuzz()


def test_fuzzed_torch_files(tmp_path):
    """Bytes changed in the part of a torch file that describes its tensors."""
    buffer = io.BytesIO()
    torch.save({"module": sat_transformer(tiny_transformer("5B", num_layers=1))}, buffer)
    data, path = buffer.getvalue(), tmp_path / "x.pt"
    with zipfile.ZipFile(buffer) as archive:
        entry = next(entry for entry in archive.infolist() if entry.filename.endswith("data.pkl"))

    @FUZZ
    @given(st.lists(st.tuples(st.integers(0, entry.file_size + 60), st.integers(0, 255)), min_size=1, max_size=4),
           st.just(len(data)) | st.integers(0, len(data)))
    def fuzz(flips: list[tuple[int, int]], length: int) -> None:
        changed = bytearray(data)
        for place, value in flips:
            changed[entry.header_offset + place] = value
        path.write_bytes(changed[:length])
        only_clear_errors(find_model, path)

    fuzz()


@pytest.mark.parametrize("config", [b"[" * 100_000, b"\xff", b'{"_class_name": 5}', b"[]"])
def test_fuzzed_configs(tmp_path, config):
    tiny_transformer("5B").save_pretrained(tmp_path / "t")
    (tmp_path / "t" / "config.json").write_bytes(config)
    with pytest.raises(SpecError, match=r"not valid JSON|expected a JSON object|expected _class_name"):
        find_model(tmp_path / "t")


def test_bytes_of_other_kinds(tmp_path):
    for name, content, message in [
            ("x.pt", b"GGUF\3\0\0\0\0\0", "is not a GGUF file that can be read"),
            ("x.pt", b"<html>", "got something else"),
            ("x.pt", b"\x80\x04}.", "got a torch file from before torch 1.6"),
            ("x.safetensors", b"<html>not found</html>", "is not a safetensors file"),
            ("x.safetensors", b"", "is not a safetensors file")]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SpecError, match=message):
            find_model(tmp_path / name)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(SpecError, match=r"expected a \.safetensors file; got \[\]"):
        find_model(tmp_path / "folder.safetensors")


def test_the_wrong_part_and_the_wrong_family(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(tiny_vae("5B").state_dict(), path)
    with pytest.raises(SpecError, match=r"not a CogVideoX transformer: .* by its keys it is the CogVideoX VAE\."):
        find_model(path)
    with pytest.raises(SpecError, match=r"not a T5 encoder: .* the CogVideoX VAE"):
        find_text_encoder(path)
    save_file({"blocks.0.self_attn.q.weight": torch.zeros(1), "blocks.0.cross_attn.q.weight": torch.zeros(1)}, path)
    with pytest.raises(SpecError, match=r"by its keys it is Wan\. Choose another file"):
        find_model(path)


def test_config_that_contradicts_the_weights(tmp_path):
    """A config beside the file, or in its metadata."""
    model = tiny_transformer("5B")
    model.save_pretrained(tmp_path / "t")
    file = tmp_path / "t" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(SpecError, match=r"config\.json: expected 3 layers .* got 2 in the weights"):
        find_model(tmp_path / "t" / "diffusion_pytorch_model.safetensors")
    path = tmp_path / "x.safetensors"
    save_file(model.state_dict(), path, metadata={"config": json.dumps({**config, "attention_head_dim": 8})})
    with pytest.raises(SpecError, match=r"weights have another shape than its config\.json says"):
        find_model(path)
    tiny_text_encoder().save_pretrained(tmp_path / "text")
    file = tmp_path / "text" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "d_ff": 96}))
    with pytest.raises(SpecError, match=rf"config\.json says d_ff 96, the weights {config['d_ff']}\."):
        find_text_encoder(tmp_path / "text")


@pytest.mark.parametrize("component", FIND)
def test_a_config_of_another_class_beside_a_file_is_ignored(tmp_path, component):
    """Some other model's may lie where a single file was put alone. That of a folder must be right."""
    make = {"transformer": tiny_transformer, "vae": tiny_vae, "text_encoder": lambda _: tiny_text_encoder()}
    tensors = make[component]("5B").state_dict()
    tensors.pop("encoder.embed_tokens.weight", None)  # the same as shared.weight
    save_file(tensors, tmp_path / "x.safetensors")
    alone = FIND[component](tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({
        "_class_name": "AutoencoderKL", "architectures": ["CLIPTextModel"], "num_layers": 3, "d_ff": 9}))
    beside = FIND[component](tmp_path / "x.safetensors")
    assert (beside.spec, beside.took) == (alone.spec, alone.took) and "its shapes" in alone.took
    if component != "text_encoder":
        with pytest.raises(SpecError, match=r"expected _class_name .*, got AutoencoderKL"):
            FIND[component](tmp_path)


def test_half_a_shard_set(tmp_path):
    tiny_transformer("5B").save_pretrained(tmp_path / "t", max_shard_size="200KB")
    first, *_, last = sorted((tmp_path / "t").glob("*.safetensors"))
    last.unlink()
    for path in (tmp_path / "t", first):
        with pytest.raises(SpecError, match=rf"lacks \['{last.name}'\]"):
            find_model(path)


def test_extra_and_non_contiguous_weights(tmp_path):
    """Keys of others are left alone; a transposed weight is what it says."""
    from cogx.model_loaders.load import load_model

    weights = tiny_transformer("2B").state_dict()
    key = "transformer_blocks.1.attn1.to_q.weight"
    weights[key] = weights[key].T.contiguous().T
    torch.save({**weights, "optimizer.step": torch.zeros(3), "v_pred": torch.tensor([])}, tmp_path / "x.pt")
    network = load_model(str(tmp_path / "x.pt"), "fp32", variant="2B").model.diffusion_model
    assert torch.equal(network.state_dict()[key], weights[key])
