"""Fixtures of the comparisons with diffusers: everything fp32, one seed, no gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    """As ComfyUI's executor runs nodes."""
    with torch.inference_mode():
        yield


def relative_error(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """L2 norm of the difference over the L2 norm of the reference."""
    assert ours.shape == reference.shape, (tuple(ours.shape), tuple(reference.shape))
    return float((ours.double() - reference.double()).norm() / reference.double().norm())


@pytest.fixture(scope="session")
def error():
    return relative_error
