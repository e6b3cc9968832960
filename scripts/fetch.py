"""Downloads a published CogVideoX pipeline, or a part of it, from the Hugging Face hub. Needs huggingface_hub only.

    python scripts/fetch.py                                      what there is, how large, under which licence
    python scripts/fetch.py CogVideoX-5b --to ComfyUI/models/diffusers
    python scripts/fetch.py CogVideoX-5b-I2V --part transformer --to ComfyUI/models/diffusers

What was cut off goes on where it stopped; what is complete is left alone. HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE are
honoured. Exit code: 0 done, 1 failed, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from pack import make_importable


def main(arguments: Sequence[str] | None = None) -> int:
    from cogx.model_loaders.download import describe, download
    from cogx.model_loaders.published import CHOICES, REPOSITORIES
    from cogx.models.specs import SpecError

    parser = argparse.ArgumentParser(prog="fetch", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(REPOSITORIES)}")
    parser.add_argument("--part", choices=CHOICES, default="all")
    parser.add_argument("--to", type=Path, default=Path("."), help="the folder for pipelines, "
                        "such as ComfyUI/models/diffusers")
    options = parser.parse_args(arguments)
    root = options.to.expanduser().resolve()
    try:
        for name in [options.name] if options.name else REPOSITORIES:
            print(describe(name, options.part, root), flush=True)
        if options.name:
            print(download(options.name, options.part, root, lambda done, total, file: None))
    except (SpecError, ImportError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped. What has come is kept; run again to go on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    make_importable()
    sys.exit(main())
