"""Fixtures of the tests that need a real ComfyUI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cogx.tests.comfy_server import ComfyServer, Run


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """L2 norm of the difference over the L2 norm of the reference."""
    assert ours.shape == reference.shape, (tuple(ours.shape), tuple(reference.shape))
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


@pytest.fixture(scope="session")
def error() -> Callable[[torch.Tensor, torch.Tensor], float]:
    return relative_error


@pytest.fixture(scope="session")
def saved_latent() -> Callable[..., torch.Tensor]:
    """Reads what SaveLatent wrote: [B, 16, T, h, w], unscaled."""
    from safetensors.torch import load_file

    def read(server: ComfyServer, run: Run, node: str = "9") -> torch.Tensor:
        return load_file(server.output(run, node))["latent_tensor"]

    return read


@pytest.fixture(scope="session")
def video_of() -> Callable[..., dict[str, Any]]:
    """Opens a saved video with PyAV."""
    import av

    def read(server: ComfyServer, run: Run, node: str = "8") -> dict[str, Any]:
        with av.open(str(server.output(run, node))) as container:
            stream = container.streams.video[0]
            frames = sum(1 for _ in container.decode(stream))
            return {"frames": frames, "size": (stream.width, stream.height), "fps": float(stream.average_rate),
                    "format": container.format.name}

    return read
