"""Makes this pack importable as ``cogx`` for scripts that are run by their path."""

from __future__ import annotations

import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make_importable(*trees: str) -> None:
    """The pack as ``cogx``, as ComfyUI would load it by path; and what lies in ``trees``, such as a ComfyUI."""
    hidden = ("", str(ROOT), str(ROOT / "scripts"))  # the pack's folder nodes/ would hide ComfyUI's nodes.py
    sys.path[:] = [*trees, *(entry for entry in sys.path if entry not in hidden)]
    pack = types.ModuleType("cogx")
    pack.__path__ = [str(ROOT)]
    sys.modules.setdefault("cogx", pack)
