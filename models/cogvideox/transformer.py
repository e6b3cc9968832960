"""The CogVideoX transformer, for every variant (CogVideoX, Yang 2024, sec. 2.2).

Module names are those of diffusers' ``CogVideoXTransformer3DModel``, so official weights and LoRAs load with no
renaming. Layers come from ``operations`` (``comfy.ops``), so casting, streaming and quantization are ComfyUI's.
Latents are [B, C, T, H, W], sequences [B, tokens, D] with the text first.
"""

from __future__ import annotations

from typing import Any

import comfy.model_prefetch
import comfy.ops
import comfy.patcher_extension
import comfy.quant_ops
import torch
import torch.nn.functional as F
from comfy.ldm.flux.math import apply_rope1
from comfy.ldm.modules.attention import optimized_attention
from einops import rearrange
from torch import Tensor, nn

from ..specs import SpecError, TransformerSpec
from .image_condition import padded_condition
from .positions import (
    PLACE_KEY,
    RIFLEX_KEY,
    Place,
    rope_grid,
    rope_matrices,
    sincos_axes,
    time_frequencies,
    timestep_embedding,
    turned,
)

Grid = tuple[int, int, int]


class PositionTable(nn.Module, comfy.ops.CastWeightBiasOp):
    """Learned positions, [1, tokens, D], as a leaf module: the host patches, merges and streams the ``weight`` of a
    leaf, and a parameter that lies between modules it does not."""

    def __init__(self, tokens: int, dim: int, dtype: Any, device: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, tokens, dim, dtype=dtype, device=device), requires_grad=False)
        self.bias = None

    def forward(self, text: Tensor, image: Tensor, text_tokens: int) -> tuple[Tensor, Tensor]:
        """Adds the positions. The first ``text_tokens`` of the table are the text's; joined prompts are longer."""
        table, bias, stream = comfy.ops.cast_bias_weight(self, image, offloadable=True)
        image = image + table[:, text_tokens:]
        known = min(text.shape[1], text_tokens)
        text = torch.cat([text[:, :known] + table[:, :known], text[:, known:]], dim=1)
        comfy.ops.uncast_bias_weight(self, table, bias, stream)
        return text, image


_TABLE = "patch_embed.pos_embedding"  # as published; the leaf's parameter adds .weight


def _take_published_table(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    if prefix + "pos_embedding" in state_dict:
        state_dict[prefix + "pos_embedding.weight"] = state_dict.pop(prefix + "pos_embedding")


def with_published_keys(state_dict: dict[str, Any]) -> dict[str, Any]:
    """The network's state dict as files have it; loading takes both."""
    return {key[:-len(".weight")] if key.endswith(_TABLE + ".weight") else key: value
            for key, value in state_dict.items()}


class PatchEmbed(nn.Module):
    """Latent and text to tokens; adds the sincos or learned positions of the models that have them."""

    def __init__(self, spec: TransformerSpec, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        self.spec = spec
        factory = {"dtype": dtype, "device": device}
        dim, p, p_t = spec.hidden_size, spec.patch_size, spec.patch_size_t
        if p_t is None:
            self.proj = operations.Conv2d(spec.in_channels, dim, p, stride=p, bias=spec.patch_bias, **factory)
        else:
            self.proj = operations.Linear(spec.in_channels * p_t * p * p, dim, bias=spec.patch_bias, **factory)
        self.text_proj = operations.Linear(spec.text_embed_dim, dim, **factory)
        if spec.use_learned_positional_embeddings:
            grid = self.native_grid()
            length = spec.max_text_seq_length + grid[0] * grid[1] * grid[2]
            self.pos_embedding = PositionTable(length, dim, **factory)
            self.register_load_state_dict_pre_hook(_take_published_table)

    def native_grid(self) -> Grid:
        spec = self.spec
        frames = (spec.sample_frames - 1) // spec.temporal_compression_ratio + 1
        return frames, spec.sample_height // spec.patch_size, spec.sample_width // spec.patch_size

    def patches(self, x: Tensor) -> Tensor:
        p, p_t = self.spec.patch_size, self.spec.patch_size_t
        if p_t is None:
            batch = x.shape[0]
            x = self.proj(rearrange(x, "b c t h w -> (b t) c h w"))
            return rearrange(x, "(b t) d h w -> b (t h w) d", b=batch)
        return self.proj(rearrange(x, "b c (t r) (h p) (w q) -> b (t h w) (c r p q)", r=p_t, p=p, q=p))

    def forward(self, x: Tensor, context: Tensor, grid: Grid, place: Place | None = None) -> tuple[Tensor, Tensor]:
        text, image = self.text_proj(context), self.patches(x)
        if self.spec.use_learned_positional_embeddings and grid == self.native_grid():
            text, image = self.pos_embedding(text, image, self.spec.max_text_seq_length)
        elif self.spec.use_learned_positional_embeddings or not self.spec.use_rotary_positional_embeddings:
            image = self._add_sincos(image, grid, place)
        return text, image

    def _add_sincos(self, image: Tensor, grid: Grid, place: Place | None) -> Tensor:
        time, columns, rows = sincos_axes(self.spec, grid, image.device, image.dtype, place)
        frames, height, width = grid
        table = torch.cat([
            time[:, None, None].expand(-1, height, width, -1),
            columns[None, None, :].expand(frames, height, -1, -1),
            rows[None, :, None].expand(frames, -1, width, -1),
        ], dim=-1)
        return image + table.flatten(0, 2)


class TimestepMLP(nn.Module):
    """Embeds a timestep, or the ofs of 1.5 image to video."""

    def __init__(self, in_dim: int, dim: int, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        self.linear_1 = operations.Linear(in_dim, dim, dtype=dtype, device=device)
        self.linear_2 = operations.Linear(dim, dim, dtype=dtype, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class ExpertNorm(nn.Module):
    """Expert adaptive LayerNorm: text and video are modulated apart (sec. 2.2)."""

    def __init__(self, spec: TransformerSpec, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        dim = spec.hidden_size
        self.linear = operations.Linear(spec.time_embed_dim, 6 * dim, dtype=dtype, device=device)
        self.norm = operations.LayerNorm(dim, eps=spec.norm_eps, dtype=dtype, device=device)

    def forward(self, image: Tensor, text: Tensor, vec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the joint modulated sequence, text first, and the two gates (image, text)."""
        modulation = self.linear(F.silu(vec))[:, None].chunk(6, dim=-1)
        shift, scale, gate, text_shift, text_scale, text_gate = modulation
        image = torch.addcmul(shift, self.norm(image), 1 + scale)
        text = torch.addcmul(text_shift, self.norm(text), 1 + text_scale)
        return torch.cat([text, image], dim=1), gate, text_gate


def has_host_rope() -> bool:
    """Not with a comfy-kitchen that is too old for ComfyUI, or without one: it starts then, but its RoPE fails."""
    return hasattr(getattr(comfy.quant_ops, "ck", None), "apply_rope1")


class Attention(nn.Module):
    """Joint self-attention with per-head LayerNorm of queries and keys."""

    def __init__(self, spec: TransformerSpec, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        dim, factory = spec.hidden_size, {"dtype": dtype, "device": device}
        self.heads = spec.num_attention_heads
        self.to_q = operations.Linear(dim, dim, bias=spec.attention_bias, **factory)
        self.to_k = operations.Linear(dim, dim, bias=spec.attention_bias, **factory)
        self.to_v = operations.Linear(dim, dim, bias=spec.attention_bias, **factory)
        self.norm_q = operations.LayerNorm(spec.attention_head_dim, eps=1e-6, **factory)
        self.norm_k = operations.LayerNorm(spec.attention_head_dim, eps=1e-6, **factory)
        self.to_out = nn.ModuleList([operations.Linear(dim, dim, **factory)])

    def _rotated(self, x: Tensor, norm: nn.Module, pe: Tensor | None) -> Tensor:
        x = norm(rearrange(x, "b s (n d) -> b s n d", n=self.heads))
        if pe is not None:
            x = (apply_rope1 if has_host_rope() else turned)(x, pe)
        return rearrange(x, "b s n d -> b s (n d)")

    def forward(self, x: Tensor, pe: Tensor | None, text_tokens: int, transformer_options: dict[str, Any]) -> Tensor:
        # One projection at a time: each frees its temporaries before the next begins.
        q = self._rotated(self.to_q(x), self.norm_q, pe)
        k = self._rotated(self.to_k(x), self.norm_k, pe)
        out = optimized_attention(q, k, self.to_v(x), self.heads, transformer_options=transformer_options)
        del q, k
        for patch in transformer_options.get("patches", {}).get("attn1_output_patch", ()):
            out = patch(out, {**transformer_options, "img_slice": [text_tokens, x.shape[1]]})
        return self.to_out[0](out)


class FeedForward(nn.Module):
    """The keys ``net.0.proj`` and ``net.2`` are those of diffusers."""

    def __init__(self, spec: TransformerSpec, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        dim, factory = spec.hidden_size, {"dtype": dtype, "device": device}
        up = nn.Module()
        up.proj = operations.Linear(dim, 4 * dim, **factory)
        self.net = nn.ModuleList([up, nn.Identity(), operations.Linear(4 * dim, dim, **factory)])

    def up(self, x: Tensor) -> Tensor:
        """The inner values, [B, tokens, 4 D]."""
        x = self.net[0].proj(x)
        # In place where nothing trains: the inner values are the largest tensor of a block, and the peak was here.
        return F.gelu(x, approximate="tanh") if x.requires_grad else torch.ops.aten.gelu_(x, approximate="tanh")

    def down(self, x: Tensor) -> Tensor:
        return self.net[2](x)

    def forward(self, x: Tensor) -> Tensor:
        """For what calls the module whole; ``Block`` calls the halves, for the memory between them."""
        return self.down(self.up(x))


class Block(nn.Module):
    def __init__(self, spec: TransformerSpec, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        self.norm1 = ExpertNorm(spec, dtype, device, operations)
        self.attn1 = Attention(spec, dtype, device, operations)
        self.norm2 = ExpertNorm(spec, dtype, device, operations)
        self.ff = FeedForward(spec, dtype, device, operations)

    def forward(self, image: Tensor, text: Tensor, vec: Tensor, pe: Tensor | None,
                transformer_options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        tokens = text.shape[1]
        joint, gate, text_gate = self.norm1(image, text, vec)
        joint = self.attn1(joint, pe, tokens, transformer_options)
        image = torch.addcmul(image, gate, joint[:, tokens:])
        text = torch.addcmul(text, text_gate, joint[:, :tokens])
        joint, gate, text_gate = self.norm2(image, text, vec)
        joint = self.ff.up(joint)  # in two steps: the normalised sequence is gone before the output is made
        joint = self.ff.down(joint)
        return torch.addcmul(image, gate, joint[:, tokens:]), torch.addcmul(text, text_gate, joint[:, :tokens])


class FinalNorm(nn.Module):
    def __init__(self, spec: TransformerSpec, dtype: Any, device: Any, operations: Any) -> None:
        super().__init__()
        dim = spec.hidden_size
        self.linear = operations.Linear(spec.time_embed_dim, 2 * dim, dtype=dtype, device=device)
        self.norm = operations.LayerNorm(dim, eps=spec.norm_eps, dtype=dtype, device=device)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.linear(F.silu(vec))[:, None].chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm(x), 1 + scale)


class CogVideoXTransformer(nn.Module):
    """Predicts v for a noisy latent.

    Args of ``forward``:
        x: [B, in_channels, T, H, W]; with a temporal patch of 2 an odd T is padded at the front with its first frame
            and the padding dropped again (FACTS 2.3); the condition's first frame is moved, not repeated.
        timestep: [B], 0..999. context: [B, tokens, text_embed_dim]. ofs: [B], for 1.5 image to video.
    Returns [B, out_channels, T, H, W].

    Raises:
        SpecError: H or W is not a multiple of the patch size, or not the native size of a model with learned positions.
    """

    def __init__(self, spec: TransformerSpec, dtype: Any = None, device: Any = None, operations: Any = None) -> None:
        super().__init__()
        self.spec = spec
        self.dtype = dtype
        factory = (dtype, device, operations)
        self.patch_embed = PatchEmbed(spec, *factory)
        self.time_embedding = TimestepMLP(spec.hidden_size, spec.time_embed_dim, *factory)
        if spec.ofs_embed_dim:
            self.ofs_embedding = TimestepMLP(spec.ofs_embed_dim, spec.ofs_embed_dim, *factory)
        self.transformer_blocks = nn.ModuleList([Block(spec, *factory) for _ in range(spec.num_layers)])
        self.norm_final = operations.LayerNorm(spec.hidden_size, eps=spec.norm_eps, dtype=dtype, device=device)
        self.norm_out = FinalNorm(spec, *factory)
        values = spec.patch_size**2 * spec.temporal_patch * spec.out_channels
        self.proj_out = operations.Linear(spec.hidden_size, values, dtype=dtype, device=device)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, ofs: Tensor | None = None, control: Any = None,
                transformer_options: dict[str, Any] | None = None, **kwargs: Any) -> Tensor:
        options = {} if transformer_options is None else transformer_options
        wrappers = comfy.patcher_extension.get_all_wrappers(
            comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, options)
        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(self._forward, self, wrappers)
        return executor.execute(x, timestep, context, ofs, control, options, **kwargs)

    def _forward(self, x: Tensor, timestep: Tensor, context: Tensor, ofs: Tensor | None, control: Any,
                 transformer_options: dict[str, Any], **kwargs: Any) -> Tensor:
        padding = -x.shape[2] % self.spec.temporal_patch
        if padding:
            x = self._padded(x, padding)
        grid = self._grid(x)
        vec = self._time_vector(timestep, ofs, x.dtype)
        pe = self._rope(grid, x.device, context.shape[1], transformer_options)
        image = self._run_blocks(x, context, grid, vec, pe, transformer_options)
        image = self.proj_out(self.norm_out(self.norm_final(image), vec))
        return self._unpatchify(image, grid)[:, :, padding:]

    def _rope(self, grid: Grid, device: torch.device, text_tokens: int, options: dict[str, Any]) -> Tensor | None:
        if not self.spec.use_rotary_positional_embeddings:
            return None
        place = options.get(PLACE_KEY)
        freqs = time_frequencies(self.spec, grid[0], device, options.get(RIFLEX_KEY), place)
        return rope_matrices(self.spec, rope_grid(self.spec, grid, device, place), text_tokens, freqs)

    def _padded(self, x: Tensor, padding: int) -> Tensor:
        """The noisy latent's first frame is repeated; a condition image moves to the front, as in the references."""
        noisy, condition = x[:, :self.spec.out_channels], x[:, self.spec.out_channels:]
        noisy = torch.cat([noisy[:, :, :1].expand(-1, -1, padding, -1, -1), noisy], dim=2)
        return torch.cat([noisy, padded_condition(condition, padding)], dim=1)

    def _grid(self, x: Tensor) -> Grid:
        p = self.spec.patch_size
        frames, height, width = x.shape[2:]
        if height % p or width % p:
            raise SpecError(f"latent {width}x{height}: CogVideoX needs multiples of {p} latent columns and rows "
                            f"({8 * p} pixels). Change the width and height.")
        grid = (frames // self.spec.temporal_patch, height // p, width // p)
        native = self.patch_embed.native_grid()
        if self.spec.use_learned_positional_embeddings and grid[1:] != native[1:]:
            raise SpecError(f"latent {width}x{height}: this model has learned positions for "
                            f"{native[2] * p}x{native[1] * p} only (x8 pixels). Change the width and height.")
        return grid

    def _time_vector(self, timestep: Tensor, ofs: Tensor | None, dtype: torch.dtype) -> Tensor:
        spec = self.spec

        def embed(value: Tensor, dim: int) -> Tensor:
            return timestep_embedding(value, dim, spec.flip_sin_to_cos, spec.freq_shift).to(dtype)

        vec = self.time_embedding(embed(timestep, spec.hidden_size))
        if spec.ofs_embed_dim:
            if ofs is None:
                raise SpecError("This 1.5 image-to-video model needs an ofs value; pass ofs=2.0 for each video.")
            vec = vec + self.ofs_embedding(embed(ofs, spec.ofs_embed_dim))
        return vec

    def _run_blocks(self, x: Tensor, context: Tensor, grid: Grid, vec: Tensor, pe: Tensor | None,
                    transformer_options: dict[str, Any]) -> Tensor:
        """Video tokens after the last block: [B, tokens, D]."""
        # Here, so that no caller holds them through all blocks.
        text, image = self.patch_embed(x, context, grid, transformer_options.get(PLACE_KEY))
        replace = transformer_options.get("patches_replace", {}).get("dit", {})
        block_patches = transformer_options.get("patches", {}).get("double_block", ())
        transformer_options["total_blocks"] = len(self.transformer_blocks)
        transformer_options["block_type"] = "double"
        blocks = list(self.transformer_blocks)
        queue = comfy.model_prefetch.make_prefetch_queue(list(blocks), x.device, transformer_options)
        for index, block in enumerate(blocks):
            transformer_options["block_index"] = index
            comfy.model_prefetch.prefetch_queue_pop(queue, x.device, block)
            image, text = _call_block(block, replace.get(("double_block", index)), image, text, vec, pe,
                                      transformer_options)
            for patch in block_patches:
                out = patch({"img": image, "txt": text, "x": x, "vec": vec, "block_index": index,
                             "img_offset": 0, "transformer_options": transformer_options})
                image, text = out["img"], out.get("txt", text)
        comfy.model_prefetch.prefetch_queue_pop(queue, x.device, None)
        return image

    def _unpatchify(self, image: Tensor, grid: Grid) -> Tensor:
        frames, rows, columns = grid
        p = self.spec.patch_size
        return rearrange(image, "b (t h w) (c r p q) -> b c (t r) (h p) (w q)", t=frames, h=rows, w=columns,
                         r=self.spec.temporal_patch, p=p, q=p)


def _call_block(block: nn.Module, replacement: Any, image: Tensor, text: Tensor, vec: Tensor, pe: Tensor | None,
                transformer_options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Run a block, or what a node put in its place (``patches_replace["dit"]``)."""
    if replacement is None:
        return block(image, text, vec, pe, transformer_options)

    def original(args: dict[str, Any]) -> dict[str, Tensor]:
        img, txt = block(args["img"], args["txt"], args["vec"], args["pe"], args["transformer_options"])
        return {"img": img, "txt": txt}

    args = {"img": image, "txt": text, "vec": vec, "pe": pe, "transformer_options": transformer_options}
    out = replacement(args, {"original_block": original})
    return out["img"], out["txt"]
