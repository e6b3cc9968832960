"""Trains the VAE: first on crops around the shape, then, its latents normalised, on whole clips."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import clips
from .networks import SCALING_FACTOR, make_vae
from .runs import DEVICE, Run, finished, linear_decay, numpy_generator, torch_generator

STEPS = 2400
WHOLE_FROM = 0.6  # of the steps
CROP, CROP_FRAMES, CROPS = 48, 9, 4  # pixels, frames, per batch
WHOLE_CLIPS = 2  # per batch
LEARNING_RATE, OTHER_LEARNING_RATE = 2e-3, 1e-3  # of the convolutions, and of biases and norms
SHAPE_WEIGHT = 4.0  # of the loss where the shape is: otherwise the backgrounds are learnt and nothing else
KL_WEIGHT = 1e-5
SEED = 1


def to_pixels(frames: np.ndarray) -> torch.Tensor:
    """uint8 [B, F, H, W, 3] to -1..1 [B, 3, F, H, W]."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1  # bfhwc -> bcfhw


def to_frames(pixels: torch.Tensor) -> np.ndarray:
    """-1..1 [B, 3, F, H, W] to uint8 [B, F, H, W, 3]."""
    scaled = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return scaled.permute(0, 2, 3, 4, 1).cpu().numpy()  # bcfhw -> bfhwc


def psnr(ours: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 pictures, in dB."""
    error = np.mean((ours.astype(float) - reference.astype(float)) ** 2)
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def crop(frames: np.ndarray, covered: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Some frames, and of these a square with the shape in it."""
    first = int(rng.integers(clips.FRAMES - CROP_FRAMES + 1))
    y, x = (int(np.mean(where)) - CROP // 2 for where in np.nonzero(covered[first + CROP_FRAMES // 2] > 0.5))
    y, x = y + int(rng.integers(-8, 9)), x + int(rng.integers(-8, 9))
    y, x = min(max(y, 0), clips.HEIGHT - CROP), min(max(x, 0), clips.WIDTH - CROP)
    window = np.s_[first:first + CROP_FRAMES, y:y + CROP, x:x + CROP]
    return frames[window], covered[window]


def batch(step: int, whole: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [B, 3, F, H, W] and the weight of each [B, 1, F, H, W]."""
    rng = numpy_generator(SEED, step)
    made = [clips.render(clips.training_scene(rng), rng) for _ in range(WHOLE_CLIPS if whole else CROPS)]
    if not whole:
        made = [crop(*pair, rng) for pair in made]
    weight = 1 + SHAPE_WEIGHT * torch.from_numpy(np.stack([covered for _, covered in made])).float()
    return to_pixels(np.stack([frames for frames, _ in made])).to(DEVICE), weight[:, None].to(DEVICE)


@torch.no_grad()
def normalise(vae: Any, scenes: int = 48) -> None:
    """Folds the latents' mean and spread into the encoder's last and the decoder's first convolution.

    The decoder's norms take the latents too; they learn the new scale in the rest of the training.
    """
    rng = numpy_generator(SEED, 10**6)
    pixels = to_pixels(np.stack([clips.render(clips.training_scene(rng), rng)[0] for _ in range(scenes)]))
    latents = torch.cat([vae.encode(part.to(DEVICE)).latent_dist.mean for part in pixels.split(4)])
    mean, spread = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4)) * SCALING_FACTOR
    out, into = vae.encoder.conv_out.conv, vae.decoder.conv_in.conv
    channels = mean.shape[0]
    out.weight[:channels] /= spread[:, None, None, None, None]
    out.bias[:channels] = (out.bias[:channels] - mean) / spread
    out.bias[channels:] -= 2 * spread.log()  # the log variance
    into.bias += torch.einsum("oikhw,i->o", into.weight, mean)
    into.weight *= spread[None, :, None, None, None]


def evaluate(vae: Any, count: int = 24) -> float:
    """Mean PSNR in dB of held-out clips, encoded and decoded as diffusers does it."""
    vae.eval()
    rng = numpy_generator(SEED, 10**7)
    frames = np.stack([clips.render(scene, rng)[0] for scene in clips.held_out_scenes()[:count]])
    with torch.no_grad():
        decoded = [vae.decode(vae.encode(to_pixels(part).to(DEVICE)).latent_dist.mode()).sample
                   for part in np.split(frames, count // 4)]
    vae.train()
    return float(np.mean([psnr(ours, true) for ours, true in zip(to_frames(torch.cat(decoded)), frames, strict=True)]))


def loss_of(vae: Any, pixels: torch.Tensor, weight: torch.Tensor, step: int) -> torch.Tensor:
    with torch.autocast(DEVICE.type, torch.bfloat16):
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch_generator(SEED, 2, step)).to(DEVICE)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    mean, log_variance = posterior.mean.float(), posterior.logvar.float()
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    error = decoded - pixels
    return (weight * (error**2 + 0.02 * error.abs())).mean() / weight.mean() + KL_WEIGHT * divergence


class Muon:
    """torch's Muon for convolutions: it takes matrices, so it gets views of theirs; AdamW for all else."""

    def __init__(self, network: Any) -> None:
        parameters = list(network.parameters())
        self.kernels = [each for each in parameters if each.ndim > 2 and each.shape[0] > 3]
        self.matrices = [torch.nn.Parameter(kernel.detach().view(kernel.shape[0], -1)) for kernel in self.kernels]
        kernels = set(self.kernels)
        rest = [each for each in parameters if each not in kernels]
        muon = torch.optim.Muon(self.matrices, lr=LEARNING_RATE, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        adam = torch.optim.AdamW(rest, lr=OTHER_LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)
        self.both = {"muon": muon, "adam": adam}
        self.rates = {"muon": LEARNING_RATE, "adam": OTHER_LEARNING_RATE}

    def step(self, factor: float) -> None:
        for matrix, kernel in zip(self.matrices, self.kernels, strict=True):
            assert kernel.grad is not None
            matrix.grad = kernel.grad.view_as(matrix)
        for name, optimizer in self.both.items():
            for group in optimizer.param_groups:
                group["lr"] = factor * self.rates[name]
            optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {name: optimizer.state_dict() for name, optimizer in self.both.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.both.items():
            optimizer.load_state_dict(state[name])


def make() -> Any:
    """The untrained VAE, nearly without noise in its latents."""
    vae = make_vae().to(DEVICE).train()
    with torch.no_grad():
        conv = vae.encoder.conv_out.conv  # channels 16 and up are the log variance
        conv.weight[16:] *= 0.1
        conv.bias[16:] = -4.0
    return vae


def train(work: Path, steps: int = STEPS) -> None:
    """Trains to ``work/vae.pt``, or goes on from it."""
    run = Run(work, "vae")
    torch.manual_seed(SEED)
    vae = make()
    optimizer = Muon(vae)
    state = run.resume() or {"step": 0}
    if state["step"]:
        vae.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
    whole_from = int(WHOLE_FROM * steps)
    for step in range(state["step"], steps):
        if step == whole_from:
            normalise(vae)
        loss = loss_of(vae, *batch(step, whole=step >= whole_from), step)
        vae.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step(linear_decay(step, steps, 50))
        if step % 50 == 0:
            run.log(step=step, loss=loss.item())
        last = step + 1 == steps
        if last or run.due():
            run.save({"step": step + 1, "network": vae.state_dict(), "optimizer": optimizer.state_dict()})
        if last or (step + 1) % 500 == 0:
            run.log(step=step + 1, held_out_psnr=evaluate(vae))


def load(work: Path) -> Any:
    vae = make_vae().to(DEVICE)
    vae.load_state_dict(finished(work, "vae", STEPS)["network"])
    return vae.eval().requires_grad_(False)
