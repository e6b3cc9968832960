"""Makes the example images and the video that the shipped workflows start from: workflows/inputs.

    python scripts/make_inputs.py

A red ball rolls over a meadow, from left to right. All of it is computed, so nobody's picture is in the repository.
Needs numpy, Pillow and PyAV (ComfyUI has them).
"""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from PIL import Image

INPUTS = Path(__file__).resolve().parent.parent / "workflows" / "inputs"
WIDTH, HEIGHT = 720, 480
FRAMES, FPS = 81, 16
VIDEO_SIZE = (360, 240)
SEED = 7

SKY_TOP, SKY_LOW = (92, 148, 214), (214, 232, 244)
MEADOW_FAR, MEADOW_NEAR = (126, 168, 84), (62, 112, 46)
BALL, SHADE = (212, 44, 40), (96, 14, 20)
HORIZON, RADIUS = 0.56, 0.13


def _blend(low: tuple[int, ...], high: tuple[int, ...], share: np.ndarray) -> np.ndarray:
    return np.asarray(low) + (np.asarray(high) - np.asarray(low)) * share[..., None]


def _hills(x: np.ndarray) -> np.ndarray:
    """Height of the horizon at each column: a few seeded sine waves."""
    generator = np.random.default_rng(SEED)
    waves = zip(generator.uniform(2, 9, 4), generator.uniform(0, 6.3, 4), generator.uniform(0.004, 0.014, 4),
                strict=True)
    return HORIZON + sum(height * np.sin(rate * x + phase) for rate, phase, height in waves)


def scene(progress: float, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """The picture at a ``progress`` of 0 (ball on the left) to 1 (ball on the right)."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    x, y = x / height, y / height  # in picture heights
    horizon = _hills(x)
    sky = _blend(SKY_TOP, SKY_LOW, np.clip(y / horizon, 0, 1))
    meadow = _blend(MEADOW_FAR, MEADOW_NEAR, np.clip((y - horizon) / (1 - horizon), 0, 1))
    picture = np.where((y < horizon)[..., None], sky, meadow)

    centre_x, centre_y = 0.25 + progress * (width / height - 0.5), 0.74
    shadow = np.clip(1 - (((x - centre_x) / 0.15) ** 2 + ((y - centre_y - RADIUS) / 0.03) ** 2), 0, 1)
    picture = picture * (1 - 0.5 * shadow[..., None])
    distance = np.hypot(x - centre_x, y - centre_y) / RADIUS
    light = np.clip(np.hypot(x - centre_x + 0.04, y - centre_y + 0.05) / (1.5 * RADIUS), 0, 1)
    turn = np.arctan2(y - centre_y, x - centre_x) - progress * (width / height - 0.5) / RADIUS
    stripe = 0.82 + 0.18 * np.clip(8 * np.cos(3 * turn), -1, 1) * np.clip(distance, 0, 1)
    ball = _blend(BALL, SHADE, light) * stripe[..., None]
    edge = np.clip((1 - distance) * RADIUS * height, 0, 1)  # one pixel wide
    picture = picture * (1 - edge[..., None]) + ball * edge[..., None]
    return Image.fromarray(picture.round().clip(0, 255).astype(np.uint8))


def write_video(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "26", "preset": "veryslow"})
        stream.width, stream.height = VIDEO_SIZE
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # the same file on every machine
        for i in range(FRAMES):
            frame = av.VideoFrame.from_image(scene(i / (FRAMES - 1), *VIDEO_SIZE))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def main() -> None:
    INPUTS.mkdir(parents=True, exist_ok=True)
    for name, progress in (("start", 0.0), ("end", 1.0)):
        scene(progress).save(INPUTS / f"cogx_{name}.jpg", quality=88, optimize=True)
    write_video(INPUTS / "cogx_video.mp4")
    for path in sorted(INPUTS.iterdir()):
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
