"""Decode nodes."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from comfy_api.latest import io

from ..models.specs import VAE_SPATIAL_RATIO, SpecError
from .validation import check_range, problem_of

TILING = ["auto", "off", "on"]
MAX_FPS = 120
ABSENT = object()  # an input that is not connected; a connected one is None in validation


def decode_inputs() -> list[io.Input]:
    return [
        io.Latent.Input("samples", tooltip="A CogVideoX latent."),
        io.Vae.Input("vae", tooltip="A CogVideoX VAE."),
        io.Combo.Input("tiling", options=TILING, default="auto", tooltip="auto: exact, in the "
                       "memory that is free. off: never splits. on: spatial tiles, which are lossy: for "
                       "their speed on very small cards."),
        io.Int.Input("tile_width", default=360, min=64, max=4096, step=8, tooltip="Pixels. Used with tiles "
                     "only.", advanced=True),
        io.Int.Input("tile_height", default=240, min=64, max=4096, step=8, tooltip="Pixels. Used with tiles "
                     "only.", advanced=True),
        io.Int.Input("tile_overlap", default=64, min=0, max=1024, step=8, tooltip="Pixels that neighbouring "
                     "tiles share and blend over. Used with tiles only.", advanced=True),
    ]


def _closed_loop_input() -> io.Input:
    return io.Boolean.Input("closed_loop", default=False, optional=True, tooltip="For a latent that was sampled as a "
                            "loop: its first frame follows its last, so each latent frame gives four frames, and "
                            "there is no jump from the end to the beginning.")


def check_tiles(tile_width: int | None, tile_height: int | None, tile_overlap: int | None) -> None:
    """Raises SpecError if they cannot be used; None is an input that is connected."""
    for name, value in {"tile_width": tile_width, "tile_height": tile_height}.items():
        check_range(name, value, 64, 4096)
    # Both are rounded down to whole latent cells.
    smallest = min(value // VAE_SPATIAL_RATIO for value in (tile_width or 4096, tile_height or 4096))
    check_range("tile_overlap", tile_overlap, 0, VAE_SPATIAL_RATIO * smallest - 1)


def _check_fps(fps: float | None, has_model: bool) -> None:
    """Raises SpecError if they cannot be used; None is an input that is connected."""
    if fps == 0 and not has_model:
        raise SpecError("fps 0 takes the model's, and no model is connected: expected 8 for CogVideoX 1.0, 16 for 1.5, "
                        "or the model.")
    if fps is not None and fps != 0 and not 1 <= fps <= MAX_FPS:
        raise SpecError(f"fps {fps:g}: expected 1 to {MAX_FPS}, or 0 for the model's.")


class Decode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXDecode",
            display_name="CogVideoX Decode",
            category="CogVideoX/latent",
            description="Turns a sampled latent into frames, exactly as the reference does unless tiles are used.",
            search_aliases=["VAE decode CogVideoX", "CogVideo decode", "decode tiled CogVideoX"],
            inputs=[*decode_inputs(), _closed_loop_input()],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def validate_inputs(cls, tile_overlap: int | None = None, tile_width: int | None = None,
                        tile_height: int | None = None) -> bool | str:
        return problem_of(lambda: check_tiles(tile_width, tile_height, tile_overlap))

    @classmethod
    def execute(cls, samples: dict, vae: io.Vae.Type, tiling: str, tile_width: int, tile_height: int,
                tile_overlap: int, closed_loop: bool = False) -> io.NodeOutput:
        from ..model_loaders.vae import require_cogvideox

        video = require_cogvideox(vae).decode_video(samples["samples"], tiling, (tile_height, tile_width), tile_overlap,
                                                    closed_loop)
        return io.NodeOutput(video.flatten(0, 1))  # batch and frames, as every IMAGE


class DecodeVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXDecodeVideo",
            display_name="CogVideoX Decode to Video",
            category="CogVideoX/latent",
            description="Turns a sampled latent into a video whose frames are never all in memory, for videos of any "
                        "length. Saved, it is the video that CogVideoX Decode, Create Video and Save Video make.",
            search_aliases=["stream video CogVideoX", "long video decode CogVideoX", "create video CogVideoX",
                            "decode to video"],
            inputs=[
                *decode_inputs(),
                io.Float.Input("fps", default=0, min=0, max=MAX_FPS, step=1, tooltip="Frames per second: 8 for 1.0, 16 "
                               "for 1.5. 0: those of the connected model."),
                io.Audio.Input("audio", optional=True, tooltip="The audio to add to the video."),
                io.Model.Input("model", optional=True, tooltip="The model that sampled, for its frames per second. "
                               "Used with fps 0 only."),
                _closed_loop_input(),
            ],
            outputs=[io.Video.Output(is_output_list=True, tooltip="A video for each of the batch.")],
        )

    @classmethod
    def validate_inputs(cls, tile_overlap: int | None = None, tile_width: int | None = None,
                        tile_height: int | None = None, fps: float | None = None,
                        model: Any = ABSENT) -> bool | str:
        def check() -> None:
            check_tiles(tile_width, tile_height, tile_overlap)
            _check_fps(fps, model is not ABSENT)

        return problem_of(check)

    @classmethod
    def execute(cls, samples: dict, vae: io.Vae.Type, tiling: str, tile_width: int, tile_height: int,
                tile_overlap: int, fps: float, audio: Any = None, model: Any = None,
                closed_loop: bool = False) -> io.NodeOutput:
        from ..model_loaders.vae import require_cogvideox
        from ..model_loaders.video import decode_to_videos
        from ..samplers.adapter import spec_of

        _check_fps(fps, model is not None)  # what comes through a link is validated by nobody
        rate = Fraction(fps or spec_of(model).fps)
        return io.NodeOutput(decode_to_videos(require_cogvideox(vae), samples["samples"], rate, audio, tiling,
                                              (tile_height, tile_width), tile_overlap, closed_loop))
