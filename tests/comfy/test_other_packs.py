"""Models where other packs put them: component folders without model_index.json, and single files, below CogVideo."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cogx.model_loaders import doctor, folders, load
from cogx.models.specs import SpecError

LINKED = {"CogVideoX-5b/transformer": "5B", "CogVideoX-5b/vae": "5B", "mine/vae": "2B", "mine/text_encoder": "2B",
          "deep/er/1.5/transformer_I2V": "1.5-5B-I2V", "deep/er/1.5/transformer_T2V": "1.5-5B", "alone": "2B"}
OTHERS = {"flux/transformer": {"_class_name": "FluxTransformer2DModel"}, "flux/vae": {"_class_name": "AutoencoderKL"},
          "flux/text_encoder_2": {"architectures": ["T5EncoderModel"]}, "odd/transformer": {"_class_name": ["x"]}}
FILES = {"GGUF/model.safetensors": "transformer", "VAE/vae.safetensors": "vae", "loras/sub/lora.safetensors": "vae"}


@pytest.fixture()
def place(tiny_pipelines, tmp_path, monkeypatch) -> Path:
    """models/CogVideo, filled."""
    place = tmp_path / "CogVideo"
    for name, variant in LINKED.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        part = "transformer" if name == "alone" else name.split("/")[-1].split("_")[0].replace("text", "text_encoder")
        (place / name).symlink_to(tiny_pipelines / variant / part)
    for name, config in OTHERS.items():
        (place / name).mkdir(parents=True)
        (place / name / "config.json").write_text(json.dumps(config))
    for name, part in FILES.items():
        (place / name).parent.mkdir(parents=True)
        (place / name).symlink_to(next((tiny_pipelines / "5B" / part).glob("*.safetensors")))
    (place / "GGUF" / "notes.txt").touch()
    monkeypatch.setattr(folders.folder_paths, "models_dir", str(tmp_path))
    monkeypatch.setattr(folders.folder_paths, "get_folder_paths", lambda category: [])
    monkeypatch.setattr(folders.folder_paths, "get_filename_list", lambda category: [])
    monkeypatch.setattr(folders.folder_paths, "get_full_path", lambda category, name: None)
    return place


def test_what_is_offered_and_loads(place):
    demo = folders.EMBEDDED.name
    offered = {part: set(folders.component_names(part)) for part in ("transformer", "vae", "text_encoder")}
    assert offered == {
        "transformer": {f"{demo}/transformer", "CogVideoX-5b/transformer", "deep/er/1.5/transformer_I2V",
                        "deep/er/1.5/transformer_T2V", "alone", "GGUF/model.safetensors"},
        "vae": {f"{demo}/vae", "CogVideoX-5b/vae", "mine/vae", "VAE/vae.safetensors"},
        "text_encoder": {f"{demo}/text_encoder", "mine/text_encoder"}}
    assert folders.pipeline_names() == [demo] and folders.lora_names() == ["loras/sub/lora.safetensors"]
    assert folders.lora_path("loras/sub/lora.safetensors") == place / "loras/sub/lora.safetensors"
    for name, spec in (("deep/er/1.5/transformer_I2V", "1.5-5B-I2V"), ("alone", "2B"),
                       ("GGUF/model.safetensors", "5B")):
        assert load.find_model(folders.component_path("transformer", name)).spec.name == spec
    load.find_vae(folders.component_path("vae", "VAE/vae.safetensors"))
    for name in ("GGUF/notes.txt", "VAE/vae.safetensors", "GGUF/../GGUF/model.safetensors"):
        with pytest.raises(SpecError, match="not found"):
            folders.component_path("transformer", name)


def test_the_survey_has_them(place):
    reports = {report.lines[0]: "\n".join(report.lines) for report in doctor.survey()[:-1] if not report.problems}
    assert set(reports) == {str(folders.EMBEDDED), *(str(place / name) for name in (
        "CogVideoX-5b", "mine", "deep/er/1.5", "alone", "GGUF/model.safetensors", "VAE/vae.safetensors"))}
    both = reports[str(place / "deep/er/1.5")]
    assert "transformer_I2V:" in both and "CogVideoX 1.5-5B transformer" in both and both.count("a step at") == 2
