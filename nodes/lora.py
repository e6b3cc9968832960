"""LoRA node."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..model_loaders import folders
from ..model_loaders.lora_scale import files_beside
from ..model_loaders.sources import fingerprint
from .validation import problem_of


class LoadLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXLoadLora",
            display_name="CogVideoX Load LoRA",
            category="CogVideoX/loaders",
            description="Applies a LoRA of any trainer (diffusers and peft, kohya, CogVideoX-Fun, SAT, finetrainers; "
                        "DoRA, LoHa and LoKr too). Strength 1 is what its author meant: the node shows which scale "
                        "that is and where it is known from.",
            search_aliases=["CogVideoX LoRA", "CogVideo lora loader", "finetrainers lora", "DoRA", "LoKr"],
            inputs=[
                io.Model.Input("model", tooltip="A CogVideoX model. Several LoRAs: one node after another."),
                io.Combo.Input("lora", options=folders.lora_names(), tooltip="A file below "
                               "models/loras. Its keys say which trainer made it, its name nothing."),
                io.Float.Input("strength", default=1.0, min=-100.0, max=100.0, step=0.01, tooltip="How much of it. 1 "
                               "is what the author meant, 0 nothing, below 0 the opposite."),
            ],
            outputs=[io.Model.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, lora: str | None = None) -> bool | str:
        def check() -> None:
            from ..model_loaders.lora import check_lora_file

            if lora is not None:
                check_lora_file(folders.lora_path(lora))

        return problem_of(check)

    @classmethod
    def fingerprint_inputs(cls, lora: str | None = None, **kwargs: Any) -> str:
        path = folders.lora_path(lora) if lora else None
        return fingerprint([path, *files_beside(path)]) if path else ""

    @classmethod
    def execute(cls, model: io.Model.Type, lora: str, strength: float) -> io.NodeOutput:
        from server import PromptServer

        from ..model_loaders.lora import load_lora
        from ..samplers.adapter import spec_of

        spec_of(model)
        patched, report = load_lora(model, folders.lora_path(lora), strength)
        PromptServer.instance.send_progress_text(report, cls.hidden.unique_id)
        return io.NodeOutput(patched, ui={"text": [report]})
