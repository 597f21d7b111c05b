"""The rows of a Parquet file."""

from __future__ import annotations

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
    import pyarrow as arrow
    import pyarrow.parquet as parquet

    try:
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    yield _json_value(row)
    except (arrow.ArrowException, ValueError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        fault = str(error).partition("\n")[0]
        raise InvalidInput(
            "damaged_file", f"{filename} is no sound Parquet file: {fault}", "copy or write the file again"
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
                return None
        case _:
            return str(value)
