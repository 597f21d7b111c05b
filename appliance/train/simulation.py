"""One forward and backward pass without numbers: what it would hold in memory, and how much it would compute.

The model is the real architecture, from its own config, on the meta device, where tensors have shapes only. So nothing
here knows a layer by name, and any architecture that Transformers has is counted as it is.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface

from appliance.architecture import empty_model
from appliance.errors import InvalidInput
from appliance.train import products
from appliance.train.fused import fuse_adapters, fuse_layers
from appliance.train.head import TrainedLogProbs
from appliance.train.model import DTYPE, ON_GPU, add_adapter
from appliance.train.recipe import Adapter

ATTENTION = "without_scores"
_ATTEND = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_GROUPED = torch.ops.aten._grouped_mm
_ATTEND_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Pass:
    """What a forward and backward pass takes beyond the weights: most bytes held at once, and operations."""

    activations: int
    """Without the output head."""
    logits: int
    """What the output head adds to the peak."""
    forward: int
    """Floating-point operations without the head, a multiplication and an addition counted as two."""
    backward: int
    """The same of the backward pass, what it computes again included."""
    head: int
    """The same of the output head, both ways."""

    @property
    def operations(self) -> int:
        return self.forward + self.backward + self.head


def meta_model(base: Path, adapter: Adapter, *, every_n_layers: int = 0) -> Any:
    """The base with a new adapter, on the meta device, with gradient checkpointing of each nth layer, 0: of none.

    The adapter is in the precision of the products that it is in, which autocast brings its weights to: its fp32
    weights would make fp32 of all that they meet. Autocast itself has no say on this device.
    """
    AttentionInterface.register(ATTENTION, _attention)
    try:
        model = empty_model(base, dtype=DTYPE, attn_implementation=ATTENTION)
    except InvalidInput as error:
        raise InvalidInput(error.code, "the model has an attention of its own kind", error.next) from error
    with torch.device("meta"):
        model = add_adapter(model.eval(), adapter, 0).train()
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(DTYPE)
    if products.are_fast():
        products.hold_rounded(products.frozen_layers(model))
    fuse_adapters(model)
    if ON_GPU:
        fuse_layers(model)
    if every_n_layers:
        model.gradient_checkpointing_enable(every_n_layers=every_n_layers)
    return model


def simulate(model: Any, rows: int, width: int, trained: int) -> Pass:
    """A pass over `rows` sequences of `width` tokens through a meta model, `trained` of all tokens trained."""
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
    body, forward, backward = _pass(model, rows, width, 0)
    whole, *parts = _pass(model, rows, width, trained)
    return Pass(body, max(whole - body, 0), forward, backward, sum(parts) - forward - backward)


def _pass(model: Any, rows: int, width: int, trained: int) -> tuple[int, int, int]:
    """Peak (bytes), and operations forward and backward, the head over so many tokens or left out.

    Gradients are there already, as in most passes.
    """
    tokens = torch.zeros(rows, width, dtype=torch.long, device="meta")
    base = model.get_base_model()
    head = base.get_output_embeddings()
    with _Ledger(model) as ledger, _autocast_of_meta():
        hidden = base.base_model(input_ids=tokens, use_cache=False).last_hidden_state.flatten(0, 1)
        if trained:
            apply: Any = TrainedLogProbs.apply
            hidden, *_ = apply(hidden[:trained], head.weight, head.bias, tokens.flatten()[:trained], 1.0, 0)
        forward = ledger.operations
        hidden.sum().backward()
    return ledger.peak, forward, ledger.operations - forward


@contextlib.contextmanager
def _autocast_of_meta() -> Iterator[None]:
    """PEFT turns autocast off by device where experts have adapters, and the meta device has none to turn off."""
    real = torch.autocast

    def autocast(device_type: str, *arguments: Any, **settings: Any) -> Any:
        return contextlib.nullcontext() if device_type == "meta" else real(device_type, *arguments, **settings)

    torch.autocast = autocast  # type: ignore[misc, assignment]
    try:
        yield
    finally:
        torch.autocast = real  # type: ignore[misc]


class _Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Keeps account of the storages that operations make and the garbage collector takes away."""

    def __init__(self, model: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types for it
        self.held = self.peak = self.operations = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()
        self._own = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
        self._own += [weight.grad.untyped_storage() for weight in model.parameters() if weight.grad is not None]
        self._known.update(self._own)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            # Asked whether a mask or the positions hold nothing special, which they do not.
            return True
        if func.overloadpacket is _GROUPED:
            # Of tokens sorted by their experts, or for each expert over its tokens; on meta it is refused but for bf16.
            ends = args[2] if len(args) > 2 else (kwargs or {})["offs"]
            groups = () if args[1].dim() == 3 else (len(ends),)
            out = args[0].new_empty(*groups, len(args[0]), args[1].shape[-1])
        else:
            out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._enter(tensor.untyped_storage())
        self.operations += _operations(func, args, kwargs or {}, out)
        return out

    def _enter(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        self.held += storage.nbytes()
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._leave, storage.nbytes())

    def _leave(self, size: int) -> None:
        self.held -= size


def _operations(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    if func.overloadpacket in (_ATTEND, _ATTEND_BACKWARD):
        # Scores and sums over half of all pairs; backward computes the scores again, and four such products.
        query = args[0] if func.overloadpacket is _ATTEND else args[1]
        pairs = query.shape[0] * query.shape[1] * query.shape[2] ** 2 // 2
        return int((4 if func.overloadpacket is _ATTEND else 10) * pairs * query.shape[3])
    if func.overloadpacket is _GROUPED:
        return int(2 * args[0].numel() * args[1].shape[-1])
    packet = func.overloadpacket
    count = flop_registry.get(torch.ops.aten.addmm if packet is torch.ops.aten.addmm_ else packet)
    return int(count(*args, **kwargs, out_val=out)) if count else 0


def _attention(
    module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Any, None]:
    """Causal attention that keeps no scores, as the kernels in use do; on meta, torch chooses one that keeps them."""
    if len(query) > 1:
        # With padding to mask, Transformers repeats the heads of keys and values.
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    out, _ = _ATTEND(query, key, value, 0.0, True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None
