"""Times the main path of this pack, of diffusers and of ComfyUI core, on random weights. See README.md beside this.

    COGX_COMFYUI=path/to/ComfyUI python benchmarks/run.py --output table.md
"""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def make_importable(tree: str | None) -> None:
    """The pack as ``cogx``, as ComfyUI would load it by path, and ComfyUI itself as ``comfy``."""
    hidden = ("", str(ROOT), str(ROOT / "benchmarks"))  # the folder nodes/ would hide ComfyUI's nodes.py
    sys.path[:] = [entry for entry in sys.path if entry not in hidden]
    pack = types.ModuleType("cogx")
    pack.__path__ = [str(ROOT)]
    sys.modules.setdefault("cogx", pack)
    if tree:
        sys.path.insert(0, tree)


if __name__ == "__main__":
    make_importable(os.environ.get("COGX_COMFYUI"))
    from cogx.benchmarks.command import main

    sys.exit(main())
