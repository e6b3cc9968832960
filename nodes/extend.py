"""The node that continues a finished video."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..models.specs import PUBLISHED, SpecError
from ..samplers.extend import extension_problem
from .decode import check_tiles, decode_inputs
from .latent import MAX_FRAMES
from .sample import cfg_input, dynamic_cfg_input, sampler_input, schedule_input, seed_input, steps_input
from .validation import check_range, problem_of

_MATCHES = ["off", "soft", "full"]


def _check(length: int | None, overlap: int | None, tiles: tuple[int | None, int | None, int | None]) -> None:
    """Raises SpecError if no published model can make such chunks; None is an input that is connected."""
    check_range("length", length, 1, MAX_FRAMES)
    check_range("overlap", overlap, 1, MAX_FRAMES)
    if length is not None and overlap is not None:
        problem = extension_problem(length, overlap, PUBLISHED["5B"], PUBLISHED["1.5-5B"])
        if problem:
            raise SpecError(problem)
    check_tiles(*tiles)


class Extend(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXExtend",
            display_name="CogVideoX Extend",
            category="CogVideoX/sampling",
            description="Continues a finished video, chunk by chunk: each one takes over the last frames that there "
                        "are and goes on with their motion. Text-to-video and image-to-video models. What is finished "
                        "when a run is stopped is found again by the next.",
            search_aliases=["continue video CogVideoX", "extend video CogVideoX", "longer video CogVideoX",
                            "video to video continuation", "last frame CogVideoX"],
            inputs=[
                io.Model.Input("model", tooltip="A CogVideoX model, for text to video or for image to video."),
                io.Conditioning.Input("positive", tooltip="What the new frames should show. From 'CogVideoX Prompt "
                                      "Sequence' each chunk takes its own prompt, in their order, and the last one "
                                      "goes on."),
                io.Conditioning.Input("negative", tooltip="What they should not show; an empty prompt is usual."),
                io.Vae.Input("vae", tooltip="The VAE of a CogVideoX pipeline."),
                io.Image.Input("images", tooltip="The frames of the finished video, in a size of the model and at its "
                               "frame rate: 8 a second for 1.0, 16 for 1.5."),
                io.Int.Input("chunks", default=1, min=1, max=256, tooltip="How many times to continue. Each adds "
                             "length - overlap frames."),
                io.Int.Input("length", default=49, min=1, max=MAX_FRAMES, step=8, tooltip="Frames of a chunk with the "
                             "overlap: 8N+1 for 1.0 (49), 16N+1 for 1.5 (81 or 161). Best is what the model was "
                             "trained on; 5B-I2V takes 49 only."),
                io.Int.Input("overlap", default=9, min=1, max=MAX_FRAMES, step=4, tooltip="Frames that a chunk takes "
                             "over from the end of the video: 4N+1 for 1.0, 8N+1 for 1.5. They tell it the motion; "
                             "it is cross-faded in over them. 1: the last frame only."),
                seed_input(io.ControlAfterGenerate.fixed),  # so that the same again goes on where it was stopped
                steps_input(),
                cfg_input(),
                sampler_input(),
                schedule_input(),
                io.Float.Input("denoise", default=0.85, min=0.05, max=1.0, step=0.01, tooltip="How freely the new "
                               "frames begin: 1 from pure noise, less from the last frame under noise, which tells "
                               "the model where things are. Too low, and the motion stops."),
                dynamic_cfg_input(),
                io.Combo.Input("match_colors", options=_MATCHES, default="full", tooltip="Give each chunk the colours "
                               "of the video, by mean and variance in Oklab over the frames that both have. soft: "
                               "half of it."),
                *decode_inputs()[2:],  # all but samples and vae
            ],
            outputs=[io.Image.Output()],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )

    @classmethod
    def validate_inputs(cls, length: int | None = None, overlap: int | None = None, tile_overlap: int | None = None,
                        tile_width: int | None = None, tile_height: int | None = None) -> bool | str:
        return problem_of(lambda: _check(length, overlap, (tile_width, tile_height, tile_overlap)))

    @classmethod
    def execute(cls, model: io.Model.Type, positive: list, negative: list, vae: io.Vae.Type, images: Any, chunks: int,
                length: int, overlap: int, seed: int, steps: int, cfg: float, sampler: str, schedule: str,
                denoise: float, dynamic_cfg: bool, match_colors: str, tiling: str, tile_width: int, tile_height: int,
                tile_overlap: int) -> io.NodeOutput:
        from ..model_loaders.chunk_files import ChunkFiles, run_identity
        from ..model_loaders.vae import require_cogvideox
        from ..samplers.adapter import spec_of
        from ..samplers.extend import Extension
        from ..samplers.extend_video import Extender, Sampling

        check_tiles(tile_width, tile_height, tile_overlap)  # what comes through a link is validated by nobody
        network = require_cogvideox(vae)
        plan = Extension(spec_of(model), chunks, length, overlap)
        extender = Extender(
            model, network, positive, negative, plan,
            Sampling(seed, steps, cfg, sampler, schedule, denoise, dynamic_cfg), match_colors,
            lambda samples: network.decode_video(samples, tiling, (tile_height, tile_width), tile_overlap),
            ChunkFiles(run_identity(model, cls.hidden.prompt, cls.hidden.unique_id)))
        return io.NodeOutput(extender.run(images))
