"""What a model is, as frozen data: architecture, latent space, noise schedule, legal frames and sizes.

Pure: imports neither torch nor ComfyUI. The numbers of the published models are those of their
``config.json`` files (transformer, vae, scheduler) and of the CogVideoX paper (Yang 2024, arXiv 2408.06072).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

VAE_SPATIAL_RATIO = 8  # pixels per latent row or column
VAE_TEMPORAL_RATIO = 4  # frames per latent frame after the first
TRAIN_TIMESTEPS = 1000
IMAGE_REFERENCES = ("auto", "diffusers", "authors")  # whose image condition: see ModelSpec.image_scale
NO_IMAGE = ("No image: expected start_image, end_image or both. Connect one, for example from Load Image; for a video "
            "from text alone take a text-to-video model and 'CogVideoX Empty Latent'.")
FITS = ("crop", "pad", "stretch")  # how images of another aspect become the video's size


class SpecError(ValueError):
    """A size, frame count, dtype or file that does not fit the model; the message names the remedy."""


@dataclass(frozen=True)
class TransformerSpec:
    """Architecture of a ``CogVideoXTransformer3DModel``; the field names are those of its config.json.

    ``sample_height`` and ``sample_width`` are in latent rows and columns, ``sample_frames`` in pixel frames.
    """

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    num_layers: int = 30
    in_channels: int = 16
    out_channels: int = 16
    time_embed_dim: int = 512
    text_embed_dim: int = 4096
    ofs_embed_dim: int | None = None
    patch_size: int = 2
    patch_size_t: int | None = None
    patch_bias: bool = True
    attention_bias: bool = True
    sample_width: int = 90
    sample_height: int = 60
    sample_frames: int = 49
    max_text_seq_length: int = 226
    norm_eps: float = 1e-5
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    temporal_compression_ratio: int = VAE_TEMPORAL_RATIO
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def temporal_patch(self) -> int:
        """Latent frames per token: 1 for CogVideoX 1.0, 2 for 1.5."""
        return self.patch_size_t or 1

    @property
    def condition_channels(self) -> int:
        """Input channels beyond the noisy latent: 16 for image to video, 0 for text to video."""
        return self.in_channels - self.out_channels


@dataclass(frozen=True)
class VAESpec:
    """Architecture of an ``AutoencoderKLCogVideoX``; the field names are those of its config.json."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    latent_channels: int = 16
    layers_per_block: int = 3
    norm_eps: float = 1e-6
    norm_num_groups: int = 32
    temporal_compression_ratio: int = VAE_TEMPORAL_RATIO
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False

    @property
    def spatial_ratio(self) -> int:
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class TextSpec:
    """Architecture of the T5 encoder; the field names are those of its config.json."""

    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    vocab_size: int = 32128
    feed_forward_proj: str = "gated-gelu"
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6


@dataclass(frozen=True)
class LatentSpec:
    """Latent space: model input = VAE latent x ``scaling_factor``."""

    channels: int = 16
    scaling_factor: float = 0.7
    invert_scale_latents: bool = False


@dataclass(frozen=True)
class ScheduleSpec:
    """Noise schedule; the field names are those of scheduler_config.json."""

    num_train_timesteps: int = TRAIN_TIMESTEPS
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    snr_shift_scale: float = 1.0
    rescale_betas_zero_snr: bool = True
    prediction_type: str = "v_prediction"
    timestep_spacing: str = "trailing"
    set_alpha_to_one: bool = True


@dataclass(frozen=True)
class ModelSpec:
    """One CogVideoX model: everything that is not weights."""

    name: str
    transformer: TransformerSpec
    latent: LatentSpec
    schedule: ScheduleSpec
    fps: int
    native_width: int
    native_height: int
    max_frames: int
    text_tokens: int
    fp16_safe: bool = False

    @property
    def is_v1_5(self) -> bool:
        return self.transformer.patch_size_t is not None

    @property
    def takes_image(self) -> bool:
        return self.transformer.condition_channels > 0

    def image_scale(self, reference: str) -> float:
        """What the VAE latent of a condition image is multiplied with.

        'diffusers': by the scaling factor, or its inverse where the VAE's config says ``invert_scale_latents`` (1.5).
        'authors': by the scaling factor in 1.0, by nothing in 1.5 (``sat/sample_video.py`` of the CogVideo repository).
        'auto': the authors' for 1.5, where they differ; diffusers' turns grey after the first frame.
        """
        if self.is_v1_5 and reference != "diffusers":
            return 1.0
        factor = self.latent.scaling_factor
        return 1 / factor if reference == "diffusers" and self.latent.invert_scale_latents else factor

    @property
    def frame_step(self) -> int:
        """Legal frame counts are ``frame_step * N + 1``, so that the VAE sees an odd number of latent frames."""
        return 2 * VAE_TEMPORAL_RATIO * self.transformer.temporal_patch

    @property
    def token_frames(self) -> int:
        """Pixel frames of a token after the first: 4 for CogVideoX 1.0, 8 for 1.5."""
        return VAE_TEMPORAL_RATIO * self.transformer.temporal_patch

    @property
    def size_step(self) -> int:
        """Legal widths and heights are multiples of this many pixels: one token."""
        return VAE_SPATIAL_RATIO * self.transformer.patch_size

    def padding_frames(self, latent_frames: int) -> int:
        """Latent frames to add at the start so that the temporal patch divides the count (CogVideoX 1.5)."""
        return -latent_frames % self.transformer.temporal_patch


def _published() -> dict[str, ModelSpec]:
    v1 = TransformerSpec(num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)
    v1_5 = replace(v1, patch_size_t=2, sample_height=96, sample_width=170, sample_frames=81, max_text_seq_length=224)
    big, small = LatentSpec(), LatentSpec(scaling_factor=1.15258426)
    base = ModelSpec("5B", v1, big, ScheduleSpec(), fps=8, native_width=720, native_height=480,
                     max_frames=49, text_tokens=226)
    base_1_5 = ModelSpec("1.5-5B", v1_5, big, ScheduleSpec(), fps=16, native_width=1360, native_height=768,
                         max_frames=161, text_tokens=224)
    learned = replace(v1, in_channels=32, use_learned_positional_embeddings=True)
    with_ofs = replace(v1_5, in_channels=32, ofs_embed_dim=512)
    specs = (
        replace(base, name="2B", transformer=TransformerSpec(), latent=small,
                schedule=ScheduleSpec(snr_shift_scale=3.0), fp16_safe=True),
        base,
        replace(base, name="5B-I2V", transformer=learned),
        base_1_5,
        replace(base_1_5, name="1.5-5B-I2V", transformer=with_ofs, latent=replace(big, invert_scale_latents=True)),
    )
    return {spec.name: spec for spec in specs}


PUBLISHED: Mapping[str, ModelSpec] = _published()


def nearest_published(transformer: TransformerSpec) -> ModelSpec:
    """The published model whose kind (1.0 or 1.5, position embedding, image input) ``transformer`` shares.

    What a transformer's config cannot say (schedule, latent scale, fps) is taken from here when no other
    config file says it.

    Raises:
        SpecError: input channels that are neither text to video nor image to video.
    """
    channels = transformer.out_channels
    if transformer.condition_channels not in (0, channels):
        raise SpecError(
            f"This transformer has {transformer.in_channels} input channels: expected {channels} (text to video) or "
            f"{2 * channels} (image to video). It belongs to another pipeline (control, inpainting); choose a model "
            "for text or image to video.")
    image = transformer.condition_channels > 0
    if transformer.patch_size_t is not None:
        name = "1.5-5B-I2V" if image else "1.5-5B"
    elif not transformer.use_rotary_positional_embeddings:
        name = "2B"
    else:
        name = "5B-I2V" if image else "5B"
    return PUBLISHED[name]


@dataclass(frozen=True)
class Geometry:
    """A video's size, in pixels and frames, and what it becomes in latent space for one model."""

    spec: ModelSpec
    width: int
    height: int
    frames: int

    @property
    def latent_frames(self) -> int:
        return (self.frames - 1) // VAE_TEMPORAL_RATIO + 1

    def latent_shape(self, batch_size: int = 1) -> tuple[int, int, int, int, int]:
        """[B, C, T, H, W] of the latent, without the padding frames of 1.5."""
        rows, columns = self.height // VAE_SPATIAL_RATIO, self.width // VAE_SPATIAL_RATIO
        return batch_size, self.spec.latent.channels, self.latent_frames, rows, columns


def nearest_on_grid(value: int, step: int, offset: int = 0, minimum: int = 0) -> tuple[int, int]:
    """The legal values ``step * n + offset`` at or below and above ``value``, none less than ``minimum``."""
    below = max((value - offset) // step * step + offset, minimum)
    return below, below if below == value else below + step


def frames_problem(frames: int, *specs: ModelSpec) -> str | None:
    """Why ``frames`` is legal for none of ``specs``, with each one's nearest legal counts; None if it is for one."""
    rules = []
    for spec in specs:
        low, high = nearest_on_grid(frames, spec.frame_step, 1, minimum=1)
        if low == frames:
            return None
        family = "1.5" if spec.is_v1_5 else "1.0"
        rules.append(f"CogVideoX {family} needs {spec.frame_step}N+1 (native {spec.transformer.sample_frames}); "
                     f"nearest: {low} or {high}.")
    return f"{frames} frames: {' '.join(rules)}"


def size_problem(width: int, height: int, spec: ModelSpec) -> str | None:
    """Why ``width`` x ``height`` pixels is not legal for ``spec``, with the nearest legal size; None if it is."""
    step = spec.size_step
    for name, value in (("width", width), ("height", height)):
        low, high = nearest_on_grid(value, step, minimum=step)
        if low != value:
            return f"{name} {value}: CogVideoX needs a multiple of {step}; nearest: {low} or {high}."
    native = (spec.native_width, spec.native_height)
    if spec.transformer.use_learned_positional_embeddings and (width, height) != native:
        return f"{width}x{height}: {spec.name} has learned positions for {native[0]}x{native[1]} only; " \
               f"set width {native[0]} and height {native[1]}."
    return None


def propose_size(width: int, height: int, spec: ModelSpec) -> tuple[int, int]:
    """The legal size (width, height) that comes nearest to the shape of an image.

    The short side is the native one; the long side follows the aspect, to the next token, and is at most the native
    one: the authors' rule for 1.5 image to video (``sat/sample_video.py``). Learned positions allow one size only.
    """
    if spec.transformer.use_learned_positional_embeddings:
        return spec.native_width, spec.native_height
    short, longest = sorted((spec.native_width, spec.native_height))
    exact = short * max(width, height) / min(width, height)
    long = min(int(exact / spec.size_step + 0.5) * spec.size_step, longest)
    return (long, short) if width > height else (short, long)


def check_any_geometry(width: int, height: int, frames: int) -> None:
    """Refuse what no published model can make, for when the model is not known yet.

    Raises:
        SpecError: as ``check_geometry``.
    """
    v1, v1_5 = PUBLISHED["5B"], PUBLISHED["1.5-5B"]
    problem = size_problem(width, height, v1) or frames_problem(frames, v1, v1_5)
    if problem:
        raise SpecError(problem)


def check_geometry(width: int, height: int, frames: int, spec: ModelSpec) -> Geometry:
    """The geometry of a legal video.

    Raises:
        SpecError: the frame count or the size is not legal; the message names the nearest legal value.
    """
    problem = size_problem(width, height, spec) or frames_problem(frames, spec)
    if problem:
        raise SpecError(problem)
    return Geometry(spec, width, height, frames)


def check_latent(shape: tuple[int, ...], spec: ModelSpec) -> None:
    """Refuse a latent that ``spec`` cannot sample. ``shape`` is [B, C, T, H, W].

    Raises:
        SpecError: another model's latent, or a size that is not on the token grid.
    """
    if len(shape) != 5 or shape[1] != spec.latent.channels:
        raise SpecError(
            f"This latent has shape {list(shape)}, so it belongs to another model: CogVideoX {spec.name} needs "
            f"[batch, {spec.latent.channels}, frames, height/8, width/8]. Use 'CogVideoX Empty Latent', or encode "
            "the images with the CogVideoX VAE.")
    height, width = shape[3] * VAE_SPATIAL_RATIO, shape[4] * VAE_SPATIAL_RATIO
    problem = size_problem(width, height, spec)
    if problem:
        raise SpecError(problem)


def check_dtype(weight_dtype: str, spec: ModelSpec) -> None:
    """Refuse a weight dtype in which the model is known to fail.

    Raises:
        SpecError: fp16 for a model that overflows in it.
    """
    if weight_dtype == "fp16" and not spec.fp16_safe:
        raise SpecError(
            f"weight_dtype fp16: {spec.name} was trained in bf16 and overflows to a black video in fp16. "
            "Expected auto, bf16 or fp32; choose auto.")


def _is_count(value: object, least: int = 1) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


# What a config may say for a field, by the type of the field's default: words, and a check.
_KINDS: dict[type, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda v: isinstance(v, bool)),
    int: ("a whole number", lambda v: _is_count(v, 0)),
    float: ("a number", lambda v: isinstance(v, (int, float)) and not isinstance(v, bool)),
    str: ("text", lambda v: isinstance(v, str)),
    tuple: ("a list of whole numbers",
            lambda v: isinstance(v, (list, tuple)) and bool(v) and all(map(_is_count, v))),
    type(None): ("a whole number or null", lambda v: v is None or _is_count(v)),
}


def pick(cls: type, config: Mapping[str, Any], where: str = "config.json") -> dict[str, Any]:
    """The entries of ``config`` that are fields of the dataclass ``cls``; lists become tuples.

    Raises:
        SpecError: a value is not of the kind of the field's default.
    """
    found = {}
    for f in fields(cls):
        if f.name not in config:
            continue
        value = config[f.name]
        words, fits = _KINDS[type(f.default)]
        zero = not isinstance(value, bool) and value == 0
        if not fits(value) or (zero and f.default):
            raise SpecError(f"{where}: {f.name} is {value!r}, expected {words}. Restore the original file.")
        found[f.name] = tuple(value) if isinstance(value, list) else value
    return found
