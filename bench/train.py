"""Supervised fine-tuning through the worker against a plain TRL script, on the same model, rows, adapter and precision.

    python bench/train.py [--base DIRECTORY] [--data FILE] [--adapter lora|qlora ...] [--rounds N] [--rows N]
                          [--losses | --around]

The peers are TRL at its defaults and TRL with group_by_length, both with 8 rows a step. Every run is a process of its
own, alternating, and trains one pass over the same rows. Tokens are those of the rows without padding, seconds those of
the steps, the peak is the process's highest resident set (on a GPU what torch has held at most). `--losses` trains ours
and the second peer with three seeds instead, and compares the held-out loss of their adapters. `--around` measures what
is around our steps: the share of callbacks and events, the seconds from SIGTERM in the middle of a step to the end of
the process with a whole checkpoint, and the time that was forecast. Without a base, a GPU gets an 8B-shaped Llama with
random weights; without data, rows are made up. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from runs import Figures, imported, machine, made_up, queued, rate, run_python, said, say, seconds_to_leave, trained_in

from appliance.home import Home
from appliance.train.forecast import matmul_speed
from appliance.train.recipe import Adapter
from appliance.train.simulation import meta_model, simulate

ON_GPU = torch.cuda.is_available()
PEERS = {"trl": "random", "trl_by_length": "group_by_length"}
TARGETS = {"trl_speed": 2.5, "trl_by_length_speed": 1.4, "trl_memory": 2.0, "trl_by_length_memory": 2.0}
"""How many times faster than each peer, and how many times less memory."""
AROUND = {"callbacks_share": 0.01, "leave_seconds": 20.0}
"""At most."""
SEEDS = (17, 18, 19)
HELD_OUT = 32
RECIPE = """
name = "bench"
base = "base"
eval_share = 0.0
seed = {seed}
[adapter]
kind = "{adapter}"
rank = 16
alpha = 32
[[stages]]
method = "sft"
dataset = "{dataset}"
epochs = 1
batch_size = 8
learning_rate = 2e-4
warmup_share = 0
schedule = "constant"
samples = 0
keep = "last"
"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--adapter", nargs="+", default=["lora", "qlora"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rows", type=int, default=40)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--losses", action="store_true")
    what.add_argument("--around", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
        bench = Bench(Home(Path(folder)), given.base, given.data)
        if given.losses:
            record = bench.losses(given.adapter, given.rows)
        else:
            record = bench.around(given.rows) if given.around else bench.speed(given)
    print(json.dumps(record | {"machine": machine()}))


class Bench:
    """A home of its own with the base and the rows."""

    def __init__(self, home: Home, base: Path | None, data: Path | None) -> None:
        home.create()
        self.home, self.base = home, home.models / "base"
        if base is None:
            from random_llama import write_model

            write_model(self.base, "8b" if ON_GPU else "tiny", Path(".cache/home/models/smollm2-135m"))
        else:
            self.base.symlink_to(base.absolute())
        file = data or made_up(home.incoming / "rows.jsonl")
        dataset = home.datasets / imported(home, file)
        self.lines = (dataset / "rows.jsonl").read_text().splitlines()
        random.Random(1).shuffle(self.lines)

    def speed(self, given: argparse.Namespace) -> dict[str, Any]:
        """Each side's figures and their ratios, by adapter."""
        figures: dict[str, Any] = {}
        ratios: dict[str, float] = {}
        peak, per_token = matmul_speed(2048), operations_per_token(self.base)
        for adapter in given.adapter:
            taken: dict[str, list[Figures]] = {side: [] for side in ("ours", *PEERS)}
            for turn in range(given.rounds):
                rows = self.lines[turn * given.rows : (turn + 1) * given.rows]
                for side, runs in taken.items():
                    runs.append(self.train(side, adapter, rows, SEEDS[0]))
                    say(f"{adapter} {side}: {rate([runs[-1]]):.0f} tokens/s, {runs[-1]['peak'] / 2**30:.2f} GiB")
                counts = [runs[-1]["tokens"] for runs in taken.values()]
                assert max(counts) - min(counts) <= len(rows), "the same, but for a newline after a row"
            memory = {side: max(run["peak"] for run in runs) for side, runs in taken.items()}
            for peer in PEERS:
                ratios[f"{adapter}_{peer}_speed"] = round(rate(taken["ours"]) / rate(taken[peer]), 2)
                ratios[f"{adapter}_{peer}_memory"] = round(memory[peer] / memory["ours"], 2)
            figures[adapter] = {
                side: {
                    "tokens_per_second": round(rate(runs), 1),
                    "peak_bytes": memory[side],
                    "share_of_matmul_speed": round(rate(runs) * per_token / peak, 2),
                }
                for side, runs in taken.items()
            }
        return {
            "bench": "train",
            "ratios": ratios,
            "targets": TARGETS,
            "met": all(ratio >= TARGETS[name.split("_", 1)[1]] for name, ratio in ratios.items()),
            "figures": figures,
            "matmul_gflops": round(peak / 1e9),
            "operations_per_token": round(per_token),
            "rows": given.rows * given.rounds,
        }

    def losses(self, adapters: list[str], count: int) -> dict[str, Any]:
        """Held-out loss of both sides' adapters after the same rows, by adapter and seed."""
        from appliance.data.render import render_conversation
        from appliance.data.tokenizer import load_tokenizer
        from appliance.release.scores import score
        from appliance.train.model import load_adapter, load_model

        tokenizer = load_tokenizer(self.base)
        held_out = [json.loads(line) for line in self.lines[-HELD_OUT:]]
        conversations = [render_conversation(tokenizer, row["messages"]) for row in held_out]
        found: dict[str, Any] = {}
        ratios = {}
        for adapter in adapters:
            by_side: dict[str, list[float]] = {"ours": [], "trl_by_length": []}
            for seed in SEEDS:
                for side, losses in by_side.items():
                    saved = self.home.root / f"{adapter}-{side}-{seed}"
                    self.train(side, adapter, self.lines[:count], seed, saved)
                    model = load_adapter(load_model(self.base, quantised=adapter == "qlora"), saved, trainable=False)
                    losses.append(round(score(model, conversations).loss, 4))
                    say(f"{adapter} {side} seed {seed}: held-out loss {losses[-1]}")
            mean = statistics.mean(by_side["ours"])
            gap = mean - statistics.mean(by_side["trl_by_length"])
            noise = max(max(losses) - min(losses) for losses in by_side.values())
            found[adapter] = {**by_side, "gap": round(gap, 4), "noise": round(noise, 4)}
            ratios[f"{adapter}_loss"] = round(statistics.mean(by_side["trl_by_length"]) / mean, 4)
        met = all(figures["gap"] <= figures["noise"] for figures in found.values())
        return {"bench": "train-losses", "ratios": ratios, "targets": "gap at most noise", "met": met, "losses": found}

    def train(self, side: str, adapter: str, lines: list[str], seed: int, saved: Path | None = None) -> Figures:
        """Tokens, seconds and peak bytes of one side's pass over `lines`; its adapter goes to `saved`."""
        if side == "ours":
            return self._ours(adapter, lines, seed, saved)
        rows = self.home.incoming / "peer.jsonl"
        rows.write_text("\n".join(lines))
        argv = [str(Path(__file__).parent / "plain_trl.py"), str(self.base), str(rows), "--adapter", adapter]
        argv += ["--sampling", PEERS[side], "--seed", str(seed), *(("--save", str(saved)) if saved else ())]
        figures: Figures = json.loads(run_python(argv).splitlines()[-1])
        return figures

    def around(self, count: int) -> dict[str, Any]:
        """The share of a step that callbacks and events take, and the seconds that a worker takes to leave."""
        run = self._queued("lora", self.lines[:count], SEEDS[0])
        share = float(run_python([str(Path(__file__).parent / "timed_worker.py"), str(run), "sft"]).splitlines()[-1])
        (foretold,) = (event["seconds"] for event in said(run, "forecast"))
        ratios = {
            "callbacks_share": round(share, 5),
            "leave_seconds": round(seconds_to_leave(self._queued("lora", self.lines[:count], SEEDS[0])), 2),
            "time_forecast_over_measured": round(foretold / trained_in(run)["seconds"], 2),
        }
        met = all(ratios[name] <= most for name, most in AROUND.items())
        return {"bench": "train-around", "ratios": ratios, "targets": AROUND, "met": met, "rows": count}

    def _ours(self, adapter: str, lines: list[str], seed: int, saved: Path | None) -> Figures:
        run = self._queued(adapter, lines, seed)
        run_python(["-m", "appliance.worker", str(run), "sft"])
        if saved:
            (run / "sft" / "adapter").rename(saved)
        return trained_in(run)

    def _queued(self, adapter: str, lines: list[str], seed: int) -> Path:
        """A run of ours over `lines` that has not begun."""
        rows = self.home.incoming / "ours.jsonl"
        rows.write_text("\n".join(json.dumps({"messages": json.loads(line)["messages"]}) for line in lines))
        return queued(self.home, RECIPE.format(adapter=adapter, dataset=imported(self.home, rows), seed=seed))


def operations_per_token(base: Path, length: int = 256) -> float:
    """What LoRA training has to compute for a token of a row of this length: forward, and backward without the base."""
    return simulate(meta_model(base, Adapter(kind="lora")), 1, length, length).operations / length


if __name__ == "__main__":
    main()
