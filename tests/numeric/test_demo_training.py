"""The demo model's training: what it optimises is what samples, and a run that was cut off goes on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cogx.scripts.demo_model import clips, evaluate, latents, networks, runs, train_text, train_transformer, train_vae
from cogx.scripts.demo_model.networks import VARIANTS
from cogx.scripts.demo_model.sampling import condition


@pytest.fixture(autouse=True)
def inference() -> None:
    """In place of the other comparisons': training needs gradients."""


@pytest.fixture(scope="module")
def tokenizer(comfyui_tree: Path) -> Any:
    from transformers import T5TokenizerFast

    return T5TokenizerFast.from_pretrained(comfyui_tree / "comfy" / "text_encoders" / "t5_tokenizer")


@pytest.fixture(scope="module")
def prepared(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with an untrained VAE, a hardly trained text encoder and a few encoded clips."""
    work = tmp_path_factory.mktemp("work")
    torch.manual_seed(0)
    runs.write(work / "vae.pt", {"network": networks.make_vae().state_dict(), "step": train_vae.STEPS})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_text, "BATCH", 16)
        patch.setattr(train_text, "STEPS", 2)
        patch.setattr(latents, "SHARD_CLIPS", 8)
        patch.setattr(latents, "SHARDS", 1)
        train_text.train(work, tokenizer, steps=2)
        latents.prepare(work, train_vae.load(work))
        yield work


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(train_transformer, "BATCH", 4)
    monkeypatch.setattr(train_transformer, "scores", lambda *arguments: [])


class CutOff(Exception):
    """Ends a run as a kill would."""


def states(work: Path, name: str) -> dict[str, torch.Tensor]:
    state = runs.read(work / f"{name}.pt")
    return {**state["network"], **{f"average.{key}": value for key, value in state.get("average", {}).items()}}


@pytest.mark.parametrize("name", list(VARIANTS))
def test_a_transformer_run_that_was_cut_off_goes_on_bit_for_bit(prepared, tokenizer, monkeypatch, name):
    start = VARIANTS[name].start
    if start:
        average = runs.Average(networks.make_transformer(VARIANTS[start]), 0.9)
        runs.write(prepared / f"{start}.pt", {"step": VARIANTS[start].steps, "average": average.weights})
    train_transformer.train(prepared, name, tokenizer, steps=4)
    whole = states(prepared, name)
    (prepared / f"{name}.pt").unlink()
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0.0)  # after every step
    original = train_transformer.loss_of
    calls = []

    def cut(*arguments: Any) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 3:
            raise CutOff
        return original(*arguments)

    monkeypatch.setattr(train_transformer, "loss_of", cut)
    with pytest.raises(CutOff):
        train_transformer.train(prepared, name, tokenizer, steps=4)
    train_transformer.train(prepared, name, tokenizer, steps=4)
    again = states(prepared, name)
    assert whole.keys() == again.keys() and all(torch.equal(whole[key], again[key]) for key in whole)


def test_a_vae_run_that_was_cut_off_goes_on_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(train_vae, "evaluate", lambda vae: 0.0)
    monkeypatch.setattr(train_vae, "CROPS", 1)
    monkeypatch.setattr(train_vae, "WHOLE_CLIPS", 1)
    original_normalise = train_vae.normalise
    monkeypatch.setattr(train_vae, "normalise", lambda vae: original_normalise(vae, scenes=4))
    train_vae.train(tmp_path / "whole", steps=4)
    monkeypatch.setattr(runs, "CHECKPOINT_SECONDS", 0.0)
    original, calls = train_vae.loss_of, []

    def cut(*arguments: Any) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 4:
            raise CutOff
        return original(*arguments)

    monkeypatch.setattr(train_vae, "loss_of", cut)
    with pytest.raises(CutOff):
        train_vae.train(tmp_path / "cut", steps=4)
    train_vae.train(tmp_path / "cut", steps=4)
    whole, again = states(tmp_path / "whole", "vae"), states(tmp_path / "cut", "vae")
    assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_normalisation_centres_the_latents_and_keeps_their_relative_noise():
    torch.manual_seed(0)
    vae = train_vae.make().eval()
    pixels = train_vae.to_pixels(clips.render(clips.held_out_scenes()[0], np.random.default_rng(0))[0][None])
    with torch.no_grad():
        before = vae.encode(pixels).latent_dist
        train_vae.normalise(vae, scenes=8)
        after = vae.encode(pixels).latent_dist
    scaled = after.mean * networks.SCALING_FACTOR
    assert abs(float(scaled.mean())) < 0.5 and abs(float(scaled.std()) - 1) < 0.5
    assert abs(float(before.mean.std()) - float(after.mean.std())) > 0.1  # there was something to do
    relative = [float((posterior.std[:, 3] / posterior.mean[:, 3].std()).mean()) for posterior in (before, after)]
    assert relative[0] == pytest.approx(relative[1], rel=1e-3)


def test_the_network_that_predicts_perfectly_has_no_loss():
    """v-prediction on the scheduler's own terms, with and without the shape's weight."""
    scheduler = networks.make_scheduler()
    x, noise = torch.randn(2, 5, 16, 8, 12), torch.randn(2, 5, 16, 8, 12)
    timesteps = torch.tensor([999, 300])
    target = scheduler.get_velocity(x, noise, timesteps)

    class Perfect(torch.nn.Module):
        config = type("Config", (), {"ofs_embed_dim": None})

        def forward(self, *arguments: Any, **keywords: Any) -> tuple[torch.Tensor]:
            return (target,)

    batch = {"x": x, "noise": noise, "timesteps": timesteps, "text": torch.zeros(2, 32, 32),
             "weight": torch.rand(2, 5, 8, 12)}
    assert float(train_transformer.loss_of(Perfect(), scheduler, None, batch)) == 0.0
    assert torch.equal(target[0], -x[0])  # all is noise at 999: v is minus the clip
    wrong = {**batch, "x": x + 1}
    assert float(train_transformer.loss_of(Perfect(), scheduler, None, wrong)) > 0.1


def test_conditions_are_placed_and_scaled_as_published():
    image = torch.randn(2, 16, 8, 12)
    first, later = condition(VARIANTS["5B-I2V"], image).split([1, 4], 1)
    assert torch.equal(first[:, 0], image * 0.7) and not later.any()
    padding, frames = condition(VARIANTS["1.5-5B-I2V"], image).split([1, 5], 1)
    assert torch.equal(padding[:, 0], image) and not frames.any()


def test_noise_augmentation_is_log_normal():
    images = torch.zeros(4000, 1, 1, 4, 4)
    spread = latents.noised(images, torch.Generator().manual_seed(0)).std((1, 2, 3, 4)).log()
    assert abs(float(spread.mean()) + 3.0) < 0.06 and abs(float(spread.std()) - 0.5) < 0.1


def test_positions_are_those_of_diffusers_pipelines():
    from diffusers import CogVideoXImageToVideoPipeline

    pipeline = CogVideoXImageToVideoPipeline.__new__(CogVideoXImageToVideoPipeline)
    for name, frames in (("5B", 5), ("1.5-5B-I2V", 6)):
        transformer = networks.make_transformer(VARIANTS[name])
        object.__setattr__(pipeline, "transformer", transformer)
        object.__setattr__(pipeline, "vae_scale_factor_spatial", 8)
        wanted = pipeline._prepare_rotary_positional_embeddings(64, 96, frames, torch.device("cpu"))
        for ours, theirs in zip(networks.positions(transformer, torch.device("cpu")), wanted, strict=True):
            assert torch.equal(ours, theirs)


def test_nothing_is_built_on_what_is_not_finished(prepared, tokenizer, tmp_path, monkeypatch):
    (prepared / "5B.pt").unlink(missing_ok=True)
    train_transformer.train(prepared, "5B", tokenizer, steps=1)
    with pytest.raises(RuntimeError, match=r"5B is at step 1 of \d+"):
        train_transformer.load(prepared, "5B")
    with pytest.raises(RuntimeError, match=r"5B-I2V is at step 0 of \d+"):
        train_transformer.make(VARIANTS["1.5-5B-I2V"], tmp_path)
    monkeypatch.setattr(latents, "SHARDS", 2)
    with pytest.raises(RuntimeError, match="1 of 2 parts"):
        latents.load(prepared)
    for load in (train_vae.load, train_text.load):
        with pytest.raises(RuntimeError, match="is at step 0 of"):
            load(tmp_path)


def test_a_text_encoder_that_is_done_is_left_alone(prepared, tokenizer):
    before = (prepared / "text.pt").read_bytes()
    train_text.train(prepared, tokenizer, steps=2)
    assert (prepared / "text.pt").read_bytes() == before


def test_dropped_prompts_are_empty_or_zero(prepared, tokenizer, monkeypatch):
    monkeypatch.setattr(train_transformer, "BATCH", 400)
    data, encoder = latents.load(prepared), train_text.load(prepared)
    batches = train_transformer.Batches(VARIANTS["5B"], data, encoder, tokenizer, seed=1)
    chosen = np.zeros(400, int)
    text = batches.text(np.random.default_rng(0), chosen)
    empty = train_transformer.embed(encoder, tokenizer, [""])
    zeros = int((text == 0).flatten(1).all(1).sum())
    same = int((text == empty).flatten(1).all(1).sum())
    assert 8 <= zeros <= 34 and 8 <= same <= 34  # 5 % of 400 each


def test_scores_judges_the_averaged_network(prepared, tokenizer, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(train_text, "STEPS", 2)
    cases = evaluate.image_cases()[:2]
    monkeypatch.setattr(evaluate, "image_cases", lambda: cases)
    judged = []
    true = {case.seed: clips.render(case.scene, np.random.default_rng(0))[0] for case in cases}
    monkeypatch.setattr(train_transformer, "generator_of",
                        lambda variant, networks, cases: judged.append(networks) or (lambda case: true[case.seed]))
    variant = VARIANTS["5B-I2V"]
    average = runs.Average(networks.make_transformer(variant), 0.9)
    (values,) = train_transformer.scores(prepared, variant, average, tokenizer)
    assert (values["shape"], values["colour"], values["motion"]) == (1.0, 1.0, 1.0)
    weights = dict(judged[0]["transformer"].named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in average.weights.items())
