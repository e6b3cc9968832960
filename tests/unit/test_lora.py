"""What the keys of LoRA files mean, and which scale their author meant. Pure: names, shapes and numbers."""

from __future__ import annotations

import json

import pytest
from cogx.model_loaders.lora_keys import is_text, plan, rank_of, read_key
from cogx.model_loaders.lora_scale import accepted, scale_of, settings_beside, settings_in, words_in
from cogx.models.specs import SpecError
from hypothesis import given, settings
from hypothesis import strategies as st

BLOCKS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "norm1.linear", "ff.net.0.proj", "ff.net.2")
MODEL = {f"transformer_blocks.{block}.{name}.weight": (64, 64) for block in range(2) for name in BLOCKS}
MODEL |= {"patch_embed.proj.weight": (64, 16, 2, 2), "patch_embed.proj.bias": (64,),
          "time_embedding.linear_1.weight": (32, 64), "transformer_blocks.0.attn1.norm_q.weight": (64,)}
PAIR = {".lora_A.weight": (4, 64), ".lora_B.weight": (64, 4)}


def modules(shapes):
    return [(change.module, change.third) for change in plan(shapes, MODEL, "x").changes]


Q, V = "transformer_blocks.1.attn1.to_q", "transformer_blocks.1.attn1.to_v"


@pytest.mark.parametrize("name, module", [
    (Q, Q), (f"transformer.{Q}", Q), (f"diffusion_model.{Q}", Q), (f"model.diffusion_model.{Q}", Q),
    (f"base_model.model.{Q}", Q), (f"base_model.model.transformer.{Q}", Q), (f"module.{Q}", Q), (f"unet.{Q}", Q),
    ("lora_unet_transformer_blocks_1_attn1_to_q", Q), ("lora_unet__transformer_blocks_1_attn1_to_q", Q),
    ("lora_transformer_transformer_blocks_1_attn1_to_q", Q), ("lycoris_transformer_blocks_1_attn1_to_q", Q),
    ("transformer.transformer_blocks.1.attn1.to_out", "transformer_blocks.1.attn1.to_out.0"),
    ("lora_unet_transformer_blocks_1_attn1_to_out_0", "transformer_blocks.1.attn1.to_out.0"),
    ("diffusion_model.blocks.1.q", Q), ("lora_unet_blocks_1_q", Q),
    ("blocks.1.ff_out", "transformer_blocks.1.ff.net.2"),
    ("blocks.1.norm1.linear", "transformer_blocks.1.norm1.linear"),
    ("model.diffusion_model.transformer.layers.1.attention.dense", "transformer_blocks.1.attn1.to_out.0"),
    ("layers.1.mlp.dense_h_to_4h", "transformer_blocks.1.ff.net.0.proj"),
])
def test_names(name, module):
    assert modules({name + end: shape for end, shape in PAIR.items()}) == [(module, None)]


@pytest.mark.parametrize("key, module, role, layout", [
    ("m.lora_A.weight", "m", "down", "peft"), ("m.lora_B.default.weight", "m", "up", "peft"),
    ("m.lora_A", "m", "down", "peft"), ("m.lora_up.weight", "m", "up", "kohya"),
    ("lora_unet__m.lora_down.weight", "lora_unet__m", "down", "CogVideoX-Fun"),
    ("m.processor.to_q_lora.down.weight", "m.processor.to_q", "down", "diffusers (old)"),
    ("m.lora.up.weight", "m", "up", "diffusers (old)"), ("m.lora_linear_layer.up.weight", "m", "up", "diffusers (old)"),
    ("m.lora_magnitude_vector.default.weight", "m", "magnitude", ""), ("m.dora_scale", "m", "magnitude", ""),
    ("m.hada_w1_a", "m", "hada_w1_a", "LoHa"), ("m.lokr_w2", "m", "lokr_w2", "LoKr"), ("m.alpha", "m", "alpha", ""),
    ("m.diff_b", "m", "diff_b", "differences"),
])
def test_roles(key, module, role, layout):
    assert read_key(key) == (module, None, role, layout)


def test_keys_that_are_no_roles():
    assert read_key("m.weight") is None and read_key("m.lora_B.bias") is None and read_key("m.original.weight") is None
    assert read_key("m.matrix_B.2") == ("m", 2, "up", "SAT")
    for key in ("lora_te_encoder_block_0", "text_encoder.encoder.block.0", "text_encoders.t5xxl.x", "lora_te1_x"):
        assert is_text(key)
    assert not is_text("transformer.text_proj")


def test_fused_projections():
    """SAT numbers the pairs; other files have one pair with the rows of all three."""
    name = "model.diffusion_model.transformer.layers.1.attention.query_key_value"
    assert modules({f"{name}.matrix_A.2": (4, 64), f"{name}.matrix_B.2": (64, 4)}) == [(V, None)]
    for fused in (name, "transformer.transformer_blocks.1.attn1.to_qkv", "lora_unet_transformer_blocks_1_attn1_to_qkv"):
        found = modules({f"{fused}.lora_A.weight": (4, 64), f"{fused}.lora_B.weight": (192, 4)})
        assert found == [(Q.replace("_q", f"_{x}"), third) for third, x in enumerate("qkv")]
        with pytest.raises(SpecError, match=r"has the shape \[192, 64\] in this model and \[64, 64\] in the LoRA"):
            modules({fused + end: shape for end, shape in PAIR.items()})


@pytest.mark.parametrize("shapes, message", [
    ({f"{Q}.lora_A.weight": (4, 64)}, r"is incomplete: .*lora_A.weight lacks its up part"),
    ({f"{Q}.hada_w1_a": (64, 4), f"{Q}.hada_w1_b": (4, 64)}, "lacks its hada_w2_a part"),
    ({f"{Q}.lokr_w1": (8, 8)}, "lacks its lokr_w2 part"),
    ({f"{Q}{end}": (1, 1) for end in (".lora_A.one.weight", ".lora_A.two.weight")}, "expected one LoRA, got several"),
    ({f"{prefix}{Q}{end}": shape for prefix in ("", "transformer.") for end, shape in PAIR.items()}, "got several for"),
    ({f"{Q}.lora_A.weight": (4, 64), f"{Q}.lora_B.weight": (64, 8)}, "do not fit each other"),
    ({f"{Q}.lora_A.weight": (), f"{Q}.lora_B.weight": ()}, "do not fit each other"),
    ({f"{Q}.lokr_w1": (8, 8), f"{Q}.lokr_w2": (8, 4)}, r"\[64, 64\] in this model and \[64, 32\] in the LoRA"),
    ({**{Q + end: shape for end, shape in PAIR.items()}, f"{Q}.dora_scale": (1, 32)}, "the 32 magnitudes of .* be 64"),
    ({f"{Q}.dora_scale": (64, 1), f"{Q}.diff": (64, 64)}, "none matches"),
    ({"text_encoder.x.lora_A.weight": (4, 64)}, "got 1 keys of which none matches"),
    ({}, "got 0 keys of which none matches"),
    ({f"{Q}.lora_A": (4, 64), f"{Q}.lora_B": (64, 4), f"{Q}.lora_mid.weight": (4, 4, 1, 1)}, "none matches"),
    ({"patch_embed.proj.lora_A.weight": (4, 32, 2, 2), "patch_embed.proj.lora_B.weight": (64, 4, 1, 1)},
     "was trained for another model: patch_embed.proj.weight"),
])
def test_refusals(shapes, message):
    with pytest.raises(SpecError, match=message):
        plan(shapes, MODEL, "x")


ENDS = [*PAIR, ".alpha", ".dora_scale", ".matrix_A.1", ".matrix_B.9", ".hada_w1_a", ".hada_w1_b", ".hada_w2_a",
        ".hada_w2_b", ".lokr_w1", ".lokr_w2_a", ".lokr_w2_b", ".diff", ".diff_b", ".set_weight", ".lora_mid.weight", ""]
NAMES = [Q, V, "patch_embed.proj", "layers.1.attention.query_key_value", "time_embedding_linear_1", "lora_unet_", "."]


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.tuples(st.sampled_from(NAMES), st.sampled_from(ENDS)).map("".join),
                       st.lists(st.sampled_from([0, 1, 4, 16, 64, 192]), max_size=4).map(tuple), max_size=8))
def test_whatever_the_header_holds(shapes):
    """A plan, whose changes fit the model, or a clear refusal."""
    try:
        made = plan(shapes, MODEL, "x")
    except SpecError:
        return
    assert all(f"{change.module}.weight" in MODEL for change in made.changes)
    assert all(rank_of(change, shapes) is None or rank_of(change, shapes) >= 0 for change in made.changes)


# --- scales ---


def scale(rank, alpha=None, metadata=None, is_sat=False, module=Q):
    made = scale_of(module, rank, alpha, settings_in(metadata, "its metadata") if metadata else None, is_sat)
    return made.value, made.source


PEFT = {"transformer.r": 64, "transformer.lora_alpha": 32,
        "transformer.alpha_pattern": {"to_v": 16, r"^transformer\.proj_out$": 8}}


@pytest.mark.parametrize("expected, words, arguments", [
    (0.5, "alpha 32 in the file, rank 64", {"alpha": 32.0, "metadata": {"lora_alpha": 1}}),
    (1.0, "alpha is the rank", {"alpha": 0.0}),  # as CogVideoX-Fun trains
    (0.5, "lora_alpha 32 in its metadata, rank 64", {"metadata": {"lora_adapter_metadata": json.dumps(PEFT)}}),
    (0.25, "lora_alpha 16", {"metadata": {"lora_adapter_metadata": json.dumps(PEFT)}, "module": V}),
    (0.125, "lora_alpha 8", {"metadata": {"lora_adapter_metadata": json.dumps(PEFT)}, "module": "proj_out"}),
    (2.0, "lora_alpha 128", {"metadata": {"lora_config": json.dumps({"r": 64, "lora_alpha": 128})}}),
    (2.0, "lora_alpha 128", {"metadata": {"ss_network_alpha": "128", "ss_network_dim": "64"}}),
    (4.0, "rank-stabilised lora_alpha 32", {"metadata": {"lora_alpha": 32, "use_rslora": True}}),
    (1.0, "does not say", {"metadata": {"ss_network_alpha": "None", "format": "pt"}}),
    (1.0, "does not say", {}),
    (1 / 64, "rank 64; SAT trains with alpha 1", {"is_sat": True}),
    (0.5, "lora_alpha 32", {"is_sat": True, "metadata": {"lora_alpha": 32}}),
])
def test_scales(expected, words, arguments):
    value, source = scale(64, **arguments)
    assert value == pytest.approx(expected) and words in source


def test_words_of_resizers():
    """kohya's resizer writes Dynamic where each module has a rank and an alpha of its own."""
    both = {"ss_network_dim": "Dynamic", "ss_network_alpha": "Dynamic"}
    assert scale(64, metadata=both) == scale(64)
    assert scale(64, metadata={**both, "ss_network_alpha": "32"})[0] == 0.5
    assert words_in(both, "its metadata") == "ss_network_alpha 'Dynamic' in its metadata is no number and is not used."
    assert words_in({"ss_network_dim": "Dynamic", "ss_network_alpha": "None"}, "x") == ""


def test_scale_without_a_rank():
    """LoKr of two full factors: LyCORIS's alpha means nothing then, peft divides by the rank of its settings."""
    assert scale(None, alpha=8.0)[0] == 1 and scale(None)[0] == 1
    assert scale(None, metadata={"alpha": 8, "r": 32})[0] == 0.25


@pytest.mark.parametrize("metadata, message", [
    ({"lora_alpha": "many"}, "lora_alpha in x: expected a number, got 'many'"),
    ({"lora_alpha": float("nan")}, "expected a number"), ({"lora_alpha": [1]}, "expected a number"),
    ({"lora_alpha": 1, "r": "1e999"}, "r in x: expected a number"),
    ({"lora_config": "{"}, "expected a JSON object"), ({"lora_config": "[" * 100_000}, "expected a JSON object"),
    ({"lora_alpha": 1, "alpha_pattern": [1]}, "alpha_pattern in x: expected a JSON object"),
    ({"lora_alpha": 1, "alpha_pattern": {"(a+)+$": 1}}, "expected names of modules, got the expression"),
])
def test_settings_that_are_none(metadata, message):
    with pytest.raises(SpecError, match=message):
        settings_in(metadata, "x")
    with pytest.raises(SpecError, match="alpha is nan"):
        scale(4, alpha=float("nan"))


def test_settings_beside_the_file(tmp_path):
    """NAME.json counts; adapter_config.json if the LoRA is alone; neither if its rank is another."""
    lora = tmp_path / "pan.safetensors"
    lora.write_bytes(b"")
    assert settings_beside(lora, {4}) == (None, "")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 2}))
    assert settings_beside(lora, {4})[0].alpha == 2
    (tmp_path / "other.safetensors").write_bytes(b"")
    assert settings_beside(lora, {4}) == (None, "")
    (tmp_path / "pan.json").write_text(json.dumps({"description": "civitai"}))
    assert settings_beside(lora, {4}) == (None, "")
    (tmp_path / "pan.json").write_text(json.dumps({"r": 8, "lora_alpha": 2}))
    found, warning = settings_beside(lora, {4})
    assert found is None and "is for rank 8, the LoRA has 4" in warning
    patterned = settings_in({"r": 8, "lora_alpha": 2, "rank_pattern": {"to_q": 4}}, "x")
    assert accepted(patterned, {4}) == (patterned, "")
    (tmp_path / "pan.json").write_text("{")
    with pytest.raises(SpecError, match=r"pan\.json is not valid JSON"):
        settings_beside(lora, {4})
