"""The example inputs of the shipped workflows are those that scripts/make_inputs.py makes, and small."""

from __future__ import annotations

import pytest

np = pytest.importorskip("numpy", reason="pip install numpy, or run: python dev.py test")
av = pytest.importorskip("av", reason="pip install av, or run: python dev.py test")
Image = pytest.importorskip("PIL.Image", reason="pip install Pillow, or run: python dev.py test")

from cogx.scripts import make_inputs  # noqa: E402 - needs the packages above

FOLDER = make_inputs.INPUTS


def difference(found: Image.Image, expected: Image.Image) -> float:
    return float(np.abs(np.asarray(found, dtype=float) - np.asarray(expected, dtype=float)).mean())


def test_they_are_small():
    sizes = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sorted(sizes) == ["cogx_end.jpg", "cogx_start.jpg", "cogx_video.mp4"]
    assert max(sizes.values()) < 20_000


@pytest.mark.parametrize("name, progress", [("start", 0.0), ("end", 1.0)])
def test_pictures(name, progress):
    assert difference(Image.open(FOLDER / f"cogx_{name}.jpg"), make_inputs.scene(progress)) < 2


def test_video():
    with av.open(str(FOLDER / "cogx_video.mp4")) as container:
        frames = [frame.to_image() for frame in container.decode(video=0)]
    assert len(frames) == make_inputs.FRAMES
    for index in (0, 40, 80):
        scene = make_inputs.scene(index / (make_inputs.FRAMES - 1), *make_inputs.VIDEO_SIZE)
        assert difference(frames[index], scene) < 4
