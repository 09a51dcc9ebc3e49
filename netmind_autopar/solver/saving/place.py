"""Which pieces wait elsewhere, and where: optimizer state by whole classes of parameters and a slice of one, the rest as named.

Parking a byte costs the same whatever byte it is, and frees it at every moment but the optimizer's. So the linear program has one
column for all of it, and what is left to choose is a short way to say it. Host memory takes optimizer state first, because
nothing hides the way to the disk there; of the values that wait for backward the earliest, which wait the longest, go on to the disk.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ..problem import Choice, Problem, stowed_bytes

if TYPE_CHECKING:
    from .tape import Names, Tape

Places = Mapping[int, tuple[int, int]]  # node -> of how many of its parameters the optimizer state waits in host memory, and on disk
FEW = 256  # ways to park that are all looked at
SPARE = 0.03  # of what is needed, that may be parked too so that fewer entries say it


def pieces(problem: Problem, choice: Choice) -> list[tuple[int, int, int]]:
    """(node, how many, bytes of one) of the optimizer state that is on the device."""
    found = zip(problem.nodes, choice, strict=True)
    return [
        (n, node.here, int(node.state[k])) for n, (node, k) in enumerate(found) if node.state is not None and node.here and node.state[k]
    ]


def parkable_bytes(problem: Problem, choice: Choice) -> int:
    """Optimizer state that is on the device and may wait elsewhere; 0 when nothing may."""
    return sum(count * size for _, count, size in pieces(problem, choice)) if problem.host_bytes_s > 0 else 0


def places(problem: Problem, choice: Choice, need: float, room: int | None = None) -> dict[int, tuple[int, int]]:
    """Pieces of at least `need` bytes: the fewest bytes when there are few ways, else few entries. All when that is less than `need`.

    room: bytes of host memory; what has none goes on disk. None: the problem's.
    """
    found = pieces(problem, choice) if need > 0 else []
    few = math.prod(count + 1 for _, count, _ in found) <= FEW
    room = problem.host_limit_bytes if room is None else room
    return _tiers({n: size for n, _, size in found}, _exact(found, need) if few else _greedy(found, need), room)


def _exact(found: list[tuple[int, int, int]], need: float) -> dict[int, int]:
    """The way with the fewest entries among those with few bytes."""
    ways = []
    for counts in itertools.product(*(range(count + 1) for _, count, _ in found)):
        total = sum(count * size for count, (_, _, size) in zip(counts, found, strict=True))
        if total >= need:
            ways.append((max(total, need * (1 + SPARE)), sum(map(bool, counts)), total, counts))
    if not ways:
        return {n: count for n, count, _ in found}
    return {n: taken for (n, _, _), taken in zip(found, min(ways)[-1], strict=True) if taken}


def _greedy(found: list[tuple[int, int, int]], need: float) -> dict[int, int]:
    """A slice of one class where that is not much too much; until then whole classes, the largest first."""
    taken: dict[int, int] = {}
    left = sorted(found, key=lambda piece: (-piece[1] * piece[2], piece[0]))
    spare = SPARE * need
    while need > 0 and left:
        enough = [(-(-need // size) * size - need, n, size) for n, count, size in left if count * size >= need]
        whole = next((piece for piece in left if piece[1] * piece[2] < need), None)
        if enough and (min(enough)[0] <= spare or whole is None):
            _, n, size = min(enough)
            taken[n] = int(-(-need // size))
            break
        assert whole is not None, "what is not enough is less than what is needed"
        left.remove(whole)
        taken[whole[0]] = whole[1]
        need -= whole[1] * whole[2]
    return taken


def _tiers(sizes: Mapping[int, int], taken: Mapping[int, int], room: int | None) -> dict[int, tuple[int, int]]:
    out = {}
    for n in sorted(taken):
        fits = taken[n] if room is None else min(taken[n], max(room, 0) // sizes[n])
        out[n] = fits, taken[n] - fits
        room = None if room is None else room - fits * sizes[n]
    return out


def stowable(problem: Problem, choice: Choice) -> dict[int, tuple[int, int]]:
    """Nodes whose parameters may wait elsewhere themselves: how many may, and bytes of one there, with gradient and optimizer state."""
    if problem.host_bytes_s <= 0:
        return {}
    pairs = enumerate(zip(problem.nodes, choice, strict=True))
    found = {n: (node.count, node.piece(k) or int(node.size[k])) for n, (node, k) in pairs if node.size is not None and node.count}
    return {n: (count, size) for n, (count, size) in found.items() if size}


def stowed_places(problem: Problem, choice: Choice, shares: Mapping[int, float]) -> dict[int, tuple[int, int]]:
    """Of each of these nodes at least this share of its parameters, the first ones: in host memory while that has room, then on disk."""
    may = stowable(problem, choice)
    taken = {n: min(math.ceil(shares[n] * may[n][0] - 1e-6), may[n][0]) for n in sorted(shares) if n in may}
    return _tiers({n: may[n][1] for n in taken}, {n: count for n, count in taken.items() if count}, problem.host_limit_bytes)


def room_left(problem: Problem, choice: Choice) -> int | None:
    """Host memory that stowed parameters leave; None: no limit."""
    if problem.host_limit_bytes is None:
        return None
    return max(problem.host_limit_bytes - stowed_bytes(problem, choice)[0], 0)


def host_bytes(problem: Problem, choice: Choice, found: Places) -> int:
    """Bytes of these pieces in host memory."""
    sizes = {n: size for n, _, size in pieces(problem, choice)}
    return sum(host * sizes[n] for n, (host, _) in found.items())


def on_disk(tape: Tape, names: Names, state: int) -> tuple[Names, int | None]:
    """Those of the named values for which host memory has no room beside `state` bytes, and the room that the others leave."""
    limit = tape.problem.host_limit_bytes
    if limit is None:
        return {}, None
    sent = []
    for t, v in enumerate(tape.value):
        maker, name = tape.maker[t], tape.problem.values[v].name
        if maker is not None and tape.bytes[t] and tape.rank[t] in names.get(name, ()):
            sent.append((maker.moment, name, tape.rank[t], tape.bytes[t]))
    host = sum(size for *_, size in sent)
    out: dict[str, set[int]] = {}
    for _, name, rank, size in sorted(sent):
        if host + state <= limit:
            break
        out.setdefault(name, set()).add(rank)
        host -= size
    return {name: frozenset(ranks) for name, ranks in sorted(out.items())}, limit - host
