"""The exact samplers and core's own, in process, against diffusers' schedulers run by hand around the same network.

The network is the tiny transformer with its weights; both sides see the same prompt embeddings and the same noise.
"""

from __future__ import annotations

import inspect
import math
from itertools import pairwise

import comfy.sample
import comfy.samplers
import pytest
import torch
from cogx.model_loaders.load import load_model
from cogx.models.cogvideox.image_condition import condition_latent
from cogx.samplers import adapter
from cogx.samplers.guidance import dynamic_guidance

CFG = 6.0
SHAPE = (1, 16, 5, 8, 12)


@pytest.fixture(scope="module")
def model(tiny_pipelines):
    return load_model(str(tiny_pipelines / "5B" / "transformer"))


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(5)
    positive, negative = torch.randn(2, 1, 226, 32, generator=generator)
    return [[positive, {}]], [[negative, {}]]


def noise_of(seed: int, shape=SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def latent_of(seed: int) -> torch.Tensor:
    """An encoded video: unscaled, as at the node boundary."""
    return noise_of(seed) * 1.3


def velocity(model, prompts, x: torch.Tensor, timestep: int, scale: float = CFG) -> torch.Tensor:
    """Guided v as the pipelines compute it: uncond + scale * (cond - uncond)."""
    network = model.model.diffusion_model
    t = torch.full((x.shape[0],), float(timestep))
    cond, uncond = (network(x, t, p[0][0].expand(x.shape[0], -1, -1)) for p in prompts)
    return uncond + scale * (cond - uncond)


def by_hand(model, prompts, timesteps, x, name="CogVideoXDDIMScheduler", steps=None, generator=None, scale=CFG,
            after_step=lambda i, x: x):
    """diffusers' scheduler on its trailing grid of ``steps``, visiting ``timesteps``; [B, C, T, H, W] in and out."""
    import diffusers

    schedule = model.model.spec.schedule
    scheduler = getattr(diffusers, name)(
        beta_start=schedule.beta_start, beta_end=schedule.beta_end, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, snr_shift_scale=schedule.snr_shift_scale,
        timestep_spacing="trailing")
    scheduler.set_timesteps(steps or len(timesteps))
    old = None
    for i, t in enumerate(timesteps):
        s = scale(t) if callable(scale) else scale
        v = velocity(model, prompts, x, t, s).transpose(1, 2)
        back = [timesteps[i - 1] if i else None] if name.endswith("DPMScheduler") else []
        if back:
            x, old = scheduler.step(v, old, t, back[0], x.transpose(1, 2), generator=generator)
        else:
            x = scheduler.step(v, t, x.transpose(1, 2), return_dict=False)[0]
        x = after_step(i, x.transpose(1, 2))
    return x


def by_formula(model, prompts, timesteps, x):
    """DDIM (Song 2021, eq. 12) in alpha space from each listed timestep to the next: for lists that are no grid."""
    from diffusers import CogVideoXDDIMScheduler

    schedule = model.model.spec.schedule
    alphas = CogVideoXDDIMScheduler(
        beta_start=schedule.beta_start, beta_end=schedule.beta_end, beta_schedule="scaled_linear",
        rescale_betas_zero_snr=True, snr_shift_scale=schedule.snr_shift_scale).alphas_cumprod
    for t, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        a = alphas[t]
        b = torch.tensor(1.0, dtype=a.dtype) if following is None else alphas[following]
        v = velocity(model, prompts, x, t)
        x0 = a.sqrt() * x - (1 - a).sqrt() * v
        epsilon = a.sqrt() * v + (1 - a).sqrt() * x
        x = b.sqrt() * x0 + (1 - b).sqrt() * epsilon
    return x.float()


def run(model, prompts, sampler, sigmas, noise, latent=None, mask=None, seed=0):
    """Through ComfyUI's sampling, [B, C, T, H, W]; the result is scaled back to model space."""
    latent = torch.zeros_like(noise) if latent is None else latent
    out = comfy.sample.sample_custom(model, noise, CFG, adapter.sampler_object(sampler), sigmas, prompts[0], prompts[1],
                                     latent, noise_mask=mask, seed=seed, disable_pbar=True)
    return model.model.process_latent_in(out)


@pytest.mark.parametrize("steps", [10, 30, 48])
def test_ddim_equals_diffusers(model, prompts, steps, error):
    sigmas = adapter.make_sigmas(model, steps, "trailing")
    noise = noise_of(0)
    expected = by_hand(model, prompts, adapter.trailing_timesteps(steps), noise, steps=steps)
    assert error(run(model, prompts, "cogvideox_ddim", sigmas, noise), expected) <= 1e-4


def test_dpm_equals_diffusers_with_the_same_draws(model, prompts, error):
    sigmas = adapter.make_sigmas(model, 10, "trailing")
    noise = noise_of(0)
    expected = by_hand(model, prompts, adapter.trailing_timesteps(10), noise, "CogVideoXDPMScheduler",
                       generator=torch.Generator().manual_seed(7))
    assert error(run(model, prompts, "cogvideox_dpm", sigmas, noise, seed=7), expected) <= 1e-4


def test_batch_equals_diffusers(model, prompts, error):
    noise = noise_of(0, (2, *SHAPE[1:]))
    sigmas = adapter.make_sigmas(model, 4, "trailing")
    expected = by_hand(model, prompts, adapter.trailing_timesteps(4), noise)
    assert error(run(model, prompts, "cogvideox_ddim", sigmas, noise), expected) <= 1e-4


@pytest.mark.parametrize("name", ["cogvideox_ddim", "cogvideox_dpm"])
def test_denoise_equals_diffusers(model, prompts, name, error):
    """Strength 0.6 of 10 steps: the last 6, noise added at the first of them, as in video to video."""
    noise, latent = noise_of(0), latent_of(1)
    scaled = model.model.process_latent_in(latent)
    timesteps = adapter.trailing_timesteps(10)[-6:]
    alpha = 1 / (model.model.model_sampling.sigmas[timesteps[0]] ** 2 + 1)
    start = alpha.sqrt() * scaled + (1 - alpha).sqrt() * noise
    scheduler = "CogVideoXDPMScheduler" if name.endswith("dpm") else "CogVideoXDDIMScheduler"
    generator = torch.Generator().manual_seed(3)
    expected = by_hand(model, prompts, timesteps, start, scheduler, steps=10, generator=generator)
    out = run(model, prompts, name, adapter.make_sigmas(model, 10, "trailing", denoise=0.6), noise, latent, seed=3)
    assert error(out, expected) <= 1e-4


def test_explicit_timesteps(model, prompts, error):
    sigmas = adapter.make_sigmas(model, 50, "trailing", timesteps="999,856,665,399")
    noise = noise_of(0)
    expected = by_formula(model, prompts, [999, 856, 665, 399], noise)
    assert error(run(model, prompts, "cogvideox_ddim", sigmas, noise), expected) <= 1e-4


@pytest.mark.parametrize("steps, split", [(10, 1), (10, 4), (10, 9), (30, 15), (48, 20)])
def test_split_sigmas(model, prompts, steps, split, error):
    """Two runs, the second without noise, equal one run; also where 1000/n is not whole."""
    sigmas = adapter.make_sigmas(model, steps, "trailing")
    noise = noise_of(0)
    expected = by_hand(model, prompts, adapter.trailing_timesteps(steps), noise, steps=steps)
    half = run(model, prompts, "cogvideox_ddim", sigmas[:split + 1], noise)
    half = model.model.process_latent_out(half)
    out = run(model, prompts, "cogvideox_ddim", sigmas[split:], torch.zeros_like(noise), half)
    assert error(out, expected) <= 1e-4


@pytest.mark.parametrize("name", ["cogvideox_ddim", "cogvideox_dpm"])
def test_short_tail_of_a_known_schedule(model, prompts, name, error):
    """The last two of 53 steps are also the last two of 52: the node says which."""
    noise, latent = noise_of(0), latent_of(1)
    timesteps = adapter.trailing_timesteps(53)[-2:]
    alpha = 1 / (model.model.model_sampling.sigmas[timesteps[0]] ** 2 + 1)
    start = alpha.sqrt() * model.model.process_latent_in(latent) + (1 - alpha).sqrt() * noise
    scheduler = "CogVideoXDPMScheduler" if name.endswith("dpm") else "CogVideoXDDIMScheduler"
    generator = torch.Generator().manual_seed(0)
    expected = by_hand(model, prompts, timesteps, start, scheduler, steps=53, generator=generator)
    sigmas = adapter.make_sigmas(model, 53, "trailing", denoise=0.04)
    out = comfy.sample.sample_custom(model, noise, CFG, adapter.sampler_object(name, 53), sigmas, *prompts, latent,
                                     seed=0, disable_pbar=True)
    assert error(model.model.process_latent_in(out), expected) <= 1e-4


@pytest.mark.parametrize("values", [[100.0, 500.0, 0.0], [900.0, 200.0, 500.0], [900.0, 0.0, 500.0, 0.0]])
def test_rising_sigmas_are_refused(model, prompts, values):
    from cogx.models.specs import SpecError

    with pytest.raises(SpecError, match="SIGMAS rise"):
        run(model, prompts, "cogvideox_ddim", torch.tensor(values), noise_of(0))


def test_one_sigma_only_adds_its_noise(model, prompts, error):
    """As core's samplers do."""
    sigmas = model.model.model_sampling.sigmas[[500]].cpu()
    ours, core = (run(model, prompts, name, sigmas, noise_of(0), latent_of(1)) for name in ("cogvideox_ddim", "euler"))
    assert error(ours, core) <= 1e-5


@pytest.mark.parametrize("sampler", ["dpm_2", "uni_pc", "euler", "cogvideox_ddim"])
@pytest.mark.parametrize("steps, denoise, kept", [(50, 0.02, 1), (10, 0.1, 1), (10, 0.5, 5), (10, 1.0, 10)])
def test_steps_that_run(model, sampler, steps, denoise, kept):
    assert len(adapter.make_sampler_sigmas(model, sampler, steps, "trailing", denoise)) == kept + 1


def test_mask(model, prompts, error):
    """Outside the mask the video stays; inside, each step sees the known part at its noise level."""
    noise, latent = noise_of(0), latent_of(1)
    scaled = model.model.process_latent_in(latent)
    mask = torch.zeros(1, 1, 5, 8, 12)
    mask[..., 4:] = 1
    timesteps = adapter.trailing_timesteps(10)
    sigmas = model.model.model_sampling.sigmas

    def known(t):
        alpha = 1 / (sigmas[t] ** 2 + 1)
        return alpha.sqrt() * scaled + (1 - alpha).sqrt() * noise

    from diffusers import CogVideoXDDIMScheduler

    schedule = model.model.spec.schedule
    scheduler = CogVideoXDDIMScheduler(
        beta_start=schedule.beta_start, beta_end=schedule.beta_end, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing",
        snr_shift_scale=schedule.snr_shift_scale)
    scheduler.set_timesteps(10)
    x = noise
    for t in timesteps:
        seen = x * mask + known(t) * (1 - mask)
        alpha = scheduler.alphas_cumprod[t]
        v = velocity(model, prompts, seen, t)
        x0 = (alpha.sqrt() * seen - (1 - alpha).sqrt() * v) * mask + scaled * (1 - mask)
        v = ((alpha.sqrt() * x - x0) / (1 - alpha).sqrt()).float()
        x = scheduler.step(v, t, x, return_dict=False)[0]
    out = run(model, prompts, "cogvideox_ddim", adapter.make_sigmas(model, 10, "trailing"), noise, latent, mask)
    assert error(out, x) <= 1e-4
    assert error(out[..., :4], scaled[..., :4]) <= 1e-5


@pytest.mark.parametrize("name", ["cogvideox_ddim", "cogvideox_dpm"])
def test_dynamic_guidance(model, prompts, name, error):
    patched = adapter.with_dynamic_guidance(model, 10)
    noise = noise_of(0)
    scheduler = "CogVideoXDPMScheduler" if name.endswith("dpm") else "CogVideoXDDIMScheduler"
    expected = by_hand(model, prompts, adapter.trailing_timesteps(10), noise, scheduler,
                       generator=torch.Generator().manual_seed(0), scale=lambda t: dynamic_guidance(CFG, t, 10))
    out = run(patched, prompts, name, adapter.make_sigmas(model, 10, "trailing"), noise)
    assert error(out, expected) <= 1e-4
    plain = by_hand(model, prompts, adapter.trailing_timesteps(10), noise)
    unpatched = run(model, prompts, "cogvideox_ddim", adapter.make_sigmas(model, 10, "trailing"), noise)
    assert error(unpatched, plain) <= 1e-4


def core_ksampler(model, prompts, sampler, schedule, steps, noise):
    out = comfy.sample.sample(model, noise, steps, CFG, sampler, schedule, prompts[0], prompts[1],
                              torch.zeros_like(noise), seed=0, disable_pbar=True)
    return model.model.process_latent_in(out)


def test_core_ksampler_ddim_simple(model, prompts, error):
    noise = noise_of(0)
    expected = by_hand(model, prompts, adapter.trailing_timesteps(10), noise)
    assert error(core_ksampler(model, prompts, "ddim", "simple", 10, noise), expected) <= 1e-3


def test_core_ksampler_converges(model, prompts, error):
    noise = noise_of(0)
    expected = by_hand(model, prompts, adapter.trailing_timesteps(1000), noise)
    errors = [error(core_ksampler(model, prompts, "euler", "normal", steps, noise), expected) for steps in (25, 200)]
    assert errors[1] < errors[0] / 4, errors


@pytest.mark.parametrize("variant", ["1.5-5B", "1.5-5B-I2V"])
def test_padding_frames(tiny_pipelines, variant, error):
    """Five latent frames of 1.5 are sampled as six, the padding's noise in front, and five come out."""
    from cogx.models.cogvideox.outer_sample import padding_noise

    model = load_model(str(tiny_pipelines / variant / "transformer"))
    positive, negative = torch.randn(2, 1, 224, 32, generator=torch.Generator().manual_seed(5))
    network, seen = model.model.diffusion_model, []
    noise = noise_of(0)
    padding = padding_noise(noise, 1, 3)
    assert not torch.equal(padding, noise[:, :, :1])

    def callback(step, x0, x, total):
        seen.append((tuple(x0.shape), tuple(x.shape)))

    image = {}
    if model.model.spec.takes_image:
        image = {"concat_latent_image": condition_latent(5, latent_of(8)[:, :, :1], None), "cogx_reference": "authors"}
    out = comfy.sample.sample_custom(
        model, noise, CFG, adapter.sampler_object("cogvideox_ddim"), adapter.make_sigmas(model, 4, "trailing"),
        [[positive, image]], [[negative, image]], torch.zeros_like(noise), seed=3, disable_pbar=True,
        callback=callback)
    assert out.shape == noise.shape and set(seen) == {(SHAPE, SHAPE)}

    ofs = torch.full((1,), 2.0) if network.spec.ofs_embed_dim else None

    class Wrapped:
        class model:
            spec = model.model.spec

            @staticmethod
            def diffusion_model(x, t, context):
                condition = x.new_zeros(x.shape[0], 16 if image else 0, *x.shape[2:])
                if image:  # on the padding frame
                    condition[:, :, :1] = latent_of(8)[:, :, :1]
                return network(torch.cat([x, condition], dim=1), t, context, ofs=ofs)

    expected = by_hand(Wrapped, ([[positive, {}]], [[negative, {}]]), adapter.trailing_timesteps(4),
                       torch.cat([padding, noise], dim=2))
    assert error(model.model.process_latent_in(out), expected[:, :, 1:]) <= 1e-4


@pytest.mark.parametrize("variant", ["5B", "1.5-5B"])
def test_videos_of_a_batch_are_those_of_single_runs(tiny_pipelines, variant, error):
    model = load_model(str(tiny_pipelines / variant / "transformer"))
    tokens = model.model.spec.text_tokens
    positive, negative = torch.randn(2, 1, tokens, 32, generator=torch.Generator().manual_seed(5))
    prompts, noise = ([[positive, {}]], [[negative, {}]]), noise_of(0, (3, *SHAPE[1:]))
    sigmas = adapter.make_sigmas(model, 4, "trailing")
    batch = run(model, prompts, "cogvideox_ddim", sigmas, noise, seed=3)
    for i in range(3):
        single = run(model, prompts, "cogvideox_ddim", sigmas, noise[i:i + 1], seed=3)
        assert error(batch[i:i + 1], single) <= 1e-5


@pytest.mark.parametrize("schedule", [name for name in adapter.schedule_names() if name != "ddim_uniform"])
def test_schedules_start_at_the_top_and_are_not_degenerate(model, schedule):
    sigmas = adapter.make_sigmas(model, 10, schedule)
    assert len(sigmas) == 11 and sigmas[-1] == 0
    assert math.isclose(float(sigmas[0]), float(model.model.model_sampling.sigma_max), rel_tol=1e-3)
    assert all(a > b for a, b in pairwise(sigmas))
    timesteps = model.model.model_sampling.timestep(sigmas[:-1])
    # Core's karras and linear_quadratic spend six and ten of ten steps there, where all is noise.
    assert int((timesteps >= 967).sum()) <= 4 and timesteps[-1] < 500, timesteps


@pytest.mark.parametrize("schedule", adapter.schedule_names())
def test_one_step_starts_at_full_noise(model, schedule):
    sigmas = adapter.make_sigmas(model, 1, schedule)
    assert sigmas.tolist() == [float(model.model.model_sampling.sigma_max), 0.0]


def test_samplers_are_all_of_core():
    assert adapter.sampler_names()[2:] == comfy.samplers.KSampler.SAMPLERS
    assert "cogvideox_ddim" in adapter.sampler_names()
    assert "sample" in dict(inspect.getmembers(adapter.sampler_object("euler")))
