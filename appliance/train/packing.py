"""Rows of a forward pass as one sequence without padding, where attention can keep them apart.

That takes a kernel for sequences of different lengths: PyTorch's own, FlashAttention, on a GPU. Everywhere else, and
for a model that fails the trial, rows are padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad
from transformers import AttentionInterface

from appliance.errors import is_out_of_memory
from appliance.train.model import DTYPE, ON_GPU
from appliance.train.rows import IGNORED

ATTENTION = "row_by_row"
TRIED = (9, 7)
"""Tokens of the two rows of the trial."""
SAME_WITHIN = 0.1
"""Largest difference of hidden states relative to their size: bf16 makes a few hundredths."""


def pack(part: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The rows of `part` (input_ids, labels, attention_mask: rows, width; padded on the right) one after the other.

    Positions begin at 0 in each row, and nothing predicts a row's first token. The last four are the arguments of
    Transformers' attention for packed rows: where each begins and the last ends, and the length of the longest.
    """
    kept = part["attention_mask"].bool()
    lengths = kept.sum(1)
    positions = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    bounds = pad(lengths.cumsum(0), (1, 0)).int()
    longest = int(lengths.max())
    return {
        "input_ids": part["input_ids"][kept][None],
        "labels": part["labels"].masked_fill(positions == 0, IGNORED)[kept][None],
        "position_ids": positions[kept][None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention (1, tokens, heads, size) within each packed row, as Transformers calls it.

    `query`, `key`, `value` are (1, heads, tokens, size). Raises NotImplementedError for what the kernel leaves out.
    """
    if dropout or softcap or s_aux is not None or position_bias is not None:
        raise NotImplementedError("dropout, a soft cap, sinks or a bias in attention")
    # Rotated in fp32, queries and keys may not have the precision of the projections any more.
    query, key, value = (heads[0].transpose(0, 1).to(value.dtype) for heads in (query, key, value))
    out: Any = varlen_attn(
        query,
        key,
        value,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(sliding_window - 1 if sliding_window else -1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[None], None


@contextmanager
def rows_apart(model: Any) -> Iterator[None]:
    """Within, `model` takes packed rows, and nothing else."""
    AttentionInterface.register(ATTENTION, attend)
    before = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def can_pack(model: Any, warn: Callable[..., Any]) -> bool:
    """Whether rows can be packed for `model`, a base with its adapter; where a GPU cannot, `warn` is told why."""
    if not ON_GPU:
        return False
    fault = fault_of_packing(model)
    if fault:
        warn(message=f"rows are padded instead of packed: {fault}")
    return not fault


def fault_of_packing(model: Any) -> str:
    """What keeps rows from being packed for `model`, seen by a pass over two rows; empty: nothing.

    Backward, nothing of the second row may follow from the first. Forward, it must be what it is alone.
    """
    base = model.get_base_model()
    if not base._supports_flash_attn:
        return "the model's attention needs masks"
    backbone, device = base.base_model, base.device
    first, last = TRIED
    rows = torch.arange(2 * first, device=device).view(2, first)
    mask = torch.ones_like(rows)
    mask[1, last:] = 0
    packed = pack({"input_ids": rows, "labels": rows, "attention_mask": mask})
    ids = packed.pop("input_ids")
    del packed["labels"]
    embedded = base.get_input_embeddings()(ids).detach().requires_grad_()
    try:
        with torch.autocast(device.type, DTYPE, enabled=device.type == "cuda"):
            with rows_apart(model):
                model.train()
                hidden = backbone(inputs_embeds=embedded, use_cache=False, **packed).last_hidden_state[0, first:]
                (by_token,) = torch.autograd.grad(hidden.float().square().sum(), embedded)
                model.eval()
                with torch.no_grad():
                    together = backbone(inputs_embeds=embedded, use_cache=False, **packed).last_hidden_state[0, first:]
            with torch.no_grad():
                alone = backbone(input_ids=ids[:, first:], use_cache=False).last_hidden_state[0]
    except Exception as error:  # the kernel, its dispatch and the models each raise their own
        if is_out_of_memory(error):
            raise
        return f"the attention kernel refuses: {str(error).strip().splitlines()[0] if str(error).strip() else error!r}"
    moved = by_token[0].float().abs().sum(1) > 0
    if moved[:first].any() or not moved[first:].any():
        return "its rows would not stay apart"
    difference = (together.float() - alone.float()).norm() / alone.float().norm()
    if not difference < SAME_WITHIN:
        return f"a packed row differs from the same row alone by {float(difference):.2f} of its size"
    return ""
