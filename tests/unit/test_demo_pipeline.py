"""The embedded model's folders: small enough for git, and completed without loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cogx.scripts import demo_pipeline

BYTES = 20_000_000


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_all_that_git_holds_is_at_most_20_mb():
    assert 10_000_000 < sum(map(len, files_of(demo_pipeline.DEMO).values())) <= BYTES


@pytest.mark.parametrize("name", demo_pipeline.OTHERS)
def test_an_image_pipeline_is_the_main_one_with_its_own_parts(tmp_path, name):
    made = files_of(demo_pipeline.assemble(name, tmp_path / name))
    main, own = files_of(demo_pipeline.DEMO / demo_pipeline.MAIN), files_of(demo_pipeline.DEMO / name)
    assert made.keys() == main.keys()
    for path, content in made.items():
        assert content == own.get(path, main[path])
    assert own.keys() >= {"model_index.json", "transformer/config.json",
                          "transformer/diffusion_pytorch_model.safetensors"}
    index = json.loads(made["model_index.json"])
    assert index["_class_name"] == "CogVideoXImageToVideoPipeline"
    assert all((tmp_path / name / part).is_dir() for part in index if not part.startswith("_"))


def test_a_wrong_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there are CogX-Demo, CogX-Demo-I2V"):
        demo_pipeline.assemble("CogX-Demo-2B", tmp_path / "x")
