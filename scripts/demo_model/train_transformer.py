"""Trains one transformer for v-prediction on the encoded clips."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import clips, evaluate, latents, train_text, train_vae
from .latents import Clips
from .networks import SCALING_FACTOR, VARIANTS, Variant, make_scheduler, make_transformer, positions
from .runs import DEVICE, Average, Run, finished, linear_decay, numpy_generator, torch_generator
from .sampling import condition, embed, generator_of, ofs

BATCH = 32
LEARNING_RATE = 2e-3
AVERAGE_DECAY = 0.998
DROPOUT = 0.1  # of prompts: half become the encoded "", half the authors' zeros
PARTIAL = 0.3  # share of prompts that leave attributes open
NOISY = 0.7  # timesteps are 1000 * u**NOISY: more of them near pure noise, where what and where is decided
SHAPE_WEIGHT = 2.0  # of the loss where the shape is; most of a frame is background
EVALUATE_EVERY = 1000


def make(variant: Variant, work: Path) -> Any:
    """The untrained network: every block begins as the identity, or with another variant's trained blocks."""
    transformer = make_transformer(variant).to(DEVICE)
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm2):
            torch.nn.init.zeros_(norm.linear.weight)
            torch.nn.init.zeros_(norm.linear.bias)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    torch.nn.init.zeros_(transformer.proj_out.bias)
    if variant.start:
        trained = finished(work, variant.start, VARIANTS[variant.start].steps)["average"]
        own = transformer.state_dict()
        kept = {name: value for name, value in trained.items() if name in own and value.shape == own[name].shape}
        transformer.load_state_dict(kept, strict=False)
    return transformer.train()


def optimizers(transformer: Any) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the rest."""
    matrices, rest = [], []
    for name, parameter in transformer.named_parameters():
        inside = name.startswith("transformer_blocks") and parameter.ndim == 2
        (matrices if inside else rest).append(parameter)
    return [torch.optim.Muon(matrices, lr=LEARNING_RATE, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=0.0)]


def prompts_of(scenes: list[clips.Scene], rng: np.random.Generator) -> list[str]:
    return [clips.describe(clips.partial(scene, rng) if rng.random() < PARTIAL else scene, rng) for scene in scenes]


class Batches:
    """Training batches, each a function of the step alone."""

    def __init__(self, variant: Variant, data: Clips, text_encoder: Any, tokenizer: Any, seed: int) -> None:
        self.variant, self.data, self.seed = variant, data, seed
        self.text_encoder, self.tokenizer = text_encoder, tokenizer

    def _padded(self, frames: torch.Tensor) -> torch.Tensor:
        """[B, T, ...] with copies of the first frame in front, up to the variant's number of latent frames."""
        missing = self.variant.latent_frames - frames.shape[1]
        return torch.cat([frames[:, :1]] * missing + [frames], 1)

    def text(self, rng: np.random.Generator, chosen: np.ndarray) -> torch.Tensor:
        prompts = prompts_of([self.data.scenes[index] for index in chosen], rng)
        dropped = rng.random(len(prompts))
        prompts = ["" if value < DROPOUT / 2 else prompt for prompt, value in zip(prompts, dropped, strict=True)]
        kept = torch.from_numpy((dropped < DROPOUT / 2) | (dropped >= DROPOUT)).to(DEVICE)
        return embed(self.text_encoder, self.tokenizer, prompts) * kept[:, None, None]

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        rng, generator = numpy_generator(self.seed, step), torch_generator(self.seed, step)
        chosen = rng.integers(len(self.data.scenes), size=BATCH)
        index = torch.from_numpy(chosen)
        x = self._padded(self.data.latents[index].float() * SCALING_FACTOR)
        timesteps = (1000 * torch.rand(BATCH, generator=generator) ** NOISY).long().clamp(max=999)
        weight = 1 + SHAPE_WEIGHT * self._padded(self.data.shape[index].float())
        made = {"x": x, "noise": torch.randn(x.shape, generator=generator), "timesteps": timesteps, "weight": weight}
        if self.variant.image:
            version = torch.randint(self.data.images.shape[1], (BATCH,), generator=generator)
            made["image"] = condition(self.variant, self.data.images[index, version].float())
        return {"text": self.text(rng, chosen), **{name: value.to(DEVICE) for name, value in made.items()}}


def _plain_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
    assert not any(options.values()), options  # no mask, no dropout, not causal
    query, key, value = (each.to(torch.bfloat16) for each in (query, key, value))
    return torch.softmax(query * query.shape[-1] ** -0.5 @ key.transpose(-1, -2), -1) @ value


@contextmanager
def quick_attention() -> Iterator[None]:
    """Attention as three plain operations on a CPU, for as long as this lasts: a step takes 30 % less time."""
    fused = torch.nn.functional.scaled_dot_product_attention
    if DEVICE.type == "cpu":
        torch.nn.functional.scaled_dot_product_attention = _plain_attention  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = fused  # type: ignore[assignment]


def loss_of(transformer: Any, scheduler: Any, rotary: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    noisy = scheduler.add_noise(batch["x"], batch["noise"], batch["timesteps"])
    target = scheduler.get_velocity(batch["x"], batch["noise"], batch["timesteps"])
    inputs = torch.cat([noisy, batch["image"]], 2) if "image" in batch else noisy
    with torch.autocast(DEVICE.type, torch.bfloat16):
        v = transformer(inputs, batch["text"], batch["timesteps"], ofs=ofs(transformer), image_rotary_emb=rotary,
                        return_dict=False)[0].float()
    weight = batch["weight"][:, :, None]
    return (weight * (v - target) ** 2).mean() / weight.mean()


def train(work: Path, name: str, tokenizer: Any, steps: int | None = None) -> None:
    """Trains the variant ``name`` to ``work/NAME.pt``, or goes on from it."""
    variant, seed = VARIANTS[name], 10 + list(VARIANTS).index(name)
    steps = steps or variant.steps
    run = Run(work, name)
    torch.manual_seed(seed)
    transformer = make(variant, work)
    both, average = optimizers(transformer), Average(transformer, AVERAGE_DECAY)
    state = run.resume() or {"step": 0}
    if state["step"]:
        transformer.load_state_dict(state["network"])
        average.weights = state["average"]
        for optimizer, saved in zip(both, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    scheduler, rotary = make_scheduler(), positions(transformer, DEVICE)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.to(DEVICE)
    batches = Batches(variant, latents.load(work), train_text.load(work), tokenizer, seed)
    for step in range(state["step"], steps):
        for optimizer in both:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * linear_decay(step, steps, 100)
            optimizer.zero_grad()
        batch = batches(step)
        with quick_attention():
            loss = loss_of(transformer, scheduler, rotary, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(transformer.parameters(), 1.0)
        for optimizer in both:
            optimizer.step()
        average.update(transformer, step)
        if step % 50 == 0:
            run.log(step=step, loss=loss.item())
        last = step + 1 == steps
        if last or run.due():
            run.save({"step": step + 1, "network": transformer.state_dict(), "average": average.weights,
                      "optimizers": [optimizer.state_dict() for optimizer in both]})
        if last or (step + 1) % EVALUATE_EVERY == 0:
            for values in scores(work, variant, average, tokenizer):
                run.log(step=step + 1, **values)


def scores(work: Path, variant: Variant, average: Average, tokenizer: Any) -> Iterator[dict[str, Any]]:
    """What the averaged weights are worth, on held-out and on training scenes."""
    transformer = make_transformer(variant).to(DEVICE).eval()
    transformer.load_state_dict(average.weights)
    networks = {"transformer": transformer, "vae": train_vae.load(work), "text_encoder": train_text.load(work),
                "tokenizer": tokenizer}
    sets = ({"image": evaluate.image_cases()} if variant.image else
            {"held out": evaluate.held_out_cases(), "training": evaluate.training_cases()})
    for kind, cases in sets.items():
        generate = generator_of(variant, networks, cases)
        found = evaluate.evaluate(generate, cases)
        values = {"cases": kind, "shape": found.shape, "colour": found.colour, "motion": found.motion}
        if variant.image:
            values["first_frame_psnr"] = float(np.mean([train_vae.psnr(generate(case)[0], case.image)
                                                        for case in cases if case.image is not None]))
        yield values


def load(work: Path, name: str) -> Any:
    """The trained network with its averaged weights.

    Raises:
        RuntimeError: the training is not done yet.
    """
    state = finished(work, name, VARIANTS[name].steps)
    transformer = make_transformer(VARIANTS[name])
    transformer.load_state_dict(state["average"])
    return transformer.eval()
