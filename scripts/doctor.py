"""Says what model files are, what is wrong with them, which node takes them, and what memory they will want here.

    python scripts/doctor.py --comfyui path/to/ComfyUI            this machine, and every model folder of that ComfyUI
    python scripts/doctor.py --comfyui path/to/ComfyUI PATH ...   these files or folders

Run it with the Python that runs ComfyUI. --comfyui may be left out if the pack lies in its custom_nodes.
Exit code: 0 all is well, 1 something is not.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from pack import ROOT, make_importable


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="doctor", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, metavar="PATH", help="default: all model folders")
    parser.add_argument("--comfyui", type=Path, default=ROOT.parent.parent, metavar="FOLDER")
    parser.add_argument("--base-directory", type=Path, metavar="FOLDER", help="as ComfyUI's own option")
    options = parser.parse_args(arguments)
    options.paths = [path.expanduser().resolve() for path in options.paths]
    if not (options.comfyui / "comfyui_version.py").is_file():
        parser.error(f"there is no ComfyUI in {options.comfyui.resolve()}: name its folder with --comfyui")
    return options


def start_comfyui(tree: Path, base: Path | None) -> None:
    """Imports ComfyUI as its main.py would set it up, as far as models go; without a server."""
    make_importable(str(tree))
    logging.disable(logging.WARNING)  # its greetings
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args
    import torch

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    if base:
        comfy.cli_args.args.base_directory = str(base.resolve())
    import folder_paths  # noqa: F401 - reads the option
    import utils.extra_config

    extra = tree / "extra_model_paths.yaml"
    if extra.is_file():
        utils.extra_config.load_extra_path_config(str(extra))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    start_comfyui(options.comfyui.resolve(), options.base_directory)
    from cogx.model_loaders.doctor import examine, survey
    from cogx.model_loaders.environment import environment

    lines, problems = environment()
    print("\n".join(lines))
    for report in [examine(path) for path in options.paths] if options.paths else survey():
        print("\n" + "\n".join(report.lines))
        problems += report.problems
    print(f"\n{problems} problem{'s' * (problems != 1)} found." if problems else "\nNo problems found.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
