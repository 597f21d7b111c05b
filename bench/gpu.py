"""What bench/gpu.sh runs: see there."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from random_llama import write_model
from train import ON_GPU, Figures, imported, machine, made_up, rate, run_python, say, trained_in

from appliance.home import Home
from appliance.train.recipe import dump_recipe, parse_recipe

SHAPE = "8b" if ON_GPU else "tiny"
LENGTH = 2048 if ON_GPU else 128
STEPS = 12 if ON_GPU else 6
PEER = Path(__file__).parent / "plain_trl.py"
PADDED = "import sys; from appliance.train import sft; sft.can_pack = lambda *_: False; "
PADDED += "from pathlib import Path; from appliance.worker import main; sys.exit(main(Path(sys.argv[1]), sys.argv[2]))"
"""A worker that pads where it could pack."""
AT_MOST = {"sft_peak_gib": 8.0, "dpo_peak_over_sft": 1.1}
AT_LEAST = {"long_rows_over_plain_trl": 1.0, "short_rows_over_plain_trl": 3.0, "short_rows_over_padded": 1.0}
FORECAST_WITHIN = 0.1

LONG = """
name = "long"
base = "random"
fidelity_tolerance = 1.0
[adapter]
kind = "qlora"
[[stages]]
method = "sft"
dataset = "{sft}"
batch_size = 1
gradient_checkpointing = "on"
max_steps = {steps}
learning_rate = 1e-4
max_length = {length}
evaluate_every = 1000
checkpoint_every = 1000
[[stages]]
method = "dpo"
dataset = "{dpo}"
batch_size = 1
gradient_checkpointing = "on"
max_steps = {steps}
learning_rate = 1e-4
max_length = {length}
evaluate_every = 1000
checkpoint_every = 1000
"""
SHORT = """
name = "short"
base = "random"
eval_share = 0.0
[adapter]
kind = "qlora"
[[stages]]
method = "sft"
dataset = "{sft}"
batch_size = 8
epochs = 1
max_steps = {steps}
learning_rate = 1e-4
checkpoint_every = 1000
"""


def main(tokenizer: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as folder:
        home = Home(Path(folder))
        home.create()
        parameters = write_model(home.models / "random", SHAPE, tokenizer)
        say(f"{SHAPE}: {parameters / 1e9:.2f} billion parameters")
        figures, after = long_rows(home)
        figures |= short_rows(home)
    ratios = {
        "sft_peak_gib": figures["sft"]["peak"] / 2**30,
        "dpo_peak_over_sft": figures["dpo"]["peak"] / figures["sft"]["peak"],
        "sft_peak_over_plain_trl": figures["sft"]["peak"] / figures["plain_trl"]["peak"],
        "long_rows_over_plain_trl": rate([figures["sft"]]) / rate([figures["plain_trl"]]),
        "short_rows_over_plain_trl": rate([figures["short"]]) / rate([figures["short_plain_trl"]]),
        "short_rows_over_padded": rate([figures["short"]]) / rate([figures["short_padded"]]),
    }
    off = {name: one["forecast"] / one["peak"] for name, one in figures.items() if "forecast" in one}
    ratios |= {f"{name}_forecast_over_peak": ratio for name, ratio in off.items()}
    met = (
        all(ratios[name] <= most for name, most in AT_MOST.items())
        and all(ratios[name] >= least for name, least in AT_LEAST.items())
        and all(abs(ratio - 1) <= FORECAST_WITHIN for ratio in off.values())
    )
    record = {
        "bench": "gpu",
        "dry_run": not ON_GPU,
        "ratios": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "targets": {"at_most": AT_MOST, "at_least": AT_LEAST, "forecast_within": FORECAST_WITHIN},
        "met": met and ON_GPU,
        "shape": SHAPE,
        "parameters": parameters,
        "length": LENGTH,
        "figures": figures,
        "after": after,
        "machine": machine(),
    }
    print(json.dumps(record))


def long_rows(home: Home) -> tuple[dict[str, Figures], dict[str, Any]]:
    """One row of full length a step: sft and dpo with checkpointing, and plain TRL; then merge and verify."""
    sft, dpo = (import_rows(home, name) for name in ("sft", "dpo"))
    run = queued(home, LONG.format(sft=sft, dpo=dpo, steps=STEPS, length=LENGTH))
    for stage in ("sft", "dpo", "merge", "verify"):
        work(run, stage)
    figures = {"sft": ours(run, "sft"), "dpo": ours(run, "dpo"), "plain_trl": peer(home, sft, 1)}
    merge, verify = (json.loads((run / stage / "result.json").read_text()) for stage in ("merge", "verify"))
    after = {name: merge[name] for name in ("seconds", "kept", "losses")}
    return figures, after | {"gates": {name: gate["passed"] for name, gate in verify["gates"].items()}}


def short_rows(home: Home) -> dict[str, Figures]:
    """Eight rows of varied length a step: packed where there is a GPU, padded, and plain TRL."""
    rows = imported(home, made_up(home.incoming / "short.jsonl"))
    figures = {}
    for name, padded in (("short", False), ("short_padded", True)):
        run = queued(home, SHORT.format(sft=rows, steps=0 if ON_GPU else STEPS))
        work(run, "sft", padded=padded)
        figures[name] = ours(run, "sft")
    return figures | {"short_plain_trl": peer(home, rows, 8)}


def queued(home: Home, recipe: str) -> Path:
    run = home.runs / f"gpu-{len(list(home.runs.iterdir()))}"
    run.mkdir()
    (run / "recipe.toml").write_text(dump_recipe(parse_recipe(recipe)))
    return run


def work(run: Path, stage: str, *, padded: bool = False) -> None:
    say(f"{run.name} {stage}{' padded' if padded else ''} ...")
    worker = ["-c", PADDED] if padded else ["-m", "appliance.worker"]
    subprocess.run([sys.executable, *worker, str(run), stage], check=True, stdout=sys.stderr)


def ours(run: Path, stage: str) -> Figures:
    forecast = json.loads((run / stage / "result.json").read_text())["memory_forecast"]
    return trained_in(run, stage) | {"forecast": forecast}


def peer(home: Home, dataset: str, batch_size: int) -> Figures:
    say("plain TRL ...")
    rows = home.datasets / dataset / "rows.jsonl"
    argv = [str(PEER), str(home.models / "random"), str(rows), "--adapter", "qlora", "--batch-size", str(batch_size)]
    figures: Figures = json.loads(run_python([*argv, "--max-length", str(LENGTH)]).splitlines()[-1])
    return figures


def import_rows(home: Home, name: str) -> str:
    """A dataset whose every row nearly fills the length; its id."""
    words = ["river", "stone", "lamp", "cloud", "amber", "quiet", "harbour", "window", "seven", "garden"]
    rows = []
    for number in range(STEPS + 8):
        text = " ".join(words[(number * 7 + place * place) % len(words)] for place in range(int(LENGTH * 0.6)))
        prompt = f"Question {number}: tell me all about it."
        answer = {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]}
        pair = {"prompt": prompt, "chosen": text, "rejected": " ".join(text.split()[::-2])}
        rows.append(answer if name == "sft" else pair)
    file = home.incoming / f"{name}.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return imported(home, file)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
