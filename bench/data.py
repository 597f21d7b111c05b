"""Importing against tokenising alone: `make bench-data`. The last line is one JSON object.

A generated file is imported with the full report; the same text is encoded by bare `tokenizers`, and by `datasets`
(`load_dataset("json")`, then `map`). Each is a process of its own on the same cores, one after another.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"tokenizers": 0.8, "datasets": 1.5}
"""Speed of the import in that of the peer; at least."""
MOST_MEMORY = 600
"""Peak resident memory of the import in MB; at most."""
BATCH = 1000


def rows(size: int, seed: int) -> Iterator[dict[str, str]]:
    """Alpaca rows of about `size` bytes in all: words as frequent as in this project's texts, lengths log-normal."""
    text = " ".join(path.read_text() for path in [ROOT / "LICENSE", ROOT / "README.md", *ROOT.glob("docs/*.md")])
    words = [*re.findall(r"[A-Za-z][\w'-]*[,.;:]?", text), *map(str, range(0, 2000, 7))]
    chance = random.Random(seed)
    written = 0
    while written < size:

        def said(median: float) -> str:
            return " ".join(chance.choices(words, k=max(2, min(2000, int(chance.lognormvariate(0, 0.9) * median)))))

        given = said(20) if chance.random() < 0.4 else ""
        row = {"instruction": said(14), "input": given, "output": said(80)}
        written += sum(map(len, row.values())) + 45
        yield row


def texts(row: dict[str, str]) -> str:
    """A row as a chat template would render it."""
    asked = "\n\n".join(part for part in (row["instruction"], row["input"]) if part)
    return f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n{row['output']}<|im_end|>\n"


def run_tokenizers(file: Path, base: Path) -> float:
    """Seconds that bare batch encoding takes; reading the file is not counted."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    seconds = 0.0
    for batch in _batches(file):
        begun = time.perf_counter()
        tokenizer.encode_batch(batch, add_special_tokens=False)
        seconds += time.perf_counter() - begun
    return seconds


def _batches(file: Path) -> Iterator[list[str]]:
    batch = []
    with open(file) as lines:
        for line in lines:
            if line.startswith("{"):
                batch.append(texts(json.loads(line.rstrip(",\n]"))))
            if len(batch) == BATCH:
                yield batch
                batch = []
    yield batch


def run_datasets(file: Path, base: Path) -> float:
    """Seconds that loading and mapping take."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)

    def tokenise(batch: dict[str, list[str]]) -> Any:
        columns = zip(batch["instruction"], batch["input"], batch["output"], strict=True)
        names = ("instruction", "input", "output")
        return tokenizer([texts(dict(zip(names, row, strict=True))) for row in columns], add_special_tokens=False)

    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=file.parent) as cache:
        loaded = load_dataset("json", data_files=str(file), cache_dir=cache)
        loaded.map(tokenise, batched=True)
        return time.perf_counter() - begun


def run_import(file: Path, base: Path) -> float:
    """Seconds of the whole import process."""
    from appliance.data.importer import import_files
    from appliance.data.requests import ImportRequest, Source
    from appliance.home import Home

    begun = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=file.parent) as root:
        home = Home(Path(root))
        home.create()
        source = Source(path=file, filename=file.name)
        report = import_files(ImportRequest(files=[source], name="bench", base=base, max_length=1024), home)
        seconds = time.perf_counter() - begun
    print({key: report[key] for key in ("kept", "duplicates", "near_duplicates", "conflicts")}, file=sys.stderr)
    print({key: report["tokens"][key] for key in ("total", "trained_share", "percentiles")}, file=sys.stderr)
    return seconds


RUNNERS: dict[str, Callable[[Path, Path], float]] = {
    "import": run_import,
    "tokenizers": run_tokenizers,
    "datasets": run_datasets,
}


def measure(runner: str, file: Path, base: Path) -> tuple[float, float]:
    """Seconds, and peak resident memory in MB, of a process that runs `runner`."""
    command = [sys.executable, __file__, "--runner", runner, "--file", str(file), "--base", str(base)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"bench-data: the {runner} run failed with {process.returncode}")
        out.seek(0)
        return float(out.read().split()[-1]), usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path, help="directory of the base model; SmolLM2, pulled, where not given")
    parser.add_argument("--size", type=int, default=256, help="MB of each file")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--runner", choices=RUNNERS)
    parser.add_argument("--file", type=Path)
    given = parser.parse_args()
    base = given.base or pulled()
    if given.runner:
        print(RUNNERS[given.runner](given.file, base))
        return
    seconds: dict[str, dict[str, list[float]]] = {}
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in ("jsonl", "json"):
            file = Path(scratch) / f"rows.{kind}"
            with open(file, "w") as out:
                lines = map(json.dumps, rows(given.size << 20, seed=len(kind)))
                if kind == "jsonl":
                    out.writelines(f"{line}\n" for line in lines)
                else:
                    out.write("[\n" + next(lines))
                    out.writelines(f",\n{line}" for line in lines)
                    out.write("\n]\n")
            taken = seconds[kind] = {runner: [] for runner in RUNNERS}
            for turn in range(given.rounds):
                for runner in list(RUNNERS) if turn % 2 else reversed(list(RUNNERS)):
                    time_taken, peak = measure(runner, file, base)
                    taken[runner].append(time_taken)
                    peaks[f"{runner} {kind}"] = max(peak, peaks.get(f"{runner} {kind}", 0))
                    print(f"{kind:6} {runner:11} {time_taken:7.1f} s  {peak:6.0f} MB", flush=True)
            file.unlink()
    ratios = {
        f"{peer} {kind}": round(min(taken[peer]) / min(taken["import"]), 3)
        for kind, taken in seconds.items()
        for peer in TARGETS
    }
    memory = round(max(peak for name, peak in peaks.items() if name.startswith("import")))
    met = memory <= MOST_MEMORY and all(ratio >= TARGETS[name.split()[0]] for name, ratio in ratios.items())
    print(
        json.dumps(
            {
                "bench": "data",
                "ratios": {**ratios, "peak_mb": memory},
                "targets": {**TARGETS, "peak_mb": MOST_MEMORY},
                "met": met,
                "machine": machine(),
                "size_mb": given.size,
            }
        )
    )


def pulled() -> Path:
    """Directory of SmolLM2, which is pulled once."""
    home = ROOT / ".cache" / "home"
    environment = {**os.environ, "APPLIANCE_HOME": str(home)}
    command = [sys.executable, "-m", "appliance.cli", "pull", "smollm2-135m"]
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    return home / "models" / "smollm2-135m"


def machine() -> str:
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{os.cpu_count()} cores, {model[1] if model else 'unknown'}"


if __name__ == "__main__":
    main()
