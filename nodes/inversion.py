"""Inversion node."""

from __future__ import annotations

from comfy_api.latest import io


class Inversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXInversion",
            display_name="CogVideoX Inversion",
            category="CogVideoX/sampling",
            description="Turns a video into the noise that cogvideox_ddim makes it from (DDIM inversion), to edit it "
                        "with another prompt. Connect both outputs: NOISE to SamplerCustomAdvanced, MODEL to its "
                        "guider.",
            search_aliases=["DDIM inversion", "unsampler CogVideoX", "video to noise", "edit video CogVideoX"],
            inputs=[
                io.Model.Input("model", tooltip="A CogVideoX model."),
                io.Conditioning.Input("positive", tooltip="What the video shows; an empty prompt is usual. Inversion "
                                      "has no negative prompt and no guidance."),
                io.Latent.Input("latent_image", tooltip="The encoded video, as 'CogVideoX Video to Video' or 'VAE "
                                "Encode' gives it. Connect it to the sampler too."),
                io.Int.Input("steps", default=50, min=1, max=1000, tooltip="Inversion steps; sample with as many. More "
                             "steps come back closer to the video. Each keeps a video in RAM, 4 bytes a value: for 81 "
                             "frames of 1.5 at 1360x768, 50 steps keep 1.2 GB."),
                io.Boolean.Input("features", default=False, tooltip="While sampling, let every attention see the keys "
                                 "and values of the inverted video too, to keep more of it. A step then takes two to "
                                 "three times as long and twice the memory."),
            ],
            outputs=[io.Model.Output(), io.Noise.Output()],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, positive: list, latent_image: dict, steps: int,
                features: bool) -> io.NodeOutput:
        from ..samplers.adapter import invert, with_reference_video
        from ..samplers.inversion import InvertedNoise

        trajectory = invert(model, positive, latent_image, steps)
        return io.NodeOutput(with_reference_video(model, trajectory, features), InvertedNoise(trajectory))
