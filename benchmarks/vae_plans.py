"""The VAE under its plans: peak live memory at the published sizes, and CPU time against diffusers.

    COGX_COMFYUI=path/to/ComfyUI python benchmarks/vae_plans.py > docs/benchmarks/vae_plans.md
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from run import make_importable

PIXELS = {"decode 720x480, 49 frames": (49, 480, 720), "decode 1360x768, 81 frames": (81, 768, 1360),
          "encode 720x480, 49 frames": (49, 480, 720), "encode 1360x768, 1 frame": (1, 768, 1360),
          "encode 1360x768, 25 frames": (25, 768, 1360)}
ROUNDS = 3
TIMED = (17, 128, 192)


def counted_rows() -> list[str]:
    import comfy.ops
    import torch
    from cogx.benchmarks.live_memory import accounting
    from cogx.models.cogvideox.vae import CogVideoXVAENetwork
    from cogx.models.cogvideox.vae_plan import HOST, PARKED, Plan, decode_memory, encode_memory
    from cogx.models.specs import VAESpec

    spec, bf16 = VAESpec(), torch.bfloat16
    network = CogVideoXVAENetwork(spec, bf16, "meta", comfy.ops.disable_weight_init)
    rows = []
    for name, (frames, height, width) in PIXELS.items():
        for plan in (Plan(8), Plan(8, True), Plan(8, True, PARKED), Plan(8, True, HOST)):
            with accounting() as memory:
                if name.startswith("decode"):
                    latent = (frames - 1) // 4 + 1, height // 8, width // 8
                    with torch.device("meta"):
                        chunks = network.decode_chunks(memory.host((1, 16, *latent), bf16), plan, memory.host)
                    estimate = decode_memory(spec, latent, 2, plan)
                else:
                    pixels = memory.host((1, 3, frames, height, width), torch.float32)
                    chunks = network.encode_chunks(pixels, plan, memory.host, dtype=bf16)
                    estimate = encode_memory(spec, (frames, height, width), 2, plan)
                for chunk in chunks:
                    del chunk
            rows.append(f"| {name} | {plan} | {memory.peak / 1e9:.2f} | {estimate.device / 1e9:.2f} | "
                        f"{estimate.host / 1e9:.1f} |")
    return rows


def timed_rows() -> list[str]:
    import comfy.ops
    import torch
    from cogx.model_loaders.detect import vae_from_config
    from cogx.models.cogvideox.vae import CogVideoXVAENetwork
    from cogx.models.cogvideox.vae_plan import UNSPLIT, cpu_plan
    from diffusers import AutoencoderKLCogVideoX

    torch.set_num_threads(1)
    torch.manual_seed(0)
    reference = AutoencoderKLCogVideoX(
        block_out_channels=(128, 256, 256, 512), layers_per_block=3, latent_channels=16,
        down_block_types=("CogVideoXDownBlock3D",) * 4, up_block_types=("CogVideoXUpBlock3D",) * 4).eval()
    spec = vae_from_config({"_class_name": "AutoencoderKLCogVideoX", **reference.config})
    ours = CogVideoXVAENetwork(spec, torch.float32, "cpu", comfy.ops.disable_weight_init).eval()
    ours.load_state_dict(reference.state_dict())
    frames, height, width = TIMED
    z = torch.randn(1, 16, (frames - 1) // 4 + 1, height // 8, width // 8)
    plans = {"diffusers": None, "cogx, the plan for a CPU": cpu_plan(spec, 9), "cogx, unsplit": UNSPLIT}
    taken: dict[str, list[float]] = {name: [] for name in plans}
    with torch.inference_mode():
        for _ in range(ROUNDS):  # in turn, so that what else runs meets them all
            for name, plan in plans.items():
                taken[name].append(_seconds(lambda plan=plan: ours.decode(z, plan) if plan else reference.decode(z)))
    base = statistics.median(taken["diffusers"])
    return [f"| {name} | {statistics.median(seconds):.1f} s | {min(seconds):.1f} to {max(seconds):.1f} s | "
            f"{statistics.median(seconds) / base:.2f} |" for name, seconds in taken.items()]


def _seconds(run: Callable[[], Any]) -> float:
    """Of the processor, not of the clock."""
    start = time.process_time()
    run()
    return time.process_time() - start


def main() -> None:
    make_importable(os.environ.get("COGX_COMFYUI"))
    import comfy.options

    comfy.options.enable_args_parsing(False)
    import comfy.cli_args
    import torch

    comfy.cli_args.args.cpu = not torch.cuda.is_available()
    frames, height, width = TIMED
    lines = ["# The VAE's plans", "", f"`python benchmarks/vae_plans.py`, torch {torch.__version__}.", "",
             "Peak live memory in bf16, counted on the meta device with host memory apart, weights not counted; GB = "
             "10^9 bytes.", "", "| what | plan | counted GB | estimate GB | estimate of host memory GB |",
             "|---|---|---|---|---|", *counted_rows(), "",
             f"Process time of a decode of {width}x{height}, {frames} frames, fp32, one CPU thread, published widths, "
             f"random weights, {ROUNDS} rounds in turn.", "", "| what | median | from to | against diffusers |",
             "|---|---|---|---|", *timed_rows(), ""]
    sys.stdout.write("\n".join(lines))


if __name__ == "__main__":
    main()
