"""The loader nodes on a server: the authors' files are listed, run and explained, beside files with diffusers' keys."""

from __future__ import annotations

import json

import torch
from cogx.scripts.tiny_pipeline import tiny_transformer, tiny_vae
from cogx.tests.comfy.graphs import latent_only, text_to_video
from cogx.tests.layout_writers import sat_transformer, sat_vae
from safetensors.torch import save_file


def test_the_authors_files_give_the_same_video(server, saved_latent):
    models = server.base / "models"
    for category in ("diffusion_models", "vae"):
        (models / category).mkdir(parents=True, exist_ok=True)
    transformer = tiny_transformer("5B")
    torch.save({"module": sat_transformer(transformer)}, models / "diffusion_models" / "any.pt")
    save_file(transformer.state_dict(), models / "diffusion_models" / "other.safetensors")
    torch.save({"state_dict": sat_vae(tiny_vae("5B"))}, models / "vae" / "v.pt")
    listed = json.dumps(server.get("/object_info/CogXLoadModel"))
    assert '"any.pt"' in listed and '"other.safetensors"' in listed
    latents = []
    for name in ("any.pt", "other.safetensors"):
        graph = latent_only(text_to_video("5B", steps=2))
        graph["30"] = {"class_type": "CogXLoadModel", "inputs": {
            "checkpoint": name, "weight_dtype": "auto", "quantization": "none"}}
        for node in graph.values():
            if node["inputs"].get("model") == ["1", 0]:
                node["inputs"]["model"] = ["30", 0]
        run = server.run(graph)
        latents.append(saved_latent(server, run))
        text, = run.outputs["30"]["text"]
        layout = "authors (SAT)" if name == "any.pt" else "diffusers"
        known = ", with rotary frequencies)" if name == "any.pt" else ", but they do not tell"
        assert text.startswith(f"CogVideoX 5B (its shapes{known}") and f"{layout} layout, F32" in text
    assert torch.equal(*latents)
    assert "Loaded " in server.log and "authors (SAT) layout" in server.log
    graph = text_to_video("5B", steps=1)
    graph["31"] = {"class_type": "CogXLoadVAE", "inputs": {"vae": "v.pt", "weight_dtype": "auto"}}
    graph["6"]["inputs"]["vae"] = ["31", 0]
    text, = server.run(graph).outputs["31"]["text"]
    assert text.startswith("CogVideoX VAE (its shapes)") and "carry no scale, the MODEL has it" in text
