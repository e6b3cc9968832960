"""The parity table on a GPU.

fp32 (TF32 off): within 1e-4 of diffusers on the same device. bf16, and fp16 for 2B: the distance from diffusers' fp32
is at most 1.1 times diffusers' own in that dtype, and at most 5e-2.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import comfy.ops
import pytest
import torch
from cogx.model_loaders.detect import model_from_configs, text_from_config, vae_from_config
from cogx.models.cogvideox import fields
from cogx.models.cogvideox.transformer import CogVideoXTransformer
from cogx.models.cogvideox.vae import CogVideoXVAENetwork
from cogx.models.cogvideox.vae_plan import DEVICE, HOST, PARKED, Plan
from cogx.scripts.tiny_pipeline import VARIANTS
from cogx.tests.gpu import references
from cogx.tests.gpu.references import relative_error
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor

EXACT = 1e-4
NO_WORSE = 1.1
LOW_PRECISION = 5e-2
LOW = [*((variant, torch.bfloat16) for variant in VARIANTS), ("2B", torch.float16)]


def check(reference: Tensor, theirs: Callable[[], Tensor], ours: Tensor, dtype: torch.dtype) -> None:
    """``reference``: diffusers in fp32. ``theirs``: diffusers in ``dtype``."""
    error = relative_error(ours, reference)
    if dtype == torch.float32:
        assert error <= EXACT
        return
    their_error = relative_error(theirs(), reference)
    words = f"error {error:.2e}, {error / their_error:.2f} x diffusers' own of {their_error:.2e}"
    assert error <= LOW_PRECISION, words
    assert error <= NO_WORSE * their_error, words


@pytest.mark.parametrize("variant, dtype", [*((v, torch.float32) for v in VARIANTS), *LOW], ids=str)
def test_transformer(variant: str, dtype: torch.dtype, device: torch.device, rehearsal: bool) -> None:
    if rehearsal and dtype == torch.float16:
        pytest.skip("fp16 on a CPU is not what this is about")
    reference = references.transformer(variant, rehearsal).to(device)
    spec = model_from_configs({"_class_name": "CogVideoXTransformer3DModel", **reference.config}).transformer
    spec = replace(spec, patch_bias=True)  # diffusers creates the bias whatever the config says
    ours = CogVideoXTransformer(spec, dtype, device, comfy.ops.disable_weight_init)
    ours.load_state_dict(reference.state_dict(), strict=True)
    size = references.TINY_SIZE if rehearsal else references.SIZE
    x, timestep, context, ofs = references.transformer_inputs(reference, size, device, dtype)
    expected = references.run_transformer(reference, x.float(), timestep, context.float(), ofs)

    def theirs() -> Tensor:
        return references.run_transformer(copy.deepcopy(reference).to(dtype), x, timestep, context, ofs)

    # On a CPU ComfyUI's choice is a sliced attention that is less accurate in bf16 than what it takes on a GPU.
    options = {"optimized_attention_override": lambda _, *args, **kwargs: attention_pytorch(*args, **kwargs)}
    found = ours.eval()(x, timestep, context, ofs=ofs, transformer_options=options if rehearsal else {})
    check(expected, theirs, found, dtype)


def vae_pair(dtype: torch.dtype, device: torch.device, rehearsal: bool) -> tuple[Any, CogVideoXVAENetwork]:
    reference = references.vae(rehearsal).to(device)
    spec = vae_from_config({"_class_name": "AutoencoderKLCogVideoX", **reference.config})
    ours = CogVideoXVAENetwork(spec, dtype, device, comfy.ops.disable_weight_init).eval()
    ours.load_state_dict(reference.state_dict(), strict=True)
    return reference, ours


VAE_DTYPES = [torch.float32, torch.bfloat16]
VAE_PLANS = [Plan(), Plan(8), Plan(24, True), Plan(16, True, PARKED), Plan(8, True, HOST)]


def check_plans(runs: dict[Plan, Tensor], reference: Tensor, theirs: Callable[[], Tensor], dtype: torch.dtype) -> None:
    low = theirs() if dtype != torch.float32 else reference
    for plan, ours in runs.items():
        assert ours.shape == reference.shape, plan
        check(reference, lambda: low, ours, dtype)


@pytest.mark.parametrize("frames", [1, 17])
@pytest.mark.parametrize("dtype", VAE_DTYPES, ids=str)
def test_vae_decode(dtype: torch.dtype, frames: int, device: torch.device, rehearsal: bool) -> None:
    """Under every kind of plan; with values in host memory that CUDA copies beside the computation."""
    reference, ours = vae_pair(dtype, device, rehearsal)
    rows, columns = (8, 12) if rehearsal else (30, 46)
    z = torch.randn(1, 16, (frames - 1) // 4 + 1, rows, columns, generator=torch.Generator().manual_seed(1))
    z = z.to(device, dtype)
    expected = reference.decode(z.float()).sample
    runs = {plan: ours.decode(z, plan) for plan in VAE_PLANS}
    check_plans(runs, expected, lambda: reference.to(dtype).decode(z).sample, dtype)


@pytest.mark.parametrize("frames", [1, 17])
@pytest.mark.parametrize("dtype", VAE_DTYPES, ids=str)
def test_vae_encode(dtype: torch.dtype, frames: int, device: torch.device, rehearsal: bool) -> None:
    if rehearsal and dtype == torch.bfloat16:
        pytest.skip("torch pools bf16 in time on CUDA only")
    reference, ours = vae_pair(dtype, device, rehearsal)
    rows, columns = (64, 96) if rehearsal else (240, 368)
    x = torch.rand(1, 3, frames, rows, columns, generator=torch.Generator().manual_seed(1)) * 2 - 1
    x = x.to(device, dtype)
    expected = reference.encode(x.float()).latent_dist.mode()
    runs = {plan: ours.encode(x, plan) for plan in VAE_PLANS}
    check_plans(runs, expected, lambda: reference.to(dtype).encode(x).latent_dist.mode(), dtype)


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("values", [DEVICE, PARKED, HOST])
def test_copies_beside_the_computation_change_nothing(values: str, pinned: bool, device: torch.device, rehearsal: bool,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Prefetched on a stream of their own, against copies that the computation waits for: bit by bit, three times."""
    _, ours = vae_pair(torch.bfloat16, device, rehearsal)
    plan = Plan(8, True, values)
    generator = torch.Generator().manual_seed(2)
    z = torch.randn(1, 16, 5, 8, 12, generator=generator).to(device, torch.bfloat16)
    x = torch.rand(1, 3, 17, 64, 96, generator=generator).to(device, torch.bfloat16)

    def host(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=pinned and not rehearsal)

    def run() -> tuple[Tensor, Tensor]:
        chunks = (ours.decode_chunks(z, plan, host), ours.encode_chunks(x, plan, host))
        decoded, encoded = (torch.cat(list(one), dim=2) for one in chunks)
        return decoded, encoded

    beside = [run() for _ in range(3)]
    plain = fields.HostLink.__init__

    def no_stream(self: Any, device: torch.device) -> None:
        plain(self, device)
        self._stream = None

    monkeypatch.setattr(fields.HostLink, "__init__", no_stream)
    expected = run()
    for found in beside:
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", VAE_DTYPES, ids=str)
def test_text_encoder(dtype: torch.dtype, device: torch.device, rehearsal: bool, comfyui_tree: Path) -> None:
    from cogx.model_loaders.text_encoder import encode, make_clip

    reference = references.text_encoder(rehearsal)
    spec = text_from_config({**reference.config.to_dict(), "architectures": ["T5EncoderModel"]})
    weights = {key: value.to(dtype) for key, value in reference.state_dict().items()}
    tokenizer = comfyui_tree / "comfy" / "text_encoders" / "t5_tokenizer"
    clip = make_clip(weights, spec, tokenizer, 226, dtype)
    prompt = "A red circle glides from left to right."
    ours = encode(clip, prompt, "encode")[0][0][0]
    ids = torch.tensor([[token for token, _ in clip.tokenize(prompt)["t5xxl"][0]]], device=device)
    expected = reference.to(device)(ids)[0]
    check(expected, lambda: reference.to(dtype)(ids)[0], ours, dtype)


def sampled_by_us(folder: Path, dtype_name: str, context: tuple[Tensor, Tensor], noise_seed: int) -> Tensor:
    from cogx.model_loaders.load import load_model
    from cogx.samplers import adapter

    model = load_model(str(folder / "transformer"), dtype_name)
    positive, negative = ([[one.float().cpu(), {}]] for one in context)
    latent = {"samples": torch.zeros(1, 16, *references.TINY_SIZE)}
    sigmas = adapter.make_sigmas(model, 10, "trailing")
    sampler = adapter.sampler_object("cogvideox_ddim", 10)
    return adapter.sample(model, positive, negative, latent, noise_seed, 6.0, sampler, sigmas)["samples"]


def sampled_by_diffusers(folder: Path, dtype: torch.dtype, device: torch.device, context: tuple[Tensor, Tensor],
                         noise_seed: int) -> Tensor:
    """[B, C, T, H, W], unscaled by the VAE factor."""
    from cogx.models.cogvideox.outer_sample import padding_noise
    from diffusers import CogVideoXPipeline

    pipeline = CogVideoXPipeline.from_pretrained(folder, torch_dtype=dtype, text_encoder=None, tokenizer=None)
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, *references.TINY_SIZE, generator=torch.manual_seed(noise_seed))
    padding = -noise.shape[2] % (pipeline.transformer.config.patch_size_t or 1)
    if padding:
        noise = torch.cat([padding_noise(noise, padding, noise_seed), noise], dim=2)
    positive, negative = (one.to(device, dtype) for one in context)
    latents = pipeline(prompt_embeds=positive, negative_prompt_embeds=negative, height=64, width=96, num_frames=17,
                       num_inference_steps=10, guidance_scale=6.0, output_type="latent",
                       latents=noise.permute(0, 2, 1, 3, 4).to(device, dtype)).frames
    return latents.permute(0, 2, 1, 3, 4)[:, :, padding:] / pipeline.vae.config.scaling_factor


@pytest.mark.parametrize("dtype_name, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("variant", ["2B", "5B", "1.5-5B"])
def test_ten_steps(variant: str, dtype_name: str, dtype: torch.dtype, device: torch.device,
                   tiny_pipelines: Path) -> None:
    """cogvideox_ddim, 10 steps, guidance 6, on a tiny network."""
    folder = tiny_pipelines / variant
    tokens = 224 if variant.startswith("1.5") else 226
    generator = torch.Generator().manual_seed(3)
    context = tuple(torch.randn(1, tokens, 32, generator=generator).to(dtype) for _ in range(2))
    expected = sampled_by_diffusers(folder, torch.float32, device, context, 12345)
    check(expected, lambda: sampled_by_diffusers(folder, dtype, device, context, 12345),
          sampled_by_us(folder, dtype_name, context, 12345), dtype)
