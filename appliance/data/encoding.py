"""In which encoding bytes that are not UTF-8 may be, for a person to decide."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from appliance.errors import InvalidInput

_WIDESPREAD = ("utf_16_le", "utf_16_be", "cp1252", "gb18030", "big5", "cp932", "cp949", "cp1251", "cp1250", "cp1253")
"""What is guessed from few bytes is one of several; these are the likelier the more files there are in them."""
_WESTERN = ("cp1250", "cp1252", "cp1254", "cp1257", "mac_", "latin", "iso8859", "cp775", "cp85")
_OWN_LETTERS = ("cp1251", "cp1253")
"""Of one byte a letter, and of letters that others have not: guessed right from few."""
_SHOWN = 12
"""Characters on either side of the fault."""
_NAMED = 3


_WITHOUT_MARK = {"utf-16": "utf-16-le", "utf-32": "utf-32-le"}
"""What a text is in that does not begin with the mark of byte order that it would have: most programs' order."""


def require_known(encoding: str) -> str:
    """The name by which Python knows an encoding of text. Raises InvalidInput."""
    try:
        found = codecs.lookup(encoding)
    except LookupError:
        found = None
    if found is None or not found._is_text_encoding:
        raise InvalidInput("bad_encoding", f"there is no encoding {encoding!r}", "name one such as cp1252 or gb18030")
    return _WITHOUT_MARK.get(found.name, found.name)


def likely_encodings(sample: bytes) -> list[str]:
    """Encodings in which `sample` is a text, the likeliest first."""
    # Only for a file that is refused: the import takes a while.
    from charset_normalizer import from_bytes

    guessed = [match.encoding for match in from_bytes(sample)]
    if guessed and guessed[0].startswith(_WESTERN) and _decodes(sample, "cp1252"):
        guessed.append("cp1252")
    common = [name for name in _WIDESPREAD if name in guessed]
    certain = [name for name in guessed[:1] if name in _OWN_LETTERS]
    return list(dict.fromkeys(certain + (common or guessed)))[:_NAMED]


def as_read(sample: bytes, at: int, encodings: Sequence[str]) -> str:
    """What stands around byte `at` of `sample` in each of `encodings`, for a person to choose by; empty: in none."""
    shown = []
    for name in encodings:
        before = sample[:at].decode(name, "ignore")[-_SHOWN:]
        after = sample[at:].decode(name, "ignore")[:_SHOWN]
        shown.append(f"{name} {' '.join((before + after).split())!r}")
    return ", as ".join(shown)


def _decodes(sample: bytes, encoding: str) -> bool:
    try:
        sample.decode(encoding)
    except UnicodeDecodeError:
        return False
    return True
