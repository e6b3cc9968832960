"""Layouts by their keys, other families by theirs, and what files of each kind say when they are wrong."""

from __future__ import annotations

import json
import os
import pickle
import zipfile

import pytest
import torch
from cogx.model_loaders import torch_files
from cogx.model_loaders.detect import configs_in_metadata
from cogx.model_loaders.families import family_of, not_this
from cogx.model_loaders.files import component_folder, kind_of, weight_set
from cogx.model_loaders.keys import AUTHORS, CORE, DIFFUSERS, find_component
from cogx.model_loaders.torch_files import read_torch
from cogx.models.specs import SpecError
from safetensors.torch import save_file

SAT = "model.diffusion_model."


def test_fused_weights_are_rows_of_one_key():
    shapes = {f"{SAT}mixins.patch_embed.text_proj.weight": (64, 32),
              f"{SAT}transformer.layers.7.attention.query_key_value.weight": (192, 64),
              f"{SAT}mixins.adaln_layer.adaLN_modulations.7.1.bias": (768,),
              "first_stage_model.encoder.conv_in.conv.weight": (1,)}
    found = find_component("transformer", shapes)
    assert (found.layout, found.prefix) == (AUTHORS, SAT)
    key = found.parts["transformer_blocks.7.attn1.to_v.weight"]
    assert (key.key, key.shape, key.blocks, key.of) == (
        f"{SAT}transformer.layers.7.attention.query_key_value.weight", (64, 64), (2,), 3)
    assert found.parts["transformer_blocks.7.norm2.linear.bias"].blocks == (3, 4, 5, 9, 10, 11)
    assert len(found.parts) == 6


def test_decoder_levels_are_counted_from_the_other_end():
    shapes = {"decoder.mid.block_1.norm1.norm_layer.weight": (8,), "decoder.up.0.block.0.conv1.conv.weight": (1,),
              "decoder.up.1.upsample.conv.weight": (2,), "decoder.up.2.block.1.nin_shortcut.bias": (3,)}
    found = find_component("vae", shapes)
    assert {key: part.shape for key, part in found.parts.items() if "up" in key} == {
        "decoder.up_blocks.2.resnets.0.conv1.conv.weight": (1,), "decoder.up_blocks.1.upsamplers.0.conv.weight": (2,),
        "decoder.up_blocks.0.resnets.1.conv_shortcut.bias": (3,)}


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "a.b.c."])
@pytest.mark.parametrize("keys, layout", [
    (["patch_embed.text_proj.weight", "transformer_blocks.0.norm1.linear.weight"], DIFFUSERS),
    (["patch_embed.text_proj.weight", "blocks.0.norm1.linear.weight"], CORE),
])
def test_any_prefix(prefix, keys, layout):
    found = find_component("transformer", {prefix + key: (6, 2) for key in [*keys, "other.weight"]})
    assert (found.layout, found.prefix) == (layout, prefix)
    assert "transformer_blocks.0.norm1.linear.weight" in found.parts


def test_of_two_copies_the_outer_one_is_taken():
    """Such as a training checkpoint with an average of its weights beside them."""
    shapes = {f"{prefix}{name}": (1, 1) for prefix in ("ema.model.", "model.") for name in (
        "patch_embed.text_proj.weight", "proj_out.weight")}
    for given in (shapes, dict(reversed(shapes.items()))):
        found = find_component("transformer", given)
        assert found.prefix == "model." and found.parts["proj_out.weight"].key == "model.proj_out.weight"


def test_rows_that_do_not_divide():
    with pytest.raises(SpecError, match=r"query_key_value\.bias: expected a weight whose rows divide by 3, got shape"):
        find_component("transformer", {"mixins.patch_embed.text_proj.weight": (1, 1),
                                       "transformer.layers.0.attention.query_key_value.bias": (64,)})


@pytest.mark.parametrize("family, keys", [
    ("Wan", ["blocks.0.self_attn.q.weight", "blocks.0.cross_attn.k.weight", "patch_embedding.weight"]),
    ("HunyuanVideo", ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight",
                      "txt_in.individual_token_refiner.blocks.0.norm1.weight"]),
    ("Flux", ["double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight", "txt_in.weight"]),
    ("LTX-Video", ["patchify_proj.weight", "scale_shift_table", "transformer_blocks.0.attn1.to_q.weight"]),
    ("SDXL", ["input_blocks.0.0.weight", "label_emb.0.0.weight", "output_blocks.0.0.in_layers.0.weight"]),
    ("Stable Diffusion 1 or 2", ["input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight"]),
    ("CogView3-Plus", ["patch_embed.text_proj.weight", "time_condition_embed.timestep_embedder.linear_1.weight"]),
    ("the UMT5 text encoder of Wan", ["encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"]),
    ("a LoRA", ["transformer_blocks.0.attn1.to_q.lora_A.weight"]),
    ("a LoRA", [f"transformer.layers.0.attention.dense.matrix_{letter}.0" for letter in "AB"]),  # SAT's
    ("the CogVideoX VAE", ["decoder.mid_block.resnets.0.norm1.conv_y.conv.weight"]),
    ("the CogVideoX VAE", ["decoder.mid.block_1.norm1.conv_y.conv.weight"]),
])
def test_other_families_are_named(family, keys):
    prefixed = [f"model.diffusion_model.{key}" for key in keys]
    assert family_of(keys).startswith(family) and family_of(prefixed).startswith(family)
    assert f"expected the key x; by its keys it is {family}" in not_this("CogVideoX transformer", "x", keys)


def test_configs_in_metadata():
    transformer = {"_class_name": "CogVideoXTransformer3DModel", "num_layers": 2}
    together = {"transformer": transformer, "vae": {"scaling_factor": 0.9}, "scheduler": {}}
    assert configs_in_metadata({"config": json.dumps(together)}) == together
    assert configs_in_metadata({"config": json.dumps(transformer)}) == {"transformer": transformer}
    for other in ("", "{", "[]", "5", "null", '{"transformer": {"_class_name": "LTXVideo"}, "vae": {}}',
                  '{"_class_name": "Flux"}', "[" * 100_000):
        assert configs_in_metadata({"config": other}) == {}


def test_kinds_by_content(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "a.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "b.safetensors")
    torch.save({"a": torch.zeros(1)}, tmp_path / "c.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "d.pt").write_bytes(b"GGUF\3\0\0\0")
    (tmp_path / "e.pt").write_bytes(b"")
    (tmp_path / "f.safetensors").write_bytes(b"<html>")
    kinds = [kind_of(file) for file in sorted(tmp_path.iterdir())]
    assert kinds == ["safetensors", "torch", "old torch", "gguf", "other", "safetensors"]
    with pytest.raises(SpecError, match="is a folder, not a file of weights"):
        kind_of(tmp_path)
    with pytest.raises(SpecError, match="Missing file"):
        kind_of(tmp_path / "none")


def test_shard_sets(tmp_path):
    """One file of a set stands for all: by an index, and by numbered names without one."""
    names = [f"x-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "alone.safetensors").touch()
    (tmp_path / "broken.safetensors.index.json").write_text("{")
    assert weight_set(tmp_path / "alone.safetensors") == [tmp_path / "alone.safetensors"]
    assert weight_set(tmp_path / names[1]) == [tmp_path / name for name in names]
    (tmp_path / names[0]).unlink()
    with pytest.raises(SpecError, match=rf"lacks \['{names[0]}'\], which belong to the same set as {names[1]}"):
        weight_set(tmp_path / names[1])
    index = {"weight_map": {"a": "alone.safetensors", "b": "half.safetensors", "c": "../../etc/passwd"}}
    (tmp_path / "m.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SpecError, match=r"lacks \['half\.safetensors'\], which m\.safetensors\.index\.json names"):
        weight_set(tmp_path / "alone.safetensors")


def test_config_beside_a_file_belongs_to_it_if_it_is_alone(tmp_path):
    file = tmp_path / "x.safetensors"
    file.touch()
    assert component_folder(file) is None and component_folder(tmp_path) == tmp_path
    (tmp_path / "config.json").write_text("{}")
    assert component_folder(file) == tmp_path
    (tmp_path / "y.safetensors").touch()
    assert component_folder(file) is None


class Evil:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("payload", [{"module": {"a": torch.zeros(1), "b": Evil()}}, Evil()])
def test_pickle_with_code_is_refused_and_not_run(tmp_path, monkeypatch, payload):
    monkeypatch.chdir(tmp_path)
    torch.save(payload, tmp_path / "x.pt")
    with pytest.raises(SpecError, match=r"holds code or is damaged: it asks for \w+\.mkdir\. It was refused and noth"):
        read_torch(tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(pickle.dumps(payload))
    assert kind_of(tmp_path / "y.pt") == "old torch"
    assert not (tmp_path / "executed").exists()


def test_torch_files_that_are_none(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    torch.save({"module": {"a": torch.zeros(1000)}, "step": 3}, path)
    assert list(read_torch(path)) == ["a"]
    torch.save({"model": {"state_dict": {"b": torch.zeros(1)}}, "lr": torch.zeros(1)}, path)
    assert list(read_torch(path)) == ["b"]
    torch.save({"module": {"a": torch.zeros(1000)}, "step": 3}, path)
    with monkeypatch.context() as patch:
        patch.setattr(torch_files, "_MAX_PICKLE", 10)
        with pytest.raises(SpecError, match=r"its description of the tensors is larger than any model's"):
            read_torch(path)
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])
    with pytest.raises(SpecError, match="is truncated or damaged"):
        read_torch(path)
    torch.save([1, 2], path)
    with pytest.raises(SpecError, match="expected a dict of tensors, got list without any"):
        read_torch(path)
    torch.save({"a": torch.zeros(1).expand(10**12)}, path)
    with pytest.raises(SpecError, match="a is no plain tensor with all of its values"):
        read_torch(path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**7)
    with pytest.raises(SpecError, match=r"archive/data\.pkl in it is compressed"):
        read_torch(path)
