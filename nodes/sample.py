"""Sampling nodes."""

from __future__ import annotations

from comfy_api.latest import io

from ..samplers.schedules import parse_timesteps
from .validation import problem_of

CATEGORY = "CogVideoX/sampling"

_SAMPLER_TIP = ("cogvideox_ddim and cogvideox_dpm are the two samplers of the reference, exact; the others are "
                "ComfyUI's own.")
_SCHEDULE_TIP = ("trailing is the schedule of the reference. The others are ComfyUI's own; karras, exponential and "
                 "linear_quadratic are repaired for CogVideoX's zero terminal SNR.")
_DENOISE_TIP = ("Strength, as in diffusers: the last int(steps * denoise) of the steps run. 1 for text to video, less "
                "to keep some of the latent's video.")


def sampler_input() -> io.Combo.Input:
    from ..samplers.adapter import sampler_names

    return io.Combo.Input("sampler", options=sampler_names(), default="cogvideox_ddim", tooltip=_SAMPLER_TIP)


def schedule_input() -> io.Combo.Input:
    from ..samplers.adapter import schedule_names

    return io.Combo.Input("schedule", options=schedule_names(), default="trailing", tooltip=_SCHEDULE_TIP)


def steps_input() -> io.Int.Input:
    return io.Int.Input("steps", default=50, min=1, max=1000, tooltip="Denoising steps; the reference uses 50.")


def seed_input(after: bool | io.ControlAfterGenerate = True) -> io.Int.Input:
    """after: what the front end does with a new node's seed after a run; True is to draw another."""
    return io.Int.Input("seed", default=0, min=0, max=0xFFFFFFFFFFFFFFFF, control_after_generate=after,
                        tooltip="Seed of the noise.")


def cfg_input() -> io.Float.Input:
    return io.Float.Input("cfg", default=6.0, min=0.0, max=100.0, step=0.1, round=0.01,
                          tooltip="Guidance scale; the reference uses 6.")


def dynamic_cfg_input() -> io.Boolean.Input:
    return io.Boolean.Input("dynamic_cfg", default=False, tooltip="Vary the guidance over the steps as the "
                            "reference's dynamic guidance does; usual with cogvideox_dpm.")


def denoise_input() -> io.Float.Input:
    return io.Float.Input("denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip=_DENOISE_TIP)


class Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXSampler",
            display_name="CogVideoX Sampler",
            category=CATEGORY,
            description="Samples a CogVideoX model with the reference's samplers or any of ComfyUI's.",
            search_aliases=["KSampler CogVideoX", "CogVideo sampler", "CogVideoX DPM", "CogVideoX DDIM"],
            inputs=[
                io.Model.Input("model", tooltip="A CogVideoX model."),
                io.Conditioning.Input("positive", tooltip="What the video should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show; an empty prompt is usual."),
                io.Latent.Input("latent_image", tooltip="An empty latent, or an encoded video for denoise below 1."),
                seed_input(),
                steps_input(),
                cfg_input(),
                sampler_input(),
                schedule_input(),
                denoise_input(),
                dynamic_cfg_input(),
            ],
            outputs=[io.Latent.Output()],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, positive: list, negative: list, latent_image: dict, seed: int, steps: int,
                cfg: float, sampler: str, schedule: str, denoise: float, dynamic_cfg: bool) -> io.NodeOutput:
        from ..samplers import adapter

        adapter.spec_of(model)
        sigmas = adapter.make_sampler_sigmas(model, sampler, steps, schedule, denoise)
        if dynamic_cfg:
            model = adapter.with_dynamic_guidance(model, len(sigmas) - 1)
        chosen = adapter.sampler_object(sampler, steps)
        return io.NodeOutput(adapter.sample(model, positive, negative, latent_image, seed, cfg, chosen, sigmas))


class SamplerSelect(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXSamplerSelect",
            display_name="CogVideoX Sampler Select",
            category=CATEGORY,
            description="A sampler for SamplerCustomAdvanced: the reference's two, exact, or any of ComfyUI's.",
            search_aliases=["KSamplerSelect CogVideoX", "cogvideox_ddim", "cogvideox_dpm"],
            inputs=[sampler_input()],
            outputs=[io.Sampler.Output()],
        )

    @classmethod
    def execute(cls, sampler: str) -> io.NodeOutput:
        from ..samplers.adapter import sampler_object

        return io.NodeOutput(sampler_object(sampler))


class Scheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXScheduler",
            display_name="CogVideoX Scheduler",
            category=CATEGORY,
            description="Noise levels for SamplerCustomAdvanced, or explicit timesteps for distilled models.",
            search_aliases=["BasicScheduler CogVideoX", "trailing timesteps", "distilled timesteps"],
            inputs=[
                io.Model.Input("model", tooltip="A CogVideoX model; its noise schedule is used."),
                steps_input(),
                schedule_input(),
                denoise_input(),
                io.String.Input("timesteps", default="", optional=True, tooltip="Falling timesteps 0..999 separated "
                                "by commas, such as 999,856,665,399, for models distilled to few steps. Replaces "
                                "steps and schedule; leave empty otherwise."),
            ],
            outputs=[io.Sigmas.Output()],
        )

    @classmethod
    def validate_inputs(cls, timesteps: str | None = None) -> bool | str:
        return problem_of(lambda: parse_timesteps(timesteps or ""))

    @classmethod
    def execute(cls, model: io.Model.Type, steps: int, schedule: str, denoise: float,
                timesteps: str = "") -> io.NodeOutput:
        from ..samplers import adapter

        adapter.spec_of(model)
        return io.NodeOutput(adapter.make_sigmas(model, steps, schedule, denoise, timesteps))


class DynamicGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="CogXDynamicGuidance",
            display_name="CogVideoX Dynamic Guidance",
            category=CATEGORY,
            description="Makes the guidance scale of ComfyUI's own samplers vary over the steps as the reference's "
                        "dynamic guidance does. 'CogVideoX Sampler' has it built in.",
            search_aliases=["dynamic cfg", "use_dynamic_cfg CogVideoX"],
            inputs=[
                io.Model.Input("model", tooltip="A CogVideoX model."),
                io.Int.Input("steps", default=50, min=1, max=1000, tooltip="The number of steps that the sampler "
                             "runs, after denoise: it is part of the formula."),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model: io.Model.Type, steps: int) -> io.NodeOutput:
        from ..samplers.adapter import with_dynamic_guidance

        return io.NodeOutput(with_dynamic_guidance(model, steps))
