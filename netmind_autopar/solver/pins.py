"""What the user fixes: placements that parameters must have, and placements that they must not have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..ir.errors import InputError
from ..ir.mesh import Mesh
from ..ir.program import Program
from ..ir.spec import Placement, Spec, parse_placement
from .build import Built
from .presolve import Kept

Pin = str | Sequence[str] | Mapping[str, str]


def pinned(program: Program, built: Built, mesh: Mesh, pins: Mapping[str, Pin], forbid: Mapping[str, Pin]) -> Kept | None:
    """The strategies that pins and prohibitions leave; None when there are none of either. Raises InputError for what cannot be."""
    if not pins and not forbid:
        return None
    allowed = [tuple(range(len(node.labels))) for node in built.problem.nodes]
    by_name = {item.name: item.node for item in program.inputs if item.role == "param"}
    by_name |= {alias: by_name[first] for alias, first in program.tied.items() if first in by_name}
    for what, given in (("pin", pins), ("forbid", forbid)):
        for name, pin in given.items():
            if name not in by_name:
                raise _unknown(what, name, by_name)
            i = next(i for i, kind in enumerate(built.kinds) if by_name[name] in kind.members)
            rows = [built.kinds[i].gives[k][0] for k in allowed[i]]
            if what == "pin":
                want = _placements(name, pin, mesh)
                fits = tuple(k for k, spec in zip(allowed[i], rows, strict=True) if _matches(spec, want, mesh))
                text = " ".join(str(p or "free") for p in want)
            else:
                banned = _banned(name, pin, mesh)
                fits = tuple(k for k, spec in zip(allowed[i], rows, strict=True) if not _has(spec, banned, mesh))
                text = str(pin)
            if not fits:
                raise _impossible(what, name, text, built, i, mesh)
            allowed[i] = fits
    return tuple(allowed)


def _unknown(what: str, name: str, by_name: Mapping[str, str]) -> InputError:
    leaf = name.rpartition(".")[2]
    near = ", ".join(sorted(n for n in by_name if n.rpartition(".")[2] == leaf)[:3]) or ", ".join(sorted(by_name)[:3])
    wanted = "pin" if what == "pin" else "forbid placements of"
    return InputError(
        f"cannot {wanted} {name!r}: the model has no such parameter", where=_where(what), try_=f"a parameter's name, such as {near}"
    )


def _impossible(what: str, name: str, text: str, built: Built, i: int, mesh: Mesh) -> InputError:
    kind = built.kinds[i]
    others = ", ".join(built.nodes[m].name for m in kind.members[:3])
    if what == "forbid":
        return InputError(
            f"nothing is left for {name!r} when {text} is forbidden",
            where=_where(what),
            why=f"with the other pins and prohibitions of the same repeated block ({others}) no placement on the mesh {mesh} remains",
            try_="forbid less",
        )
    return InputError(
        f"cannot pin {name!r} to {text}",
        where=_where(what),
        why=f"its shape {tuple(built.nodes[kind.members[0]].meta['val'].shape)} cannot be split so on the mesh {mesh}, "
        f"or another pin of the same repeated block ({others}) says otherwise",
        try_="a dim that is at least as long as the axis is wide, and one pin per repeated block",
    )


def _where(what: str) -> str:
    return "pins=" if what == "pin" else "forbid="


def _banned(name: str, given: Pin, mesh: Mesh) -> list[set[Placement]]:
    """Per axis the placements that are forbidden."""
    if isinstance(given, Mapping):
        _known_axes(name, given, mesh, "forbid")
        words = [[given[axis]] if axis in given else [] for axis in mesh.names]
    else:
        words = [given.split() if isinstance(given, str) else list(given)] * len(mesh.axes)
    try:
        return [{parse_placement(word) for some in at for word in some.split()} for at in words]
    except ValueError as e:
        raise InputError(
            f"cannot read what is forbidden for {name!r}", where=_where("forbid"), why=str(e), try_="R, or S(0) for a split of dim 0"
        ) from None


def _has(spec: Spec | None, banned: Sequence[set[Placement]], mesh: Mesh) -> bool:
    assert spec is not None
    return any(p in some and axis.size > 1 for p, some, axis in zip(spec.placements, banned, mesh.axes, strict=True))


def _known_axes(name: str, given: Mapping[str, str], mesh: Mesh, what: str) -> None:
    for axis in given:
        if axis not in mesh.names:
            raise InputError(
                f"the {'pin' if what == 'pin' else 'prohibition'} of {name!r} names the axis {axis!r}",
                where=_where(what),
                why=f"the mesh is {mesh}",
                try_=f"one of {', '.join(mesh.names)}",
            )


def _placements(name: str, pin: Pin, mesh: Mesh) -> list[Placement | None]:
    """One placement per axis; None where the pin says nothing."""
    if isinstance(pin, Mapping):
        _known_axes(name, pin, mesh, "pin")
        words: list[str | None] = [pin.get(axis) for axis in mesh.names]
    else:
        given = pin.split() if isinstance(pin, str) else list(pin)
        words = [*(given * len(mesh.axes) if len(given) == 1 else given)]
    if len(words) != len(mesh.axes):
        raise InputError(
            f"the pin of {name!r} has {len(words)} placements",
            where="pins=",
            why=f"the mesh {mesh} has {len(mesh.axes)} axes",
            try_="one placement per axis, such as " + repr(" ".join(["R"] * (len(mesh.axes) - 1) + ["S(0)"])),
        )
    try:
        return [None if word is None else parse_placement(word) for word in words]
    except ValueError as e:
        raise InputError(f"cannot read the pin of {name!r}", where="pins=", why=str(e), try_="R, or S(0) for a split of dim 0") from None


def _matches(spec: Spec | None, want: Sequence[Placement | None], mesh: Mesh) -> bool:
    assert spec is not None
    return all(w is None or p == w or axis.size == 1 for p, w, axis in zip(spec.placements, want, mesh.axes, strict=True))
