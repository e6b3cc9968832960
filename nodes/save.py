"""The node that writes a model to a file."""

from __future__ import annotations

from comfy_api.latest import io

from .load import QUANTIZATIONS
from .validation import check_choice, problem_of

CHOICES = ["as_loaded", *QUANTIZATIONS]


class SaveModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXSaveModel",
            display_name="CogVideoX Save Model",
            category="CogVideoX/loaders",
            description="Writes the transformer as one .safetensors file: as it is loaded, quantized, or with its "
                        "LoRAs merged. CogVideoX Load Model reads it back; what model it is, is noted in the file.",
            search_aliases=["CogVideoX save", "save quantized model", "merge LoRA into model", "export CogVideoX"],
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="A CogVideoX model, with or without LoRAs."),
                io.String.Input("filename_prefix", default="diffusion_models/CogVideoX", tooltip="Folder and name "
                                "below ComfyUI's output folder; a number is added. Files in output/diffusion_models "
                                "are in the list of CogVideoX Load Model."),
                io.Combo.Input("quantization", options=CHOICES, default="as_loaded", tooltip="as_loaded: as the "
                               "loader holds it. none: all weights in the loader's weight_dtype. The others quantize "
                               "the large layers, as in the loader."),
                io.Boolean.Input("merge_loras", default=False, optional=True, tooltip="Write the weights with the "
                                 "LoRAs and merges that the model carries. Off: the weights without them."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, quantization: str | None = None) -> bool | str:
        def check() -> None:
            check_choice("quantization", quantization, CHOICES)
            if quantization not in (None, "as_loaded"):
                from ..model_loaders.quantization import check_quantization

                check_quantization(str(quantization), {})

        return problem_of(check)

    @classmethod
    def execute(cls, model: io.Model.Type, filename_prefix: str, quantization: str,
                merge_loras: bool = False) -> io.NodeOutput:
        from server import PromptServer

        from ..model_loaders.folders import free_output_name
        from ..model_loaders.save import save_model

        words = save_model(model, free_output_name(filename_prefix), quantization, merge_loras)
        PromptServer.instance.send_progress_text(words, cls.hidden.unique_id)
        return io.NodeOutput(ui={"text": [words]})
