"""The parts of bench/gpu.sh, each run as a process of its own: python gpu_parts.py PART SCRATCH TOKENIZER [--dry].

Base models with random weights lie in SCRATCH and are made once. The last line is what the part has found.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from runs import WORKER, imported, made_up, queued, rate, run_python, said, say, seconds_to_leave, trained_in

from appliance.home import Home

HERE = Path(__file__).parent
UNTIMED = 2
"""The first steps, in which kernels are compiled."""
MEMORY = 7.0
"""GiB in which an 8B's short rows have no room eight at a time."""
STAGE = """
[[stages]]
method = "{method}"
dataset = "{dataset}"
batch_size = {batch_size}
gradient_checkpointing = "{checkpointing}"
epochs = 1
max_steps = {steps}
learning_rate = {learning_rate}
max_length = 2048
evaluate_every = 1000
checkpoint_every = 1000
samples = 0
"""
RECIPE = """
name = "bench"
base = "{base}"
eval_share = {eval_share}
[adapter]
kind = "qlora"
"""


def shapes(dry: bool) -> tuple[str, str]:
    """Of the base that is trained, and of the one that is released."""
    return ("tiny", "tiny") if dry else ("8b", "1.5b")


@dataclass(frozen=True)
class Bench:
    """What a part works with."""

    home: Home
    """Its own, with the base models that have been made."""
    scratch: Path
    tokenizer: Path
    dry: bool

    @property
    def large(self) -> str:
        """Shape of the base that is trained."""
        return shapes(self.dry)[0]

    @property
    def small(self) -> str:
        """Shape of the base that is released."""
        return shapes(self.dry)[1]

    @property
    def length(self) -> int:
        return 128 if self.dry else 2048

    def steps(self, count: int) -> int:
        return min(count, 4) if self.dry else count

    def rows(self, method: str, count: int) -> str:
        """A dataset of so many rows that each nearly fill the length; its id."""
        words = ["river", "stone", "lamp", "cloud", "amber", "quiet", "harbour", "window", "seven", "garden"]
        rows = []
        for number in range(count):
            text = " ".join(words[(number * 7 + place * place) % len(words)] for place in range(int(self.length * 0.6)))
            prompt = f"Question {number}: tell me all about it."
            answer = {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]}
            pair = {"prompt": prompt, "chosen": text, "rejected": " ".join(text.split()[::-2])}
            rows.append(answer if method == "sft" else pair)
        file = self.home.incoming / f"{method}.jsonl"
        file.write_text("\n".join(json.dumps(row) for row in rows))
        return imported(self.home, file)

    def short_rows(self) -> str:
        return imported(self.home, made_up(self.home.incoming / "short.jsonl"))

    def run(self, *stages: str, base: str = "", eval_share: float = 0.0) -> Path:
        return queued(self.home, RECIPE.format(base=base or self.large, eval_share=eval_share) + "".join(stages))


def stage(dataset: str, steps: int, *, method: str = "sft", rows: int = 1, checkpointing: str = "auto") -> str:
    """A stage of a recipe."""
    return STAGE.format(
        method=method,
        dataset=dataset,
        batch_size=rows,
        checkpointing=checkpointing,
        steps=steps,
        learning_rate=1e-4 if method == "sft" else 5e-6,
    )


def work(run: Path, name: str, *options: str) -> dict[str, Any]:
    """Run a stage in a worker; the most memory that the GPU then had in use beyond what it had before.

    Where parts run side by side, that is what all of them take.
    """
    script = [str(HERE / "gpu_worker.py")] if options or name in ("sft", "dpo") else WORKER
    say(f"{run.name} {name} {' '.join(options)}")
    before = most = gpu_memory()
    with subprocess.Popen([sys.executable, *script, str(run), name, *options], stdout=sys.stderr) as worker:
        while worker.poll() is None:
            most = max(most, gpu_memory())
            time.sleep(0.2)
    failure = run / name / "failure.json"
    if worker.returncode:
        raise RuntimeError(failure.read_text() if failure.exists() else f"the worker left with {worker.returncode}")
    return {"nvml": most - before}


def gpu_memory() -> int:
    """Bytes in use of the first GPU; 0 without one."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return int(pynvml.nvmlDeviceGetMemoryInfo(pynvml.nvmlDeviceGetHandleByIndex(0)).used)
    except pynvml.NVMLError:
        return 0


def trained(run: Path, name: str, *options: str) -> dict[str, Any]:
    """Train a stage; its figures, tokens and seconds without those of the first steps."""
    seen = work(run, name, *options)
    result = json.loads((run / name / "result.json").read_text())
    (forecast,) = said(run, "forecast", name)[-1:]
    counted = trained_in(run, name, UNTIMED)
    return {
        **counted,
        **seen,
        "tokens_per_second": round(rate([counted]), 1),
        "with_first_steps": round(rate([trained_in(run, name)]), 1),
        "reserved": json.loads((run / "reserved.json").read_text()),
        "forecast": result["memory_forecast"],
        "forecast_parts": forecast["memory"],
        "forecast_seconds": forecast["seconds"],
        "gradient_checkpointing": forecast["gradient_checkpointing"],
        "losses": [event["loss"] for event in said(run, "step", name)],
        "warnings": [event["message"] for event in said(run, "warning", name)],
        "stage_seconds": result["seconds"],
    }


def stack(bench: Bench) -> dict[str, Any]:
    from gpu_kernels import stack

    return stack()


def rounding(bench: Bench) -> dict[str, Any]:
    from gpu_kernels import rounding

    return rounding()


def attention(bench: Bench) -> dict[str, Any]:
    from gpu_kernels import attention

    return attention()


def fp8(bench: Bench) -> dict[str, Any]:
    from gpu_kernels import fp8

    return fp8()


def weights(bench: Bench) -> dict[str, Any]:
    """Make what base models are not there."""
    from random_llama import write_model

    figures = {}
    for shape in set(shapes(bench.dry)):
        folder = bench.scratch / shape
        if not folder.exists():
            begun = time.monotonic()
            unfinished = folder.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            parameters = write_model(unfinished, shape, bench.tokenizer, device="cpu" if bench.dry else "cuda")
            unfinished.rename(folder)
            figures[shape] = {"parameters": parameters, "seconds": round(time.monotonic() - begun, 1)}
    return figures


def layers(bench: Bench) -> dict[str, Any]:
    """Passes with the publishers' layers, with ours, and with Liger's where it is installed."""
    from gpu_kernels import passes

    lengths = (bench.length, 4 * bench.length)
    return passes(bench.home.models / bench.large, lengths)


def sft_checkpointed(bench: Bench) -> dict[str, Any]:
    """Rows of full length, one a step, every layer computed twice."""
    count = bench.steps(12)
    return trained(bench.run(stage(bench.rows("sft", count), count, checkpointing="on")), "sft")


def sft(bench: Bench) -> dict[str, Any]:
    """The same without computing twice."""
    count = bench.steps(12)
    return trained(bench.run(stage(bench.rows("sft", count), count, checkpointing="off")), "sft")


def dpo(bench: Bench) -> dict[str, Any]:
    """Pairs of full length after a little sft: the reference is the adapter that it left, so the first loss is ln 2."""
    count = bench.steps(8)
    first = stage(bench.rows("sft", 3), 3, checkpointing="on")
    run = bench.run(first, stage(bench.rows("dpo", count), count, method="dpo", checkpointing="on"))
    before = trained(run, "sft")
    return trained(run, "dpo") | {"sft_peak": before["peak"]}


def out_of_memory(bench: Bench) -> dict[str, Any]:
    """Short rows in too little memory: parts are halved, and the run ends."""
    figures = trained(bench.run(stage(bench.short_rows(), bench.steps(6), rows=8)), "sft", "--memory", str(MEMORY))
    halved = [warning for warning in figures["warnings"] if warning.startswith("out of memory")]
    return figures | {"halved": len(halved)}


def release(bench: Bench) -> dict[str, Any]:
    """From rows to a merged release of a smaller base, verified as a whole and layer by layer."""
    run = bench.run(stage(bench.short_rows(), bench.steps(12), rows=8), base=bench.small, eval_share=0.1)
    figures = {"sft": trained(run, "sft")}
    for step, name, *options in (("merge", "merge"), ("verify", "verify"), ("streamed", "verify", "--streamed")):
        (run / name / "result.json").unlink(missing_ok=True)
        seen = work(run, name, *options)
        result = json.loads((run / name / "result.json").read_text())
        # Hashes of files say nothing here.
        figures[step] = seen | {key: value for key, value in result.items() if "files" not in key}
    for step in ("verify", "streamed"):
        gates = figures[step].get("gates", {})
        failed = {name: gate for name, gate in gates.items() if not gate.get("passed")}
        if failed or not gates:
            raise RuntimeError(f"the gates of {step} do not hold: {failed}; {json.dumps(figures)}")
    return figures


def interrupted(bench: Bench) -> dict[str, Any]:
    """SIGTERM in the middle of a step, and on from there."""
    count = 8
    run = bench.run(stage(bench.rows("sft", count), count))
    seconds = seconds_to_leave(run, [str(HERE / "gpu_worker.py")])
    left_after = len(said(run, "step"))
    work(run, "sft")
    steps = [event["step"] for event in said(run, "step")]
    if steps != list(range(1, count + 1)):
        raise RuntimeError(f"steps {steps} instead of {count} in a row")
    return {"leave_seconds": round(seconds, 2), "left_after": left_after, "steps": steps}


def short_packed(bench: Bench) -> dict[str, Any]:
    """Rows of varied length, eight a step, packed where there is a GPU."""
    return trained(bench.run(stage(bench.short_rows(), bench.steps(25), rows=8)), "sft")


def short_padded(bench: Bench) -> dict[str, Any]:
    """The same rows padded."""
    return trained(bench.run(stage(bench.short_rows(), bench.steps(25), rows=8)), "sft", "--padded")


def short_plain_trl(bench: Bench) -> dict[str, Any]:
    """The same rows in a plain TRL script."""
    return plain_trl(bench, bench.short_rows(), bench.steps(25), 8)


def long_plain_trl(bench: Bench) -> dict[str, Any]:
    """The rows of full length in a plain TRL script."""
    count = bench.steps(12)
    return plain_trl(bench, bench.rows("sft", count), count, 1)


def plain_trl(bench: Bench, dataset: str, steps: int, batch_size: int) -> dict[str, Any]:
    lines = (bench.home.datasets / dataset / "rows.jsonl").read_text().splitlines()
    rows = bench.home.incoming / "plain.jsonl"
    rows.write_text("\n".join(lines[: steps * batch_size]))
    argv = [str(HERE / "plain_trl.py"), str(bench.home.models / bench.large), str(rows), "--adapter", "qlora"]
    argv += ["--batch-size", str(batch_size), "--max-length", "2048", "--after", str(UNTIMED)]
    figures: dict[str, Any] = json.loads(run_python(argv).splitlines()[-1])
    return figures | {"tokens_per_second": round(rate([figures]), 1)}


class Part(NamedTuple):
    """One part."""

    run: Callable[[Bench], dict[str, Any]]
    seconds: float
    """How long it may take."""
    timed: bool = False
    """It is measured how fast it is: nothing else may run beside it."""
    trains: bool = True
    """It needs the base models."""

    @property
    def name(self) -> str:
        return self.run.__name__


PARTS = (
    Part(stack, 120, trains=False),
    Part(rounding, 120, trains=False),
    Part(attention, 120, trains=False),
    Part(fp8, 120, trains=False),
    Part(weights, 150, trains=False),
    Part(layers, 150, timed=True),
    Part(sft_checkpointed, 120, timed=True),
    Part(sft, 120, timed=True),
    Part(dpo, 180),
    Part(out_of_memory, 150),
    Part(release, 240),
    Part(interrupted, 180),
    Part(short_packed, 120, timed=True),
    Part(short_padded, 120, timed=True),
    Part(short_plain_trl, 120, timed=True),
    Part(long_plain_trl, 120, timed=True),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("part")
    parser.add_argument("scratch", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("--dry", action="store_true")
    given = parser.parse_args()
    (part,) = (part for part in PARTS if part.name == given.part)
    with tempfile.TemporaryDirectory(prefix=f"{part.name}-", dir=given.scratch) as folder:
        home = Home(Path(folder))
        home.create()
        bench = Bench(home, given.scratch, given.tokenizer, given.dry)
        for shape in set(shapes(given.dry)):
            (home.models / shape).symlink_to(given.scratch.absolute() / shape)
        print(json.dumps(part.run(bench)))


if __name__ == "__main__":
    main()
