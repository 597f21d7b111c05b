"""Whether vLLM says of merged models what Transformers does: `python bench/models_served.py FOLDER`, where vLLM is.

FOLDER holds models by family, each with what is expected (EXPECTED). One line of JSON a family goes to standard output.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from serve.engines.vllm import LEAST_IMAGES, WITH_ITS_TOWERS

EXPECTED = "expected.json"
PATIENCE = 240
"""Seconds after which a model is given up."""
APART = 0.01
"""Nats by which a token's log-probability may differ."""
ROUNDINGS = 2
"""In bfloat16, which is all that vLLM's CPU build has of some models: how often it may differ by what the rounding to
bfloat16 makes of them in Transformers."""
_WORKERS = 2


def serve(folder: Path, result: Path) -> None:
    """Leave in `result` what vLLM makes of the model in `folder`."""
    log = os.open(result.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    try:
        try:
            outcome = _served(folder, "float32")
        except AssertionError as error:
            if "BF16" not in str(error):
                raise
            outcome = _served(folder, "bfloat16")
    except BaseException as error:  # whatever a model that nobody has tried before raises
        lacks = re.search(r"No module named '([\w.]+)'", result.with_suffix(".log").read_text())
        why = f"it needs {lacks[1]}" if lacks else f"{type(error).__name__}: {' '.join(str(error).split())}"
        outcome = f"not loaded: {why}"[:200]
    result.write_text(json.dumps(outcome))


def _served(folder: Path, dtype: str) -> str:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    expected = json.loads((folder / EXPECTED).read_bytes())
    ids: list[int] = expected["ids"]
    with_towers = json.loads((folder / "config.json").read_bytes())["model_type"] in WITH_ITS_TOWERS
    engine = LLM(
        str(folder),
        dtype=dtype,
        max_model_len=256,
        max_num_seqs=2,
        enforce_eager=True,
        kv_cache_memory_bytes=1 << 26,
        distributed_executor_backend="uni",
        language_model_only=not with_towers,
        limit_mm_per_prompt=LEAST_IMAGES if with_towers else None,
    )
    answer: Any = engine.generate(
        [{"prompt_token_ids": ids}], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0), use_tqdm=False
    )[0]
    said = [of[id].logprob for of, id in zip(answer.prompt_logprobs[1:], ids[1:], strict=True)]
    apart = max(abs(one - other) for one, other in zip(said, expected["logprobs"], strict=True))
    most = APART if dtype == "float32" else APART + ROUNDINGS * expected["rounding"]
    return "served" if apart <= most else f"another model: {apart:.2g} nats apart, {most:.2g} allowed"


def _tried(context: Any, folder: Path) -> str:
    result = folder / "served.json"
    process = context.Process(target=serve, args=(folder, result))
    process.start()
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
        return f"not loaded: no end within {PATIENCE} s"
    return str(json.loads(result.read_bytes())) if result.exists() else f"not loaded: exit {process.exitcode}"


def main() -> None:
    """Try each model of the folder."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker"])
    folders = sorted(path.parent for path in Path(sys.argv[1]).glob(f"*/{EXPECTED}"))
    with ThreadPoolExecutor(_WORKERS) as pool:
        for folder, outcome in zip(folders, pool.map(lambda one: _tried(context, one), folders), strict=True):
            print(json.dumps({folder.name: outcome}), flush=True)


if __name__ == "__main__":
    main()
