"""The T5 encoder as a ComfyUI CLIP: ComfyUI's T5 network, the token count of the model, no attention mask.

CogVideoX was trained with padding tokens attended to (FACTS: no mask), and reads parentheses as text, so the tokenizer
here pads and cuts to a fixed length and parses neither weights nor embeddings.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.text_encoders.t5
import torch

from ..models.specs import PUBLISHED, SpecError, TextSpec
from ..models.turns import TURN, prompts_of

log = logging.getLogger("cogx")

CLIP_NAME = "t5xxl"
_ACTIVATIONS = {"gated-gelu": ("gelu_pytorch_tanh", True), "relu": ("relu", False), "gated-relu": ("relu", True)}


def network_config(spec: TextSpec) -> dict[str, Any]:
    """The config dict of ``comfy.text_encoders.t5.T5``."""
    activation, gated = _ACTIVATIONS[spec.feed_forward_proj]
    return {
        "num_layers": spec.num_layers, "d_model": spec.d_model, "d_kv": spec.d_kv, "num_heads": spec.num_heads,
        "d_ff": spec.d_ff, "dense_act_fn": activation, "is_gated_act": gated, "model_type": "t5",
        "vocab_size": spec.vocab_size,
    }


@dataclass(frozen=True)
class TokenCount:
    """How a prompt fits: tokens it has (end mark included), tokens the model takes, and the words cut off."""

    used: int
    limit: int
    dropped: str

    def __str__(self) -> str:
        if not self.dropped:
            return f"{self.used} of {self.limit} tokens"
        return f"{self.used} tokens, cut to {self.limit}; dropped from: \"{self.dropped[:60]}\""


class FixedLengthTokenizer:
    """T5's tokenizer, padded and cut to ``max_tokens``, in the shape that ComfyUI's CLIP expects."""

    def __init__(self, folder: Path, max_tokens: int) -> None:
        from transformers import T5TokenizerFast

        self.max_tokens = max_tokens
        try:
            self.hf = T5TokenizerFast.from_pretrained(str(folder))
        except (OSError, ValueError) as error:
            raise SpecError(f"The tokenizer in {folder} cannot be read ({error}). Download it again.") from error

    def of_length(self, max_tokens: int) -> FixedLengthTokenizer:
        other = copy.copy(self)
        other.max_tokens = max_tokens
        return other

    def tokenize_with_weights(self, text: str, return_word_ids: bool = False, **kwargs: Any) -> dict[str, Any]:
        ids = self.hf(text, padding="max_length", max_length=self.max_tokens, truncation=True)["input_ids"]
        tokens = [(int(i), 1.0, 0) if return_word_ids else (int(i), 1.0) for i in ids]
        return {CLIP_NAME: [tokens]}

    def count(self, text: str) -> TokenCount:
        ids = self.hf(text, verbose=False)["input_ids"]
        dropped = "" if len(ids) <= self.max_tokens else self.hf.decode(ids[self.max_tokens - 1:-1])
        return TokenCount(len(ids), self.max_tokens, dropped)

    def untokenize(self, token_weight_pair: list[tuple[Any, ...]]) -> list[tuple[Any, str]]:
        return [(pair, self.hf.convert_ids_to_tokens(pair[0])) for pair in token_weight_pair]

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        return self.hf.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def state_dict(self) -> dict[str, Any]:
        return {}


def _network_class(spec: TextSpec) -> type[comfy.sd1_clip.SD1ClipModel]:
    config = network_config(spec)

    class T5Encoder(comfy.sd1_clip.SDClipModel):
        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(device=device, dtype=dtype, textmodel_json_config=dict(config),
                             special_tokens={"end": 1, "pad": 0}, model_class=comfy.text_encoders.t5.T5,
                             model_options=model_options or {})

    class CogVideoXTextModel(comfy.sd1_clip.SD1ClipModel):
        text_spec = spec

        def __init__(self, device: Any = "cpu", dtype: Any = None, model_options: Any = None) -> None:
            super().__init__(device=device, dtype=dtype, name=CLIP_NAME, clip_model=T5Encoder,
                             model_options=model_options or {})

    return CogVideoXTextModel


def make_clip(state_dict: dict[str, torch.Tensor], spec: TextSpec, tokenizer_folder: Path, max_tokens: int,
              dtype: torch.dtype, disable_dynamic: bool = False, operations: Any = None) -> comfy.sd.CLIP:
    """A CLIP whose prompts are ``max_tokens`` long. ``state_dict`` has transformers' key names; ``operations`` are the
    layer types of quantized weights."""
    if "shared.weight" not in state_dict and "encoder.embed_tokens.weight" in state_dict:
        state_dict["shared.weight"] = state_dict.pop("encoder.embed_tokens.weight")
    state_dict.pop("encoder.embed_tokens.weight", None)
    target = comfy.supported_models_base.ClipTarget(
        lambda embedding_directory=None, tokenizer_data=None: FixedLengthTokenizer(tokenizer_folder, max_tokens),
        _network_class(spec))
    parameters = sum(t.numel() for t in state_dict.values())
    # A list: ComfyUI loads nothing from a bare dict here.
    return comfy.sd.CLIP(target, parameters=parameters, state_dict=[state_dict], disable_dynamic=disable_dynamic,
                         model_options={"dtype": dtype, "custom_operations": operations})


def default_tokenizer_folder() -> Path:
    """ComfyUI's own T5 tokenizer, which is that of the published folders."""
    return Path(comfy.text_encoders.t5.__file__).parent / "t5_tokenizer"


def tokenizer_of(clip: comfy.sd.CLIP, max_tokens: int | None = None) -> FixedLengthTokenizer:
    """What cuts and pads the prompt: the CLIP's own, or one for a T5-XXL that core's loaders made, with 226 tokens.

    Raises:
        SpecError: a CLIP without such an encoder, or one that masks the padding.
    """
    own = clip.tokenizer
    if isinstance(own, FixedLengthTokenizer):
        return own if max_tokens in (None, own.max_tokens) else own.of_length(max_tokens)
    encoder = getattr(clip.cond_stage_model, CLIP_NAME, None)
    if encoder is None or not isinstance(encoder.transformer, comfy.text_encoders.t5.T5):
        raise SpecError(f"Expected the CLIP of a CogVideoX pipeline, or T5-XXL of core's Load CLIP; got one with "
                        f"{type(own).__name__}. Load it with 'CogVideoX Load Pipeline' or 'CogVideoX Load Text "
                        "Encoder'.")
    others = [name for name in ("clip_l", "clip_g", "llama") if getattr(clip.cond_stage_model, name, None) is not None]
    if others or encoder.enable_attention_masks:
        reason = f"it joins T5 with {others[0]}" if others else "it masks the padding, which CogVideoX attends to"
        raise SpecError(f"This CLIP gives another embedding than CogVideoX was trained with: {reason}. Expected T5-XXL "
                        "alone: in Load CLIP set the type to cogvideox (sd3 and pixart give the same).")
    return FixedLengthTokenizer(default_tokenizer_folder(), max_tokens or PUBLISHED["5B"].text_tokens)


def encode(clip: comfy.sd.CLIP, text: str, when_empty: str,
           max_tokens: int | None = None) -> tuple[list[Any], TokenCount]:
    """CONDITIONING of a prompt, and how it fits. ``when_empty`` 'zeros' gives the authors' unconditional (FACTS 2.6).
    ``max_tokens`` None: as the CLIP was loaded; 226 for one of core's.

    Raises:
        SpecError: a CLIP of another model family.
    """
    tokenizer = tokenizer_of(clip, max_tokens)
    count = tokenizer.count(text)
    if count.dropped:
        log.warning("Prompt of %d tokens cut to %d; dropped from: %r", count.used, count.limit, count.dropped[:80])
    # SD3's model asks for the tokens of the encoders that it lacks, too.
    tokens = {"l": [], "g": [], **tokenizer.tokenize_with_weights(text)}
    conditioning = clip.encode_from_tokens_scheduled(tokens)
    if when_empty == "zeros" and not text.strip():
        conditioning = [[torch.zeros_like(tensor), options] for tensor, options in conditioning]
    return conditioning, count


def encode_sequence(clip: comfy.sd.CLIP, text: str,
                    max_tokens: int | None = None) -> tuple[list[Any], list[TokenCount]]:
    """CONDITIONING of a prompt per line, each marked with its turn, and how each fits. Empty lines are left out.

    Raises:
        SpecError: no prompt, or as ``encode``.
    """
    prompts = prompts_of(text)
    encoded = [encode(clip, prompt, "encode", max_tokens) for prompt in prompts]
    # With LoRAs that are scheduled on the CLIP a prompt has several entries: a sequence of each.
    scheduled = zip(*(conditioning for conditioning, _ in encoded), strict=True)
    conditioning = [[embedding, {**options, TURN: (turn, len(prompts))}]
                    for entries in scheduled for turn, (embedding, options) in enumerate(entries)]
    return conditioning, [count for _, count in encoded]
