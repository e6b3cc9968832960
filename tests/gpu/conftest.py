"""The GPU lane: what a CPU cannot show. Skipped without CUDA.

With ``COGX_GPU_REHEARSAL=1`` it runs on the CPU at tiny size, which checks the tests themselves and proves nothing
about a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

REHEARSAL = os.environ.get("COGX_GPU_REHEARSAL") == "1" and not torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in (item for item in items if here in item.path.parents):
        item.add_marker("gpu")
        item.add_marker("alone")
        if not (torch.cuda.is_available() or REHEARSAL):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device: torch.cuda.is_available() is false"))


@pytest.fixture(scope="session")
def rehearsal() -> bool:
    return REHEARSAL


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if REHEARSAL else "cuda")


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """As ComfyUI's executor runs nodes; and fp32 means fp32."""
    matmul, convolution = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = matmul, convolution
