"""Stands in for a stage's process: python fake_worker.py RUN_DIR STAGE. RUN_DIR/behaviour.json says how it ends."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

run, stage = Path(sys.argv[1]), sys.argv[2]
behaviour = json.loads((run / "behaviour.json").read_text()).get(stage, "done")
(run / stage).mkdir(exist_ok=True)
with open(run / "starts.txt", "a") as file:
    file.write(f"{stage}\n")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
match behaviour:
    case "hang":
        time.sleep(60)
    case "wait":
        while not (run / "go").exists():
            time.sleep(0.01)
    case "defy":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    case "die":
        print("about to die", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    case "die once":
        if (run / "starts.txt").read_text().split().count(stage) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    case "fail":
        failure = {"code": "bad", "reason": "the rows are too long", "next": "set max_length"}
        (run / stage / "failure.json").write_text(json.dumps(failure))
        sys.exit(1)
    case "short of memory once":
        if (run / "starts.txt").read_text().split().count(stage) == 1:
            failure = {"code": "out_of_memory", "reason": "the stage ran out of memory", "next": "free memory"}
            (run / stage / "failure.json").write_text(json.dumps(failure))
            sys.exit(1)
refused = behaviour in ("refuse", "ruin")
gates = {name: {"passed": not refused, "figures": {}, "reason": ""} for name in ("structure", "fidelity")}
gates["quality"] = {"passed": behaviour not in ("worse", "ruin"), "figures": {}, "reason": ""}
files: dict[str, str] = {}
if stage == "merge":
    (run / "merge" / "model").mkdir(exist_ok=True)
    tokenizer = b"another" if behaviour == "another tokenizer" else b"the base's"
    for name, content in (("model.safetensors", b"weights of " + run.name.encode()), ("tokenizer.json", tokenizer)):
        (run / "merge" / "model" / name).write_bytes(content)
        files[name] = hashlib.sha256(content).hexdigest()
if stage == "verify":
    probes = [{"messages": [{"role": "user", "content": "hi"}], "token_ids": [1, 2], "max_tokens": 8}]
    (run / "verify" / "probes.json").write_text(json.dumps(probes))
    served = {"conversations": [{"token_ids": [1, 2], "positions": [1], "logps": [-1.0]}], "limit": 0.1}
    served["fp8_limit"] = None if behaviour == "no fp8" else 0.6
    (run / "verify" / "served.json").write_text(json.dumps(served))
    (run / "verify" / "live.txt").write_text(os.environ["APPLIANCE_LIVE_RELEASE"])
figures = {"gates": gates, "kept": "16-bit", "losses": {}, "files": files, "base_files": {}, "seconds": 0.0}
figures |= {"dataset_rows": {"d1": "0"}, "recipe_sha256": "0"}
(run / stage / "result.json").write_text(json.dumps(figures))
