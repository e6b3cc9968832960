"""No render is lost: what was sampled for long is on disk before anything can go wrong with it.

An OUTER_SAMPLE wrapper, outside all others, saves what the sampler returns; if it is stopped or fails, its last
estimate of the video. Errors while decoding name the file. 'CogVideoX Load Latent' brings it back.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import inspect
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
from torch import Tensor

from ..models.cogvideox.apply_model import KEPT_KEY
from ..models.specs import SpecError
from .latent_files import (
    SavedRun,
    find,
    fingerprint,
    list_files,
    pack_version,
    pixel_size,
    prune,
    read_latent,
    read_run,
    write,
)
from .recovery_settings import VARIABLE, RecoverySettings, read_settings

log = logging.getLogger("cogx")

FOLDER = "cogx_recovery"  # below ComfyUI's output folder
NEWEST = "newest"
BRING_BACK = "'CogVideoX Load Latent' brings it back."
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def recovery_folder() -> Path:
    return Path(folder_paths.get_output_directory()) / FOLDER


def current_settings() -> RecoverySettings:
    """Of ComfyUI's default user: a run does not know who queued it."""
    file = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    return read_settings(file, os.environ)


def _as_between_nodes(latent: Tensor) -> Tensor:
    """As ComfyUI's samplers hand it on (--fp16-intermediates), in RAM."""
    return latent.to(device="cpu", dtype=comfy.model_management.intermediate_dtype())


@contextlib.contextmanager
def _costing_nothing(failed: str) -> Iterator[None]:
    """What goes wrong in here is a warning: neither the render nor an error that is on its way may be lost by it."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - disk, card, RAM, settings, other packs' guiders: anything can fail
        log.warning("%s: %s: %s", failed, type(error).__name__, error)


# --- Saving ---


def _sampler_name(sampler: Any) -> str:
    name = getattr(sampler, "name", None) or getattr(getattr(sampler, "sampler_function", None), "__name__", "")
    return str(name).removeprefix("sample_") or type(sampler).__name__


def _guidance_scale(guider: Any) -> float | None:
    """The one scale of a guider, if it has one: others inherit ``cfg`` and never read it."""
    set_cfg = getattr(guider, "set_cfg", None)
    if set_cfg is None or "cfg" not in inspect.signature(set_cfg).parameters:
        return None
    try:
        return float(guider.cfg)
    except (AttributeError, TypeError, ValueError, RuntimeError):  # a list, or a tensor of several
        return None


def _write_and_prune(latent: Tensor, run: SavedRun, keep: int) -> Path:
    """A full disk is cleared once: of what is stale, and of the oldest file that the new one would push out anyway.

    Raises:
        OSError: as ``write``.
    """
    folder = recovery_folder()
    try:
        path = write(folder, latent, run)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        prune(folder, keep - 1 if run.complete else keep, keep_stopped=keep - 1)
        path = write(folder, latent, run)
    with _costing_nothing(f"Old latents in {folder} could not be deleted"):
        prune(folder, keep)
    return path


@dataclass
class _Recorder:
    """One run while it goes on: what it is, and how far it has come."""

    guider: Any
    sampler: Any
    sigmas: Tensor
    seed: int | None
    latent_image: Tensor  # what the run began with, as nodes have it
    began: float = field(default_factory=time.monotonic)
    step: int = 0
    estimate: Tensor | None = None  # of the video, at that step: [B, C, T, h, w], as the network sees it

    def watch(self, callback: Callable[..., Any] | None) -> Callable[..., Any]:
        """The host's callback, and before it our own: an interrupt comes out of the host's."""
        def remember(step: int, x0: Tensor, x: Tensor, total_steps: int) -> Any:
            self.step, self.estimate = step + 1, x0
            return callback(step, x0, x, total_steps) if callback is not None else None

        return remember

    def _renders(self) -> bool:
        """Noise falls. It rises where a video is inverted to noise, and training has numbers of images there."""
        return len(self.sigmas) > 1 and float(self.sigmas[-1]) < float(self.sigmas[0])

    def _describe(self, latent: Tensor, complete: bool) -> SavedRun:
        model, steps = self.guider.model_patcher.model, len(self.sigmas) - 1
        return SavedRun(
            model=model.spec.name, fps=model.spec.fps, **pixel_size(latent), seed=int(self.seed or 0),
            sampler=_sampler_name(self.sampler), steps=steps, step=steps if complete else self.step, complete=complete,
            end_sigma=float(self.sigmas[-1]) if complete else 0.0, cfg=_guidance_scale(self.guider),
            dtype=str(model.get_dtype_inference()).removeprefix("torch."),
            seconds=round(time.monotonic() - self.began, 1), saved=time.strftime("%Y-%m-%d %H:%M:%S"),
            sha256=fingerprint(latent), version=pack_version())

    def _is_worth_it(self, minimum_seconds: float) -> bool:
        """Long, or what goes on from a saved latent: a first stage's hour is in the second stage's result."""
        return time.monotonic() - self.began >= minimum_seconds or find_saved(self.latent_image) is not None

    def save(self, latent: Tensor, complete: bool) -> Path | None:
        """The file with a latent as nodes have it; None if the run was too short, saving is off, or it failed."""
        with _costing_nothing(f"The sampled latent could not be saved in {recovery_folder()}"):
            settings = current_settings()
            if self._renders() and settings.enabled and self._is_worth_it(settings.minimum_seconds):
                latent = _as_between_nodes(latent)
                return _write_and_prune(latent, self._describe(latent, complete), settings.keep)
        return None

    def _save_estimate(self) -> Path | None:
        if self.estimate is None:
            return None
        with _costing_nothing(f"The video as it was at step {self.step} could not be saved"):
            # Fails too after an error that leaves the card unusable: what lies on it is lost.
            return self.save(self.guider.model_patcher.model.process_latent_out(self.estimate.cpu().float()), False)
        return None

    def stopped(self, error: BaseException) -> None:
        """Save the video as it was at the last step, and say so in the log and in the error; if there is none, name the
        file that the run began with."""
        path = self._save_estimate()
        words = f"The video as it was at step {self.step} of {len(self.sigmas) - 1} is saved in {path}. {BRING_BACK}"
        with _costing_nothing("The saved latent could not be named"):
            if path is None:
                path = find_saved(self.latent_image)
                words = f"The latent that this run began with is saved in {path}. {BRING_BACK}"
            if path is not None:
                log.info(words)
                if isinstance(error, Exception):  # an interrupt has no message
                    add_words(error, words)


def save_outer_sample(executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor,
                      denoise_mask: Tensor | None = None, callback: Callable[..., Any] | None = None,
                      disable_pbar: bool = False, seed: int | None = None, latent_shapes: Any = None) -> Tensor:
    """OUTER_SAMPLE wrapper, the outermost: saves what the sampler returns, [B, C, T, h, w], unscaled.

    If the run is stopped or fails, its last estimate of the video; the error goes on, with the file's name in it, or
    with that of the saved latent that the run began with. With ``KEPT_KEY`` only a run that ends early is saved.
    The settings are read at the end of the run, so that a change during a long one counts.
    """
    run = _Recorder(executor.class_obj, sampler, sigmas, seed, latent_image)
    try:
        samples = executor(noise, latent_image, sampler, sigmas, denoise_mask, run.watch(callback), disable_pbar, seed,
                           latent_shapes=latent_shapes)
    except (Exception, comfy.model_management.InterruptProcessingException) as error:
        run.stopped(error)
        raise
    path = None if run.guider.model_options.get(KEPT_KEY) else run.save(samples, complete=True)
    if path is not None:
        log.info("The sampled latent is saved in %s. If a later step fails, %s", path, BRING_BACK)
    return samples


# --- Errors that name the file ---


def add_words(error: BaseException, words: str) -> None:
    """Put words at the end of an error's message, which is what ComfyUI shows. Its type, and what else it holds, stay
    as they are, so that ComfyUI goes on knowing an out-of-memory error. Into the log if it makes its message itself."""
    if words in str(error):
        return
    before = error.args
    if not before or (len(before) == 1 and isinstance(before[0], str)):
        error.args = (" ".join([*before, words]),)
    if words not in str(error):
        error.args = before
        log.error(words)


def find_saved(samples: Tensor) -> Path | None:
    """The file that holds this latent, if it was saved."""
    if not list_files(recovery_folder()):
        return None
    return find(recovery_folder(), fingerprint(_as_between_nodes(samples)))


def _name_saved(error: Exception, samples: Tensor) -> None:
    with _costing_nothing("Whether the latent was saved could not be found out"):
        path = find_saved(samples)
        if path is not None:
            add_words(error, f"The sampled latent is saved in {path}. {BRING_BACK}")


def naming_saved_latent(decode: Callable[..., Any]) -> Callable[..., Any]:
    """For methods that decode ``samples``: an error that comes out of them names the file that the latent is saved in.
    An interrupt is no error."""
    @functools.wraps(decode)
    def run(self: Any, samples: Tensor, *args: Any, **kwargs: Any) -> Any:
        try:
            return decode(self, samples, *args, **kwargs)
        except Exception as error:
            _name_saved(error, samples)
            raise

    return run


# --- Loading ---


def saved_names() -> list[str]:
    """What can be chosen: the newest, and each file."""
    return [NEWEST, *(path.name for path in list_files(recovery_folder()))]


def saved_path(name: str) -> Path:
    """The file of a name, or the newest.

    Raises:
        SpecError: there is none; says where it was looked for.
    """
    files = list_files(recovery_folder())
    for path in files:
        if name in (NEWEST, path.name):
            return path
    settings = current_settings()
    saved = f"Runs over {settings.minimum_seconds:g} seconds are saved there." if settings.enabled else (
        f"Saving is switched off, in ComfyUI's settings or by {VARIABLE}.")
    raise SpecError(f"Saved latent {str(name)[:80]!r} not found: expected a file in {recovery_folder()}; found "
                    f"{[path.name for path in files]}. {saved}")


def saved_fingerprint(name: str | None) -> str:
    """Changes when the name means another file or the file changes; each time if the name is not known yet (None)."""
    if name is None:
        return str(time.time_ns())
    path = saved_path(name)
    return f"{path.name} {path.stat().st_mtime_ns}"


def check_saved(name: str) -> None:
    """Raises SpecError unless the file of this name is a whole latent of ours, by its header."""
    read_run(saved_path(name))


def load_saved(name: str) -> tuple[dict[str, Any], str]:
    """A saved LATENT, and what it is in words.

    Raises:
        SpecError: as ``saved_path``, or the file is damaged or not ours.
    """
    path = saved_path(name)
    latent, run = read_latent(path)
    return {"samples": latent.to(comfy.model_management.intermediate_device())}, f"{path.name}: {run.describe()}"
