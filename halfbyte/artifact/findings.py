"""What a check found wrong: a list that stays readable when one cause breaks a thousand tensors."""

from __future__ import annotations

from collections import Counter

LIMIT = 20
"""Findings of one code that are listed; the rest are counted."""


class Findings:
    """Findings as check.json holds them: a stable code, where, and one line that says what is wrong."""

    def __init__(self) -> None:
        self._items: list[dict[str, str]] = []
        self._counts: Counter[str] = Counter()

    def add(self, code: str, where: str, message: str) -> None:
        """Note a finding; beyond LIMIT of one code it is only counted."""
        self._counts[code] += 1
        if self._counts[code] <= LIMIT:
            self._items.append({"code": code, "where": where, "message": " ".join(message.split())})

    def __bool__(self) -> bool:
        return bool(self._items)

    def listed(self) -> list[dict[str, str]]:
        """All findings in the order found, and one more per code that has more than LIMIT."""
        more = [(code, n - LIMIT) for code, n in self._counts.items() if n > LIMIT]
        return self._items + [{"code": code, "where": "", "message": f"and {n} more like these"} for code, n in more]
