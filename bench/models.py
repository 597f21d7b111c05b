"""`make bench-models`: tiny random models of all families through SFT, DPO, merge, gates and vLLM.

Each family is a process of its own. Writes docs/MODELS.md; the last line is the record.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models_served import EXPECTED
from runs import machine

if TYPE_CHECKING:
    from appliance.home import Home

PAGE = Path(__file__).parent.parent / "docs" / "MODELS.md"
PATIENCE = 900
"""Seconds after which a family is given up."""
TARGET = 0.95
LISTED = """
llama qwen2 qwen3 mistral ministral3 gemma2 gemma3_text gemma4_text phi phi3 smollm3 lfm2 qwen3_5_text olmo2
olmo3 granite glm4 stablelm cohere2 exaone4 starcoder2 gpt_neox hunyuan_v1_dense ernie4_5 nanochat helium
apertus seed_oss arcee gemma4 gemma3n gemma3 qwen3_5 mistral3 qwen2_5_vl qwen3_vl qwen3_moe mixtral gpt_oss
olmoe qwen2_moe granitemoe granitemoehybrid qwen3_next glm4_moe phimoe jamba deepseek_v2 deepseek_v3 minicpm3
falcon falcon_h1 nemotron_h mamba2 gpt2
"""
"""What people train, of which at least TARGET has to go through."""

OF_IMAGES = ("torchvision==0.28.0", "timm==1.0.31", "pillow")
_OPERATORS = """import torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""

_PAGE = """# Models

<!-- `make bench-models` writes this page. -->

Every family of models that Transformers {version} has for texts, or for texts and images, as a tiny random model with a
chat template such as its own, through `sft`, `dpo`, merge and gates on a CPU. Of models with images or sound the text
is trained, and the rest stays byte for byte. A mixture of experts goes through twice: with adapters beside the experts,
as by default, and on them too (`target_parameters`). vLLM's CPU build is given the merged model, and served is what it
says the same of as Transformers; a class that reads images is loaded as itself, for texts alone where it can be.

{trained} of {made} are trained, {refused} refused before training, {failed} fail.
Of {others} no tiny model could be made: {names}.

| family | chat template | outcome | on experts | vLLM |
|---|---|---|---|---|
{rows}
"""


def trial(family: str, folder: Path, result: Path, kept: Path) -> None:
    """Leave in `result` how far the family came, and why no further, and in `kept` the merged model."""
    with open(folder / "log.txt", "w") as log:
        sys.stdout = sys.stderr = log
        found = try_family(family, folder)
        if found["outcome"] == "trained":
            keep(folder / "home" / "runs" / "beside" / "merge" / "model", kept)
        result.write_text(json.dumps(found))


def keep(model: Path, kept: Path) -> None:
    """Copy a merged model to `kept`, with what Transformers says of a text."""
    import torch

    from appliance.train.model import load_model

    ids = [5 + number * 7 % 300 for number in range(24)]

    def said(dtype: torch.dtype) -> torch.Tensor:
        logits = load_model(model).to(dtype)(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1]
        logprobs: torch.Tensor = logits.float().log_softmax(-1)
        return logprobs.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]

    with torch.no_grad():
        exact, rounded = said(torch.float32), said(torch.bfloat16)
    expected = {"ids": ids, "logprobs": exact.tolist(), "rounding": (rounded - exact).abs().max().item()}
    shutil.copytree(model, kept)
    (kept / EXPECTED).write_text(json.dumps(expected))


def served(python: Path, kept: Path) -> Iterator[tuple[str, str]]:
    """Each family whose merged model is in `kept`, with what vLLM makes of it; `python` is where vLLM is."""
    command = [python, Path(__file__).with_name("models_served.py"), kept]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as asked:
        for line in asked.stdout or ():
            print(line.strip(), file=sys.stderr)
            yield from json.loads(line).items()
    if asked.returncode:
        raise SystemExit(f"vLLM could not be tried: exit {asked.returncode}")


def install_for_images(folder: Path) -> None:
    """Put in `folder` what classes that read images import, though no image is read here, for every process from now.

    PyPI's build of torchvision is compiled for CUDA. Beside torch's CPU build it lacks its operators, and is imported
    all the same where two of them are declared.
    """
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), *OF_IMAGES]
    subprocess.run(command, check=True)
    (folder / "sitecustomize.py").write_text(_OPERATORS)
    sys.path.insert(0, str(folder))  # which forked processes have from here
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def try_family(family: str, folder: Path) -> dict[str, Any]:
    """How far the family came in a home of its own, and why no further."""
    from tiny_families import make_family, template_of

    from appliance.architecture import empty_model, expert_parameters
    from appliance.errors import InvalidInput
    from appliance.home import Home
    from appliance.models import check_model
    from appliance.pull import require_usable

    home = Home(folder / "home")
    home.create()
    found: dict[str, Any] = {"template": template_of(family)}
    try:
        base = make_family(home.models / "base", family)
    except Exception as error:  # whatever a config that nobody has tried before raises
        return found | {"outcome": "not made", "why": _line(error)}
    try:
        check_model(base)
        require_usable(base)
    except InvalidInput as error:
        return found | {"outcome": "refused", "why": error.message}
    found |= _run(home, "beside", "")
    if found["outcome"] == "trained" and expert_parameters(empty_model(base)):
        experts = _run(home, "experts", 'target_parameters = ["all-experts"]\n')
        if experts["outcome"] == "failed":
            return found | experts
        found["experts"] = experts["outcome"]
    return found


def _run(home: Home, name: str, adapter: str) -> dict[str, Any]:
    """How far a run with such settings of its adapter came."""
    from tiny import add_run, events, stage, work
    from tiny import result as result_of

    stages = stage("sft", "FACTS", epochs=2, max_length=4096)
    stages += stage("dpo", "PREFERENCES", epochs=1, max_length=4096)
    run = add_run(home, name, adapter + stages, base="base")
    for step in ("sft", "dpo", "merge", "verify"):
        if work(run, step) != 0:
            problem = json.loads((run / step / "failure.json").read_bytes())
            early = problem["code"] == "not_mergeable" and not events(run, "step")
            return {"outcome": "refused" if early else "failed", "stage": step, "why": problem["reason"]}
    gates = result_of(run, "verify")["gates"]
    without = [what for what, kind in (("forecast", "forecast"), ("sample answers", "sample")) if not events(run, kind)]
    if failed := [gate for gate, found in gates.items() if not found["passed"]]:
        return {"outcome": "failed", "without": without, "stage": "verify", "why": f"gates {', '.join(failed)}"}
    return {"outcome": "trained", "without": without}


def _line(error: Exception) -> str:
    first, *_ = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {first}"[:160]


def trials(families: Iterable[str], workers: int, kept: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each family with what came of it, in their order; merged models go to `kept`."""
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["appliance.train.stage", "appliance.release.verify", "tiny_families"])

    def tried(family: str) -> tuple[str, dict[str, Any]]:
        with tempfile.TemporaryDirectory(prefix=f"{family}-") as scratch:
            folder, result = Path(scratch), Path(scratch) / "result.json"
            process = context.Process(target=trial, args=(family, folder, result, kept / family))
            process.start()
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()
                return family, {"template": "", "outcome": "failed", "why": f"no end within {PATIENCE} s"}
            if not result.exists():
                last = (folder / "log.txt").read_text().strip().splitlines()[-1:]
                why = f"exit {process.exitcode}: {''.join(last)[:160]}"
                return family, {"template": "", "outcome": "failed", "why": why}
            return family, json.loads(result.read_bytes())

    with ThreadPoolExecutor(workers) as pool:
        for family, outcome in pool.map(tried, families):
            print(
                f"{family}: {outcome['outcome']} {outcome.get('stage', '')} {outcome.get('why', '')}", file=sys.stderr
            )
            yield family, outcome


def page(rows: Iterable[str], others: Iterable[str]) -> str:
    """docs/MODELS.md, of the rows of its table, and of families of which no model could be made."""
    import transformers

    rows, others = sorted(rows), sorted(others)
    count = Counter(row.split(" | ")[2].split()[0].rstrip(",:") for row in rows)
    return _PAGE.format(
        version=transformers.__version__,
        made=len(rows),
        others=len(others),
        names=", ".join(others) or "none",
        rows="\n".join(rows),
        **{kind: count[kind] for kind in ("trained", "refused", "failed")},
    )


def row_of(family: str, one: dict[str, Any]) -> str:
    """The row of a family of which a model could be made."""
    return f"| {family} | {one['template']} | {_said(one)} | {one.get('experts', '')} | {_cell(one.get('vllm', ''))} |"


def updated(before: str, outcomes: dict[str, dict[str, Any]]) -> str:
    """The page `before` with what came of some families since."""
    kept = [row for row in re.findall(r"^\| .* \|$", before, re.M)[1:] if row.split()[1] not in outcomes]
    named = re.search(r"^Of \d+ no tiny model could be made: (.*)\.$", before, re.M)
    others = {*(named[1].split(", ") if named else ())} - outcomes.keys() - {"none"}
    made = {family: one for family, one in outcomes.items() if one["outcome"] != "not made"}
    rows = [*kept, *(row_of(family, one) for family, one in made.items())]
    return page(rows, others | (outcomes.keys() - made.keys()))


def _said(one: dict[str, Any]) -> str:
    """An outcome in its cell of the table."""
    without = f", without {' or '.join(one['without'])}" if one.get("without") else ""
    where = f" in {one['stage']}" if "stage" in one else ""
    why = f": {_cell(one['why'])}" if "why" in one else ""
    return f"{one['outcome']}{without}{where}{why}"


def _cell(text: str) -> str:
    """Text that stays in its cell, without names of folders and hosts."""
    return re.sub(r"https?://\S+|/tmp/[^\s']*/", "", text.replace("|", "/"))


def main() -> None:
    """Try the families, write the page, print the record."""
    from tiny_families import FAMILIES

    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*", help="none: all; else their rows of the page alone are written anew")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--vllm", type=Path, required=True, help="the Python that has vLLM")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        kept, modules = Path(scratch) / "kept", Path(scratch) / "modules"
        install_for_images(modules)
        outcomes = dict(trials(given.families or FAMILIES, given.workers, kept))
        for family, outcome in served(given.vllm, kept):
            outcomes[family]["vllm"] = outcome
    PAGE.write_text(updated(PAGE.read_text() if given.families else "", outcomes))
    listed = [outcomes[family]["outcome"] for family in LISTED.split() if family in outcomes]
    share = listed.count("trained") / len(listed) if listed else 0.0
    failed = sorted(family for family, one in outcomes.items() if one["outcome"] == "failed")
    record = {
        "bench": "models",
        "ratios": {"listed_trained": round(share, 3), "failed": len(failed)},
        "targets": {"listed_trained": TARGET, "failed": 0},
        "met": share >= TARGET and not failed,
        "served": sum(one.get("vllm") == "served" for one in outcomes.values()),
        "families": Counter(one["outcome"] for one in outcomes.values()),
        "machine": machine(),
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
