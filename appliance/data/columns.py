"""Names for the columns of a file whose rows are in no known format but by their names."""

from __future__ import annotations

from typing import Any

from appliance.data.formats import KEYS, shown_keys
from appliance.errors import InvalidInput


class ColumnMap:
    """Gives the keys of rows the names that the formats know, and notices a key that no row has.

    It is written `instruction=question,output=answer`: the format's name, then the file's. Raises InvalidInput where it
    is not.
    """

    def __init__(self, text: str) -> None:
        self._names: dict[str, str] = {}
        """The format's name by the file's."""
        for part in text.split(","):
            name, _, column = (side.strip() for side in part.partition("="))
            if not name or not column:
                raise _bad(f"{part.strip()!r} maps no column", "write it as --map instruction=question,output=answer")
            if name not in KEYS:
                raise _bad(f"no format has {name!r}", f"the first name is one of {', '.join(KEYS)}")
            if name in self._names.values() or column in self._names:
                raise _bad(f"{part.strip()!r} maps a name a second time", "map each name once")
            self._names[column] = name
        self._unseen = set(self._names)
        self._first_keys = "no columns"

    def rename(self, value: Any) -> Any:
        """The row with its keys renamed; what stood under a name given to another is called `NAME as it was`."""
        if not isinstance(value, dict):
            return value
        if len(self._unseen) == len(self._names):
            self._first_keys = shown_keys(value)
        self._unseen -= value.keys()
        renamed = {name: value[column] for column, name in self._names.items() if column in value}
        kept = {
            f"{key} as it was" if key in renamed else key: item for key, item in value.items() if key not in self._names
        }
        return kept | renamed

    def check(self, filename: str) -> None:
        """Raise InvalidInput where none of the rows renamed so far had one of the columns."""
        if self._unseen:
            raise InvalidInput(
                "no_such_column",
                f"no row of {filename} has {shown_keys(dict.fromkeys(sorted(self._unseen)))}; "
                f"there are {self._first_keys}",
                "mend --map",
            )


def _bad(fault: str, next: str) -> InvalidInput:
    return InvalidInput("bad_map", f"the column map cannot be read: {fault}", next)
