"""Trains the text encoder alone: from its output, small readers must tell every attribute of the scene.

The readers are thrown away. Rows of the table for words that no sentence has are set to zero, which git stores in
nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import clips
from .clips import ATTRIBUTES, Scene
from .networks import TEXT_DIM, TEXT_TOKENS, make_text_encoder
from .runs import DEVICE, Run, finished, linear_decay, numpy_generator

STEPS = 1500
BATCH = 256
LEARNING_RATE = 3e-3
PARTIAL = 0.5  # share of sentences that leave attributes open
SEED = 2


class Readers(nn.Module):
    """One attention query and one linear layer for each attribute, with a class for "not said"."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(len(ATTRIBUTES), TEXT_DIM))
        self.heads = nn.ModuleList(nn.Linear(TEXT_DIM, len(values) + 1) for values in ATTRIBUTES.values())

    def forward(self, states: torch.Tensor) -> list[torch.Tensor]:
        weights = torch.einsum("btd,ad->bat", states, self.query).softmax(-1)
        pooled = torch.einsum("bat,btd->bad", weights, states)
        return [head(pooled[:, index]) for index, head in enumerate(self.heads)]


def tokenize(tokenizer: Any, prompts: list[str]) -> torch.Tensor:
    """Token ids [B, TEXT_TOKENS], padded as the pipelines do it."""
    encoded = tokenizer(prompts, padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt")
    return encoded.input_ids.to(DEVICE)


def labels_of(scenes: list[Scene]) -> list[torch.Tensor]:
    return [torch.tensor([values.index(value) + 1 if (value := getattr(scene, name)) else 0 for scene in scenes],
                         device=DEVICE) for name, values in ATTRIBUTES.items()]


def batch(step: int, size: int = BATCH) -> tuple[list[str], list[Scene]]:
    rng = numpy_generator(SEED, step)
    prompts, scenes = [], []
    for _ in range(size):
        scene = clips.training_scene(rng)
        if rng.random() < PARTIAL:
            scene = clips.partial(scene, rng)
        prompts.append(clips.describe(scene, rng))
        scenes.append(scene)
    return prompts, scenes


@torch.no_grad()
def accuracy(encoder: Any, readers: Readers, tokenizer: Any) -> float:
    """Share of attributes that the readers tell from sentences about the held-out scenes."""
    rng = numpy_generator(SEED, 10**7)
    scenes = clips.held_out_scenes()
    answers = readers(encoder(tokenize(tokenizer, [clips.describe(scene, rng) for scene in scenes]))[0])
    right = [(answer.argmax(-1) == label).float().mean()
             for answer, label in zip(answers, labels_of(scenes), strict=True)]
    return float(torch.stack(right).mean())


def train(work: Path, tokenizer: Any, steps: int = STEPS) -> None:
    """Trains to ``work/text.pt``; quick enough to begin anew if it is cut off, and left alone when it is done."""
    run = Run(work, "text")
    if (run.resume() or {}).get("step") == steps:
        return
    torch.manual_seed(SEED)
    encoder, readers = make_text_encoder().to(DEVICE), Readers().to(DEVICE)
    parameters = [*encoder.parameters(), *readers.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    used = torch.zeros(encoder.config.vocab_size, dtype=torch.bool, device=DEVICE)
    used[tokenize(tokenizer, [""]).unique()] = True
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * linear_decay(step, steps, 50)
        prompts, scenes = batch(step)
        ids = tokenize(tokenizer, prompts)
        used[ids.unique()] = True
        answers = readers(encoder(ids)[0])
        loss = torch.stack([nn.functional.cross_entropy(answer, label)
                            for answer, label in zip(answers, labels_of(scenes), strict=True)]).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 100 == 0:
            run.log(step=step, loss=loss.item())
    with torch.no_grad():
        encoder.get_input_embeddings().weight[~used] = 0.0
    run.log(step=steps, held_out_accuracy=accuracy(encoder, readers, tokenizer), words=int(used.sum()))
    run.save({"step": steps, "network": encoder.state_dict()})


def load(work: Path) -> Any:
    encoder = make_text_encoder()
    encoder.load_state_dict(finished(work, "text", STEPS)["network"])
    return encoder.to(DEVICE).eval().requires_grad_(False)
