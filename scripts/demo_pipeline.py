"""Completes the embedded image-to-video pipelines from what they share with demo/CogX-Demo. Needs Python only.

    python scripts/demo_pipeline.py --pipeline CogX-Demo-I2V --output ComfyUI/models/diffusers/CogX-Demo-I2V

Git holds each file once: demo/CogX-Demo-I2V and demo/CogX-Demo-1.5-I2V have what differs, the rest is copied here.
"""
from __future__ import annotations

import argparse
import shutil
from pathlib import Path

DEMO = Path(__file__).resolve().parent.parent / "demo"
MAIN = "CogX-Demo"
OTHERS = ("CogX-Demo-I2V", "CogX-Demo-1.5-I2V")


def assemble(name: str, target: Path, demo: Path = DEMO) -> Path:
    """Writes the complete pipeline folder ``name`` to ``target``, which must not exist; returns it."""
    if name not in (MAIN, *OTHERS):
        raise ValueError(f"{name!r} is no embedded pipeline; there are {', '.join((MAIN, *OTHERS))}")
    for source in dict.fromkeys((demo / MAIN, demo / name)):
        for file in sorted(each for each in source.rglob("*") if each.is_file()):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)  # content only: the pack may be read-only, the copy must not be
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", choices=(MAIN, *OTHERS), required=True)
    parser.add_argument("--output", type=Path, required=True, help="the folder to make")
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output} exists already")
    print(assemble(options.pipeline, options.output))


if __name__ == "__main__":
    main()
