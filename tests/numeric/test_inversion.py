"""DDIM inversion against diffusers: its inverse scheduler, its transformer with the CogVideo repository's attention."""

from __future__ import annotations

import uuid
from typing import Any

import comfy.model_management
import comfy.samplers
import pytest
import torch
import torch.nn.functional as F
from cogx.model_loaders.load import load_model
from cogx.models.specs import SpecError
from cogx.samplers import adapter
from cogx.samplers.inversion import InvertedNoise, Trajectory
from comfy.patcher_extension import WrappersMP

SHAPE = (1, 16, 5, 8, 12)
VARIANTS = ["2B", "5B", "1.5-5B", "1.5-5B-I2V"]


@pytest.fixture(scope="module", params=["5B"])
def model(request, tiny_pipelines):
    return load_model(str(tiny_pipelines / request.param / "transformer"))


each_variant = pytest.mark.parametrize("model", VARIANTS, indirect=True)


def prompts_of(model) -> tuple[list, list]:
    tokens = model.model.spec.text_tokens
    positive, negative = torch.randn(2, 1, tokens, 32, generator=torch.Generator().manual_seed(5))
    options = {"concat_latent_image": torch.zeros(SHAPE)} if model.model.spec.transformer.condition_channels else {}
    return [[positive, options]], [[negative, options]]


def video_of(seed: int, shape=SHAPE) -> dict[str, torch.Tensor]:
    """An encoded video as a LATENT: unscaled."""
    return {"samples": torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 1.3}


def padded(model, latent: dict[str, torch.Tensor]) -> torch.Tensor:
    """The video that the network sees: scaled, with the padding frames of 1.5."""
    x = model.model.process_latent_in(latent["samples"])
    return torch.cat([x[:, :, :1]] * model.model.spec.padding_frames(x.shape[2]) + [x], dim=2)


def velocity(model, x: torch.Tensor, timestep: int, prompt) -> torch.Tensor:
    network, spec = model.model.diffusion_model, model.model.spec.transformer
    x = torch.cat([x, x.new_zeros(x.shape[0], spec.condition_channels, *x.shape[2:])], dim=1)
    ofs = torch.full((x.shape[0],), 2.0) if spec.ofs_embed_dim else None
    return network(x, torch.full((x.shape[0],), float(timestep)), prompt[0][0].expand(x.shape[0], -1, -1), ofs=ofs)


def ddim_scheduler(model, cls: str) -> Any:
    import diffusers

    schedule = model.model.spec.schedule
    config = {"beta_start": schedule.beta_start, "beta_end": schedule.beta_end, "beta_schedule": "scaled_linear",
              "clip_sample": False, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
              "timestep_spacing": "trailing"}
    exact = diffusers.CogVideoXDDIMScheduler(**config, snr_shift_scale=schedule.snr_shift_scale)
    if cls == "CogVideoXDDIMScheduler":
        return exact
    scheduler = getattr(diffusers, cls)(**config)
    scheduler.alphas_cumprod = exact.alphas_cumprod  # it does not know the SNR shift, and rounds its own table
    return scheduler


def inverted_by_hand(model, latent, steps: int) -> list[torch.Tensor]:
    """diffusers' inverse scheduler; [B, C, T, H, W] after each step."""
    scheduler = ddim_scheduler(model, "DDIMInverseScheduler")
    scheduler.set_timesteps(steps)
    x, videos = padded(model, latent), []
    for t in scheduler.timesteps.tolist():
        v = velocity(model, x, t, prompts_of(model)[0])
        videos.append(x := scheduler.step(v, t, x, return_dict=False)[0].float())
    return videos


def sampled_by_hand(model, x: torch.Tensor, steps: int, start: int = 0, cfg: float = 1.0) -> torch.Tensor:
    """diffusers' DDIM over the trailing grid from its step ``start``."""
    positive, negative = prompts_of(model)
    scheduler = ddim_scheduler(model, "CogVideoXDDIMScheduler")
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps[start:].tolist():
        v = velocity(model, x, t, positive)
        if cfg != 1:
            uncond = velocity(model, x, t, negative)
            v = uncond + cfg * (v - uncond)
        x = scheduler.step(v, t, x, return_dict=False)[0].float()
    return x


def run(model, noise: Any, latent, sigmas, sampler="cogvideox_ddim", cfg=1.0, callback=None) -> torch.Tensor:
    """As SamplerCustomAdvanced does it; the result is scaled back to the model's space."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*prompts_of(model))
    guider.set_cfg(cfg)
    out = guider.sample(noise.generate_noise(latent), latent["samples"], adapter.sampler_object(sampler), sigmas,
                        callback=callback, disable_pbar=True, seed=noise.seed)
    return model.model.process_latent_in(out)


class RandomNoise:
    seed = 3

    def generate_noise(self, latent) -> torch.Tensor:
        return torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(self.seed))


def inverted(model, latent, steps: int, features: bool = False) -> tuple[Any, InvertedNoise, Trajectory]:
    trajectory = adapter.invert(model, prompts_of(model)[0], latent, steps)
    return adapter.with_reference_video(model, trajectory, features), InvertedNoise(trajectory), trajectory


@each_variant
@pytest.mark.parametrize("steps", [4, 30])
def test_inversion_equals_diffusers(model, steps, error):
    """Every video on the way, the padding frames of 1.5 included."""
    latent = video_of(1)
    _, _, trajectory = inverted(model, latent, steps)
    assert torch.equal(trajectory.videos[0], padded(model, latent))
    for ours, theirs in zip(trajectory.videos[1:], inverted_by_hand(model, latent, steps), strict=True):
        assert error(ours, theirs) <= 1e-4


@each_variant
def test_sampling_begins_on_the_inverted_noise(model, error):
    """With and without our MODEL; guidance, and the padding noise of 1.5 (which does not come from the seed)."""
    latent = video_of(1)
    patched, noise, trajectory = inverted(model, latent, 4)
    expected = sampled_by_hand(model, trajectory.noise, 4, cfg=6.0)[:, :, trajectory.padding:]
    sigmas = adapter.make_sigmas(model, 4, "trailing")
    for target in (patched, model):
        assert error(run(target, noise, latent, sigmas, cfg=6.0), expected) <= 1e-4


@each_variant
@pytest.mark.parametrize("denoise, sampler", [(0.5, "cogvideox_ddim"), (0.5, "euler"), (0.2, "cogvideox_ddim")])
def test_denoise_begins_on_the_trajectory(model, denoise, sampler, error):
    latent = video_of(1)
    patched, noise, trajectory = inverted(model, latent, 10)
    skipped = 10 - int(10 * denoise)
    start = adapter.trailing_timesteps(10)[skipped]
    expected = sampled_by_hand(model, trajectory.at(start), 10, skipped)[:, :, trajectory.padding:]
    sigmas = adapter.make_sigmas(model, 10, "trailing", denoise)
    assert error(run(patched, noise, latent, sigmas, sampler), expected) <= 1e-4
    assert error(run(model, noise, latent, sigmas, sampler), expected) > 1e-2, "the MODEL did nothing"


@each_variant
def test_round_trip_comes_closer_with_more_steps(model, error):
    latent = video_of(1)
    errors = []
    for steps in (5, 20, 80):
        patched, noise, _ = inverted(model, latent, steps)
        out = run(patched, noise, latent, adapter.make_sigmas(model, steps, "trailing"))
        errors.append(error(out, model.model.process_latent_in(latent["samples"])))
    assert errors[0] > 2 * errors[1] > 4 * errors[2], errors


def test_videos_of_a_batch_are_those_of_single_runs(model, error):
    latent = video_of(1, (3, *SHAPE[1:]))
    sigmas = adapter.make_sigmas(model, 4, "trailing")
    patched, noise, trajectory = inverted(model, latent, 4, features=True)
    batch = run(patched, noise, latent, sigmas, cfg=6.0)
    for i in range(3):
        one = {"samples": latent["samples"][i:i + 1]}
        patched, noise, alone = inverted(model, one, 4, features=True)
        assert error(trajectory.noise[i:i + 1], alone.noise) <= 1e-5
        assert error(batch[i:i + 1], run(patched, noise, one, sigmas, cfg=6.0)) <= 1e-4


class ReferenceProcessor:
    """Attention processor for diffusers' transformer: in a batch of [videos, references] the videos also attend to the
    keys and values of their references. Rules: the CogVideo repository's inference/ddim_inversion.py."""

    def __call__(self, attn, hidden_states, encoder_hidden_states, attention_mask=None, image_rotary_emb=None):
        from diffusers.models.embeddings import apply_rotary_emb

        text = encoder_hidden_states.shape[1]
        joint = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        q, k, v = (layer(joint).unflatten(2, (attn.heads, -1)).transpose(1, 2)
                   for layer in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        if image_rotary_emb is not None:
            q, k = (torch.cat([t[:, :, :text], apply_rotary_emb(t[:, :, text:], image_rotary_emb)], dim=2)
                    for t in (q, k))
        outs = []
        for i in range(q.shape[0]):
            half = q.shape[0] // 2
            seen = [i, i + half] if i < half else [i]
            keys, values = (torch.cat([t[j] for j in seen], dim=1) for t in (k, v))
            outs.append(F.scaled_dot_product_attention(q[i:i + 1], keys[None], values[None]))
        out = attn.to_out[0](torch.cat(outs).transpose(1, 2).flatten(2))
        return out[:, text:], out[:, :text]


def features_by_hand(folder, model, trajectory, x: torch.Tensor, steps: int, cfg: float) -> torch.Tensor:
    """The sampling loop of that script: [uncond, cond, reference, reference] through diffusers' transformer."""
    from diffusers import CogVideoXTransformer3DModel
    from diffusers.models.embeddings import get_3d_rotary_pos_embed

    network = CogVideoXTransformer3DModel.from_pretrained(folder / "transformer")
    for block in network.transformer_blocks:
        block.attn1.set_processor(ReferenceProcessor())
    config, spec = network.config, model.model.spec.transformer
    frames, rows, columns = x.shape[2] // spec.temporal_patch, x.shape[3] // 2, x.shape[4] // 2
    rotary = None
    if spec.use_rotary_positional_embeddings and spec.patch_size_t:
        rotary = get_3d_rotary_pos_embed(config.attention_head_dim, None, (rows, columns), frames, grid_type="slice",
                                         max_size=(config.sample_height // 2, config.sample_width // 2))
    elif spec.use_rotary_positional_embeddings:
        rotary = get_3d_rotary_pos_embed(config.attention_head_dim, ((0, 0), (rows, columns)), (rows, columns), frames)
    positive, negative = prompts_of(model)
    text = torch.cat([negative[0][0], positive[0][0]]).repeat(2, 1, 1)
    scheduler = ddim_scheduler(model, "CogVideoXDDIMScheduler")
    scheduler.set_timesteps(steps)
    x = x.transpose(1, 2)  # bcthw -> btchw
    for i, t in enumerate(scheduler.timesteps.tolist()):
        reference = trajectory.videos[-1 - i].transpose(1, 2)
        batch = torch.cat([x, x, reference, reference])
        batch = torch.cat([batch, batch.new_zeros(*batch.shape[:2], spec.condition_channels, *batch.shape[3:])], dim=2)
        ofs = torch.full((1,), 2.0) if spec.ofs_embed_dim else None
        out = network(batch, text, torch.full((4,), t), ofs=ofs, image_rotary_emb=rotary, return_dict=False)[0]
        uncond, cond = out[:2].split(1)
        x = scheduler.step(uncond + cfg * (cond - uncond), t, x, return_dict=False)[0].float()
    return x.transpose(1, 2)  # btchw -> bcthw


@each_variant
@pytest.mark.parametrize("random", [False, True], ids=["inverted noise", "random noise"])
def test_features_equal_diffusers(model, tiny_pipelines, random, error):
    """From the inverted noise, and from random noise as that script does it."""
    latent, steps, cfg = video_of(1), 4, 6.0
    patched, noise, trajectory = inverted(model, latent, steps, features=True)
    noise = RandomNoise() if random else noise
    start = noise.generate_noise(latent)
    if start.shape[2] != trajectory.noise.shape[2]:
        from cogx.models.cogvideox.outer_sample import padding_noise

        start = torch.cat([padding_noise(start, 1, noise.seed), start], dim=2)
    folder = tiny_pipelines / model.model.spec.name
    expected = features_by_hand(folder, model, trajectory, start, steps, cfg)[:, :, trajectory.padding:]
    sigmas = adapter.make_sigmas(model, steps, "trailing")
    assert error(run(patched, noise, latent, sigmas, cfg=cfg), expected) <= 1e-5
    assert error(run(model, noise, latent, sigmas, cfg=cfg), expected) > 1e-3, "the features did nothing"


def test_what_the_network_gets_with_features(model):
    """The condition of an image model beside both; names that patches and caches go by; another node's attention."""
    _, _, trajectory = inverted(model, video_of(1, (2, *SHAPE[1:])), 2)
    x, names, calls = torch.randn(4, 32, *SHAPE[2:]), [uuid.uuid4(), uuid.uuid4()], []

    def executor(*args: Any) -> torch.Tensor:
        calls.append(args)
        return args[0][:, :16]

    def override(attention: Any, *tensors: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        calls.append(attention)
        return tensors[0]

    options = {"cond_or_uncond": [1, 0], "uuids": names, "optimized_attention_override": override, "kept": 1}
    timestep, context, ofs = torch.full((4,), 999.0), torch.randn(4, 3, 2), torch.full((1,), 2.0)
    out = adapter._forward_beside(trajectory, executor, x, timestep, context, ofs, None, options)
    batch, timesteps, contexts, both_ofs, _, given = calls[0]
    assert torch.equal(out, x[:, :16]) and torch.equal(batch[:4], x)
    assert torch.equal(batch[4:, :16], trajectory.noise.repeat(2, 1, 1, 1, 1)), "video i beside video i"
    assert torch.equal(batch[4:, 16:], x[:, 16:])
    assert timesteps.tolist() == [999.0] * 8 and both_ofs.tolist() == [2.0] * 8
    assert torch.equal(contexts, torch.cat([context, context]))
    assert given["cond_or_uncond"] == [1, 0, 1, 0] and given["kept"] == 1 and options["uuids"] == names
    assert given["uuids"][:2] == names and len(set(given["uuids"])) == 4
    q = torch.randn(2, 3, 4)
    assert torch.equal(given["optimized_attention_override"]("host", q, q, q), q) and calls[1:] == ["host", "host"]


def with_windows(model, freenoise: bool = False):
    """Core's context windows of three frames."""
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    return ContextWindowsManualNode.execute(
        model, context_length=3, context_overlap=1, context_schedule="standard_static", context_stride=1,
        closed_loop=False, fuse_method="pyramid", dim=2, freenoise=freenoise).result[0]


def test_features_of_a_part_are_refused(model):
    """A context window sees some of the frames."""
    windowed = with_windows(model)
    latent, sigmas = video_of(1), adapter.make_sigmas(model, 2, "trailing")
    patched, noise, _ = inverted(windowed, latent, 2)
    assert torch.isfinite(run(patched, noise, latent, sigmas)).all()
    patched, noise, _ = inverted(windowed, latent, 2, features=True)
    with pytest.raises(SpecError, match=r"expected the whole video \[5, 8, 12\] .*got a part of it, \[3, 8, 12"):
        run(patched, noise, latent, sigmas)


@pytest.mark.parametrize("after", [False, True])
def test_freenoise_of_inverted_noise_is_refused(model, after):
    """Context windows before or after the inversion. They may shuffle other noise."""
    latent, sigmas = video_of(1), adapter.make_sigmas(model, 2, "trailing")
    patched, noise, _ = inverted(model if after else with_windows(model, freenoise=True), latent, 2)
    if after:
        patched = with_windows(patched, freenoise=True)
    with pytest.raises(SpecError, match=r"freenoise: expected it off.*got it on.*Turn freenoise off"):
        run(patched, noise, latent, sigmas)
    assert torch.isfinite(run(patched, RandomNoise(), latent, sigmas)).all()


@pytest.mark.parametrize("sampler, schedule", [("cogvideox_ddim", "trailing"), ("euler", "normal"), ("dpm_2", "beta")])
def test_features_at_timesteps_that_the_inversion_did_not_visit(model, sampler, schedule, error):
    """The reference lies on the way between two of its steps: close to that of an inversion in many steps."""
    latent = video_of(1)
    sigmas = adapter.make_sigmas(model, 7, schedule)
    (few, _, _), (many, _, _) = (inverted(model, latent, steps, features=True) for steps in (50, 200))
    first, second = (run(m, RandomNoise(), latent, sigmas, sampler, cfg=6.0) for m in (few, many))
    plain = run(model, RandomNoise(), latent, sigmas, sampler, cfg=6.0)
    assert error(first, second) < 0.2 * error(plain, second), (error(first, second), error(plain, second))


def test_nothing_is_left_behind(model):
    """The model that went in samples as before, also after an interrupted inversion; nothing is an inference tensor."""
    latent, sigmas = video_of(1), adapter.make_sigmas(model, 2, "trailing")
    before, wrappers = run(model, RandomNoise(), latent, sigmas), repr(model.wrappers)
    attributes = {name: set(vars(module)) for name, module in model.model.named_modules()}
    patched, noise, trajectory = inverted(model, latent, 2, features=True)
    run(patched, noise, latent, sigmas, cfg=6.0)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        interrupted_inversion(model, latent)
    assert not any(video.is_inference() for video in trajectory.videos)
    assert repr(model.wrappers) == wrappers
    assert {name: set(vars(module)) for name, module in model.model.named_modules()} == attributes
    assert torch.equal(run(model, RandomNoise(), latent, sigmas), before)


def interrupted_inversion(model, latent) -> None:
    steps: list[int] = []
    network, original = model.model.diffusion_model, type(model.model.diffusion_model)._forward

    def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
        steps.append(1)
        comfy.model_management.interrupt_current_processing(True)
        return original(network, *args, **kwargs)

    network._forward = forward
    try:
        adapter.invert(model, prompts_of(model)[0], latent, 5)
    finally:
        comfy.model_management.interrupt_current_processing(False)
        del network._forward
        assert len(steps) == 1, "it went on after the interrupt"


def test_a_second_inversion_replaces_the_first(model):
    """Inverting with the MODEL of an earlier inversion does not attend to the earlier video."""
    patched, _, _ = inverted(model, video_of(1), 2, features=True)
    again, _, trajectory = inverted(patched, video_of(2), 2)
    _, _, expected = inverted(model, video_of(2), 2)
    assert torch.equal(trajectory.noise, expected.noise)
    assert len(again.get_wrappers(WrappersMP.OUTER_SAMPLE, adapter.INVERSION_KEY)) == 1
    assert not again.get_wrappers(WrappersMP.DIFFUSION_MODEL, adapter.INVERSION_KEY)


@pytest.mark.parametrize("features", [False, True])
def test_step_caches_act_in_the_sampling_only(model, features, error):
    """Core's EasyCache before the inversion: it fails on rising noise levels, and would bend the way up."""
    from comfy_extras.nodes_easycache import EasyCacheNode

    latent, sigmas = video_of(1), adapter.make_sigmas(model, 12, "trailing")
    cached = EasyCacheNode.execute(model, 2.0, 0.15, 0.95, False).result[0]
    plain, noise, expected = inverted(model, latent, 12, features)
    patched, _, trajectory = inverted(cached, latent, 12, features)
    assert torch.equal(trajectory.noise, expected.noise)
    difference = error(run(patched, noise, latent, sigmas, cfg=6.0), run(plain, noise, latent, sigmas, cfg=6.0))
    assert 1e-6 < difference < 1, difference


def test_features_ask_for_the_memory_of_twice_the_videos(model, monkeypatch):
    """Both when room is made before the run and when the batch is planned."""
    shapes: list[int] = []
    inner, original = model.model, model.model.memory_required
    monkeypatch.setattr(inner, "memory_required", lambda shape, **kwargs: shapes.append(shape[0]) or original(shape))
    latent = video_of(1)
    patched, noise, _ = inverted(model, latent, 1, features=True)
    shapes.clear()
    run(model, noise, latent, adapter.make_sigmas(model, 1, "trailing"), cfg=6.0)
    plain = len(shapes)
    run(patched, noise, latent, adapter.make_sigmas(model, 1, "trailing"), cfg=6.0)
    assert plain and shapes[plain:] == [2 * batch for batch in shapes[:plain]]


def test_empty_latent_is_refused(model):
    with pytest.raises(SpecError, match=r"latent_image is empty .*expected an encoded video.*Connect 'CogVideoX Video"):
        inverted(model, {"samples": torch.zeros(SHAPE)}, 2)


@pytest.mark.parametrize("model", ["5B", "1.5-5B"], indirect=True)
def test_more_than_the_free_ram_is_refused(model, monkeypatch):
    """Before the first step. The padding frame of 1.5 counts too."""
    kept = (2 + 1) * padded(model, video_of(1)).numel() * 4
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: kept - 1)
    with pytest.raises(SpecError, match=r"2 inversion steps: expected at most 0\.0 GB, the free RAM.*Use fewer steps"):
        adapter.invert(model, prompts_of(model)[0], video_of(1), 2)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: kept)
    adapter._check_ram(padded(model, video_of(1)).numel(), 2)


def test_much_ram_is_logged(monkeypatch, caplog):
    values = 16 * 22 * 96 * 170  # 1.5, 81 frames, 1360x768
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: 8e9)
    with caplog.at_level("INFO", logger="cogx"):
        adapter._check_ram(values, 4)
        assert not caplog.messages
        adapter._check_ram(values, 50)
    assert caplog.messages == ["CogVideoX Inversion: keeps 1.2 GB in RAM, 8.0 GB are free."]
    with pytest.raises(SpecError, match=r"expected at most 8\.0 GB.*got 23\.0\. "):
        adapter._check_ram(values, 1000)


def test_latent_of_another_shape_is_refused(model):
    patched, noise, _ = inverted(model, video_of(1), 2, features=True)
    other, sigmas = video_of(1, (1, 16, 3, 8, 12)), adapter.make_sigmas(model, 2, "trailing")
    for source in (noise, RandomNoise()):
        with pytest.raises(SpecError, match=r"inverted video has the shape \[1, 16, 5, 8, 12\] .*\[1, 16, 3, 8, 12\]"):
            run(patched, source, other, sigmas)


def test_noise_of_another_model_is_refused(model, tiny_pipelines):
    """The noise of 1.5 has a frame more than a 1.0 model samples."""
    padded_model = load_model(str(tiny_pipelines / "1.5-5B" / "transformer"))
    _, noise, _ = inverted(padded_model, video_of(1), 1)
    with pytest.raises(SpecError, match=r"The noise has 6 frames, the latent 5: expected the same"):
        run(model, noise, video_of(1), adapter.make_sigmas(model, 1, "trailing"))


def test_another_model_is_refused():
    with pytest.raises(SpecError, match="Expected a CogVideoX MODEL, got object"):
        adapter.invert(object(), [], video_of(1), 2)
