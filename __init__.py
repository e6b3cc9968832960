"""CogX: CogVideoX for ComfyUI. Loaded by ComfyUI, which looks for these two names."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
