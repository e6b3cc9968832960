"""Every layout of every variant through the loader nodes: the forward of diffusers' model to 1e-6, whatever the name.

The files are written by ``layout_writers`` and by diffusers; the names are random and say nothing.
"""

from __future__ import annotations

import json
import os
import sys
import types
import uuid
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from cogx.model_loaders.find import find_model, find_vae
from cogx.models.cogvideox.transformer import with_published_keys
from cogx.models.specs import PUBLISHED, SpecError
from cogx.nodes.load import LoadModel, LoadPipeline, LoadVAE
from cogx.scripts.tiny_pipeline import VARIANTS, tiny_transformer
from cogx.tests.layout_writers import core_transformer, sat_transformer, sat_vae, sat_with_lora
from cogx.tests.numeric.test_transformer import inputs, run_reference
from cogx.tests.quantized_writers import plain_fp8
from safetensors.torch import save_file

# A lone file does not say the native size, which rotary positions stretch over and a learned table is made for: it is
# the published one. For the table the forward must be of that size, so the rest is tiny.
SIZE = {"sample_width": 90, "sample_height": 60, "sample_frames": 49}
NATIVE = {"5B": SIZE, "5B-I2V": {**SIZE, "num_attention_heads": 1, "num_layers": 1}}
CLASS = {"_class_name": "CogVideoXTransformer3DModel"}


@pytest.fixture(scope="module")
def references() -> dict[str, Any]:
    made = {variant: tiny_transformer(variant, **NATIVE.get(variant, {})) for variant in VARIANTS}
    return {**made, "small 5B-I2V": tiny_transformer("5B-I2V")}


@pytest.fixture(scope="module")
def expected(references) -> dict[str, Any]:
    """Inputs, and what diffusers makes of them."""
    made = {}
    with torch.inference_mode():
        for variant, reference in references.items():
            batch, size = (1, (13, 60, 90)) if variant == "5B-I2V" else (2, (5, 8, 12))
            given = inputs(reference, size, batch)
            made[variant] = (given, run_reference(reference, *given))
    return made


class Models:
    """The model folders of a ComfyUI, and the texts that nodes showed."""

    def __init__(self, root: Path) -> None:
        self.root, self.shown = root, []

    def send_progress_text(self, text: str, node_id: str) -> None:
        self.shown.append(text)

    def name(self, category: str, ending: str) -> Path:
        """A place for a file of a random name, one folder down."""
        path = self.root / category / uuid.uuid4().hex / f"{uuid.uuid4().hex}{ending}"
        path.parent.mkdir(parents=True)
        return path

    def shown_name(self, category: str, path: Path) -> str:
        return path.relative_to(self.root / category).as_posix()


@pytest.fixture()
def models(tmp_path, monkeypatch):
    made = Models(tmp_path)
    for category in ("diffusion_models", "vae", "diffusers"):
        (tmp_path / category).mkdir()
        extensions = folder_paths.folder_names_and_paths[category][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, category, ([str(tmp_path / category)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    fake = types.SimpleNamespace(PromptServer=types.SimpleNamespace(instance=made))
    monkeypatch.setitem(sys.modules, "server", fake)
    for node in (LoadModel, LoadPipeline, LoadVAE):
        monkeypatch.setattr(node, "hidden", types.SimpleNamespace(unique_id="1"), raising=False)
    return made


def prefixed(prefix: str):
    def write(models: Models, reference: Any) -> Path:
        path = models.name("diffusion_models", ".safetensors")
        save_file({prefix + key: value for key, value in reference.state_dict().items()}, path)
        return path

    return write


def core(prefix: str):
    def write(models: Models, reference: Any) -> Path:
        path = models.name("diffusion_models", ".safetensors")
        save_file({prefix + key: value for key, value in core_transformer(reference).items()}, path)
        return path

    return write


def sat(models: Models, reference: Any) -> Path:
    """As DeepSpeed writes it, the trainer's random state included."""
    import numpy

    path = models.name("diffusion_models", ".pt")
    weights = sat_transformer(reference)
    weights["first_stage_model.encoder.conv_in.conv.weight"] = torch.zeros(2, 2)
    torch.save({"module": weights, "iteration": 1, "np_rng_state": numpy.random.RandomState(0).get_state(),
                "param_shapes": {key: value.shape for key, value in weights.items()}}, path)
    return path


def with_metadata(models: Models, reference: Any) -> Path:
    path = models.name("diffusion_models", ".safetensors")
    config = {"transformer": {**CLASS, **reference.config}, "vae": {"scaling_factor": 0.9}}
    save_file(core_transformer(reference), path, metadata={"config": json.dumps(config, default=str)})
    return path


def folder(models: Models, reference: Any) -> Path:
    """A component folder without its pipeline."""
    place = models.name("diffusion_models", "")
    reference.save_pretrained(place)
    return next(place.glob("*.safetensors"))


def shards(models: Models, reference: Any) -> Path:
    place = models.name("diffusion_models", "")
    reference.save_pretrained(place, max_shard_size="200KB")
    found = sorted(place.glob("*.safetensors"))
    assert len(found) > 1
    return found[-1]


def safetensors_by_another_name(models: Models, reference: Any) -> Path:
    path = prefixed("")(models, reference)
    return path.rename(path.with_suffix(".bin"))


# The forward of a 5B-I2V of the published size takes seconds: where another case has shown the layout, equal weights
# show the rest.
SAME = ("transformer.", "diffusion_model.", "core, prefixed", ".bin")

# Whether the file says itself that a tiny 2B has sinusoidal positions; else the user must.
LAYOUTS = {
    "diffusers": (prefixed(""), False), "transformer.": (prefixed("transformer."), False),
    "model.diffusion_model.": (prefixed("model.diffusion_model."), False),
    "diffusion_model.": (prefixed("diffusion_model."), False), "core": (core(""), False),
    "core, prefixed": (core("model.diffusion_model."), False), "SAT": (sat, True), "metadata": (with_metadata, True),
    "folder": (folder, True), "shards": (shards, True), ".bin": (safetensors_by_another_name, False),
}


def forward(model: Any, given: tuple[Any, ...]) -> torch.Tensor:
    x, timestep, context, ofs = given
    return model.model.diffusion_model(x, timestep, context, ofs=ofs)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_of_every_layout(models, references, expected, error, layout, variant):
    write, tells = LAYOUTS[layout]
    which = "small 5B-I2V" if variant == "5B-I2V" and tells and layout != "SAT" else variant
    name = models.shown_name("diffusion_models", write(models, references[which]))
    said = variant if variant == "2B" and not tells else "auto"
    assert LoadModel.validate_inputs(checkpoint=name, weight_dtype="fp32", variant=said) is True
    out = LoadModel.execute(name, "fp32", "none", said)
    model, given = out.result[0], expected[which]
    assert model.model.spec.name == variant
    if layout != "metadata":
        assert model.model.latent_format.scale_factor == (1.15258426 if variant == "2B" else 0.7)
    if which == "5B-I2V" and layout in SAME:
        loaded = with_published_keys(model.model.diffusion_model.state_dict())
        wanted = references[which].state_dict()
        assert loaded.keys() == wanted.keys() and all(torch.equal(loaded[key], wanted[key].float()) for key in wanted)
    else:
        assert error(forward(model, given[0]), given[1]) <= 1e-6
    assert models.shown[-1] == out.ui["text"][0] and f"CogVideoX {variant} (" in models.shown[-1]


@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_of_a_pipeline_folder(models, tiny_pipelines, error, variant):
    from diffusers import CogVideoXTransformer3DModel

    place = models.root / "diffusers" / uuid.uuid4().hex
    place.symlink_to(tiny_pipelines / variant, target_is_directory=True)
    reference = CogVideoXTransformer3DModel.from_pretrained(place / "transformer").eval()
    given = inputs(reference, (5, 8, 12))
    wanted = run_reference(reference, *given)
    whole = LoadPipeline.execute(place.name, "fp32", "none")
    part = LoadModel.execute(f"{place.name}/transformer", "fp32", "none")
    assert error(forward(whole.result[0], given), wanted) <= 1e-6
    assert error(forward(part.result[0], given), wanted) <= 1e-6


@pytest.mark.parametrize("layout", ["diffusers", "core", "SAT", "folder"])
def test_missing_patch_bias(models, error, layout):
    """Some files of 1.5 have none: it must be zero, not what was in memory."""
    reference = tiny_transformer("1.5-5B")
    reference.patch_embed.proj.bias.data.zero_()
    given = inputs(reference, (5, 8, 12))
    wanted = run_reference(reference, *given)
    bias = reference.patch_embed.proj.bias
    reference.patch_embed.proj.bias = None
    path = LAYOUTS[layout][0](models, reference)
    reference.patch_embed.proj.bias = bias
    model = LoadModel.execute(models.shown_name("diffusion_models", path), "fp32", "none").result[0]
    assert model.model.diffusion_model.patch_embed.proj.bias is None
    assert error(forward(model, given), wanted) <= 1e-6


def test_patch_matrix_of_the_authors_current_code(models, references, expected, error):
    path = models.name("diffusion_models", ".pt")
    torch.save({"module": sat_transformer(references["5B"], linear_patch=True)}, path)
    model = LoadModel.execute(models.shown_name("diffusion_models", path), "fp32", "none").result[0]
    given, wanted = expected["5B"]
    assert error(forward(model, given), wanted) <= 1e-6


def test_positions_that_no_file_tells(models, references):
    """A tiny 2B with diffusers' keys looks like a 5B: the node says that it guesses, and the user decides."""
    name = models.shown_name("diffusion_models", prefixed("")(models, references["2B"]))
    guess = LoadModel.execute(name, "fp32", "none").result[0]
    assert guess.model.spec.name == "5B"
    assert "not tell 2B's positions from 5B's at width 64; rotary ones are taken: set variant to 2B" in models.shown[-1]
    LoadModel.execute(name, "fp32", "none", "2B")
    assert models.shown[-1].startswith("CogVideoX 2B (as set); VAE scale 1.15258 (as published for 2B)")


def test_a_2b_that_takes_an_image(models, error):
    """A finetune of 2B, in a file whose table of positions could be 5B-I2V's but for the user's word."""
    reference = tiny_transformer("2B", in_channels=32)
    given = inputs(reference, (5, 8, 12))
    name = models.shown_name("diffusion_models", sat(models, reference))
    model = LoadModel.execute(name, "fp32", "none", "2B").result[0]
    assert model.model.spec.name == "2B" and model.model.spec.takes_image
    assert error(forward(model, given), run_reference(reference, *given)) <= 1e-6


def test_a_lora_in_the_authors_checkpoint(models, error):
    """As their trainer saves it: merged, W + B A / r, it is what the trained model computes."""
    reference = tiny_transformer("5B", **SIZE)
    weights, merged = sat_with_lora(reference, rank=4)
    given = inputs(reference, (5, 8, 12))
    before = run_reference(reference, *given)
    reference.load_state_dict({**reference.state_dict(), **merged})
    wanted = run_reference(reference, *given)
    assert error(before, wanted) > 0.05
    path = models.name("diffusion_models", ".pt")
    torch.save({"module": weights}, path)
    model = LoadModel.execute(models.shown_name("diffusion_models", path), "fp32", "none").result[0]
    assert error(forward(model, given), wanted) <= 1e-6
    assert "; the LoRA of rank 4 in it merged at 1/rank, as SAT trains it (alpha 1);" in models.shown[-1]
    fp8 = plain_fp8(models.name("diffusion_models", ".safetensors"), weights,
                    lambda key: key.endswith((".dense.original.weight", ".query_key_value.original.weight")))
    assert not find_model(fp8).layers, "with a LoRA merged they are no longer fp8"
    model = LoadModel.execute(models.shown_name("diffusion_models", fp8), "fp32", "none").result[0]
    assert 1e-4 < error(forward(model, given), wanted) <= 0.06
    half = {key: value for key, value in weights.items() if not key.endswith("matrix_A.1")}
    torch.save({"module": half}, path)
    with pytest.raises(SpecError, match=r"query_key_value: expected the LoRA in this checkpoint to fit.*matrix_A \[\]"):
        find_model(path)


def test_vae_scale(models, references):
    """Of a config beside or inside the file, else as published, else what the user sets; it is the MODEL's."""
    name = models.shown_name("diffusion_models", with_metadata(models, references["5B"]))
    assert LoadModel.execute(name, "fp32", "none").result[0].model.latent_format.scale_factor == 0.9
    assert "VAE scale 0.9 (its vae config)" in models.shown[-1]
    model = LoadModel.execute(name, "fp32", "none", vae_scale=1.25).result[0]
    assert model.model.latent_format.scale_factor == 1.25 and "VAE scale 1.25 (as set)" in models.shown[-1]
    factory, arguments = model.cached_patcher_init[:2]
    assert factory(*arguments).model.latent_format.scale_factor == 1.25


@pytest.mark.parametrize("variant", VARIANTS)
def test_detection_at_full_size(variant):
    """The published sizes, without weights: every layout of every variant is recognised whole."""
    from dataclasses import fields

    from cogx.model_loaders.detect import model_from_shapes
    from cogx.model_loaders.keys import AUTHORS, CORE, DIFFUSERS, find_component
    from diffusers import CogVideoXTransformer3DModel

    spec = PUBLISHED[variant].transformer
    config = {field.name: getattr(spec, field.name) for field in fields(spec) if field.name != "norm_eps"}
    with torch.device("meta"):
        reference = CogVideoXTransformer3DModel(**config)
        layouts = {AUTHORS: sat_transformer(reference), CORE: core_transformer(reference),
                   DIFFUSERS: {f"a.b.{key}": value for key, value in reference.state_dict().items()}}
    for layout, state_dict in layouts.items():
        found = find_component("transformer", {key: tuple(value.shape) for key, value in state_dict.items()})
        assert found.layout == layout
        assert model_from_shapes({key: part.shape for key, part in found.parts.items()}) == PUBLISHED[variant]


@pytest.fixture(scope="module")
def vae():
    """As scripts/tiny_pipeline.py makes it, with the group count that shapes imply."""
    from cogx.scripts.tiny_pipeline import randomize, vae_config
    from diffusers import AutoencoderKLCogVideoX

    torch.manual_seed(0)
    return randomize(AutoencoderKLCogVideoX(**{**vae_config("2B"), "layers_per_block": 2, "norm_num_groups": 8}), 0)


def _vae_file(prefix: str):
    def write(models: Models, vae: Any) -> Path:
        path = models.name("vae", ".safetensors")
        save_file({prefix + key: value for key, value in vae.state_dict().items()}, path)
        return path

    return write


def _sat_vae_file(key: str, prefix: str):
    def write(models: Models, vae: Any) -> Path:
        path = models.name("vae", ".pt")
        weights = {prefix + name: value for name, value in sat_vae(vae).items()}
        torch.save({key: weights, "global_step": 5} if key else weights, path)
        return path

    return write


def _vae_folder(models: Models, vae: Any) -> Path:
    place = models.name("vae", "")
    vae.save_pretrained(place)
    return next(place.glob("*.safetensors"))


VAE_LAYOUTS = {
    "diffusers": _vae_file(""), "vae.": _vae_file("vae."), "first_stage_model.": _vae_file("first_stage_model."),
    "SAT": _sat_vae_file("state_dict", ""), "SAT, bare": _sat_vae_file("", ""),
    "SAT, in a training checkpoint": _sat_vae_file("module", "first_stage_model."), "folder": _vae_folder,
}


@pytest.mark.parametrize("layout", VAE_LAYOUTS)
def test_vae_of_every_layout(models, vae, error, layout):
    name = models.shown_name("vae", VAE_LAYOUTS[layout](models, vae))
    assert LoadVAE.validate_inputs(vae=name) is True
    network = LoadVAE.execute(name, "fp32").result[0].first_stage_model
    x = torch.rand(1, 3, 9, 32, 48, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = torch.randn(1, 16, 3, 4, 6, generator=torch.Generator().manual_seed(1))
    ours, theirs = network.state_dict(), vae.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert error(network.encode(x), vae.encode(x).latent_dist.mode()) <= 1e-5  # strips add up in another order
    assert error(network.decode(z), vae.decode(z).sample) <= 1e-5
    assert models.shown[-1].startswith("CogVideoX VAE (its ")


@pytest.mark.parametrize("layout", ["shards", "text_encoders.t5xxl.transformer.", "torch", "one table"])
def test_text_encoder_of_every_layout(tmp_path, error, layout):
    """The same prompt, the same embedding, whatever the file."""
    from cogx.model_loaders.load import load_text_encoder
    from cogx.model_loaders.text_encoder import encode
    from cogx.scripts.tiny_pipeline import tiny_text_encoder

    model = tiny_text_encoder()
    model.encoder.embed_tokens.weight.data.copy_(model.shared.weight)  # two names of one table, as in the real one
    path = tmp_path / uuid.uuid4().hex
    weights = model.state_dict()
    if layout == "shards":
        model.save_pretrained(path, max_shard_size="100KB")
        path = sorted(path.glob("*.safetensors"))[1]
    elif layout == "torch":
        torch.save(weights, path.with_suffix(".bin"))
        path = path.with_suffix(".bin")
    else:
        path = path.with_suffix(".safetensors")
        dropped = "shared.weight" if layout == "one table" else "encoder.embed_tokens.weight"
        prefix = "" if layout == "one table" else layout
        save_file({prefix + key: value.clone() for key, value in weights.items() if key != dropped}, path)
    clip = load_text_encoder(str(path), "fp32")
    ids = torch.tensor([[token for token, _ in clip.tokenize("a red circle")["t5xxl"][0]]])
    conditioning, _ = encode(clip, "a red circle", "encode")
    assert error(conditioning[0][0], model(ids)[0]) <= 1e-5


def test_paths_of_all_kinds(models, references, expected, error):
    """A link to a file in a read-only folder with a name in other scripts; found through folder_paths."""
    place = models.root / "elsewhere" / "モデル und Größe 模型"
    place.mkdir(parents=True)
    made = prefixed("")(models, references["5B"]).rename(place / "ñandú.safetensors")
    link = models.root / "diffusion_models" / "связь.safetensors"
    link.symlink_to(made)
    made.chmod(0o444)
    place.chmod(0o555)
    try:
        folder_paths.filename_list_cache.clear()
        from cogx.model_loaders.folders import component_names

        assert link.name in component_names("transformer")
        model = LoadModel.execute(link.name, "fp32", "none").result[0]
        given, wanted = expected["5B"]
        assert error(forward(model, given), wanted) <= 1e-6
        assert os.listdir(place) == [made.name]
    finally:
        place.chmod(0o755)


def test_extra_model_paths(models, references, tmp_path):
    """A place that extra_model_paths.yaml names."""
    from utils.extra_config import load_extra_path_config

    made = sat(models, references["5B"])
    place = tmp_path / "more" / "unet"
    place.mkdir(parents=True)
    made.rename(place / "x.pt")
    config = tmp_path / "extra_model_paths.yaml"
    config.write_text(f"mine:\n    base_path: {tmp_path / 'more'}\n    diffusion_models: unet/\n")
    load_extra_path_config(str(config))
    assert LoadModel.execute("x.pt", "fp32", "none").result[0].model.spec.name == "5B"


def test_what_is_found_says_so(models, references, vae):
    component = find_model(sat(models, references["5B"]))
    assert component.layout == "authors (SAT)" and component.took.endswith("authors (SAT) layout, F32")
    assert find_vae(_sat_vae_file("state_dict", "")(models, vae)).layout == "authors (SAT)"
