"""The MODEL, CLIP and VAE as ComfyUI's memory manager and multi-GPU code handle them. In process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import comfy.model_management
import pytest
import torch
from cogx.model_loaders import load

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture()
def pipeline(tiny_pipelines):
    return load.load_pipeline(str(tiny_pipelines / "5B"))


def test_deepclone_as_multi_gpu_does(pipeline):
    """Each patcher can make an independent copy of itself with the same weights, and keeps our wrapper."""
    import comfy.patcher_extension as extension

    model, clip, vae = pipeline
    for patcher in (model, clip.patcher, vae.patcher):
        copy = patcher.deepclone_multigpu(new_load_device=torch.device("cpu"))
        assert copy.model is not patcher.model
        ours, theirs = patcher.model.state_dict(), copy.model.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    clone = model.deepclone_multigpu()
    assert clone.get_wrappers(extension.WrappersMP.OUTER_SAMPLE, load.WRAPPER_KEY)


def test_clone_without_dynamic_loading(pipeline):
    """What TorchCompileModel and hooks ask for."""
    for patcher in (pipeline[0], pipeline[1].patcher, pipeline[2].patcher):
        assert patcher.clone(disable_dynamic=True).model is not None
        factory, arguments = patcher.cached_patcher_init[:2]
        assert type(factory(*arguments, disable_dynamic=True)) is comfy.model_patcher.ModelPatcher


def test_model_sampling_is_made_from_its_config_alone(pipeline):
    """Core's nodes rebuild it as ``cls(model_config)``."""
    sampling = pipeline[0].model.model_sampling
    again = type(sampling)(pipeline[0].model.model_config)
    assert torch.equal(again.sigmas, sampling.sigmas)
    assert 4500 < float(sampling.sigma_max) < 4530 and len(sampling.sigmas) == 1000


@pytest.mark.parametrize("variant", ["2B", "5B", "1.5-5B"])
def test_model_sampling_is_the_table_of_the_reference(tiny_pipelines, variant):
    """Sigmas of all timesteps but the last, where the reference's is infinite."""
    from diffusers import CogVideoXDDIMScheduler

    folder = tiny_pipelines / variant
    alphas = CogVideoXDDIMScheduler.from_pretrained(folder / "scheduler").alphas_cumprod[:-1]
    sigmas = load.load_model(str(folder / "transformer")).model.model_sampling.sigmas[:-1]
    assert torch.allclose(sigmas.double(), ((1 - alphas) / alphas).sqrt(), rtol=1e-6)


def test_vae_equals_diffusers(pipeline, tiny_pipelines):
    """Through ComfyUI's VAE: scaling to 0..1, layouts, batches of videos and a video as a batch of images."""
    from diffusers import AutoencoderKLCogVideoX

    vae = pipeline[2]
    reference = AutoencoderKLCogVideoX.from_pretrained(tiny_pipelines / "5B" / "vae")
    frames = torch.rand(2, 17, 64, 96, 3, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        encoded = vae.encode(frames)
        expected = reference.encode(frames.permute(0, 4, 1, 2, 3) * 2 - 1).latent_dist.mode()
        decoded = vae.decode(encoded)
        pixels = reference.decode(encoded).sample.permute(0, 2, 3, 4, 1)
    assert torch.allclose(encoded, expected, atol=1e-4)
    assert torch.allclose(vae.encode(frames[0]), encoded[:1], atol=1e-4)
    assert torch.allclose(decoded, (pixels / 2 + 0.5).clamp(0, 1), atol=1e-4)
    assert vae.encode(frames[:, :, :61, :93]).shape == (2, 16, 5, 7, 11)  # cropped to whole cells, no frame lost


def test_a_latent_holds_no_more_than_itself(pipeline):
    """The log variance beside the mean is freed, for one video and for several."""
    with torch.inference_mode():
        for count in (1, 2):
            latent = pipeline[2].encode(torch.rand(count, 9, 64, 96, 3))
            assert latent.is_contiguous()
            assert latent.untyped_storage().nbytes() == latent.numel() * latent.element_size()


def test_incomplete_text_encoder_is_refused(tiny_pipelines, tmp_path):
    from cogx.models.specs import SpecError
    from safetensors.torch import load_file, save_file

    weights = load_file(tiny_pipelines / "5B" / "text_encoder" / "model.safetensors")
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, tmp_path / "t5.safetensors")
    with pytest.raises(SpecError, match=r"1 of \d+ weights are missing, such as \['encoder.final_layer_norm.weight'\]"):
        load.load_text_encoder(str(tmp_path / "t5.safetensors"))


def test_context_windows_leave_the_text_whole(pipeline):
    """Core slices every condition whose third size is the number of frames: here 32, the width of the embedding."""
    import comfy.sample
    from cogx.samplers import adapter
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    model = ContextWindowsManualNode.execute(
        pipeline[0], context_length=8, context_overlap=2, context_schedule="standard_static", context_stride=1,
        closed_loop=False, fuse_method="pyramid", dim=2, freenoise=False).result[0]
    positive, negative = torch.randn(2, 1, 226, 32, generator=torch.Generator().manual_seed(5))
    noise = torch.randn(1, 16, 32, 4, 4, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        out = comfy.sample.sample_custom(
            model, noise, 6.0, adapter.sampler_object("cogvideox_ddim"), adapter.make_sigmas(model, 2, "trailing"),
            [[positive, {}]], [[negative, {}]], torch.zeros_like(noise), seed=0, disable_pbar=True)
    assert out.shape == noise.shape and torch.isfinite(out).all()


def test_previews_show_something(pipeline):
    import latent_preview
    from comfy.cli_args import LatentPreviewMethod, args

    previous, args.preview_method = args.preview_method, LatentPreviewMethod.Latent2RGB
    try:
        previewer = latent_preview.get_previewer(torch.device("cpu"), pipeline[0].model.latent_format)
    finally:
        args.preview_method = previous
    image = previewer.decode_latent_to_preview(torch.randn(1, 16, 5, 8, 12))
    assert image.size == (12, 8) and len(image.getcolors(10_000)) > 10


LOAD_SCRIPT = """
import sys, threading, time
sys.path.insert(0, {tests!r})
import conftest, torch
from cogx.model_loaders import load

def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) * 1024

peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.002)

load.{warm_up}
before = anonymous()
thread = threading.Thread(target=watch); thread.start()
kept = load.{call}
done.set(); thread.join()
print("RISE", peak - before)
"""


def rise_of_anonymous_memory(call: str, warm_up: str) -> int:
    script = LOAD_SCRIPT.format(tests=str(ROOT / "tests"), call=call, warm_up=warm_up)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300,
                          env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    return int(done.stdout.rsplit("RISE", 1)[1])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("dtype, layout", [("bf16", "diffusers"), ("fp32", "diffusers"), ("bf16", "SAT")])
def test_loading_takes_the_weights_once(tmp_path, tiny_pipelines, dtype, layout):
    """A transformer file of over 1 GB: the peak of anonymous memory rises by at most 1.2x its size. In the authors'
    layout a seventh of the weights is put together from pieces."""
    from cogx.tests.layout_writers import sat_transformer
    from diffusers import CogVideoXTransformer3DModel
    from safetensors.torch import save_file

    with torch.device("meta"):
        model = CogVideoXTransformer3DModel(num_attention_heads=48, num_layers=4 if dtype == "bf16" else 2,
                                            use_rotary_positional_embeddings=True)
    written = sat_transformer(model) if layout == "SAT" else model.state_dict()
    weights = {key: torch.zeros(value.shape, dtype=load.DTYPES[dtype]) for key, value in written.items()}
    path = tmp_path / "big"
    if layout == "SAT":
        torch.save({"module": weights}, path)
    else:
        save_file(weights, path := path.with_suffix(".safetensors"))
    del weights
    size = path.stat().st_size
    assert size >= 1e9
    warm = f"load_model({str(tiny_pipelines / '5B' / 'transformer')!r})"
    rise = rise_of_anonymous_memory(f"load_model({str(path)!r}, {dtype!r})", warm)
    path.unlink()
    assert rise <= 1.2 * size, f"{rise / size:.2f}x"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_text_takes_the_weights_once(tmp_path, tiny_pipelines):
    """A text encoder of over 1 GB, likewise."""
    from safetensors.torch import save_file
    from transformers import T5Config, T5EncoderModel

    with torch.device("meta"):
        encoder = T5EncoderModel(T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=2, num_heads=64,
                                          feed_forward_proj="gated-gelu"))
    path = tmp_path / "t5.safetensors"
    save_file({key: torch.zeros(value.shape, dtype=torch.float16) for key, value in encoder.state_dict().items()
               if key != "encoder.embed_tokens.weight"}, path)
    size = path.stat().st_size
    assert size >= 1e9
    warm = f"load_text_encoder({str(tiny_pipelines / '5B' / 'text_encoder')!r})"
    rise = rise_of_anonymous_memory(f"load_text_encoder({str(path)!r})", warm)
    path.unlink()
    assert rise <= 1.2 * size, f"{rise / size:.2f}x"
