"""The rows of files in Parquet and in Arrow's own format, which `datasets` saves."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from appliance.errors import InvalidInput

_BATCH_ROWS = 1024


def read_parquet(path: Path, filename: str) -> Iterator[dict[str, Any]]:
    """Each row as a JSON object. Raises InvalidInput for a file that is no sound Parquet.

    Parquet cannot tell an absent key from a null one, so nulls are left out, in nested structures too; with them go
    what JSON has no value for: NaN, infinities and bytes that are not UTF-8. Dates, times and decimals become text.
    """
    import pyarrow.parquet as parquet

    with _sound(filename, "Parquet"), parquet.ParquetFile(path, page_checksum_verification=True) as file:
        for batch in file.iter_batches(batch_size=_BATCH_ROWS):
            for row in batch.to_pylist():
                yield _json_value(row)


def read_arrow(path: Path, filename: str) -> Iterator[dict[str, Any]]:
    """The same of a file of record batches, as a stream or a file of Arrow's IPC format."""
    import pyarrow as arrow

    with _sound(filename, "Arrow"), arrow.memory_map(str(path)) as source:
        try:
            batches = iter(arrow.ipc.open_stream(source))
        except arrow.ArrowInvalid:
            held = arrow.ipc.open_file(source)
            batches = (held.get_batch(number) for number in range(held.num_record_batches))
        for batch in batches:
            batch.validate(full=True)  # offsets of a damaged file lead anywhere
            for begin in range(0, batch.num_rows, _BATCH_ROWS):
                for row in batch.slice(begin, _BATCH_ROWS).to_pylist():
                    yield _json_value(row)


@contextlib.contextmanager
def _sound(filename: str, kind: str) -> Iterator[None]:
    import pyarrow as arrow

    try:
        yield
    except (arrow.ArrowException, ValueError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        fault = str(error).partition("\n")[0]
        raise InvalidInput(
            "damaged_file", f"{filename} is no sound {kind} file: {fault}", "copy or write the file again"
        ) from None


def _json_value(value: Any) -> Any:
    match value:
        case dict():
            held = {key: _json_value(item) for key, item in value.items()}
            return {key: item for key, item in held.items() if item is not None}
        case list() | tuple():
            return [_json_value(item) for item in value]
        case float():
            return value if math.isfinite(value) else None
        case None | str() | int():
            return value
        case bytes():
            try:
                return value.decode()
            except UnicodeDecodeError:
                return {"bytes": len(value)}  # an image, say: no text, and not nothing
        case _:
            return str(value)
