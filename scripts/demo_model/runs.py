"""What every training stage shares: seeds, logs, and checkpoints from which a run goes on bit for bit."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

CHECKPOINT_SECONDS = 120.0
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def numpy_generator(*seed: int) -> np.random.Generator:
    """A generator of its own for each step and purpose, so that a resumed run draws what it would have drawn."""
    return np.random.default_rng(seed)


def torch_generator(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))


def write(path: Path, content: Any) -> None:
    """Saves with torch; a run that is cut off leaves the old file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    torch.save(content, temporary)
    os.replace(temporary, path)


def read(path: Path) -> Any:
    return torch.load(path, map_location=DEVICE, weights_only=True)


def finished(work: Path, stage: str, steps: int) -> dict[str, Any]:
    """The checkpoint of a stage that is done.

    Raises:
        RuntimeError: it is not.
    """
    path = work / f"{stage}.pt"
    state = read(path) if path.exists() else {"step": 0}
    if state["step"] != steps:
        raise RuntimeError(f"{stage} is at step {state['step']} of {steps}: run the stage '{stage}' to its end first")
    return state


class Run:
    """One stage in the work folder: its log and its checkpoint."""

    def __init__(self, work: Path, stage: str) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.stage = work, stage
        self.checkpoint = work / f"{stage}.pt"
        self._saved = self._began = time.monotonic()
        self._before = 0.0

    def resume(self) -> dict[str, Any] | None:
        """The checkpoint's content, or None at the first start."""
        if not self.checkpoint.exists():
            return None
        state = read(self.checkpoint)
        self._before = state["seconds"]
        return state

    @property
    def seconds(self) -> float:
        """Time spent in this stage, over all its sessions."""
        return self._before + time.monotonic() - self._began

    def save(self, state: dict[str, Any]) -> None:
        write(self.checkpoint, {**state, "seconds": self.seconds})
        self._saved = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self._saved > CHECKPOINT_SECONDS

    def log(self, **values: Any) -> None:
        """A line in log.jsonl and on the terminal."""
        rounded = {key: round(value, 5) if isinstance(value, float) else value for key, value in values.items()}
        line = json.dumps({"stage": self.stage, "seconds": round(self.seconds), **rounded})
        with (self.work / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        print(line, flush=True)


class Average:
    """Exponential moving average of a network's weights (with a warm-up, so that the start is forgotten)."""

    def __init__(self, network: torch.nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: value.detach().clone() for name, value in network.named_parameters()}

    @torch.no_grad()
    def update(self, network: torch.nn.Module, step: int) -> None:
        decay = min(self.decay, (step + 1) / (step + 10))
        for name, value in network.named_parameters():
            self.weights[name].lerp_(value, 1 - decay)


def linear_decay(step: int, steps: int, warmup: int, decay: float = 0.3) -> float:
    """Learning-rate factor: warm-up, constant, then linearly to zero over the last ``decay`` of the steps."""
    return min((step + 1) / warmup, 1.0, (steps - step) / (decay * steps))
