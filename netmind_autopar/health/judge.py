"""The verdict over all ranks, from what each last said of itself: a pure function, so that every case can be tested.

failed      a rank raised an error that nobody caught
lost        its process is gone, or does not answer
diverged    two ranks run different collectives
stalled     others wait in a collective, it does not come, and nothing shows that it is at work
terminated  it was told to end
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..ir import errors
from ..ir.errors import RankError

BUSY_S = 1800.0  # the longest that planning, compiling or the like may take while others wait
LEFT_S = 5.0  # how long ranks wait in a collective for one whose program is over
KINDS = {
    "failed": "FailedRankError",
    "lost": "LostRankError",
    "diverged": "DivergedRankError",
    "stalled": "StalledRankError",
    "terminated": "TerminatedError",
}
TRY = {
    "failed": "mend the error of rank {rank}, which it shows itself",
    "lost": "look at the last lines of rank {rank} and at its machine (memory, signals); under torchrun --max-restarts, "
    "load_latest() goes on from the newest checkpoint",
    "diverged": "make every rank build the same model and call it alike, with batches of the same shapes and in the same order",
    "stalled": "look at that line of rank {rank}; if it may take longer, autoparallelize(..., timeout_s=600)",
    "terminated": "start again; load_latest() goes on from the newest checkpoint",
}


@dataclass(frozen=True)
class Verdict:
    """Why all ranks end. rank: whose fault it is, as far as that can be told; collective: the one that the others were in."""

    kind: str
    rank: int
    what: str
    where: str = ""
    why: str = ""
    collective: str = ""

    def json(self) -> dict[str, Any]:
        return asdict(self)

    def error(self) -> RankError:
        """The typed error that every rank raises."""
        kind: type[RankError] = getattr(errors, KINDS[self.kind])
        hint = TRY[self.kind].format(rank=self.rank)
        return kind(self.what, where=self.where, why=self.why, try_=hint, rank=self.rank, collective=self.collective)


@dataclass(frozen=True)
class Seen:
    """A rank as others see it. silent_s: since it last said anything; still_s: since it got ahead. gone: its process is not there.

    What it said: count, waiting, busy, where (the user's line), op, recent [(count, mark, name)], left (its program is over), idle_s
    (since it last used its processor or files).
    """

    rank: int
    said: Mapping[str, Any] = field(default_factory=dict)
    silent_s: float = 0.0
    still_s: float = 0.0
    gone: bool = False

    @property
    def waiting(self) -> str:
        return str(self.said.get("waiting", ""))

    @property
    def busy(self) -> bool:
        return bool(self.said.get("busy"))

    def patience_s(self, timeout_s: float) -> float:
        """How long others wait for it: longer while it is known to be at work."""
        return BUSY_S if self.busy or float(self.said.get("idle_s", BUSY_S)) <= timeout_s else timeout_s

    @property
    def left(self) -> bool:
        return bool(self.said.get("left"))

    @property
    def collective(self) -> str:
        """What it is in, with the model's line; or else the last it was in."""
        op = self.said.get("op", "")
        if self.waiting:
            return self.waiting + (f" ({op})" if op else "")
        recent = self.said.get("recent") or [[0, 0, ""]]
        return f"behind {recent[-1][2]}" if recent[-1][2] else ""


def judge(ranks: Sequence[Seen], timeout_s: float) -> Verdict | None:
    """None while all is well, as far as one can see. timeout_s: how long others may wait for a rank."""
    return _lost(ranks, timeout_s) or _diverged(ranks) or _stalled(ranks, timeout_s)


def where_others_are(ranks: Sequence[Seen], but: int) -> str:
    """The collective that most of the others wait in."""
    found = Counter(s.collective for s in ranks if s.rank != but and s.waiting)
    return found.most_common(1)[0][0] if found else ""


def lost(rank: int, ranks: Sequence[Seen], why: str) -> Verdict:
    """The verdict over a rank whose process is gone."""
    collective = where_others_are(ranks, rank)
    last = next((s for s in ranks if s.rank == rank), Seen(rank))
    during = f" while others wait in {collective}" if collective else ""
    at = "; ".join(t for t in (last.said.get("where", ""), last.collective) if t)
    return Verdict("lost", rank, f"rank {rank} died{during}", f"rank {rank} was last seen at {at}" if at else "", why, collective)


def _lost(ranks: Sequence[Seen], timeout_s: float) -> Verdict | None:
    for s in ranks:
        if s.left:
            waits = next((o for o in ranks if o.waiting and o.still_s > LEFT_S and o.said.get("count", 0) > s.said.get("count", 0)), None)
            if waits is not None:
                what = f"rank {s.rank} ended while others wait in {waits.collective}"
                return Verdict("lost", s.rank, what, s.said.get("where", ""), "its program was over", waits.collective)
        elif s.gone:
            return lost(s.rank, ranks, "its process is gone")
        elif s.silent_s > (BUSY_S if s.busy else timeout_s):
            return lost(
                s.rank, ranks, f"it has not answered for {s.silent_s:.0f} s: its process is stopped, or its machine is out of reach"
            )
    return None


def _diverged(ranks: Sequence[Seen]) -> Verdict | None:
    """Two ranks with the same number of collectives behind them must have run the same ones."""
    runs = [s for s in ranks if not s.left and s.said.get("recent")]
    known = [{count: (mark, name) for count, mark, name in s.said["recent"]} for s in runs]
    for count in sorted({c for k in known for c in k}):
        have = [(s, k[count]) for s, k in zip(runs, known, strict=True) if count in k]
        marks = Counter(mark for _, (mark, _) in have)
        if len(marks) < 2:
            continue
        usual, of = marks.most_common(1)[0]
        others = [(s, name) for s, (mark, name) in have if mark == usual]
        odd, name = next((s, name) for s, (mark, name) in have if mark != usual)
        first, theirs = others[0]
        most = f"rank {first.rank} is" if of == 1 else f"{of} other ranks are"
        what = f"rank {odd.rank} runs another program: collective {count} is {name} there, and {theirs} on rank {first.rank}"
        if name == theirs:
            what = f"rank {odd.rank} ran other collectives than rank {first.rank} before {name}"
        where = "; ".join(f"rank {s.rank} at {s.said['where']}" for s in (odd, first) if s.said.get("where"))
        why = f"all ranks must run the same collectives in the same order; {most} at {first.collective}"
        return Verdict("diverged", odd.rank, what, where, why, first.waiting or theirs)
    return None


def awaited(ranks: Sequence[Seen], timeout_s: float) -> str:
    """What to say of a rank that others wait for longer than `timeout_s`, and which is at work; nothing when there is none."""
    waits = max((s.still_s for s in ranks if s.waiting), default=0.0)
    s = next((s for s in ranks if not (s.waiting or s.left or s.busy) and s.still_s > timeout_s), None)
    if s is None or waits <= timeout_s:
        return ""
    collective = where_others_are(ranks, s.rank)
    at = s.said.get("where", "an unknown line")
    return f"rank {s.rank} is at work at {at}; others wait for it in {collective}, up to {BUSY_S / 60:.0f} minutes"


def _counted(s: Seen) -> bool:
    """Whether it waits in a collective that was counted when it was entered; those of the program's own and of checkpoints are not."""
    return any(name == s.waiting for _, _, name in s.said.get("recent", ()))


def _stalled(ranks: Sequence[Seen], timeout_s: float) -> Verdict | None:
    runs = [s for s in ranks if not s.left]
    waiting = [s for s in runs if s.waiting]
    longest = max((s.still_s for s in waiting), default=0.0)
    if longest <= timeout_s:
        return None
    late = [s for s in runs if not s.waiting and s.still_s > s.patience_s(timeout_s)]
    if late:
        s = late[0]
        collective = where_others_are(runs, s.rank)
        more = f" (nor has {', '.join(f'rank {o.rank}' for o in late[1:])})" if len(late) > 1 else ""
        what = f"rank {s.rank} did not come to {collective} within {timeout_s:.0f} s{more}"
        where = f"rank {s.rank} is at {s.said['where']}" if s.said.get("where") else ""
        return Verdict("stalled", s.rank, what, where, f"{len(waiting)} of {len(runs)} ranks wait for it", collective)
    if len(waiting) == len(runs) and min(s.still_s for s in runs) > timeout_s:
        if any(o.said.get("ahead") for o in runs) and len({o.said.get("count") for o in runs}) == 1:
            return None  # all may be elsewhere, such as reading data
        names = Counter(o.waiting for o in runs)
        s = min(runs, key=lambda s: s.said.get("count", 0))
        if len(names) > 1 and not all(_counted(o) for o in runs):  # of the counted ones `_diverged` knows the order
            usual = names.most_common(1)[0][0]
            odd, other = next(o for o in reversed(runs) if o.waiting != usual), next(o for o in runs if o.waiting == usual)
            what = f"rank {odd.rank} waits in {odd.collective}, rank {other.rank} in {other.collective}"
            where = "; ".join(f"rank {o.rank} at {o.said['where']}" for o in (odd, other) if o.said.get("where"))
            return Verdict("diverged", odd.rank, what, where, "neither can come to the other's", other.collective)
        why = "every rank waits in it, and nothing arrives" if len(names) == 1 else "every rank waits, and this one is behind"
        return Verdict("stalled", s.rank, f"rank {s.rank} does not get out of {s.collective}", s.said.get("where", ""), why, s.collective)
    return None
