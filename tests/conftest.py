"""Makes the pack importable as ``cogx`` and, where there is one, a ComfyUI as ``comfy``.

ComfyUI loads the pack by path, so the repository's root is no package on ``sys.path``. Tests write
``from cogx.models.specs import ...``. ``COGX_COMFYUI`` is the ComfyUI tree (``dev.py test`` sets it).
"""

from __future__ import annotations

import os
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

for entry in ("", str(ROOT)):
    while entry in sys.path:
        sys.path.remove(entry)  # its folder nodes/ would hide ComfyUI's nodes.py

cogx = types.ModuleType("cogx")
cogx.__path__ = [str(ROOT)]
sys.modules.setdefault("cogx", cogx)

from cogx.tests.comfy_server import ComfyServer  # noqa: E402 - only now can it be imported

COMFYUI = os.environ.get("COGX_COMFYUI")


_output = tempfile.TemporaryDirectory(prefix="cogx-output-")  # what tests save is no part of that ComfyUI


def _add_comfyui(tree: str) -> None:
    sys.path.insert(0, tree)
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args
    import torch

    comfy.cli_args.args.cpu = not torch.cuda.is_available()

    import folder_paths

    folder_paths.set_output_directory(_output.name)


if COMFYUI:
    _add_comfyui(COMFYUI)

collect_ignore = [] if COMFYUI else ["numeric", "comfy", "browser", "gpu"]


@pytest.fixture(scope="session")
def comfyui_tree() -> Path:
    """The ComfyUI tree under test."""
    assert COMFYUI, "set COGX_COMFYUI, or run: python dev.py test"
    return Path(COMFYUI)


@pytest.fixture(scope="session")
def tiny_pipelines(comfyui_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one tiny pipeline folder per variant."""
    from cogx.scripts import tiny_pipeline

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = comfyui_tree / "comfy" / "text_encoders" / "t5_tokenizer"
    for variant in tiny_pipeline.VARIANTS:
        tiny_pipeline.make(folder / variant, tokenizer, variant)
    return folder


def _start(tree: str, tiny: Path, base: Path) -> ComfyServer:
    import torch

    diffusers = base / "models" / "diffusers"
    diffusers.parent.mkdir(parents=True)
    diffusers.symlink_to(tiny, target_is_directory=True)
    return ComfyServer(Path(tree), base, *([] if torch.cuda.is_available() else ["--cpu"])).start()


@pytest.fixture(scope="session")
def server(comfyui_tree: Path, tiny_pipelines: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """The newest ComfyUI with this pack and the tiny pipelines."""
    running = _start(str(comfyui_tree), tiny_pipelines, tmp_path_factory.mktemp("server"))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def oldest_server(tiny_pipelines: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """The oldest supported ComfyUI with this pack and the tiny pipelines."""
    tree = os.environ.get("COGX_COMFYUI_OLDEST")
    assert tree, "set COGX_COMFYUI_OLDEST, or run: python dev.py test"
    running = _start(tree, tiny_pipelines, tmp_path_factory.mktemp("oldest"))
    yield running
    running.stop()
