"""Nodes that start from an image or a video."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..models.specs import FITS, IMAGE_REFERENCES, NO_IMAGE, PUBLISHED, SpecError, propose_size
from .latent import check_size_inputs, empty_latent, geometry_of, size_inputs
from .validation import problem_of

CATEGORY = "CogVideoX/image"
ABSENT = object()  # an input that is not connected; a connected one is None in validation

_FIT_TIP = ("How an image of another aspect becomes the video's size. crop: cut off what is over, equally on both "
            "sides. pad: add black edges. stretch: distort.")
_REFERENCE_TIP = ("Whose image condition. auto: diffusers' for 1.0, the authors' for 1.5, because 1.5 turns grey and "
                  "blurred after the first frame with diffusers' scale of 1/0.7.")


def _fit_input() -> io.Combo.Input:
    return io.Combo.Input("fit", options=list(FITS), default="crop", optional=True, tooltip=_FIT_TIP)


def _model_input() -> io.Model.Input:
    return io.Model.Input("model", optional=True, tooltip="Connect it to check the size, the frame count and the kind "
                          "of model before anything is encoded.")


def _report(cls: type[io.ComfyNode], notes: list[str]) -> dict[str, list[str]] | None:
    """Show ``notes`` on the node, and return them for the history."""
    if not notes:
        return None
    from server import PromptServer

    PromptServer.instance.send_progress_text("\n".join(notes), cls.hidden.unique_id)
    return {"text": notes}


class ImageToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXImageToVideo",
            display_name="CogVideoX Image to Video",
            category=CATEGORY,
            description="Gives an image-to-video CogVideoX the image that its video starts from, as the references "
                        "do, and an empty latent to sample.",
            search_aliases=["CogVideoX I2V", "CogVideo image to video", "first frame last frame CogVideoX",
                            "CogVideoX ImageEncode"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the video should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show; an empty prompt is usual."),
                io.Vae.Input("vae", tooltip="The VAE of a CogVideoX pipeline."),
                *size_inputs(),
                io.Int.Input("batch_size", default=1, min=1, max=64, tooltip="Videos to sample at once from each "
                             "image."),
                io.Image.Input("start_image", optional=True, tooltip="The first frame. Several images make several "
                               "videos. Connect this, end_image or both."),
                io.Image.Input("end_image", optional=True, tooltip="The last frame, for models and LoRAs that were "
                               "trained on it; none of the published models was."),
                io.Combo.Input("reference", options=list(IMAGE_REFERENCES), default="auto", optional=True,
                               tooltip=_REFERENCE_TIP),
                io.Combo.Input("posterior", options=["mean", "sample"], default="mean", optional=True,
                               tooltip="Which latent of the image. mean: the VAE's best guess, the same each time. "
                               "sample: a draw around it with augmentation_seed, as diffusers does."),
                _fit_input(),
                io.Boolean.Input("noise_augmentation", default=False, optional=True, tooltip="Add to the image the "
                                 "slight noise that the models were trained with, for a little more motion."),
                io.Int.Input("augmentation_seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, optional=True,
                             tooltip="Seed of noise_augmentation and of posterior sample."),
                _model_input(),
            ],
            outputs=[io.Conditioning.Output(display_name="positive"), io.Conditioning.Output(display_name="negative"),
                     io.Latent.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, width: int | None = None, height: int | None = None, length: int | None = None,
                        start_image: Any = ABSENT, end_image: Any = ABSENT) -> bool | str:
        def check() -> None:
            check_size_inputs(width, height, length)
            if start_image is ABSENT and end_image is ABSENT:
                raise SpecError(NO_IMAGE)

        return problem_of(check)

    @classmethod
    def execute(cls, positive: list, negative: list, vae: io.Vae.Type, width: int, height: int, length: int,
                batch_size: int, start_image: Any = None, end_image: Any = None, reference: str = "auto",
                posterior: str = "mean", fit: str = "crop", noise_augmentation: bool = False,
                augmentation_seed: int = 0, model: Any = None) -> io.NodeOutput:
        from ..model_loaders.images import ImageOptions, count_videos, encode_condition, with_images
        from ..models.cogvideox.image_condition import check_image

        geometry = geometry_of(width, height, length, model)
        if model is not None:
            check_image(geometry.spec, True, "The conditioning of this node")
        videos = count_videos(start_image, end_image, batch_size)
        options = ImageOptions(fit, posterior, noise_augmentation, augmentation_seed)
        condition, notes = encode_condition(vae, geometry, start_image, end_image, options)
        if condition.shape[0] > 1:  # one serves every video; of several, a, a, b, b where core would make a, b, a, b
            condition = condition.repeat_interleave(batch_size, dim=0)
        return io.NodeOutput(
            with_images(positive, condition, reference), with_images(negative, condition, reference),
            empty_latent(geometry, videos), ui=_report(cls, notes))


class VideoToVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXVideoToVideo",
            display_name="CogVideoX Video to Video",
            category=CATEGORY,
            description="Encodes a video to sample on with denoise below 1: exactly the strength of the reference's "
                        "video to video.",
            search_aliases=["CogVideoX V2V", "CogVideo video to video", "CogVideoX encode video", "vid2vid CogVideoX"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE of a CogVideoX pipeline."),
                io.Image.Input("video", tooltip="The frames of a video, as Get Video Components gives them. Frames "
                               "beyond length are not used."),
                *size_inputs(),
                _fit_input(),
                _model_input(),
            ],
            outputs=[io.Latent.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, width: int | None = None, height: int | None = None,
                        length: int | None = None) -> bool | str:
        return problem_of(lambda: check_size_inputs(width, height, length))

    @classmethod
    def execute(cls, vae: io.Vae.Type, video: Any, width: int, height: int, length: int, fit: str = "crop",
                model: Any = None) -> io.NodeOutput:
        from ..model_loaders.images import encode_video

        geometry = geometry_of(width, height, length, model)
        specs = [geometry.spec] if model is not None else [PUBLISHED["5B"], PUBLISHED["1.5-5B"]]
        samples, notes = encode_video(vae, geometry, video, fit, *specs)
        return io.NodeOutput({"samples": samples}, ui=_report(cls, notes))


class ImageSize(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXImageSize",
            display_name="CogVideoX Image Size",
            category=CATEGORY,
            description="The legal video size that comes nearest to the shape of an image, for a model.",
            search_aliases=["CogVideoX size", "CogVideoX aspect", "nearest size CogVideoX"],
            inputs=[
                io.Image.Input("image", tooltip="An image or a video; portrait too."),
                io.Model.Input("model", tooltip="The CogVideoX model that the size is for."),
            ],
            outputs=[io.Int.Output(display_name="width"), io.Int.Output(display_name="height")],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, image: Any, model: io.Model.Type) -> io.NodeOutput:
        from ..samplers.adapter import spec_of

        width, height = propose_size(image.shape[2], image.shape[1], spec_of(model))
        return io.NodeOutput(width, height, ui=_report(cls, [f"{width}x{height}"]))
