"""What the pack adds to ComfyUI's start: under half a second, and no heavy package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
import asyncio, importlib.util, sys, time
sys.path.insert(0, {tests!r})
import conftest
import nodes, comfy.sd, comfy.samplers, folder_paths
from comfy_api.latest import io
{block}
before = set(sys.modules)
start = time.perf_counter()
spec = importlib.util.spec_from_file_location("pack", {root!r} + "/__init__.py", submodule_search_locations=[{root!r}])
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
spec.loader.exec_module(pack)
extension = asyncio.run(pack.comfy_entrypoint())
schemas = [node.GET_SCHEMA() for node in asyncio.run(extension.get_node_list())]
print("SECONDS", time.perf_counter() - start)
print("NEW", *sorted(name for name in set(sys.modules) - before if name.split(".")[0] in {heavy!r}))
print("NODES", len(schemas))
"""
HEAVY = ("diffusers", "transformers", "accelerate", "safetensors", "einops", "gguf")


def run(block: str = "") -> str:
    script = SCRIPT.format(tests=str(ROOT / "tests"), root=str(ROOT), heavy=HEAVY, block=block)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300,
                          env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.alone
def test_import_is_quick_and_light():
    output = run()
    assert float(re.search(r"SECONDS (\S+)", output)[1]) < 0.5, output
    assert re.search(r"^NEW$", output.replace("NEW ", "NEW"), re.MULTILINE), output


def test_nodes_register_without_the_dependencies():
    """With every package of requirements.txt that ComfyUI does not bring itself missing, the nodes are all there."""
    block = "sys.modules.update({name: None for name in ('diffusers', 'accelerate', 'gguf')})"
    assert "NODES 25" in run(block)


def test_server_log_agrees(server):
    seconds = re.search(r"([0-9.]+) seconds[^\n]*comfyui-cogx", server.log)
    assert seconds and float(seconds[1]) < 0.5


def test_missing_diffusers_says_what_to_install(monkeypatch):
    import pytest
    from cogx.models.specs import PUBLISHED
    from cogx.samplers.reference import ReferenceRun

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install -r requirements\.txt"):
        ReferenceRun("cogvideox_ddim", PUBLISHED["5B"].schedule, [999])
