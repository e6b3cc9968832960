"""Latent nodes."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..models.specs import PUBLISHED, Geometry, check_any_geometry, check_geometry
from .validation import check_range, problem_of

MAX_PIXELS, MAX_FRAMES = 4096, 8193


def size_inputs() -> list[io.Input]:
    """``width``, ``height`` and ``length`` of a video."""
    return [
        io.Int.Input("width", default=720, min=16, max=MAX_PIXELS, step=16, tooltip="Pixels, a multiple of 16. "
                     "Native: 720 for 1.0, 1360 for 1.5."),
        io.Int.Input("height", default=480, min=16, max=MAX_PIXELS, step=16, tooltip="Pixels, a multiple of 16. "
                     "Native: 480 for 1.0, 768 for 1.5."),
        io.Int.Input("length", default=49, min=1, max=MAX_FRAMES, step=8, tooltip="Frames: 8N+1 for 1.0 (native 49), "
                     "16N+1 for 1.5 (native 81 or 161)."),
    ]


def check_size_inputs(width: int | None, height: int | None, length: int | None) -> None:
    """Raises SpecError if no published model can make it; None is an input that is connected."""
    check_range("width", width, 16, MAX_PIXELS)
    check_range("height", height, 16, MAX_PIXELS)
    check_range("length", length, 1, MAX_FRAMES)
    check_any_geometry(width or 16, height or 16, length or 1)


def geometry_of(width: int, height: int, length: int, model: Any = None) -> Geometry:
    """The geometry of a legal video for ``model``, or for any published model if none is connected.

    Raises:
        SpecError: it is not legal.
    """
    from ..samplers.adapter import spec_of

    if model is not None:
        return check_geometry(width, height, length, spec_of(model))
    check_any_geometry(width, height, length)
    return Geometry(PUBLISHED["5B"], width, height, length)  # the latent space is the same for all


def empty_latent(geometry: Geometry, batch_size: int) -> dict[str, Any]:
    """A LATENT of zeros."""
    import comfy.model_management
    import torch

    device = comfy.model_management.intermediate_device()
    return {"samples": torch.zeros(geometry.latent_shape(batch_size), device=device)}


class EmptyLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXEmptyLatent",
            display_name="CogVideoX Empty Latent",
            category="CogVideoX/latent",
            description="An empty video to sample. Refuses sizes and frame counts that CogVideoX cannot make, and "
                        "names the nearest that it can.",
            search_aliases=["empty latent video CogVideoX", "CogVideoX size", "CogVideoX frames"],
            inputs=[
                *size_inputs(),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Videos to sample at once."),
                io.Model.Input("model", optional=True, tooltip="Connect it to check the size and the frame count "
                               "against this very model."),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def validate_inputs(cls, width: int | None = None, height: int | None = None,
                        length: int | None = None) -> bool | str:
        return problem_of(lambda: check_size_inputs(width, height, length))

    @classmethod
    def execute(cls, width: int, height: int, length: int, batch_size: int, model: Any = None) -> io.NodeOutput:
        return io.NodeOutput(empty_latent(geometry_of(width, height, length, model), batch_size))
