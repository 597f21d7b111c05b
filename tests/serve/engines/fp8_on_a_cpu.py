"""vLLM in FP8 without a card: `python fp8_on_a_cpu.py ASKED RESULT`, for processors with AMX.

Its CPU build multiplies with weights in FP8 and lacks the kernel that rounds them, for which PyTorch stands in here.
ASKED is {"model", "reloaded", "options", "ids"}, `options` those of the class LLM; RESULT gets two lists, by prompt and
token: what the model says, and what it says with the weights of `reloaded` loaded in their place.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def _quantise(values: Any, scale: Any, **_: Any) -> tuple[Any, Any]:
    import torch

    return (values.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def _logps(llm: Any, ids: list[list[int]]) -> list[list[float]]:
    from vllm import SamplingParams

    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    said = llm.generate([{"prompt_token_ids": one} for one in ids], asked, use_tqdm=False)
    return [
        [0.0, *(of[id].logprob for of, id in zip(one.prompt_logprobs[1:], one.prompt_token_ids[1:], strict=True))]
        for one in said
    ]


def main() -> None:
    """Ask, reload, ask again."""
    from vllm import LLM, _custom_ops

    _custom_ops.scaled_fp8_quant = _quantise
    asked = json.loads(Path(sys.argv[1]).read_text())
    llm = LLM(asked["model"], dtype="bfloat16", max_model_len=512, gpu_memory_utilization=0.3, **asked["options"])
    before = _logps(llm, asked["ids"])
    llm.collective_rpc("reload_weights", kwargs={"weights_path": asked["reloaded"]})
    llm.reset_prefix_cache()
    Path(sys.argv[2]).write_text(json.dumps([before, _logps(llm, asked["ids"])]))


if __name__ == "__main__":
    main()
