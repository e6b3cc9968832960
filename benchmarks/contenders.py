"""What is timed: this pack, diffusers and ComfyUI core, each behind the same few methods.

A method that is named after a measure builds what it needs and returns a callable that does the work once. Nothing is
read from disk but the tokenizer of ComfyUI.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .setting import GUIDANCE, NotMeasured, Setting, bytes_of, materialise, randomise

Work = Callable[[], Any]
# Runs a sampling loop and calls its argument after every step.
Loop = Callable[[Callable[[], None]], Any]


class Contender:
    """``weights``: bytes of the network that the last method built."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.weights = 0

    def forward(self, batch: int) -> Work:
        """The transformer alone."""
        raise NotImplementedError

    def sampling(self, steps: int, sampler: str, instantaneous: bool = False) -> Loop:
        """A sampling run with guidance; ``instantaneous`` puts a network in place that does nothing."""
        raise NotImplementedError

    def decode(self) -> Work:
        """Untiled, to frames in 0..1 as fp32 on the CPU; on the meta device the network alone."""
        raise NotImplementedError

    def encode(self) -> Work:
        """Untiled, from frames on the CPU to the mean of the posterior; on the meta device the network alone."""
        raise NotImplementedError

    def text(self) -> Work:
        """The text encoder on one prompt of full length, without the tokenizer."""
        raise NotImplementedError

    def description(self) -> str:
        """How it ran, for the table."""
        return ""


class CogX(Contender):
    """This pack, through ComfyUI's model management."""

    def _model(self) -> Any:
        from ..models.cogvideox.base_model import CogVideoXConfig

        config = CogVideoXConfig(self.setting.spec)
        config.set_inference_dtype(self.setting.dtype, None)
        model = config.get_model(device=self.setting.device)
        randomise(model.diffusion_model)
        self.weights = bytes_of(model.diffusion_model)
        return model

    def forward(self, batch: int) -> Work:
        return comfy_forward(self.setting, self._model().diffusion_model, batch)

    def sampling(self, steps: int, sampler: str, instantaneous: bool = False) -> Loop:
        import comfy.patcher_extension

        from ..model_loaders.load import WRAPPER_KEY
        from ..models.cogvideox.outer_sample import outer_sample
        from ..samplers.adapter import make_sigmas, sampler_object

        patcher = comfy_patcher(self._model())
        patcher.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, outer_sample)
        sigmas = make_sigmas(patcher, steps, "trailing")
        return comfy_loop(self.setting, patcher, sampler_object(sampler), sigmas, instantaneous)

    def _vae(self) -> Any:
        from ..model_loaders.vae import CogVideoXVAE

        with self.setting.device:
            vae = CogVideoXVAE(self.setting.vae, self.setting.dtype)
        randomise(vae.first_stage_model)
        self.weights = bytes_of(vae.first_stage_model)
        return vae

    def decode(self) -> Work:
        vae, z = self._vae(), self.setting.vae_latent()
        if self.setting.device.type == "meta":
            return lambda: _exhaust(vae.first_stage_model.decode_chunks(z))
        return lambda: vae.decode_video(z, tiling="off")

    def encode(self) -> Work:
        vae, pixels = self._vae(), self.setting.pixels()
        if self.setting.device.type == "meta":
            x = _bcthw(pixels).to(self.setting.dtype)
            return lambda: _exhaust(vae.first_stage_model.encode_chunks(x))
        return lambda: vae.encode(pixels)

    def text(self) -> Work:
        from ..model_loaders.load import tokenizer_folder
        from ..model_loaders.text_encoder import CLIP_NAME, make_clip

        s = self.setting
        clip = make_clip({}, s.text, tokenizer_folder(Path("no folder")), s.spec.text_tokens, s.dtype)
        randomise(clip.cond_stage_model.to(s.device))
        self.weights = bytes_of(clip.cond_stage_model)
        tokens = {CLIP_NAME: [[(i + 3, 1.0) for i in range(s.spec.text_tokens)]]}
        return lambda: clip.encode_from_tokens_scheduled(tokens)

    def description(self) -> str:
        return f"attention {attention_name()}"


class Core(Contender):
    """ComfyUI's own CogVideoX network, to be timed only: its numbers are not the reference's."""

    def _model(self) -> Any:
        import comfy.supported_models

        s = self.setting
        absent = ("norm_eps", "temporal_interpolation_scale")
        network = {key: value for key, value in asdict(s.spec.transformer).items() if key not in absent}
        config = comfy.supported_models.CogVideoX_T2V({"image_model": "cogvideox", **network})
        config.set_inference_dtype(s.dtype, None)
        model = config.get_model({}, device=s.device)
        randomise(model.diffusion_model)
        self.weights = bytes_of(model.diffusion_model)
        return model

    def forward(self, batch: int) -> Work:
        return comfy_forward(self.setting, self._model().diffusion_model, batch)

    def sampling(self, steps: int, sampler: str, instantaneous: bool = False) -> Loop:
        import comfy.samplers

        if self.setting.spec.transformer.condition_channels:
            raise NotMeasured("core wants an image")
        patcher = comfy_patcher(self._model())
        sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", steps)
        return comfy_loop(self.setting, patcher, comfy.samplers.sampler_object("ddim"), sigmas, instantaneous)

    def _vae(self) -> Any:
        from comfy.ldm.cogvideo.vae import AutoencoderKLCogVideoX

        spec = self.setting.vae
        vae = materialise(lambda: AutoencoderKLCogVideoX(
            block_out_channels=spec.block_out_channels, latent_channels=spec.latent_channels,
            layers_per_block=spec.layers_per_block, groups=spec.norm_num_groups), self.setting)
        self.weights = bytes_of(vae)
        return vae

    def decode(self) -> Work:
        vae, z = self._vae(), self.setting.vae_latent()
        return lambda: _frames(vae.decode(z))

    def encode(self) -> Work:
        vae, pixels = self._vae(), self.setting.pixels()
        return lambda: vae.encode(_bcthw(pixels).to(self.setting.device, self.setting.dtype)).float().cpu()

    def text(self) -> Work:
        raise NotMeasured("the T5 of ComfyUI, which this pack uses")

    def description(self) -> str:
        return f"attention {attention_name()}; sampler ddim"


class Diffusers(Contender):
    """diffusers' networks and pipeline, eager."""

    compiled = False

    def _transformer(self) -> Any:
        from diffusers import CogVideoXTransformer3DModel

        spec = self.setting.spec.transformer
        network = materialise(lambda: CogVideoXTransformer3DModel(**asdict(spec)), self.setting)
        self.weights = bytes_of(network)
        if self.compiled and self.setting.device.type != "meta":
            network.compile()
        return network

    def _pipeline(self, transformer: Any, scheduler: str) -> Any:
        import diffusers

        s = self.setting.spec.schedule
        scheduler_class = getattr(diffusers, scheduler)
        pipeline = diffusers.CogVideoXPipeline(
            tokenizer=None, text_encoder=None, vae=None, transformer=transformer,
            scheduler=scheduler_class(clip_sample=False, **asdict(s)))
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def forward(self, batch: int) -> Work:
        s, network = self.setting, self._transformer()
        g = s.geometry
        x, timestep, context = s.latent(batch).transpose(1, 2), s.timestep(batch), s.context(batch)  # bcthw -> btchw
        ofs = s.ofs(batch) if s.spec.transformer.ofs_embed_dim else None
        rope = None
        if s.spec.transformer.use_rotary_positional_embeddings:
            pipeline = self._pipeline(network, "CogVideoXDDIMScheduler")
            place = torch.device("cpu") if s.device.type == "meta" else s.device
            rope = pipeline._prepare_rotary_positional_embeddings(g.height, g.width, x.shape[1], place)
            rope = tuple(part.to(s.device) for part in rope)
        return lambda: network(x, context, timestep, ofs=ofs, image_rotary_emb=rope, return_dict=False)

    def sampling(self, steps: int, sampler: str, instantaneous: bool = False) -> Loop:
        s = self.setting
        if s.spec.transformer.condition_channels:
            raise NotMeasured("the pipeline wants an image")
        transformer = self._transformer()
        if instantaneous:
            channels = s.spec.transformer.out_channels
            transformer.forward = lambda hidden_states, **kwargs: (hidden_states[:, :, :channels],)
        scheduler = "CogVideoXDPMScheduler" if sampler == "cogvideox_dpm" else "CogVideoXDDIMScheduler"
        pipeline = self._pipeline(transformer, scheduler)
        positive, negative, g = s.context(), s.context(), s.geometry

        def run(tick: Callable[[], None]) -> Any:
            def on_step_end(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
                tick()
                return tensors

            return pipeline(prompt_embeds=positive, negative_prompt_embeds=negative, height=g.height, width=g.width,
                            num_frames=g.frames, num_inference_steps=steps, guidance_scale=GUIDANCE,
                            output_type="latent", callback_on_step_end=on_step_end)

        return run

    def _vae(self) -> Any:
        from diffusers import AutoencoderKLCogVideoX

        vae = materialise(lambda: AutoencoderKLCogVideoX(**asdict(self.setting.vae)), self.setting)
        self.weights = bytes_of(vae)
        return vae

    def decode(self) -> Work:
        vae, z = self._vae(), self.setting.vae_latent()
        return lambda: _frames(vae.decode(z).sample)

    def encode(self) -> Work:
        vae, pixels = self._vae(), self.setting.pixels()
        if self.setting.device.type == "meta":
            x = _bcthw(pixels).to(self.setting.dtype)
            return lambda: vae.encode(x).latent_dist.mode()
        return lambda: vae.encode(
            _bcthw(pixels).to(self.setting.device, self.setting.dtype)).latent_dist.mode().float().cpu()

    def text(self) -> Work:
        from transformers import T5Config, T5EncoderModel

        s = self.setting
        network = materialise(lambda: T5EncoderModel(T5Config(**asdict(s.text))), s)
        self.weights = bytes_of(network)
        tokens = torch.arange(3, 3 + s.spec.text_tokens, device=s.device)[None]
        return lambda: network(tokens)[0]

    def description(self) -> str:
        return "torch.compile of the transformer" if self.compiled else "eager"


class DiffusersCompiled(Diffusers):
    compiled = True


CONTENDERS: dict[str, type[Contender]] = {
    "cogx": CogX, "diffusers": Diffusers, "diffusers-compiled": DiffusersCompiled, "core": Core,
}


def attention_name() -> str:
    from comfy.ldm.modules.attention import optimized_attention

    return optimized_attention.__name__


def attention_options(device: torch.device) -> dict[str, Any]:
    """On the meta device the attention of a CUDA run; ComfyUI would look for a CPU's there."""
    if device.type != "meta":
        return {}
    from comfy.ldm.modules.attention import attention_pytorch

    return {"optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)}


def comfy_forward(setting: Setting, network: Any, batch: int) -> Work:
    """One call of a network of ComfyUI's signature. ``ofs`` is ignored where there is none."""
    x, timestep, context = setting.latent(batch), setting.timestep(batch), setting.context(batch)
    ofs, options = setting.ofs(batch), attention_options(setting.device)
    return lambda: network(x, timestep, context, ofs=ofs, transformer_options=options)


def comfy_patcher(model: Any) -> Any:
    import comfy.model_management
    import comfy.model_patcher

    management = comfy.model_management
    return comfy.model_patcher.CoreModelPatcher(model, load_device=management.get_torch_device(),
                                                offload_device=management.unet_offload_device())


def comfy_loop(setting: Setting, patcher: Any, sampler: Any, sigmas: Tensor, instantaneous: bool) -> Loop:
    """A run through ComfyUI's sampling, as its nodes start it."""
    import comfy.sample

    if instantaneous:
        channels = setting.spec.transformer.out_channels
        patcher.model.diffusion_model.forward = lambda x, *args, **kwargs: x[:, :channels]
    positive, negative = ([[setting.context().cpu(), {}]] for _ in range(2))
    noise = torch.randn(setting.geometry.latent_shape())

    def run(tick: Callable[[], None]) -> Tensor:
        return comfy.sample.sample_custom(
            patcher, noise, GUIDANCE, sampler, sigmas, positive, negative, torch.zeros_like(noise),
            callback=lambda *args: tick(), disable_pbar=True, seed=0)

    return run


def _bcthw(pixels: Tensor) -> Tensor:
    """[T, H, W, 3] in 0..1 -> [1, 3, T, H, W] in -1..1."""
    return (pixels * 2 - 1).permute(3, 0, 1, 2)[None]


def _frames(video: Tensor) -> Tensor:
    """[B, 3, T, H, W] in -1..1 -> [B, T, H, W, 3] in 0..1, fp32, on the CPU."""
    return (video / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 4, 1).float().cpu()


def _exhaust(chunks: Any) -> None:
    for chunk in chunks:
        del chunk
