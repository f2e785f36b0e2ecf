"""JSON as data sets need it: one sentence for whatever is wrong, also where Python's reader lets it pass."""

from __future__ import annotations

import json
from typing import Any

from vlmtune.types import VlmtuneError

_SURROGATES = (("\\ud", "\\uD"), (b"\\ud", b"\\uD"))


def loads(text: bytes | str, where: str, remedy: str = "mend it") -> Any:
    """The value of a JSON text in UTF-8. Raises VlmtuneError that begins with `where` and ends with `remedy`.

    Refused besides broken syntax: a key given twice (Python keeps the last one), nesting beyond Python's recursion
    limit, and halves of surrogate pairs, which no tokenizer takes.
    """
    try:
        value = json.loads(text, object_pairs_hook=_object)
        if any(mark in text for mark in _SURROGATES[isinstance(text, bytes)]):  # an escape may be half a character
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise VlmtuneError(f"{where}: not valid JSON (half a surrogate pair, \\ud800 to \\udfff); {remedy}.") from error
    except UnicodeDecodeError as error:
        raise VlmtuneError(
            f"{where}: not valid JSON (byte {error.start} is not UTF-8); {remedy}, or save the file as UTF-8."
        ) from error
    except RecursionError as error:
        raise VlmtuneError(f"{where}: not valid JSON (nested too deeply); {remedy}.") from error
    except ValueError as error:
        raise VlmtuneError(f"{where}: not valid JSON ({error}); {remedy}.") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"key {next(n for n in names if names.count(n) > 1)!r} given twice")
    return value


def excerpt(value: Any, length: int = 80) -> str:
    """A value as it may stand in a complaint: one line, cut, and never the bytes of an image."""
    return json.dumps(value, default=_brief)[:length]


def _brief(value: Any) -> str:
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else f"<{type(value).__name__}>"
