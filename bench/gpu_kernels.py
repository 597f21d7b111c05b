"""Parts of bench/gpu.sh on single kernels: each against the same in fp32, or on the CPU. Without a GPU they run dry."""

from __future__ import annotations

import importlib
import platform
import shutil
import sysconfig
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gpu_worker import use_older_attention
from peft.helpers import disable_input_dtype_casting
from runs import machine
from torch.nn import functional

from appliance.release.fp8 import rounded
from appliance.train.forecast import matmul_speed
from appliance.train.fused import fuse_adapters, fuse_layers
from appliance.train.head import install
from appliance.train.model import ON_GPU, add_adapter, load_model, nf4_round_trip
from appliance.train.packing import attend
from appliance.train.recipe import Adapter

DEVICE = "cuda" if ON_GPU else "cpu"
LARGEST = torch.finfo(torch.float8_e4m3fn).max
PACKAGES = ("triton", "accelerate", "datasets", "pydantic", "numpy")
MODULES = (*PACKAGES, "appliance.release.merge", "appliance.release.verify", "appliance.train.stage")


def stack() -> dict[str, Any]:
    """What is installed beside what `machine` names, what imports, and the output head's kernel."""
    figures: dict[str, Any] = {"python": platform.python_version(), "versions": {}, "missing": {}}
    for name in MODULES:
        try:
            importlib.import_module(name)
            if name in PACKAGES:
                figures["versions"][name] = version(name)
        except Exception as error:  # whatever an import raises is what this part is there to tell
            figures["missing"][name] = f"{type(error).__name__}: {error}"
    figures["header"] = Path(sysconfig.get_path("include"), "Python.h").exists()
    figures["compiler"] = shutil.which("gcc") or shutil.which("cc") or ""
    if ON_GPU:
        import pynvml

        pynvml.nvmlInit()
        figures |= {
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "cuda": torch.version.cuda,
            "capability": torch.cuda.get_device_capability(),
            "memory": torch.cuda.get_device_properties(0).total_memory,
        }
    sizes = (2048, 8192) if ON_GPU else (256,)
    figures["matmul_speed"] = {size: matmul_speed(size) for size in sizes}
    return figures | {"head": head(), "machine": machine()}


def head(tokens: int = 600, width: int = 4096, vocabulary: int = 128256) -> dict[str, float]:
    """The output head that trains, its log-probabilities and its gradient against fp32."""
    from trl.trainer import utils

    if not ON_GPU:
        install()
        width, vocabulary = 64, 1000
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, device=DEVICE).bfloat16().float().requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, width, device=DEVICE)).bfloat16().float()
    targets = torch.randint(vocabulary, (tokens,), device=DEVICE)
    upstream = torch.randn(tokens, device=DEVICE)
    wanted = torch.log_softmax(hidden @ weight.T, -1).gather(1, targets[:, None])[:, 0]
    (slope,) = torch.autograd.grad(wanted @ upstream, hidden)
    narrow = torch.bfloat16 if ON_GPU else torch.float32
    inputs = hidden.detach().to(narrow).requires_grad_()
    chunk = utils._CHUNKED_LOGPROB_CHUNK_SIZE

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        found = utils._ChunkedLogProbFunction.apply(inputs, weight.to(narrow), None, targets, 1.0, chunk, None, 1.0, ())
        (gradient,) = torch.autograd.grad(found[0] @ upstream, inputs)
        return found[0].detach(), gradient

    (found, gradient), first = timed(run)
    _, again = timed(run)
    return {
        "log_prob_difference": float((found - wanted).abs().max()),
        "gradient_difference": apart(gradient, slope),
        "first_seconds": first,
        "seconds": again,
    }


def rounding(rows: int = 14336, columns: int = 4096) -> dict[str, Any]:
    """NF4 on the GPU, as training has it, against NF4 on the CPU, as merging has it."""
    import bitsandbytes.functional as nf4

    rows, columns = (rows, columns) if ON_GPU else (256, 128)
    torch.manual_seed(0)
    weight = (0.02 * torch.randn(rows, columns)).bfloat16()
    # As in real models: some outputs far larger than the others, some all zero.
    weight[::97] *= 30
    weight[5] = 0
    on_cpu, cpu_seconds = timed(lambda: nf4_round_trip(weight))
    here = weight.to(DEVICE)
    on_device, device_seconds = timed(lambda: nf4_round_trip(here))
    # A layer of the quantised model is rounded from bf16 and unpacked to it.
    codes, state = nf4.quantize_4bit(here, quant_type="nf4", compress_statistics=True)
    in_training = nf4.dequantize_4bit(codes, state).float()
    return {
        "differ": float((on_device.cpu() != on_cpu).float().mean()),
        "largest_difference": float((on_device.cpu() - on_cpu).abs().max()),
        "difference": apart(on_device.cpu(), on_cpu),
        "training_difference": apart(in_training.cpu(), on_cpu.bfloat16().float()),
        "training_differs": float((in_training.cpu() != on_cpu.bfloat16().float()).float().mean()),
        "rounding_error": apart(on_cpu, weight.float()),
        "cpu_seconds": cpu_seconds,
        "device_seconds": device_seconds,
    }


def fp8(rows: int = 64, outputs: int = 14336, inputs: int = 4096) -> dict[str, float]:
    """A product in FP8 as the card multiplies it, against what verifying says that it is."""
    rows, outputs, inputs = (rows, outputs, inputs) if ON_GPU else (4, 32, 64)
    torch.manual_seed(0)
    values = torch.randn(rows, inputs, device=DEVICE).bfloat16()
    weight = (0.02 * torch.randn(outputs, inputs, device=DEVICE)).bfloat16()
    exact = values.float() @ weight.float().T
    scales = values.abs().amax(-1, keepdim=True).float() / LARGEST, (weight.abs().amax().float() / LARGEST)
    narrow = [
        (one.float() / scale).to(torch.float8_e4m3fn) for one, scale in zip((values, weight), scales, strict=True)
    ]
    multiply = torch._scaled_mm if ON_GPU else _scaled_product
    of_weights = scales[1].expand(1, outputs).contiguous()
    found = multiply(narrow[0], narrow[1].T, scales[0], of_weights, out_dtype=torch.bfloat16)
    simulated = rounded(values, values.abs().amax(-1, keepdim=True)) @ rounded(weight, weight.abs().amax()).T
    return {"difference": apart(found, simulated), "rounding": apart(simulated, exact)}


def _scaled_product(
    one: torch.Tensor, other: torch.Tensor, scale: torch.Tensor, other_scale: torch.Tensor, *, out_dtype: torch.dtype
) -> torch.Tensor:
    """In the place of the card's product, which a CPU may not have."""
    return ((one.float() * scale) @ (other.float() * other_scale)).to(out_dtype)


def attention(heads: int = 32, shared: int = 8) -> dict[str, Any]:
    """Attention within packed rows, forward and backward, against each row alone in fp32."""
    use_older_attention()
    if not ON_GPU:
        packing: Any = importlib.import_module("appliance.train.packing")
        packing.varlen_attn = _row_by_row
    figures = {}
    for size in (64, 128):
        for window in (None, 100):
            figures[f"size_{size}_window_{window or 0}"] = _attention(heads, shared, size, window)
    return {"cases": figures, "difference": max(max(case.values()) for case in figures.values())}


def _attention(heads: int, shared: int, size: int, window: int | None) -> dict[str, float]:
    lengths = (9, 700, 333) if ON_GPU else (3, 40, 20)
    torch.manual_seed(0)
    shapes = {"query": heads, "key": shared, "value": shared}
    narrow = torch.bfloat16 if ON_GPU else torch.float32
    wide = {
        name: torch.randn(1, count, sum(lengths), size, device=DEVICE).to(narrow).float().requires_grad_()
        for name, count in shapes.items()
    }
    packed = [tensor.detach().to(narrow).requires_grad_() for tensor in wide.values()]
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=DEVICE, dtype=torch.int32)
    rows: Any = {"cu_seq_lens_q": bounds, "max_length_q": max(lengths), "sliding_window": window}
    out, _ = attend(None, packed[0], packed[1], packed[2], None, **rows)
    upstream = torch.randn(out.shape, device=DEVICE)
    gradients = torch.autograd.grad((out.float() * upstream).sum(), packed)

    alone = torch.cat([_alone(row, window) for row in _rows(wide.values(), lengths)], 2).transpose(1, 2)
    wanted = torch.autograd.grad((alone * upstream).sum(), list(wide.values()))
    return {"forward": apart(out, alone)} | {
        name: apart(found, slope) for name, found, slope in zip(wide, gradients, wanted, strict=True)
    }


def _rows(tensors: Any, lengths: tuple[int, ...]) -> Any:
    """The tensors (1, heads, tokens, size) of each row."""
    return zip(*(tensor.split(lengths, 2) for tensor in tensors), strict=True)


def _alone(row: Any, window: int | None) -> torch.Tensor:
    """Causal attention of one row (query, key, value), each token seeing itself and the `window` - 1 before."""
    query, key, value = row
    places = torch.arange(query.shape[2], device=query.device)
    back = places[:, None] - places
    seen = (back >= 0) & (back < (window or len(places)))
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    return functional.scaled_dot_product_attention(query, key, value, seen)


def _row_by_row(query: Any, key: Any, value: Any, bounds: Any, *_: Any, **named: Any) -> torch.Tensor:
    """In the place of PyTorch's kernel, which a CPU has not."""
    back = named["window_size"][0]
    rows = _rows((tensor.transpose(0, 1)[None] for tensor in (query, key, value)), tuple(bounds.diff().tolist()))
    return torch.cat([_alone(row, back + 1 or None) for row in rows], 2)[0].transpose(0, 1)


def passes(base: Path, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Seconds and peak bytes of a forward and backward pass over rows of `lengths`, by how layers are computed."""
    from transformers.integrations.liger import apply_liger_kernel
    from transformers.utils import is_liger_kernel_available

    model = add_adapter(load_model(base, quantised=ON_GPU), Adapter(kind="qlora", rank=16), 0).train()
    figures = {"publishers": _passes(model, lengths)}
    fuse_adapters(model)
    figures["adapters"] = _passes(model, lengths)
    changed = fuse_layers(model)
    figures["ours"] = _passes(model, lengths)
    if ON_GPU and is_liger_kernel_available():
        for layer in changed:
            del layer.forward
        apply_liger_kernel(model, {"cross_entropy": False, "fused_linear_cross_entropy": False})
        figures["ligers"] = _passes(model, lengths)
    return figures


def _passes(model: Any, lengths: tuple[int, ...]) -> dict[str, dict[str, float]]:
    backbone = model.get_base_model().base_model
    figures = {}
    for length in lengths:
        ids = torch.arange(length, device=DEVICE)[None] % 1000

        def run(ids: torch.Tensor = ids) -> None:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=ON_GPU), disable_input_dtype_casting(model):
                hidden = backbone(input_ids=ids, use_cache=False).last_hidden_state
            hidden.float().square().mean().backward()

        run()
        if ON_GPU:
            torch.cuda.reset_peak_memory_stats()
        seconds = min(timed(run)[1] for _ in range(4))
        figures[str(length)] = {"seconds": seconds, "peak": torch.cuda.max_memory_allocated() if ON_GPU else 0}
    return figures


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The norm of the difference relative to that of what is wanted."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def timed(run: Any) -> tuple[Any, float]:
    begun = time.perf_counter()
    found = run()
    if ON_GPU:
        torch.cuda.synchronize()
    return found, time.perf_counter() - begun
