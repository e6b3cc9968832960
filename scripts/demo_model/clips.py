"""The demo model's world: short clips of one coloured shape that moves over a background, and sentences about them.

Everything is drawn from a seed with numpy. Some combinations of shape, colour and motion are held out: no training clip
shows them, while every pair of attributes occurs in training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product

import numpy as np

WIDTH, HEIGHT, FRAMES, FPS = 96, 64, 17, 8

SHAPES = ("circle", "square", "triangle")
COLOURS: Mapping[str, tuple[int, int, int]] = {
    "red": (220, 30, 30), "green": (30, 190, 50), "blue": (40, 70, 230),
    "yellow": (235, 215, 30), "purple": (190, 40, 210), "cyan": (30, 210, 220),
}
# Unit vectors, x to the right and y down; "still" and "bounce" have tracks of their own.
DIRECTIONS: Mapping[str, tuple[float, float]] = {
    "left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0),
    "up right": (0.7071, -0.7071), "down left": (-0.7071, 0.7071),
}
MOTIONS = (*DIRECTIONS, "still", "bounce")
# Grey levels of the top and the bottom row. All are without colour, so colour belongs to the shape alone.
BACKGROUNDS: Mapping[str, tuple[int, int]] = {
    "dark": (25, 25), "grey": (115, 115), "light": (225, 225), "gradient": (30, 200),
}
# Pixels travelled, and bounces.
SPEEDS: Mapping[str, tuple[float, float]] = {"slow": (11, 1.0), "normal": (19, 1.5), "fast": (28, 2.0)}
RADIUS = (10.0, 13.0)  # of the circle with the shape's area, in pixels
_MARGIN = 1.0

ATTRIBUTES: Mapping[str, tuple[str, ...]] = {
    "shape": SHAPES, "colour": tuple(COLOURS), "motion": MOTIONS, "background": tuple(BACKGROUNDS),
    "speed": tuple(SPEEDS),
}


@dataclass(frozen=True)
class Scene:
    """What a clip shows; in a description, None is what it leaves open."""

    shape: str | None
    colour: str | None
    motion: str | None
    background: str | None
    speed: str | None = "normal"


def _held_out() -> frozenset[tuple[str, str, str]]:
    """A sixth of the triples, so spread that each pair of attributes keeps most of its partners."""
    indexed = product(enumerate(SHAPES), enumerate(COLOURS), enumerate(MOTIONS))
    return frozenset((shape, colour, motion) for (s, shape), (c, colour), (m, motion) in indexed
                     if (2 * s + c + m) % 6 == 0)


HELD_OUT = _held_out()


def held_out_scenes() -> list[Scene]:
    """48 scenes: each held-out triple over two of the four backgrounds, at normal speed."""
    names = list(BACKGROUNDS)
    return [Scene(*triple, names[(index + shift) % 4]) for index, triple in enumerate(sorted(HELD_OUT))
            for shift in (0, 2)]


def training_scene(rng: np.random.Generator) -> Scene:
    """A scene whose triple is not held out."""
    while True:
        scene = Scene(**{name: str(rng.choice(values)) for name, values in ATTRIBUTES.items()})
        if (scene.shape, scene.colour, scene.motion) not in HELD_OUT:
            return scene


# --- Pictures ---


def distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance in pixels to the shape's edge, positive inside; the area is that of a circle of ``radius``."""
    if shape == "circle":
        return radius - np.hypot(x, y)
    if shape == "square":
        return radius * np.sqrt(np.pi) / 2 - np.maximum(np.abs(x), np.abs(y))
    inradius = radius * np.sqrt(np.pi / (3 * np.sqrt(3)))  # an equilateral triangle, its tip up
    side = np.abs(x) * np.sqrt(3) / 2 - y / 2
    return inradius - np.maximum(side, y)


def _extent(shape: str, radius: float) -> tuple[float, float, float]:
    """How far the shape reaches from its centre: sideways, up, down."""
    if shape == "circle":
        return radius, radius, radius
    if shape == "square":
        half = radius * float(np.sqrt(np.pi)) / 2
        return half, half, half
    inradius = radius * float(np.sqrt(np.pi / (3 * np.sqrt(3))))
    return inradius * float(np.sqrt(3)), 2 * inradius, inradius


def coverage(shape: str, centre: tuple[float, float], radius: float) -> np.ndarray:
    """How much of each pixel the shape covers: [HEIGHT, WIDTH], 0 to 1."""
    y, x = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    return np.clip(distance(shape, x - centre[0], y - centre[1], radius) + 0.5, 0.0, 1.0)


def track(scene: Scene, radius: float, rng: np.random.Generator) -> np.ndarray:
    """The centre of the shape in every frame: [FRAMES, 2], x and y in pixels; the shape never leaves the frame."""
    assert scene.shape and scene.motion and scene.speed
    pixels, bounces = SPEEDS[scene.speed]
    pixels += rng.uniform(-2, 2)
    time = np.linspace(0.0, 1.0, FRAMES)
    if scene.motion == "still":
        path = np.zeros((FRAMES, 2))
    elif scene.motion == "bounce":
        height = rng.uniform(22, 28)
        path = np.stack([np.zeros(FRAMES), -height * np.abs(np.sin(np.pi * bounces * time))], 1)
    else:
        path = np.outer(time * pixels, DIRECTIONS[scene.motion])
    low, high = _room(scene.shape, radius, path)
    return path + rng.uniform(low, high)


def _room(shape: str, radius: float, path: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and the highest start (x, y) from which the shape stays in the frame on its path."""
    side, up, down = _extent(shape, radius)
    low = np.array([side, up]) + _MARGIN - path.min(0)
    high = np.array([WIDTH - side, HEIGHT - down]) - _MARGIN - path.max(0)
    return low, high


def _paint(scene: Scene, centres: np.ndarray, radius: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    assert scene.shape and scene.colour and scene.background
    rows = np.linspace(*BACKGROUNDS[scene.background], HEIGHT) + rng.uniform(-8, 8)
    background = np.broadcast_to(rows[:, None, None], (HEIGHT, WIDTH, 3))
    colour = np.array(COLOURS[scene.colour], float) + rng.uniform(-10, 10, 3)
    covered = np.stack([coverage(scene.shape, (x, y), radius) for x, y in centres])
    frames = background + covered[..., None] * (colour - background)
    return np.clip(np.rint(frames), 0, 255).astype(np.uint8), covered


def render(scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A clip of the scene: frames [FRAMES, HEIGHT, WIDTH, 3] uint8, and coverage [FRAMES, HEIGHT, WIDTH] float."""
    radius = rng.uniform(*RADIUS)
    return _paint(scene, track(scene, radius, rng), radius, rng)


def first_frame(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A picture of the scene's shape where it has room for a slow motion in any direction: uint8 [HEIGHT, WIDTH, 3]."""
    assert scene.shape
    radius = rng.uniform(*RADIUS)
    farthest = SPEEDS["slow"][0] + 2
    low, high = _room(scene.shape, radius, np.array([[-farthest, -farthest], [farthest, farthest]]))
    return _paint(scene, rng.uniform(low, high)[None], radius, rng)[0][0]


# --- Sentences ---

_MOTION_PHRASES: Mapping[str, tuple[str, ...]] = {
    "left": ("moves to the left", "glides from right to left", "slides left"),
    "right": ("moves to the right", "glides from left to right", "slides right"),
    "up": ("moves up", "rises from bottom to top", "glides upwards"),
    "down": ("moves down", "sinks from top to bottom", "glides downwards"),
    "up right": ("moves diagonally up to the right", "glides up and to the right", "climbs diagonally to the right"),
    "down left": ("moves diagonally down to the left", "glides down and to the left", "sinks diagonally to the left"),
    "still": ("stays still", "does not move", "rests in place"),
    "bounce": ("bounces up and down", "bounces", "keeps bouncing"),
}
_BACKGROUND_PHRASES: Mapping[str, tuple[str, ...]] = {
    "dark": ("a dark background", "a black background"), "grey": ("a grey background", "a plain grey background"),
    "light": ("a light background", "a white background"),
    "gradient": ("a gradient background", "a background that fades from dark to light"),
}
_SPEED_PHRASES: Mapping[str, tuple[str, ...]] = {"slow": ("slowly", "at a slow pace"), "normal": ("",),
                                                 "fast": ("quickly", "fast")}


def describe(scene: Scene, rng: np.random.Generator) -> str:
    """An English sentence about what the scene says; what is None is left out."""
    subject = " ".join(word for word in (scene.colour, scene.shape or "shape") if word)
    motion = str(rng.choice(_MOTION_PHRASES[scene.motion])) if scene.motion else ""
    adverb = str(rng.choice(_SPEED_PHRASES[scene.speed])) if scene.speed and scene.motion else ""
    place = str(rng.choice(_BACKGROUND_PHRASES[scene.background])) if scene.background else ""
    preposition = str(rng.choice(("over", "on", "in front of")))
    action = f"{motion} {adverb}".strip()
    forms = [[f"A {subject}", action, f"{preposition} {place}" if place else ""]]
    if place:
        forms.append([f"{preposition.capitalize()} {place}, a {subject}", action])
    if action:
        forms.append([f"A video of a {subject} that", action, f"{preposition} {place}" if place else ""])
    words = forms[int(rng.integers(len(forms)))]
    return " ".join(word for word in words if word) + str(rng.choice((".", "")))


def partial(scene: Scene, rng: np.random.Generator) -> Scene:
    """The scene with one to three attributes left open, so that each attribute is learnt by itself too."""
    chosen = rng.choice(["shape", "colour", "motion", "background"], int(rng.integers(1, 4)), replace=False)
    opened = {**asdict(scene), **dict.fromkeys(map(str, chosen))}
    if opened["motion"] is None:
        opened["speed"] = None
    return Scene(**opened)
