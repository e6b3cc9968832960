"""Download node."""

from __future__ import annotations

import time
from typing import Any

from comfy_api.latest import io

from ..model_loaders import folders
from ..model_loaders.published import CHOICES, REPOSITORIES


class Download(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXDownload",
            display_name="CogVideoX Download",
            category="CogVideoX/loaders",
            description="Downloads a published CogVideoX pipeline, or one part of it, from the Hugging Face hub into "
                        "models/diffusers. It says first what that would be, and downloads only if download is on.",
            search_aliases=["CogVideoX models", "Hugging Face download", "get CogVideo weights"],
            inputs=[
                io.Combo.Input("repository", options=list(REPOSITORIES), default="CogVideoX-5b", tooltip="The "
                               "published pipeline. Its weights have a licence of their own, which the node shows."),
                io.Combo.Input("part", options=list(CHOICES), default="all", tooltip="all: the whole pipeline. A "
                               "single part if you have the others: the text encoder is the same T5-v1.1-XXL in all, "
                               "in fp32 for 1.5."),
                io.Boolean.Input("download", default=False, tooltip="off: only say how much would be downloaded, "
                                 "where to, and under which licence; the network is not used. on: download. What was "
                                 "cut off goes on where it stopped, what is complete is left alone."),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **kwargs: Any) -> float:
        return float("nan")  # the disk may have changed; what is complete is seen at once

    @classmethod
    def execute(cls, repository: str, part: str, download: bool) -> io.NodeOutput:
        from server import PromptServer

        from ..model_loaders import download as hub

        root, node = folders.download_root(repository), cls.hidden.unique_id
        text = hub.describe(repository, part, root)
        if download:
            PromptServer.instance.send_progress_text(text, node)
            target = hub.download(repository, part, root, _progress(node))
            text = f"{target} is complete ({part}). Press R, then choose it in a CogVideoX loader."
        elif not hub.is_there(repository, part, root):
            text += "\nNothing was downloaded: switch download on and queue again."
        PromptServer.instance.send_progress_text(text, node)
        return io.NodeOutput(ui={"text": [text]})


def _progress(node: str) -> Any:
    """Shows bytes and the file at work on the node; ComfyUI's interrupt ends the download."""
    import comfy.model_management
    import comfy.utils
    from server import PromptServer

    bar, shown = comfy.utils.ProgressBar(1), 0.0

    def progress(done: int, total: int, file: str) -> None:
        nonlocal shown
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)
        if time.monotonic() - shown > 1:
            shown = time.monotonic()
            PromptServer.instance.send_progress_text(f"{done / 1e9:.1f} of {total / 1e9:.1f} GB: {file}", node)

    return progress
