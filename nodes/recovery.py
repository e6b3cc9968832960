"""The node that brings back what a run left on disk."""

from __future__ import annotations

from comfy_api.latest import io

from .validation import problem_of


def _names() -> list[str]:
    from ..model_loaders.recovery import saved_names

    return saved_names()


class LoadLatent(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXLoadLatent",
            display_name="CogVideoX Load Latent",
            category="CogVideoX/latent",
            description="Brings back a sampled latent that CogX saved by itself, after a failed decode, a crash or an "
                        "interrupted run. Decode it with the VAE of the same model family.",
            search_aliases=["recover latent CogVideoX", "resume CogVideoX", "lost render", "load latent CogVideoX"],
            inputs=[
                io.Combo.Input("file", options=_names(), tooltip="A file in output/cogx_recovery; newest is the one "
                               "that was saved last. Press R to list new ones."),
            ],
            outputs=[io.Latent.Output()],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        from ..model_loaders.recovery import check_saved

        return problem_of(lambda: check_saved(file) if file is not None else None)

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None) -> str:
        from ..model_loaders.recovery import saved_fingerprint

        return saved_fingerprint(file)  # None: linked

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        from server import PromptServer

        from ..model_loaders.recovery import load_saved

        latent, words = load_saved(file)
        PromptServer.instance.send_progress_text(words, cls.hidden.unique_id)
        return io.NodeOutput(latent, ui={"text": [words]})
