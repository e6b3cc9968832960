"""Loader nodes: files to MODEL, CLIP and VAE."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..model_loaders import folders
from ..model_loaders.sources import state_of
from ..models.specs import PUBLISHED, check_dtype
from .validation import check_choice, problem_of

WEIGHT_DTYPES = ["auto", "bf16", "fp16", "fp32"]
QUANTIZATIONS = ["none", "fp8_e4m3fn", "fp8_scaled", "int8", "mxfp8", "nvfp4"]
CATEGORY = "CogVideoX/loaders"

_DTYPE_TIP = ("Precision of the weights. auto: what the model was trained in, if your card computes it (bf16; fp16 for "
              "2B), else fp32. fp16 turns every model but 2B black and is refused for them.")
_QUANTIZATION_TIP = ("Hold the weights in fewer bits to save memory. none: as they are in the file, quantized or not. "
                     "fp8_e4m3fn: 8 bits, computed in weight_dtype. fp8_scaled: the same, multiplied in fp8 where the "
                     "card can. int8: ComfyUI 0.30 and newer. mxfp8, nvfp4: NVIDIA Blackwell.")


def _dtype_input() -> io.Combo.Input:
    return io.Combo.Input("weight_dtype", options=WEIGHT_DTYPES, default="auto", tooltip=_DTYPE_TIP)


def _quantization_input() -> io.Combo.Input:
    return io.Combo.Input("quantization", options=QUANTIZATIONS, default="none", tooltip=_QUANTIZATION_TIP)


def _show(node: type[io.ComfyNode], *components: Any) -> dict[str, list[str]]:
    """What was taken and why, on the node at once and in its UI output."""
    from server import PromptServer

    text = "\n".join(component.took for component in components)
    PromptServer.instance.send_progress_text(text, node.hidden.unique_id)
    return {"text": [text]}


class LoadPipeline(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXLoadPipeline",
            display_name="CogVideoX Load Pipeline",
            category=CATEGORY,
            description="Loads a whole CogVideoX pipeline folder as downloaded from Hugging Face: model, text encoder "
                        "and VAE. Which CogVideoX it is, is read from its config files.",
            search_aliases=["CogVideoX", "CogVideo loader", "load CogVideoX checkpoint", "download CogVideo model"],
            inputs=[
                io.Combo.Input("pipeline", options=folders.pipeline_names(), tooltip="Folder with model_index.json, "
                               "below models/diffusers or models/CogVideo."),
                _dtype_input(),
                _quantization_input(),
            ],
            outputs=[io.Model.Output(), io.Clip.Output(), io.Vae.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, pipeline: str | None = None, weight_dtype: str | None = None,
                        quantization: str | None = None) -> bool | str:
        def check() -> None:
            from ..model_loaders import load
            from ..model_loaders.doctor import explained
            from ..model_loaders.quantization import check_quantization

            check_choice("weight_dtype", weight_dtype, WEIGHT_DTYPES)
            check_choice("quantization", quantization, QUANTIZATIONS)
            if pipeline is None:
                return
            root = folders.pipeline_path(pipeline)
            load.check_pipeline(root)
            with explained(root / "transformer"):
                model = load.find_model(root / "transformer")
            check_dtype(weight_dtype or "auto", model.spec)
            with explained(root / "text_encoder"):
                text_encoder = load.find_text_encoder(root / "text_encoder")
            for component in (model, text_encoder):
                check_quantization(quantization or "none", component.layers)
            with explained(root / "vae"):
                load.find_vae(root / "vae")

        return problem_of(check)

    @classmethod
    def fingerprint_inputs(cls, pipeline: str | None = None, **kwargs: Any) -> str:
        return state_of("pipeline", folders.pipeline_path(pipeline)) if pipeline else ""

    @classmethod
    def execute(cls, pipeline: str, weight_dtype: str, quantization: str) -> io.NodeOutput:
        from ..model_loaders.load import find_model, load_pipeline

        folder = folders.pipeline_path(pipeline)
        parts = load_pipeline(str(folder), weight_dtype, quantization)
        return io.NodeOutput(*parts, ui=_show(cls, find_model(folder / "transformer")))


class LoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXLoadModel",
            display_name="CogVideoX Load Model",
            category=CATEGORY,
            description="Loads only the CogVideoX transformer, from a single file or from the transformer folder of a "
                        "pipeline.",
            search_aliases=["CogVideoX transformer", "CogVideo unet", "diffusion model loader CogVideoX"],
            inputs=[
                io.Combo.Input("checkpoint", options=folders.component_names("transformer"), tooltip="A "
                               "file below models/diffusion_models (.safetensors, .gguf, or the authors' .pt), or "
                               "PIPELINE/transformer. Of a set of shards any one."),
                _dtype_input(),
                _quantization_input(),
                io.Combo.Input("variant", options=["auto", *PUBLISHED], default="auto", optional=True,
                               tooltip="Which model it is, if a single file of unusual width cannot tell: 2B has "
                                       "sinusoidal, 5B rotary positions. A pipeline folder always tells."),
                io.Float.Input("vae_scale", default=0.0, min=0.0, max=100.0, step=0.00000001, round=False,
                               optional=True, tooltip="What the VAE's latents are multiplied with. 0: what the files "
                               "say, or as published (2B 1.15258426, the others 0.7). Set it for a finetune that was "
                               "trained with another."),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, checkpoint: str | None = None, weight_dtype: str | None = None,
                        quantization: str | None = None, variant: str | None = None) -> bool | str:
        def check() -> None:
            from ..model_loaders import load
            from ..model_loaders.doctor import explained
            from ..model_loaders.quantization import check_quantization

            check_choice("weight_dtype", weight_dtype, WEIGHT_DTYPES)
            check_choice("quantization", quantization, QUANTIZATIONS)
            check_choice("variant", variant, ["auto", *PUBLISHED])
            if checkpoint is not None:
                path = folders.component_path("transformer", checkpoint)
                with explained(path):
                    component = load.find_model(path, variant or "auto")
                check_dtype(weight_dtype or "auto", component.spec)
                check_quantization(quantization or "none", component.layers)

        return problem_of(check)

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str | None = None, **kwargs: Any) -> str:
        return state_of("transformer", folders.component_path("transformer", checkpoint)) if checkpoint else ""

    @classmethod
    def execute(cls, checkpoint: str, weight_dtype: str, quantization: str, variant: str = "auto",
                vae_scale: float = 0.0) -> io.NodeOutput:
        from ..model_loaders.load import find_model, load_model

        path = folders.component_path("transformer", checkpoint)
        model = load_model(str(path), weight_dtype, quantization, variant, vae_scale)
        return io.NodeOutput(model, ui=_show(cls, find_model(path, variant, vae_scale)))


class LoadTextEncoder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXLoadTextEncoder",
            display_name="CogVideoX Load Text Encoder",
            category=CATEGORY,
            description="Loads only the T5 text encoder, from a single file or from the text_encoder folder of a "
                        "pipeline.",
            search_aliases=["T5 loader", "CogVideoX CLIP", "T5-XXL"],
            inputs=[
                io.Combo.Input("text_encoder", options=folders.component_names("text_encoder"), tooltip="A "
                               "file below models/text_encoders (.safetensors, .gguf), or PIPELINE/text_encoder."),
                io.Combo.Input("weight_dtype", options=WEIGHT_DTYPES, default="auto", tooltip="Precision of the "
                               "weights. auto: as in the file; fp32 files in bf16 on a GPU. It computes in fp32."),
                _quantization_input(),
                io.Combo.Input("max_tokens", options=["auto", "226", "224"], default="auto", optional=True,
                               tooltip="Tokens per prompt: 226 for CogVideoX 1.0, 224 for 1.5 as its authors run it. "
                                       "auto: what the pipeline's transformer says, else 226."),
            ],
            outputs=[io.Clip.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, text_encoder: str | None = None, quantization: str | None = None) -> bool | str:
        def check() -> None:
            from ..model_loaders import load
            from ..model_loaders.doctor import explained
            from ..model_loaders.quantization import check_quantization

            check_choice("quantization", quantization, QUANTIZATIONS)
            if text_encoder is not None:
                path = folders.component_path("text_encoder", text_encoder)
                with explained(path):
                    component = load.find_text_encoder(path)
                check_quantization(quantization or "none", component.layers)

        return problem_of(check)

    @classmethod
    def fingerprint_inputs(cls, text_encoder: str | None = None, **kwargs: Any) -> str:
        if not text_encoder:
            return ""
        return state_of("text_encoder", folders.component_path("text_encoder", text_encoder))

    @classmethod
    def execute(cls, text_encoder: str, weight_dtype: str, quantization: str,
                max_tokens: str = "auto") -> io.NodeOutput:
        from ..model_loaders.load import find_text_encoder, load_text_encoder, text_tokens_beside

        path = folders.component_path("text_encoder", text_encoder)
        tokens = text_tokens_beside(path) if max_tokens == "auto" else int(max_tokens)
        clip = load_text_encoder(str(path), weight_dtype, quantization, tokens)
        return io.NodeOutput(clip, ui=_show(cls, find_text_encoder(path)))


class LoadVAE(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXLoadVAE",
            display_name="CogVideoX Load VAE",
            category=CATEGORY,
            description="Loads only the CogVideoX VAE, from a single file or from the vae folder of a pipeline.",
            search_aliases=["CogVideoX VAE", "CogVideo autoencoder"],
            inputs=[
                io.Combo.Input("vae", options=folders.component_names("vae"), tooltip="A file below models/vae "
                               "(.safetensors, or the authors' 3d-vae.pt), or PIPELINE/vae."),
                io.Combo.Input("weight_dtype", options=WEIGHT_DTYPES, default="auto", tooltip="Precision of the VAE. "
                               "auto: bf16 if your card computes it, else fp32."),
            ],
            outputs=[io.Vae.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, vae: str | None = None) -> bool | str:
        def check() -> None:
            from ..model_loaders import load
            from ..model_loaders.doctor import explained

            if vae is not None:
                path = folders.component_path("vae", vae)
                with explained(path):
                    load.find_vae(path)

        return problem_of(check)

    @classmethod
    def fingerprint_inputs(cls, vae: str | None = None, **kwargs: Any) -> str:
        return state_of("vae", folders.component_path("vae", vae)) if vae else ""

    @classmethod
    def execute(cls, vae: str, weight_dtype: str) -> io.NodeOutput:
        from ..model_loaders.load import find_vae, load_vae

        path = folders.component_path("vae", vae)
        return io.NodeOutput(load_vae(str(path), weight_dtype), ui=_show(cls, find_vae(path)))
