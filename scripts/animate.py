"""Makes an animated GIF of a video, enlarged without smoothing, for the README.

    python scripts/animate.py cogx_demo.mp4 docs/images/red_circle.gif

Run it with the host's Python (PyAV and Pillow come with ComfyUI).
"""
from __future__ import annotations

import argparse
from pathlib import Path

import av
from PIL import Image


def animate(video: Path, output: Path, scale: int = 3) -> None:
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        milliseconds = round(1000 / float(stream.average_rate))
        frames = [frame.to_image() for frame in container.decode(stream)]
    larger = [frame.resize((frame.width * scale, frame.height * scale), Image.Resampling.NEAREST) for frame in frames]
    # One palette for all frames: one of its own for each would flicker.
    palette = larger[0].quantize(128, method=Image.Quantize.MEDIANCUT)
    paletted = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in larger]
    output.parent.mkdir(parents=True, exist_ok=True)
    paletted[0].save(output, save_all=True, append_images=paletted[1:], duration=milliseconds, loop=0, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("video", type=Path)
    parser.add_argument("output", type=Path)
    options = parser.parse_args()
    animate(options.video, options.output)


if __name__ == "__main__":
    main()
