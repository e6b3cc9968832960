"""Prompts against transformers' tokenizer and ``T5EncoderModel``: padded, no mask; ids equal, embeddings <= 1e-5."""

from __future__ import annotations

import logging

import pytest
from cogx.model_loaders.load import load_text_encoder, text_tokens_beside
from cogx.model_loaders.text_encoder import encode
from cogx.models.specs import SpecError

LONG = " ".join(f"word{i} (loud:1.4) embedding:none \\(" for i in range(60))
PROMPTS = ["A red circle glides from left to right.", "", "parentheses (really:1.5) and [brackets] stay", LONG]


@pytest.fixture(scope="module", params=["5B", "1.5-5B"])
def pair(request, tiny_pipelines):
    from transformers import T5EncoderModel, T5TokenizerFast

    folder = tiny_pipelines / request.param
    tokens = text_tokens_beside(folder / "text_encoder")
    clip = load_text_encoder(str(folder / "text_encoder"), max_tokens=tokens)
    tokenizer = T5TokenizerFast.from_pretrained(folder / "tokenizer")
    return clip, tokenizer, T5EncoderModel.from_pretrained(folder / "text_encoder").eval(), tokens


@pytest.mark.parametrize("prompt", PROMPTS, ids=["plain", "empty", "parentheses", "over-long"])
def test_prompt_equals_transformers(pair, prompt, error):
    clip, tokenizer, reference, tokens = pair
    options = {"padding": "max_length", "max_length": tokens, "truncation": True, "return_tensors": "pt"}
    expected = tokenizer(prompt, **options).input_ids
    ids = [token for token, _ in clip.tokenize(prompt)["t5xxl"][0]]
    assert ids == expected[0].tolist() and len(ids) == tokens
    conditioning, count = encode(clip, prompt, "encode")
    assert error(conditioning[0][0], reference(expected)[0]) <= 1e-5
    assert count.used == len(tokenizer(prompt).input_ids)


def test_published_tokenizer_folder(tiny_pipelines, tmp_path):
    """The published folders have spiece.model and no tokenizer.json, and no package here reads that."""
    import shutil

    folder = tmp_path / "published"
    shutil.copytree(tiny_pipelines / "5B", folder)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    (folder / "tokenizer" / "spiece.model").write_bytes(b"not read")
    published = load_text_encoder(str(folder / "text_encoder"))
    ours = load_text_encoder(str(tiny_pipelines / "5B" / "text_encoder"))
    assert published.tokenize(PROMPTS[0]) == ours.tokenize(PROMPTS[0])


def test_token_count(pair):
    assert pair[3] in (224, 226)
    _, count = encode(pair[0], "a cat", "encode")
    assert str(count) == f"{count.used} of {pair[3]} tokens"


def test_over_long_prompt_names_what_was_dropped(pair, caplog):
    clip, tokenizer, _, tokens = pair
    with caplog.at_level(logging.WARNING, logger="cogx"):
        _, count = encode(clip, LONG, "encode")
    assert count.used > tokens
    assert tokenizer.decode(tokenizer(LONG).input_ids[tokens - 1:-1]) == count.dropped
    assert count.dropped[:20] in caplog.text and f"cut to {tokens}" in caplog.text


def test_empty_as_zeros(pair):
    zeros, _ = encode(pair[0], "  ", "zeros")
    assert not zeros[0][0].any()
    assert encode(pair[0], "a cat", "zeros")[0][0][0].any()


def test_clip_of_another_family():
    class Foreign:
        tokenizer = cond_stage_model = object()

    with pytest.raises(SpecError, match=r"Expected the CLIP of a CogVideoX pipeline, or T5-XXL .* got one with object"):
        encode(Foreign(), "a cat", "encode")
