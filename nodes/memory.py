"""The node that says what a run will take."""

from __future__ import annotations

import json
import time
from typing import Any

from comfy_api.latest import io

from ..model_loaders.memory_plan import ENCODES
from ..models.specs import PUBLISHED, check_dtype, check_geometry
from .latent import check_size_inputs, size_inputs
from .load import WEIGHT_DTYPES
from .validation import check_choice, check_range, problem_of

ABSENT = object()  # an input that is not connected; a connected one is None in validation
MAX_BATCH = 64


class MemoryPlan(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXMemoryPlan",
            display_name="CogVideoX Memory Plan",
            category="CogVideoX/memory",
            description="Says what a video will take on this machine, and what will be chosen for it, without running "
                        "anything: memory for the prompt, sampling, encode and decode, what stays on the card and what "
                        "is streamed, and a smaller video that fits if this one does not.",
            search_aliases=["CogVideoX VRAM", "CogVideoX out of memory", "memory estimate", "will it fit", "OOM"],
            inputs=[
                io.Combo.Input("variant", options=list(PUBLISHED), default="5B", tooltip="Which CogVideoX, for what is "
                               "not connected. Nothing has to be on disk for it."),
                *size_inputs(),
                io.Int.Input("batch_size", default=1, min=1, max=MAX_BATCH, tooltip="Videos to sample at once."),
                io.Combo.Input("weight_dtype", options=WEIGHT_DTYPES, default="auto", tooltip="Precision as in the "
                               "loaders, for what is not connected."),
                io.Combo.Input("encode", options=list(ENCODES), default="auto", tooltip="What is encoded before "
                               "sampling. auto: an image for an image-to-video model, else nothing. video: all "
                               "frames, as for video to video."),
                io.Model.Input("model", optional=True, tooltip="Plan for this very model; variant is then not used. "
                               "Its loader reads the file into RAM."),
                io.Clip.Input("clip", optional=True, tooltip="Plan for this very text encoder."),
                io.Vae.Input("vae", optional=True, tooltip="Plan for this very VAE."),
            ],
            outputs=[io.String.Output(display_name="plan")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, width: int | None = None, height: int | None = None, length: int | None = None,
                        batch_size: int | None = None, variant: str | None = None, weight_dtype: str | None = None,
                        model: Any = ABSENT) -> bool | str:
        def check() -> None:
            check_choice("variant", variant, list(PUBLISHED))
            check_choice("weight_dtype", weight_dtype, WEIGHT_DTYPES)
            check_range("batch_size", batch_size, 1, MAX_BATCH)
            check_size_inputs(width, height, length)
            if model is not ABSENT or variant is None:
                return
            spec = PUBLISHED[variant]
            check_dtype(weight_dtype or "auto", spec)
            check_geometry(width or spec.native_width, height or spec.native_height, length or 1, spec)

        return problem_of(check)

    @classmethod
    def fingerprint_inputs(cls, **kwargs: Any) -> float:
        return time.monotonic()  # what is free now is no input

    @classmethod
    def execute(cls, variant: str, width: int, height: int, length: int, batch_size: int, weight_dtype: str,
                encode: str, model: Any = None, clip: Any = None, vae: Any = None) -> io.NodeOutput:
        from server import PromptServer

        from ..model_loaders.memory_now import Run
        from ..samplers.adapter import spec_of

        check_choice("encode", encode, ENCODES)  # what comes through a link is validated by nobody
        check_choice("variant", variant, list(PUBLISHED))
        spec = PUBLISHED[variant] if model is None else spec_of(model)
        check_dtype(weight_dtype if model is None else "auto", spec)
        geometry = check_geometry(width, height, length, spec)
        plan = Run(spec, weight_dtype, model, clip, vae).plan(geometry, batch_size, encode)
        words, numbers = "\n".join(plan.words()), plan.numbers()
        PromptServer.instance.send_progress_text(words, cls.hidden.unique_id)
        return io.NodeOutput(json.dumps(numbers), ui={"text": [words], "plan": [numbers]})
