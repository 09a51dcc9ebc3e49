"""JSON from outside, read strictly: no key twice, no nesting that would exhaust the interpreter's stack."""

from __future__ import annotations

import json

from pydantic_core import from_json


def read_json(text: str, *, constants: bool = False) -> object:
    """What `text` says; NaN and Infinity with `constants`, for who refuses them by field. Raises ValueError, whatever the text.

    The first reader bounds the nesting without a stack of Python's; at Python's own limit, finalizers of other objects would fail too.
    """
    from_json(text)
    return json.loads(text, object_pairs_hook=_unique, parse_constant=float if constants else _no_constant)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    out: dict[str, object] = {}
    for key, value in pairs:
        if key in out:
            raise ValueError(f"the key {key!r} appears twice")
        out[key] = value
    return out


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not a number")
