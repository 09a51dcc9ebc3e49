"""Whether this process is at work, as far as the system can tell: it uses a processor, or reads and writes.

A rank for which others wait may be busy with something of its own: an evaluation, a copy of files. It then uses a processor, or files. One
that waits for something that does not come (a lock, a record, `sleep`) does neither. What does not count: work of other processes
for which this one waits, and bytes that travel over sockets without its processor.
"""

from __future__ import annotations

import time
from contextlib import suppress

CPU_SHARE = 0.02  # of one core, of all threads together; the watch itself takes about 0.2%
IO_BYTES_S = 1 << 20  # read and written per second


class Work:
    """Signs of work of this process since the last look."""

    def __init__(self) -> None:
        self._at, self._cpu, self._io = time.monotonic(), time.process_time(), _moved_bytes()
        self._worked = self._at

    def idle_s(self) -> float:
        """Seconds since the process last was at work. Looks of less than half a second ago count with the next."""
        now = time.monotonic()
        passed = now - self._at
        if passed >= 0.5:
            cpu, io = time.process_time(), _moved_bytes()
            if cpu - self._cpu > CPU_SHARE * passed or io - self._io > IO_BYTES_S * passed:
                self._worked = now
            self._at, self._cpu, self._io = now, cpu, io
        return round(now - self._worked, 1)


def _moved_bytes() -> int:
    """Bytes that this process read and wrote so far, where the system says so."""
    with suppress(OSError, ValueError, IndexError), open("/proc/self/io", encoding="ascii") as file:
        return sum(int(line.split()[1]) for line in file.readlines()[:2])
    return 0
