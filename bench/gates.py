"""Which planted faults the gates catch, and how many honest releases they refuse, on the real small model.

    python bench/gates.py [--base DIRECTORY] [--seeds N ...] [--home DIRECTORY]

Each fault of tests/appliance/release/planted.py is planted into the merge of two runs of each seed, that of the demo
and one that is barely trained, and judged by the verify stage as a worker does (gates 1, 2 and 5; parity and stopping
need an engine). Honest are ten kinds of run of each seed. What a home has already done is not done again. The last
line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from planted import FAULTS, merged, plant
from runs import imported, machine, say

from appliance.home import Home
from appliance.train.recipe import dump_recipe, parse_recipe
from appliance.worker import main as work

EXAMPLES = Path(__file__).parent.parent / "examples"
SHORT = "max_steps = 20\nbatch_size = 8\nmax_length = 256\nsamples = 0\nevaluate_every = 1000\n"
SFT = f'[[stages]]\nmethod = "sft"\ndataset = "FACTS"\n{SHORT}'
DPO = f'[[stages]]\nmethod = "dpo"\ndataset = "PREFERENCES"\nepochs = 10\n{SHORT}'
KTO = f'[[stages]]\nmethod = "kto"\ndataset = "JUDGEMENTS"\nepochs = 10\n{SHORT}'
HONEST = {
    "demo": ("", ""),
    "barely trained": ('kind = "qlora"', SFT + DPO),
    "sft, lora": ('kind = "lora"', SFT),
    "sft, rslora": ('kind = "rslora"\nrank = 64', SFT),
    "sft, dora": ('kind = "dora"', SFT),
    "sft, a tenth of the learning rate": ('kind = "lora"', SFT + "learning_rate = 1e-4\n"),
    "dpo, lora": ('kind = "lora"', DPO),
    "dpo, qlora": ('kind = "qlora"', DPO),
    "kto, lora": ('kind = "lora"', KTO),
    "sft and kto": ('kind = "lora"', SFT + KTO),
}
"""Adapter and stages; the demo's are its recipe's."""
PLANTED_IN = ("demo", "barely trained")
TARGETS = {"caught": 1.0, "falsely_refused": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path, default=Path(".cache/home/models/smollm2-135m"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19])
    parser.add_argument("--home", type=Path)
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = given.home or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-gates-")))
        record = Bench(Home(folder.absolute()), given.base).record(given.seeds)
    print(json.dumps(record | {"machine": machine()}))


class Bench:
    """A home with the base and the demo's data."""

    def __init__(self, home: Home, base: Path) -> None:
        home.create()
        self.home = home
        if not (home.models / "smollm2-135m").exists():
            (home.models / "smollm2-135m").symlink_to(base.absolute())
        judged = home.incoming / "judgements.jsonl"
        judged.write_text("\n".join(map(json.dumps, _judgements())))
        files = {
            "FACTS": EXAMPLES / "facts.json",
            "PREFERENCES": EXAMPLES / "preferences.jsonl",
            "JUDGEMENTS": judged,
        }
        self.datasets = {name: imported(home, file) for name, file in files.items()}

    def record(self, seeds: list[int]) -> dict[str, Any]:
        """Every honest run judged, every fault planted and judged."""
        honest: dict[str, dict[str, Any]] = {}
        faults: dict[str, dict[str, Any]] = {}
        for seed in seeds:
            for kind in HONEST:
                run = self._trained(kind, seed)
                honest[f"{kind}, {seed}"] = _judged(run)
                if kind in PLANTED_IN:
                    faults |= {f"{fault}, {kind}, {seed}": self._plant(run, fault) for fault in FAULTS}
        missed = [name for name, gates in faults.items() if not refused_by(gates)]
        refused = {name: found for name, gates in honest.items() if (found := refused_by(gates))}
        ratios = {"caught": 1 - len(missed) / len(faults), "falsely_refused": len(refused) / len(honest)}
        return {
            "bench": "gates",
            "ratios": ratios,
            "targets": TARGETS,
            "met": ratios == TARGETS,
            "planted": len(faults),
            "honest": len(honest),
            "missed": missed,
            "refused": refused,
            "caught_by": {
                fault: sorted(
                    {
                        gate
                        for name, gates in faults.items()
                        if name.startswith(f"{fault}, ")
                        for gate in refused_by(gates)
                    }
                )
                for fault in FAULTS
            },
            "honest_figures": {name: _figures(gates) for name, gates in honest.items()},
        }

    def _trained(self, kind: str, seed: int) -> Path:
        """The run of a kind, merged."""
        adapter, stages = HONEST[kind]
        if stages:
            text = f'name = "bench"\nbase = "smollm2-135m"\nseed = {seed}\n[adapter]\n{adapter}\n{stages}'
        else:
            text = f"seed = {seed}\n" + (EXAMPLES / "recipes" / "demo.toml").read_text()
            text = text.replace('"facts"', '"FACTS"').replace('"preferences"', '"PREFERENCES"')
        for name, id in self.datasets.items():
            text = text.replace(name, id)
        run = self.home.runs / f"{kind.replace(' ', '-').replace(',', '')}-{seed}"
        if not run.exists():
            run.mkdir()
            (run / "recipe.toml").write_text(dump_recipe(parse_recipe(text)))
        for stage in parse_recipe((run / "recipe.toml").read_text()).pipeline()[:-2]:
            self._work(run, stage)
        return run

    def _work(self, run: Path, stage: str) -> None:
        begun = time.monotonic()
        with contextlib.redirect_stdout(io.StringIO()):
            status = work(run, stage)
        if status:
            raise SystemExit(f"{stage} of {run.name} failed: {(run / stage / 'failure.json').read_text()}")
        say(f"{run.name} {stage}: {time.monotonic() - begun:.0f} s")

    def _plant(self, run: Path, fault: str) -> dict[str, Any]:
        """The gates of the run's merge with a fault in it; the run itself stays as it is."""
        spoilt = self.home.runs / "spoilt"
        kept = run / f"{fault.replace(' ', '-')}.json"
        if not kept.exists():
            shutil.rmtree(spoilt, ignore_errors=True)
            shutil.copytree(run, spoilt)
            shutil.rmtree(spoilt / "verify", ignore_errors=True)
            recipe = parse_recipe((run / "recipe.toml").read_text())
            form = json.loads((run / "merge" / "result.json").read_text())["kept"]
            plant(merged(self.home, spoilt, recipe, form), fault, spoilt / "merge" / "model")
            self._work(spoilt, "verify")
            shutil.copyfile(spoilt / "verify" / "result.json", kept)
        gates: dict[str, Any] = json.loads(kept.read_text())["gates"]
        say(f"  {fault}: {', '.join(refused_by(gates)) or 'MISSED'}")
        return gates


def _judged(run: Path) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()):
        assert work(run, "verify") == 0
    gates: dict[str, Any] = json.loads((run / "verify" / "result.json").read_text())["gates"]
    say(f"{run.name}: {refused_by(gates) or 'passed'}")
    return gates


def refused_by(gates: dict[str, Any]) -> list[str]:
    """The gates that have measured and refused."""
    return [name for name, gate in gates.items() if not gate["passed"] and "not measured" not in gate["reason"]]


def _figures(gates: dict[str, Any]) -> dict[str, float]:
    """How close to its limits an honest release came."""
    fidelity, structure, quality = (gates[name]["figures"] for name in ("fidelity", "structure", "quality"))
    found = {
        "update_kept": structure["update_kept"],
        "otherwise_rounded": structure["otherwise_rounded"] / structure["values"],
        "divergence": fidelity["mean_divergence"],
        "divergence_over_limit": fidelity["mean_divergence"] / fidelity["limits"]["mean_divergence"],
        "difference_over_limit": fidelity["largest_difference"] / fidelity["limits"]["largest_difference"],
        "loss_over_base": quality["difference"],
    }
    if "margin" in fidelity:
        found["margin_kept"] = fidelity["margin"]["kept"]
    return {name: float(f"{value:.4g}") for name, value in found.items()}


def _judgements() -> list[dict[str, Any]]:
    """The demo's preferences as single answers, each judged good or bad."""
    rows = [json.loads(line) for line in (EXAMPLES / "preferences.jsonl").read_text().splitlines()]
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row in rows
        for side in ("chosen", "rejected")
    ]


if __name__ == "__main__":
    main()
