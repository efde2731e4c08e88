"""How long a memcg may stay held without a decision. Imported by the real-time process."""

from __future__ import annotations


class Loan:
    """LOAN_NS at once, BUDGET_NS within WINDOW_NS.

    LEAST_NS is always lent: less would thaw before anything could be decided.
    """

    LEAST_NS = 200_000_000
    LOAN_NS = 2_000_000_000
    BUDGET_NS = 5_000_000_000
    WINDOW_NS = 60_000_000_000

    def __init__(self) -> None:
        self._spent: list[tuple[int, int]] = []  # (from, to)
        self._since_ns: int | None = None
        self.deadline_ns: int | None = None

    def begin(self, now_ns: int) -> None:
        """The memcg was frozen; the deadline is set by what is left of the budget."""
        if self._since_ns is not None:
            return
        self._spent = [span for span in self._spent if span[1] > now_ns - self.WINDOW_NS]
        left_ns = self.BUDGET_NS - sum(end - max(start, now_ns - self.WINDOW_NS) for start, end in self._spent)
        self._since_ns = now_ns
        self.deadline_ns = now_ns + max(self.LEAST_NS, min(self.LOAN_NS, left_ns))

    def prolong(self, deadline_ns: int) -> None:
        """A decision was made that needs the memcg frozen until then at most."""
        if self._since_ns is not None:
            self.deadline_ns = deadline_ns

    def end(self, now_ns: int) -> None:
        """The memcg was thawed."""
        if self._since_ns is not None:
            self._spent.append((self._since_ns, now_ns))
        self._since_ns = self.deadline_ns = None
