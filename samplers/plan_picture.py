"""A plan of windows as a picture: a band for each step, a bar for each window, as high as the window counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .plan import spans

WIDTH, MARGIN, LANE, GAP, LINE = 1000, 24, 56, 8, 30
# On a background of its own it reads the same in a dark and in a light theme. Colours: Okabe and Ito (2008).
BACKGROUND, GROUND, TEXT = (24, 26, 32), (48, 52, 62), (236, 238, 242)
COLOURS = [(86, 180, 233), (230, 159, 0), (0, 158, 115), (204, 121, 167), (213, 94, 0), (240, 228, 66)]


def lanes_of(windows: list[dict[str, Any]]) -> list[int]:
    """A lane for each window, as few as show none over another."""
    ends: list[list[list[int]]] = []
    chosen = []
    for window in windows:
        free = (lane for lane, taken in enumerate(ends) if not any(
            first <= other_last and other_first <= last
            for first, last in window["frames"] for other_first, other_last in taken))
        lane = next(free, len(ends))
        if lane == len(ends):
            ends.append([])
        ends[lane] += window["frames"]
        chosen.append(lane)
    return chosen


class Picture:
    """Draws one plan, of ``plan.described``. Frames lie along the whole width, from 0."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self.plan = plan
        self.overview = plan["overview"]
        self.lanes = [lanes_of(windows) for windows in plan["steps"]]
        bands = [LINE + (max(lanes) + 1) * (LANE + GAP) for lanes in self.lanes]
        bands += [LINE + LANE + GAP] if self.overview else []
        self.image = Image.new("RGB", (WIDTH, 2 * MARGIN + LINE + sum(bands) + LINE), BACKGROUND)
        self.draw = ImageDraw.Draw(self.image)
        self.font = ImageFont.load_default(18)
        self.small = ImageFont.load_default(15)

    def x(self, frame: int) -> float:
        return MARGIN + (WIDTH - 2 * MARGIN) * frame / self.plan["frames"]

    def drawn(self) -> Tensor:
        """IMAGE: [1, H, W, 3]."""
        plan, y = self.plan, MARGIN
        self.draw.text((MARGIN, y), f"{plan['frames']} frames, windows of {plan['length']}, overlap {plan['overlap']}: "
                       f"{plan['schedule']}, {plan['fuse']}", TEXT, self.font)
        y += LINE
        if self.overview:
            self.draw.text((MARGIN, y + 4), "while the noise is high: 1 window, the others between its frames", TEXT,
                           self.small)
            y += LINE
            self._rectangle(0, plan["frames"] - 1, y, y + LANE, GROUND)
            for first, last in self.overview:
                self._rectangle(first, last, y, y + LANE, COLOURS[0])
            y += LANE + GAP
        for step, (windows, lanes) in enumerate(zip(plan["steps"], self.lanes, strict=True), 1):
            count = f"{len(windows)} window{'s' if len(windows) > 1 else ''}"
            when = "each step" if plan["same_at_each_step"] else f"step {step}"
            when = "then " + when if self.overview else when
            self.draw.text((MARGIN, y + 4), f"{when}: {count}", TEXT, self.small)
            y += LINE
            for number, (window, lane) in enumerate(zip(windows, lanes, strict=True)):
                self._bar(window, y + lane * (LANE + GAP), COLOURS[number % len(COLOURS)])
            y += (max(lanes) + 1) * (LANE + GAP)
        self._axis(y)
        return torch.from_numpy(np.asarray(self.image, dtype=np.float32) / 255)[None]

    def _bar(self, window: dict[str, Any], y: float, colour: tuple[int, int, int]) -> None:
        for first, last in window["frames"]:
            self._rectangle(first, last, y, y + LANE, GROUND)
        for (first, last), weight in zip(_columns(window["frames"]), window["weights"], strict=True):
            self._rectangle(first, last, y + LANE * (1 - weight), y + LANE, colour)
        for first, last in window["frames"]:
            room = self.x(last + 1) - self.x(first) - 8
            label = next((text for text in (f"{first}-{last}", str(first))
                          if self.draw.textlength(text, self.small) <= room), "")
            self.draw.text((self.x(first) + 4, y + 3), label, TEXT, self.small, stroke_width=2, stroke_fill=BACKGROUND)

    def _rectangle(self, first: int, last: int, top: float, bottom: float, colour: tuple[int, int, int]) -> None:
        """Over these frames; a pixel wide at least, as there may be more frames than pixels."""
        self.draw.rectangle((self.x(first), top, max(self.x(first), self.x(last + 1) - 1), bottom), colour)

    def _axis(self, y: float) -> None:
        last = self.plan["frames"] - 1
        step = next(s for n in range(9) for s in (10**n, 2 * 10**n, 5 * 10**n) if last <= 10 * s)
        self.draw.line((self.x(0), y, self.x(last + 1), y), TEXT)
        for frame in [*range(0, last - step // 2, step), last]:
            self.draw.line((self.x(frame), y, self.x(frame), y + 5), TEXT)
            label = str(frame)
            width = self.draw.textlength(label, self.small)
            left = min(max(self.x(frame) - width / 2, MARGIN), WIDTH - MARGIN - width)
            self.draw.text((left, y + 7), label, TEXT, self.small)


def _columns(frames: list[list[int]]) -> list[list[int]]:
    """The pixel frames of each latent frame of a window: the first of the video holds one, all others four."""
    return [spans([latent])[0] for first, last in frames for latent in range((first + 3) // 4, last // 4 + 1)]


def picture_of(plan: dict[str, Any]) -> Tensor:
    """IMAGE [1, H, W, 3] of a plan."""
    return Picture(plan).drawn()
