"""The CogVideoX transformer as a ``comfy.model_base.BaseModel``: latent format, model sampling, conditions, memory."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_sampling
import comfy.quant_ops
import comfy.supported_models_base
import torch
from torch import Tensor

from ..noise_schedule import alphas_cumprod
from ..specs import LatentSpec, ModelSpec
from .image_condition import REFERENCE_KEY, check_image, model_condition
from .transformer import CogVideoXTransformer, has_host_rope, with_published_keys

# ComfyUI's own value for the last cumulative alpha at zero terminal SNR (sigma 4518): a larger sigma costs fp32 digits.
TERMINAL_ALPHA = 4.8973451890853435e-08

# Preview colours of the 16 latent channels: the fit that ComfyUI-CogVideoXWrapper publishes for the 5B VAE, rounded.
RGB_FACTORS = [
    [0.1195, 0.0992, -0.0048], [-0.0012, 0.0550, 0.0213], [-0.0141, -0.0087, -0.0210], [0.0306, 0.1219, 0.0140],
    [0.0927, 0.0303, 0.0508], [0.0379, 0.0494, 0.0586], [0.0177, 0.0088, 0.0360], [0.1061, 0.0234, 0.0572],
    [0.1274, -0.0110, 0.0433], [-0.0187, 0.0822, 0.1061], [0.0084, 0.0762, 0.0930], [0.1294, 0.1236, 0.0448],
    [0.0457, 0.0411, -0.0177], [0.0002, -0.0140, 0.0533], [0.0808, 0.1155, -0.0215], [-0.0152, -0.0058, 0.0722],
]

OFS = 2.0  # the one value that 1.5 image to video was trained with

# Live values per token at the widest point of a block, in units of hidden_size: two copies of the residual stream, the
# MLP's inner values, and its input or output. tests/comfy/test_memory.py measures it.
LIVE_VALUES_PER_TOKEN = 7.0
# The same while RoPE turns the keys, where ComfyUI has no kernel for it: the residual stream, the normalised sequence,
# queries, keys and the result in the model's dtype, and two of them in fp32.
LIVE_VALUES_IN_PLAIN_ROPE, FP32_VALUES_IN_PLAIN_ROPE = 5.0, 2.0


class CogVideoXLatent(comfy.latent_formats.LatentFormat):
    """Latents at the node boundary are unscaled; the model sees them times ``scaling_factor``."""

    latent_dimensions = 3
    spacial_downscale_ratio = 8
    temporal_downscale_ratio = 4

    def __init__(self, latent: LatentSpec | None = None) -> None:
        latent = latent or LatentSpec()
        self.scale_factor = latent.scaling_factor
        self.latent_channels = latent.channels
        self.latent_rgb_factors = RGB_FACTORS if latent.channels == len(RGB_FACTORS) else None


class CogVideoXConfig(comfy.supported_models_base.BASE):
    """ComfyUI's model config, made from a spec instead of being matched."""

    unet_extra_config: ClassVar[dict[str, Any]] = {}
    sampling_settings: ClassVar[dict[str, Any]] = {"zsnr": True}
    latent_format = CogVideoXLatent

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__({"spec": spec.transformer})
        self.spec = spec
        self.latent_format = CogVideoXLatent(spec.latent)
        self.supported_inference_dtypes = [torch.bfloat16, torch.float32]
        if spec.fp16_safe:
            self.supported_inference_dtypes.insert(0, torch.float16)

    def get_model(self, state_dict: Any = None, prefix: str = "", device: Any = None) -> CogVideoXModel:
        return CogVideoXModel(self, device=device)

    def process_unet_state_dict_for_saving(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return super().process_unet_state_dict_for_saving(with_published_keys(state_dict))


class CogVideoXSampling(comfy.model_sampling.ModelSamplingDiscrete, comfy.model_sampling.V_PREDICTION):
    """v-prediction on the model's own table: sigma = sqrt((1 - a) / a), SNR shift and zero terminal SNR included."""

    def __init__(self, model_config: CogVideoXConfig | None = None, zsnr: bool | None = None) -> None:
        self._schedule = model_config.spec.schedule if model_config is not None else None
        super().__init__(model_config, zsnr)

    def _register_schedule(self, *args: Any, **kwargs: Any) -> None:
        if self._schedule is None:
            raise ValueError("CogVideoXSampling needs the model config that holds the schedule; pass model_config.")
        alphas = alphas_cumprod(self._schedule)
        alphas[-1] = max(alphas[-1], TERMINAL_ALPHA)
        self.num_timesteps = len(alphas)
        self.linear_start, self.linear_end = self._schedule.beta_start, self._schedule.beta_end
        self.zsnr = self._schedule.rescale_betas_zero_snr
        self.set_sigmas(((1 - alphas) / alphas) ** 0.5)


class CogVideoXModel(comfy.model_base.BaseModel):
    """What ComfyUI samples. ``spec`` says which CogVideoX it is."""

    def __init__(self, model_config: CogVideoXConfig, device: Any = None) -> None:
        super().__init__(model_config, comfy.model_base.ModelType.V_PREDICTION, device=device,
                         unet_model=CogVideoXTransformer)
        self.spec = model_config.spec
        self.model_sampling = CogVideoXSampling(model_config)

    def concat_cond(self, **kwargs: Any) -> Tensor | None:
        """The image condition as the network takes it: [B, extra, T, H, W], padding frames of 1.5 included.

        Raises:
            SpecError: an image for a text-to-video model, or none for an image-to-video model.
        """
        condition = kwargs.get("concat_latent_image")
        check_image(self.spec, condition is not None, f"The {kwargs.get('prompt_type', '')} conditioning")
        if condition is None:
            return None
        made = model_condition(condition, tuple(kwargs["noise"].shape), self.spec, kwargs.get(REFERENCE_KEY, "auto"))
        return made.to(kwargs["device"])

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        out = super().extra_conds(**kwargs)
        context = kwargs.get("cross_attn")
        if context is not None:
            self._check_context(context)
            out["c_crossattn"] = comfy.conds.CONDRegular(context)
        if self.spec.transformer.ofs_embed_dim:
            out["ofs"] = comfy.conds.CONDRegular(torch.full((1,), OFS, device=kwargs["device"]))
        return out

    def _check_context(self, context: Tensor) -> None:
        expected = self.spec.transformer.text_embed_dim
        if context.shape[-1] != expected:
            raise ValueError(
                f"The prompt's embedding has {context.shape[-1]} values per token, CogVideoX {self.spec.name} needs "
                f"{expected}: it comes from another text encoder. Encode it with 'CogVideoX Text Encode' and the "
                "CLIP of a CogVideoX pipeline (T5-v1.1-XXL).")

    def resize_cond_for_context_window(self, cond_key: str, cond_value: Any, window: Any, x_in: Tensor, device: Any,
                                       retain_index_list: Any = ()) -> Any:
        """Text and ofs have no time axis, whatever their sizes happen to be; the rest is core's business."""
        if cond_key in ("c_crossattn", "ofs"):
            return cond_value._copy_with(cond_value.cond.to(device))
        return None

    def memory_required(self, input_shape: Any, cond_shapes: Any = {}) -> float:  # noqa: B006 - the host's signature
        """Bytes that one forward needs beside the weights. input_shape: [B, C, T, H, W], latent."""
        return forward_memory(self.spec, input_shape, comfy.model_management.dtype_size(self.get_dtype_inference()))


def forward_memory(spec: ModelSpec, input_shape: Any, value: int) -> float:
    """Bytes that one forward needs beside the weights. input_shape: [B, C, T, H, W], latent. value: bytes of one."""
    network = spec.transformer
    patch = network.temporal_patch * network.patch_size**2
    tokens = math.prod(input_shape[2:]) / patch + spec.text_tokens
    per_token, rope = LIVE_VALUES_PER_TOKEN * value, 0
    if network.use_rotary_positional_embeddings:
        rope = 4 * 2 * network.attention_head_dim
        if not has_rope_kernel():
            plain = LIVE_VALUES_IN_PLAIN_ROPE * value + FP32_VALUES_IN_PLAIN_ROPE * torch.float32.itemsize
            per_token = max(per_token, plain)
    return input_shape[0] * tokens * per_token * network.hidden_size + tokens * rope


def has_rope_kernel() -> bool:
    """Whether ComfyUI turns queries and keys with one kernel: with a torch for CUDA 13, so far."""
    backends = comfy.quant_ops.ck.list_backends() if has_host_rope() else {}
    return any(backend["available"] and not backend["disabled"] and "apply_rope1" in backend["capabilities"]
               for name, backend in backends.items() if name != "eager")
