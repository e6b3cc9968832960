"""RIFLEx and global positions: against the paper's formula, and through diffusers' network with it in its RoPE."""

from __future__ import annotations

import math

import pytest
import torch
from cogx.model_loaders import load
from cogx.models.cogvideox.positions import (
    PLACE_KEY,
    RIFLEX_KEY,
    Place,
    Riflex,
    intrinsic_frequency,
    rope_grid,
    rope_matrices,
    time_frequencies,
)
from cogx.models.specs import PUBLISHED, SpecError
from cogx.samplers.long_video import with_riflex
from cogx.tests.numeric.test_transformer import inputs, pair, run_reference

CPU = torch.device("cpu")


def reference_angles(dim: int, positions: torch.Tensor, k: int | None, length: int) -> torch.Tensor:
    """RIFLEx, eq. 8 and the authors' README: theta_k = 0.9 * 2 pi / L_test; the others as in RoPE. [N, dim/2]."""
    theta = torch.tensor([10000.0 ** (-2 * j / dim) for j in range(dim // 2)], dtype=torch.float64)
    if k is not None:
        theta[k - 1] = 0.9 * 2 * math.pi / length
    return positions.double()[:, None] * theta


@pytest.mark.parametrize("name, frames, k", [("5B", 97, 2), ("5B", 145, 2), ("5B", 81, 2), ("1.5-5B", 513, 3),
                                             ("1.5-5B-I2V", 641, 3)])
def test_the_papers_formula(name, frames, k):
    """Every angle of time; 5B's 97 frames are 25 latent frames, 1.5's 513 are 65 tokens."""
    spec = PUBLISHED[name]
    count = (frames - 1) // spec.token_frames + 1
    trained = (spec.max_frames - 1) // spec.token_frames + 1
    network = spec.transformer
    riflex = Riflex(intrinsic_frequency(network, trained))
    assert riflex.k == k
    grid = (count, 2, 3)
    made = rope_matrices(network, rope_grid(network, grid, CPU), 4, time_frequencies(network, count, CPU, riflex))
    time = made[0, 4:, 0, :8].unflatten(0, grid)[:, 0, 0]  # [T, dim/2, 2, 2]
    angles = reference_angles(16, torch.arange(count), k, count)
    assert torch.allclose(time[..., 0, 0].double(), angles.cos(), atol=2e-5)
    assert torch.allclose(time[..., 1, 0].double(), angles.sin(), atol=2e-5)
    lowered = float(riflex.lowered(time_frequencies(network, count, CPU, None), count)[k - 1])
    assert lowered == pytest.approx(0.9 * 2 * math.pi / count, rel=1e-7)
    plain = rope_matrices(network, rope_grid(network, grid, CPU), 4)
    assert torch.equal(made[..., 8:, :, :], plain[..., 8:, :, :]), "rows and columns are as they were"


@pytest.mark.parametrize("trained, dim, expected", [(13, 64, 2), (21, 64, 3)])
def test_intrinsic_frequency(trained, dim, expected):
    """CogVideoX 1.0: 2, as the paper says (period 20); 1.5, 161 frames: 3 (period 63)."""
    assert intrinsic_frequency(PUBLISHED["5B"].transformer, trained) == expected


@pytest.mark.parametrize("frames, same", [(77, True), (81, False)])
def test_left_alone_within_a_period(frames, same):
    """20 latent frames of 5B are one period; weights that were fine-tuned for RIFLEx always have their frequency."""
    network, count = PUBLISHED["5B"].transformer, (frames - 1) // 4 + 1
    plain = time_frequencies(network, count, CPU, None)
    assert torch.equal(time_frequencies(network, count, CPU, Riflex(2)), plain) == same
    tuned = time_frequencies(network, 13, CPU, Riflex(2, 37))
    assert float(tuned[1]) == pytest.approx(0.9 * 2 * math.pi / 37, rel=1e-7)


@pytest.mark.parametrize("variant, size", [("5B", (25, 8, 12)), ("1.5-5B", (26, 6, 8)), ("1.5-5B-I2V", (25, 8, 12))])
def test_diffusers_network_with_riflex(monkeypatch, error, variant, size):
    from diffusers.models import embeddings

    ours, reference = pair(variant)
    given = inputs(reference, size)
    plain = run_reference(reference, *given)
    usual, count = embeddings.get_1d_rotary_pos_embed, -(-size[0] // ours.spec.temporal_patch)

    def lowered(dim, pos, *args, **kwargs):
        if dim != ours.spec.attention_head_dim // 4:  # rows and columns
            return usual(dim, pos, *args, **kwargs)
        angles = reference_angles(dim, torch.as_tensor(pos), 1, count).repeat_interleave(2, dim=1)
        return angles.cos().float(), angles.sin().float()

    monkeypatch.setattr(embeddings, "get_1d_rotary_pos_embed", lowered)
    expected = run_reference(reference, *given)
    made = ours(*given, transformer_options={RIFLEX_KEY: Riflex(1)})
    assert error(made, expected) <= 1e-5 < error(made, plain)


@pytest.mark.parametrize("variant", ["5B", "1.5-5B", "2B"])
def test_global_positions(monkeypatch, error, variant):
    """A window of a longer video: diffusers' network with the rows of the whole video's table that are the window's."""
    from cogx.tests.numeric import test_transformer

    ours, reference = pair(variant)
    given = inputs(reference, (6, 8, 12))
    frames, total = (18, 19, 20, 21, 0, 1), 22  # over the end, as looped windows go
    made = ours(*given, transformer_options={PLACE_KEY: Place(frames, total)})
    patch = ours.spec.temporal_patch
    rows = [frame // patch for frame in frames[::patch]]
    if variant == "2B":
        usual = reference.patch_embed._get_positional_embeddings
        text = reference.config.max_text_seq_length

        def sliced(height, width, count, **kwargs):
            table = usual(height, width, 4 * (total - 1) + 1, **kwargs)
            video = table[:, text:].unflatten(1, (total, -1))[:, rows].flatten(1, 2)
            return torch.cat([table[:, :text], video], dim=1)

        monkeypatch.setattr(reference.patch_embed, "_get_positional_embeddings", sliced)
        monkeypatch.setattr(reference.patch_embed, "sample_frames", 0)  # so that the table is computed
    else:
        usual = test_transformer.reference_rope

        def rope(model, count, height, width):
            return [part.unflatten(0, (total // patch, -1))[rows].flatten(0, 1)
                    for part in usual(model, total, height, width)]

        monkeypatch.setattr(test_transformer, "reference_rope", rope)
    assert error(made, run_reference(reference, *given)) <= 1e-5 < error(made, ours(*given))


def test_on_a_model(tiny_pipelines):
    """A clone that knows its frequency; models without rotary positions alone are refused, in words."""
    models = {v: load.load_model(str(tiny_pipelines / v / "transformer")) for v in ("5B", "2B", "5B-I2V")}
    made = with_riflex(models["5B"], 0, 0)
    assert made.model_options["transformer_options"][RIFLEX_KEY] == Riflex(1)
    assert RIFLEX_KEY not in models["5B"].model_options["transformer_options"]
    assert with_riflex(made, 2, 145).model_options["transformer_options"][RIFLEX_KEY] == Riflex(2, 37)
    for name, message in (("2B", "expected a model with rotary positions, got CogVideoX 2B, which has sinusoidal ones"),
                          ("5B-I2V", "got CogVideoX 5B-I2V, which has learned ones for 17 frames too")):
        with pytest.raises(SpecError, match=message):
            with_riflex(models[name], 0, 0)
    with pytest.raises(SpecError, match=r"k 5: CogVideoX 5B has 2 frequencies of time; nearest: 2\."):
        with_riflex(models["5B"], 5, 0)
