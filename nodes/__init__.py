"""The nodes: schema and one call each. What they do lives in model_loaders/ and samplers/.

Node ids and inputs are a contract (tests/data/nodes.json): append optional inputs only, at the end.
"""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .decode import Decode, DecodeVideo
from .download import Download
from .extend import Extend
from .image import ImageSize, ImageToVideo, VideoToVideo
from .inversion import Inversion
from .latent import EmptyLatent
from .load import LoadModel, LoadPipeline, LoadTextEncoder, LoadVAE
from .lora import LoadLora
from .memory import MemoryPlan
from .recovery import LoadLatent
from .sample import DynamicGuidance, Sampler, SamplerSelect, Scheduler
from .save import SaveModel
from .text import PromptSequence, TextEncode
from .windows import ContextWindows, RIFLEx

NODES: list[type[io.ComfyNode]] = [
    LoadPipeline, LoadModel, LoadTextEncoder, LoadVAE, TextEncode, EmptyLatent, Sampler, SamplerSelect, Scheduler,
    DynamicGuidance, Decode, ImageToVideo, VideoToVideo, ImageSize, Inversion, LoadLatent, MemoryPlan, SaveModel,
    LoadLora, Download, ContextWindows, RIFLEx, PromptSequence, DecodeVideo, Extend,
]


class CogXExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> CogXExtension:
    return CogXExtension()
