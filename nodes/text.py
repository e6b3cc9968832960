"""Prompt node."""

from __future__ import annotations

from comfy_api.latest import io


class TextEncode(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXTextEncode",
            display_name="CogVideoX Text Encode",
            category="CogVideoX/conditioning",
            description="Encodes a prompt as CogVideoX was trained: a fixed number of tokens, no mask, no prompt "
                        "weights. Shows how many tokens the prompt takes; longer ones are cut, with a warning.",
            search_aliases=["CogVideoX prompt", "T5 text encode", "CLIP text encode CogVideoX"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of a CogVideoX pipeline."),
                io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip="The prompt. Long, detailed "
                                "descriptions work best; parentheses are read as text."),
                io.Combo.Input("when_empty", options=["encode", "zeros"], default="encode", tooltip="What an empty "
                               "prompt becomes. encode: the embedding of an empty text, as in diffusers. zeros: "
                               "the zero tensor that the authors trained and sample with."),
            ],
            outputs=[io.Conditioning.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip: io.Clip.Type, text: str, when_empty: str) -> io.NodeOutput:
        from server import PromptServer

        from ..model_loaders.text_encoder import encode

        conditioning, count = encode(clip, text, when_empty)
        PromptServer.instance.send_progress_text(str(count), cls.hidden.unique_id)
        return io.NodeOutput(conditioning, ui={"text": [str(count)]})
