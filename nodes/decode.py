"""Decode node."""

from __future__ import annotations

from comfy_api.latest import io

from ..models.specs import VAE_SPATIAL_RATIO
from .validation import check_range, problem_of


class Decode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXDecode",
            display_name="CogVideoX Decode",
            category="CogVideoX/latent",
            description="Turns a sampled latent into frames, exactly as the reference does unless tiles are used.",
            search_aliases=["VAE decode CogVideoX", "CogVideo decode", "decode tiled CogVideoX"],
            inputs=[
                io.Latent.Input("samples", tooltip="A CogVideoX latent."),
                io.Vae.Input("vae", tooltip="A CogVideoX VAE."),
                io.Combo.Input("tiling", options=["auto", "off", "on"], default="auto", tooltip="auto: exact, in the "
                               "memory that is free. off: never splits. on: spatial tiles, which are lossy: for "
                               "their speed on very small cards."),
                io.Int.Input("tile_width", default=360, min=64, max=4096, step=8, tooltip="Pixels. Used with tiles "
                             "only.", advanced=True),
                io.Int.Input("tile_height", default=240, min=64, max=4096, step=8, tooltip="Pixels. Used with tiles "
                             "only.", advanced=True),
                io.Int.Input("tile_overlap", default=64, min=0, max=1024, step=8, tooltip="Pixels that neighbouring "
                             "tiles share and blend over. Used with tiles only.", advanced=True),
            ],
            outputs=[io.Image.Output()],
        )

    @classmethod
    def validate_inputs(cls, tile_overlap: int | None = None, tile_width: int | None = None,
                        tile_height: int | None = None) -> bool | str:
        def check() -> None:
            sizes = {"tile_width": tile_width, "tile_height": tile_height}
            for name, value in sizes.items():
                check_range(name, value, 64, 4096)
            # Both are rounded down to whole latent cells.
            smallest = min(value // VAE_SPATIAL_RATIO for value in (tile_width or 4096, tile_height or 4096))
            check_range("tile_overlap", tile_overlap, 0, VAE_SPATIAL_RATIO * smallest - 1)

        return problem_of(check)

    @classmethod
    def execute(cls, samples: dict, vae: io.Vae.Type, tiling: str, tile_width: int, tile_height: int,
                tile_overlap: int) -> io.NodeOutput:
        from ..model_loaders.vae import require_cogvideox

        video = require_cogvideox(vae).decode_video(samples["samples"], tiling, (tile_height, tile_width), tile_overlap)
        return io.NodeOutput(video.flatten(0, 1))  # batch and frames, as every IMAGE
