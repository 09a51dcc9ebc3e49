"""Rules of ops that no table lists: given by hand (`register_rule`), found earlier, or found now.

A rule given by hand is proven on small calls when it is first used, as a found one is; one that is not exact is an error.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..ir import flags
from ..ir.errors import InputError, RuleError, UnknownOpError
from . import cache, compute
from .algebra import Rule, parse
from .call import Call
from .discover import Found, confirmed, counterexample, discover
from .origin import call_key, source_digest

_FOUND: dict[str, Found] = {}  # by call and source: a pure function, remembered for this process
_TOLD: dict[str, Found] = {}  # by call: what rank 0 found


@dataclass
class Given:
    """A rule given by hand. `proven` holds the calls for which it was proven."""

    op: str
    found: Found
    trusted: bool
    proven: set[str]

    @property
    def text(self) -> str:
        words = " ".join(f"{name}={what}" for name, what in self.found.adjust)
        return f"register_rule({self.op!r}, {self.found.pattern + (' | ' + words if words else '')!r})"


_GIVEN: dict[str, Given] = {}


def register_rule(op: str, rule: str, *, trusted: bool = False) -> None:
    """Say how an op that netmind-autopar does not know can be split.

    op: "mylib::op", or "mylib::op.overload". rule: a pattern such as "b d, d -> b d": one term per tensor argument and per output, one
    letter per dim; a letter that the outputs lack leaves a sum; "d!" is never split; "(h d)" is a dim made of two. After "|" integer
    and list arguments that follow the local sizes: "heads=size:h shape=shape". It is proven on small CPU calls when
    it is first used: then RuleError, with a counterexample, if it is not exact. trusted: take it without proof.
    Raises InputError when the text cannot be read or the op has a rule already.
    """
    from .table import TABLE

    name = op.replace("::", ".", 1)
    name = name if name.count(".") > 1 else f"{name}.default"
    if not isinstance(op, str) or "::" not in op:
        raise InputError(f"{op!r} is no op's name", where="register_rule", try_='"mylib::op"')
    if name in TABLE:
        raise InputError(f"{op} has a rule already: {TABLE[name]}", where="register_rule", try_="drop this call")
    pattern, _, words = rule.partition("|")
    try:
        inputs, outputs, _, _ = parse(pattern.strip())
        pairs = tuple((word.split("=")[0], word.split("=")[1]) for word in words.split())
        letters = {x for t in (*inputs, *outputs) if t is not None for d in t.dims for x in d}
        if wrong := [what for _, what in pairs if what not in ("shape", "parts", "starts", "lengths") and not _follows(what, letters)]:
            raise ValueError(f"{wrong[0]!r} follows no letter of the rule")
    except (ValueError, IndexError) as error:
        raise InputError(f"cannot read the rule {rule!r} of {op}", where="register_rule", why=str(error), try_='"b d, d -> b d"') from None
    _GIVEN[name] = Given(op, Found(pattern.strip(), adjust=pairs), trusted, set())


def _follows(what: str, letters: set[str]) -> bool:
    kind, colon, product = what.partition(":")
    return kind in ("size", "start") and bool(colon) and all(word in letters or word.isdigit() for word in product.split("*"))


def learnt(call: Call) -> Rule:
    """The rule of an op without a row; nothing splits, and `why` says why, when none is found.

    Raises RuleError for a wrong rule given by hand, UnknownOpError for an op that draws random numbers.
    """
    if call.op in _GIVEN:
        return _given(_GIVEN[call.op], call)
    found = lookup(call)
    if found.draws:
        raise UnknownOpError(
            f"{call.op} draws random numbers that devices cannot share",
            why="every device would draw its own, and the result would not be that of one device",
            try_="draw them outside of the model and pass them in as an input",
        )
    if found.pattern:
        try:
            return found.rule(call)
        except ValueError:  # a file of the cache that is well-formed and nonsense
            found = Found(why="what was found for small sizes does not fit these")
    return whole(call, found.why)


def whole(call: Call, why: str = "") -> Rule:
    """Nothing splits: always correct."""
    return replace(compute.fixed(call), known=False, why=why)


def lookup(call: Call) -> Found:
    """What is known or can be found out about one call."""
    if reason := _not_searched(call):
        return Found(why=reason)
    key = call_key(call)
    told = _TOLD.get(json.dumps(key))
    if told is not None:
        return told
    digest = source_digest(call.target)
    text = json.dumps([key, digest, 0 if digest is not None else id(call.target)])
    if text not in _FOUND:
        _FOUND[text] = _searched(call, {**key, "source": digest} if digest is not None else None)
    return _FOUND[text]


def _searched(call: Call, key: dict[str, Any] | None) -> Found:
    """From the cache on disk if it stands a second look, else by a search."""
    found = cache.load(key) if key is not None else None
    if found is not None and (not found.pattern or confirmed(found, call)):
        return found
    found = discover(call)
    if key is not None and found.lasting and not found.draws:
        cache.store(key, found)
    flags.debug(2, f"{call.op}: {found.pattern or 'no rule: ' + found.why}")
    return found


def _not_searched(call: Call) -> str:
    if not flags.discovers():
        return "AUTOPAR_DISCOVER=0"
    if not isinstance(call.target, torch._ops.OpOverload):
        return "it is no op of torch.library"
    if call.target._schema.is_mutable:
        return "it changes its arguments"
    return ""


def _given(given: Given, call: Call) -> Rule:
    """A rule given by hand, proven for this call. Raises RuleError."""
    sizes = tuple((what.partition(":")[2], call[name]) for name, what in given.found.adjust if what.startswith("size:") and "*" not in what)
    found = replace(given.found, sizes=tuple((x, n) for x, n in sizes if type(n) is int))
    try:
        rule = found.rule(call)
    except ValueError as error:
        raise RuleError(
            f"the rule of {given.op} does not fit its call", where=given.text, why=str(error), try_="correct the rule"
        ) from None
    key = json.dumps(call_key(call))
    if key in given.proven or given.trusted:
        return rule
    why, proven = counterexample(found, call)
    if why and proven:
        raise RuleError(f"the rule of {given.op} is not exact", where=given.text, why=why, try_="mark letters that never split with '!'")
    if why:
        raise RuleError(
            f"the rule of {given.op} could not be proven",
            where=given.text,
            why=why,
            try_="register_rule(..., trusted=True) if you are sure",
        )
    given.proven.add(key)
    return rule


def share(calls: Iterable[Call], from_rank_zero: Callable[[Callable[[], str]], str]) -> None:
    """Let every rank use what rank 0 found for these calls; `from_rank_zero` runs a function there and gives all its text."""
    unlisted = [c for c in calls if c.op not in _GIVEN and not _not_searched(c)]
    _TOLD.clear()

    def ask() -> str:
        found = {json.dumps(call_key(c)): lookup(c) for c in unlisted}
        return json.dumps({key: [cache.plain(f), f.draws] for key, f in found.items()})

    for key, (data, draws) in json.loads(from_rank_zero(ask)).items():
        if (found := cache.read(data)) is not None:
            _TOLD[key] = replace(found, draws=draws)
