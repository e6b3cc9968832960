"""Nodes for videos longer than the model was trained on."""

from __future__ import annotations

import json
from typing import Any

from comfy_api.latest import io, ui

from ..models.specs import PUBLISHED, SpecError
from ..samplers.windows import COARSE, FUSES, NOISES, POSITIONS, SCHEDULES, Windows, window_problem
from .latent import MAX_FRAMES
from .validation import check_range, problem_of


def _check(length: int | None, overlap: int | None) -> None:
    """Raises SpecError if windows of this length fit no published model; None is an input that is connected."""
    check_range("length", length, 1, MAX_FRAMES)
    check_range("overlap", overlap, 0, MAX_FRAMES)
    if length is None or overlap is None:
        return
    problem = window_problem(length, overlap, PUBLISHED["5B"], PUBLISHED["1.5-5B"])
    if problem:
        raise SpecError(problem)


def _shown(windows: Windows, latent: dict[str, Any]) -> tuple[str, Any]:
    """The plan for a LATENT as JSON, and as an IMAGE."""
    from ..models.specs import check_latent
    from ..samplers.plan import described
    from ..samplers.plan_picture import picture_of

    shape = tuple(latent["samples"].shape)
    if len(shape) == 5:  # core's empty image latents have no frames, and fewer channels
        check_latent(shape, windows.spec)
    plan = described(windows, shape[2] if len(shape) == 5 else 1)
    return json.dumps(plan), picture_of(plan)


class ContextWindows(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXContextWindows",
            display_name="CogVideoX Context Windows",
            category="CogVideoX/sampling",
            description="Samples a video longer than the model was trained on in overlapping windows, which it blends "
                        "at every step. Memory depends on the window, not on the video. A video that fits into one "
                        "window is sampled as without this node, except with the schedule looped, which makes a "
                        "closed loop of any video.",
            search_aliases=["long video CogVideoX", "FreeNoise", "sliding window CogVideoX", "extend length CogVideoX",
                            "closed loop CogVideoX", "looping video CogVideoX", "seamless loop"],
            inputs=[
                io.Model.Input("model", tooltip="A CogVideoX model."),
                io.Int.Input("length", default=49, min=1, max=MAX_FRAMES, step=8, tooltip="Frames of a window: 8N+1 "
                             "for 1.0 (49), 16N+1 for 1.5 (81 or 161). Best is what the model was trained on; 5B-I2V "
                             "takes 49 only."),
                io.Int.Input("overlap", default=16, min=0, max=MAX_FRAMES, step=4, tooltip="Frames that a window "
                             "shares with the next: a multiple of 4 for 1.0, of 8 for 1.5. More is smoother and "
                             "takes longer."),
                io.Combo.Input("schedule", options=list(SCHEDULES), default=COARSE, tooltip="Where the windows lie. "
                               "static: the same at each step. uniform: moved on at each step, so that no border "
                               "stays in one place. looped: likewise, over the end into the beginning too: a closed "
                               "loop, whose last frame meets its first. batched: side by side, without overlap. "
                               "coarse: as static, but while the noise is high one window spread over the whole video "
                               "lays it out, so that the motion goes on."),
                io.Combo.Input("fuse", options=list(FUSES), tooltip="How windows are blended where they overlap. "
                               "pyramid: by the distance from the window's end. linear: a cross-fade over the "
                               "overlap. flat: their mean. relative: by the distance from the window's middle."),
                io.Combo.Input("noise", options=list(NOISES), default="freenoise", tooltip="independent: each frame "
                               "has its own noise. freenoise: windows share theirs in shuffled order, which holds "
                               "them together. repeated: the first window's noise again and again, which may repeat "
                               "its motion too."),
                io.Boolean.Input("anchor", default=True, tooltip="For image-to-video models: every window sees the "
                                 "start image, not only the first one. With coarse later ones see mostly what the "
                                 "window before them made."),
                io.Combo.Input("positions", options=list(POSITIONS), tooltip="window: each window begins at position "
                               "0, as the model was trained. global: frames keep their positions in the whole video. "
                               "5B-I2V takes window only."),
                io.Latent.Input("latent", optional=True, tooltip="The LATENT that will be sampled: the node then shows "
                                "its windows, and gives them as JSON."),
            ],
            outputs=[io.Model.Output(), io.String.Output("plan", tooltip="The windows over the latent as JSON: which "
                                                         "frames each has, with what weights. Empty without one.")],
        )

    @classmethod
    def validate_inputs(cls, length: int | None = None, overlap: int | None = None) -> bool | str:
        return problem_of(lambda: _check(length, overlap))

    @classmethod
    def execute(cls, model: Any, length: int, overlap: int, schedule: str, fuse: str, noise: str, anchor: bool,
                positions: str, latent: dict[str, Any] | None = None) -> io.NodeOutput:
        from ..samplers.adapter import spec_of
        from ..samplers.long_video import with_context_windows

        windows = Windows(spec_of(model), length, overlap, schedule, fuse, noise, anchor, positions)
        patched = with_context_windows(model, windows)
        if latent is None:
            return io.NodeOutput(patched, "")
        plan, picture = _shown(windows, latent)
        shown = ui.PreviewImage(picture, cls=cls).as_dict()
        return io.NodeOutput(patched, plan, ui={**shown, "text": [plan]})


class RIFLEx(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXRIFLEx",
            display_name="CogVideoX RIFLEx",
            category="CogVideoX/sampling",
            description="Samples a video of up to twice the trained length in one pass, without its motion beginning "
                        "again: lowers the frequency of the rotary positions that would repeat.",
            search_aliases=["length extrapolation CogVideoX", "long video CogVideoX", "RoPE frequency"],
            inputs=[
                io.Model.Input("model", tooltip="A CogVideoX model with rotary positions: 5B, 1.5-5B or 1.5-5B-I2V."),
                io.Int.Input("k", default=0, min=0, max=64, tooltip="Which frequency of time is lowered, from 1. 0 "
                             "takes the model's: 2 for 5B, which acts from 81 frames on; 3 for 1.5, from 513 on."),
                io.Int.Input("tuned_frames", default=0, min=0, max=MAX_FRAMES, tooltip="Only for weights that were "
                             "fine-tuned with RIFLEx: the frames that they were tuned for. 0 for all others: the "
                             "video's own length counts."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: Any, k: int, tuned_frames: int) -> io.NodeOutput:
        from ..samplers.long_video import with_riflex

        return io.NodeOutput(with_riflex(model, k, tuned_frames))
