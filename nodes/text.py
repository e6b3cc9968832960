"""Prompt nodes."""

from __future__ import annotations

from comfy_api.latest import io

from ..models.turns import prompts_of
from .validation import problem_of


def _clip() -> io.Input:
    return io.Clip.Input("clip", tooltip="The CLIP of a CogVideoX pipeline, or T5-XXL from core's Load CLIP with the "
                         "type cogvideox, sd3 or pixart.")


def _max_tokens() -> io.Input:
    return io.Combo.Input("max_tokens", options=["auto", "226", "224"], default="auto", optional=True,
                          tooltip="Tokens per prompt: 226 for CogVideoX 1.0, 224 for 1.5 as its authors run it. "
                          "auto: as the CLIP was loaded; 226 for one of core's Load CLIP.")


def _limit(max_tokens: str) -> int | None:
    return None if max_tokens == "auto" else int(max_tokens)


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
                _clip(),
                io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip="The prompt. Long, detailed "
                                "descriptions work best; parentheses are read as text."),
                io.Combo.Input("when_empty", options=["encode", "zeros"], default="encode", tooltip="What an empty "
                               "prompt becomes. encode: the embedding of an empty text, as in diffusers. zeros: "
                               "the zero tensor that the authors trained and sample with."),
                _max_tokens(),
            ],
            outputs=[io.Conditioning.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, clip: io.Clip.Type, text: str, when_empty: str, max_tokens: str = "auto") -> io.NodeOutput:
        from server import PromptServer

        from ..model_loaders.text_encoder import encode

        conditioning, count = encode(clip, text, when_empty, _limit(max_tokens))
        PromptServer.instance.send_progress_text(str(count), cls.hidden.unique_id)
        return io.NodeOutput(conditioning, ui={"text": [str(count)]})


class PromptSequence(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXPromptSequence",
            display_name="CogVideoX Prompt Sequence",
            category="CogVideoX/conditioning",
            description="Encodes a prompt for each part of a long video, in turn: each line is a prompt. With "
                        "'CogVideoX Context Windows' they are spread evenly over the video's time, and each goes over "
                        "into the next. Sampling takes no longer than with one prompt.",
            search_aliases=["prompt travel CogVideoX", "prompt schedule", "prompts per window", "long video CogVideoX"],
            inputs=[
                _clip(),
                io.String.Input("text", multiline=True, dynamic_prompts=True, tooltip="A prompt on each line, in the "
                                "order of the video. Empty lines are left out; parentheses are read as text."),
                _max_tokens(),
            ],
            outputs=[io.Conditioning.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, text: str | None = None) -> bool | str:
        return problem_of(lambda: None if text is None else prompts_of(text))

    @classmethod
    def execute(cls, clip: io.Clip.Type, text: str, max_tokens: str = "auto") -> io.NodeOutput:
        from server import PromptServer

        from ..model_loaders.text_encoder import encode_sequence

        conditioning, counts = encode_sequence(clip, text, _limit(max_tokens))
        said = "\n".join(f"{line}: {count}" for line, count in enumerate(counts, 1))
        PromptServer.instance.send_progress_text(said, cls.hidden.unique_id)
        return io.NodeOutput(conditioning, ui={"text": [said]})
