"""What loading costs, on files as large as real ones: anonymous memory and time."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cogx.model_loaders import find
from cogx.models.cogvideox.transformer import CogVideoXTransformer
from cogx.models.specs import PUBLISHED
from cogx.tests.comfy.quantized import chosen
from cogx.tests.comfy.test_model import ROOT, rise_of_anonymous_memory
from safetensors.torch import save_file

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def shapes_of(layers: int) -> dict[str, tuple[int, ...]]:
    """The transformer of 5B with fewer layers."""
    spec = replace(PUBLISHED["5B"].transformer, num_layers=layers)
    return find.expected_shapes(CogVideoXTransformer, spec)


def size_of(held: dict[str, tuple[int, ...]], bytes_of: dict[bool, float]) -> float:
    return sum(math.prod(shape) * bytes_of[chosen(key)] for key, shape in held.items())


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A transformer of 2 GB in bf16."""
    path = tmp_path_factory.mktemp("big") / "big.safetensors"
    save_file({key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in shapes_of(8).items()}, path)
    assert path.stat().st_size >= 2e9
    yield path
    path.unlink()


@LINUX
@pytest.mark.parametrize("name", ["fp8_scaled", "int8"])
def test_quantizing_takes_the_quantized_size(big, tiny_pipelines, name, record_property):
    """Quantized while it is loaded: 1.25x the quantized size at most."""
    quantized = size_of(shapes_of(8), {True: 1.0, False: 2.0})
    warm = f"load_model({str(tiny_pipelines / '5B' / 'transformer')!r}, 'bf16', {name!r})"
    rise = rise_of_anonymous_memory(f"load_model({str(big)!r}, 'bf16', {name!r})", warm)
    record_property("rise", rise / quantized)
    assert rise <= 1.25 * quantized, f"{rise / quantized:.2f}x"


@LINUX
def test_a_quantized_file_takes_its_size(tmp_path, tiny_pipelines):
    """A GGUF file of over 1 GB: what is packed stays in the file, memory mapped."""
    from gguf import GGMLQuantizationType, GGUFWriter

    shapes, path = shapes_of(8), tmp_path / "big.gguf"
    writer = GGUFWriter(str(path), "cogvideox", use_temp_file=True)
    for key, shape in shapes.items():
        if chosen(key):
            blocks = np.zeros((shape[0], shape[1] // 32 * 34), np.uint8)
            writer.add_tensor(key, blocks, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(key, np.zeros(shape, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    size = path.stat().st_size
    assert size >= 1e9
    rise = rise_of_anonymous_memory(f"load_model({str(path)!r}, 'bf16')",
                                    f"load_model({str(tiny_pipelines / '5B' / 'transformer')!r})")
    path.unlink()
    assert rise <= 1.25 * size, f"{rise / size:.2f}x"


TIME_SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import conftest, torch
from cogx.model_loaders import load
from cogx.models.cogvideox.transformer import CogVideoXTransformer
from safetensors.torch import load_file

path, warm = {path!r}, {warm!r}

def ours():
    return load.load_model(path, "bf16")

def plain():
    component = load.find_model(load.Path(path))
    with torch.device("meta"):
        network = CogVideoXTransformer(component.spec.transformer, torch.bfloat16, None, torch.nn)
    network = network.to_empty(device="cpu")
    begin = time.perf_counter()
    network.load_state_dict(load_file(path))
    return begin

load.load_model(warm)
load_file(path)
best = {{"ours": 1e9, "plain": 1e9}}
for _ in range(2):
    begin = time.perf_counter()
    kept = ours()
    best["ours"] = min(best["ours"], time.perf_counter() - begin)
    del kept
    begin = plain()
    best["plain"] = min(best["plain"], time.perf_counter() - begin)
print("RATIO", best["ours"] / best["plain"], best)
"""


@pytest.mark.alone
def test_a_file_of_2_gb_loads_as_fast_as_it_can_be_read(big, tiny_pipelines):
    """Against safetensors.torch.load_file and load_state_dict into a network that is made already."""
    script = TIME_SCRIPT.format(tests=str(ROOT / "tests"), path=str(big),
                                warm=str(tiny_pipelines / "5B" / "transformer"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=600,
                          env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    words = done.stdout.rsplit("RATIO", 1)[1]
    assert float(words.split()[0]) <= 1.2, words
