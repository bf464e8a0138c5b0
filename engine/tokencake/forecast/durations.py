"""Forecast of stall durations, as distributions learned per role and tool.

One histogram over the logarithm of the duration per (role, tool), online and in bounded memory. Quantiles are robust
against outliers; the weight of the past fades, so that the forecast follows a tool that changes. While there is little
data the user's estimate counts half (paper: b = 0.5). The elapsed time is taken into account: a tool that was expected
for 1 s and has run for 5 s is not expected back in -4 s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import erf, exp, inf, log, sqrt
from typing import Any, Final

from tokencake.forecast.fair_lru import FairLRU
from tokencake.forecast.roles import Role

SHORTEST_S: Final = 0.001
BINS_PER_E: Final = 4
"""Bins per factor e of duration: each is 28 % wide."""
BINS: Final = 92
"""From 1 ms up to four months."""
MAX_KEYS: Final = 4_096
UNKNOWN_S: Final = 1.0
"""Median of a stall without estimate and history (from the paper's implementation)."""
ESTIMATE_SIGMA: Final = 0.5
"""Log-normal spread around a user's estimate."""
UNKNOWN_SIGMA: Final = 1.5
FADE: Final = 0.98
"""Weight of the past at each new observation: about the last 50 count."""
ENOUGH: Final = 8.0
"""Observations from which on the user's estimate no longer counts."""
_SPLIT_EVENLY: Final = 0.5
_DUMPED: Final = len(Role._fields) + 2
"""Items of one dumped history: its role, the tool and the weights."""
UNSEEN_SHARE: Final = 0.05
"""Share of stalls that outlast everything seen before."""


def _bin(seconds: float) -> int:
    return min(BINS - 1, max(0, int(log(max(seconds, SHORTEST_S) / SHORTEST_S) * BINS_PER_E)))


def _edge(index: float) -> float:
    """Duration at the lower edge of a bin, in seconds."""
    return SHORTEST_S * exp(index / BINS_PER_E)


@dataclass(frozen=True, slots=True)
class DurationDistribution:
    """Distribution of the remaining duration of one stall, in seconds from now."""

    weights: tuple[float, ...]
    """Probability of each bin of the *whole* duration."""
    elapsed_s: float = 0.0

    def given_elapsed(self, elapsed_s: float) -> DurationDistribution:
        """The same stall when it has already lasted `elapsed_s`."""
        return DurationDistribution(self.weights, elapsed_s)

    def quantile(self, q: float) -> float:
        """The seconds within which the stall is over with probability `q`."""
        alive = self._alive()
        left = q * sum(alive)
        if left <= 0.0:
            return 0.0
        for index, weight in enumerate(alive):
            if weight > 0.0 and left <= weight:
                low, high = max(_edge(index), self.elapsed_s), _edge(index + 1)
                return max(0.0, low + (high - low) * left / weight - self.elapsed_s)
            left -= weight
        return max(0.0, _edge(BINS) - self.elapsed_s)

    def cdf(self, seconds: float) -> float:
        """The probability that the stall is over within `seconds`."""
        alive, until_s = self._alive(), self.elapsed_s + seconds
        within = 0.0
        for index, weight in enumerate(alive):
            low, high = max(_edge(index), self.elapsed_s), _edge(index + 1)
            if weight > 0.0 and until_s > low:
                within += weight * min(1.0, (until_s - low) / (high - low))
        return within / sum(alive)

    @property
    def mean_s(self) -> float:
        """Expected remaining duration."""
        alive = self._alive()
        middles = ((max(_edge(i), self.elapsed_s) + _edge(i + 1)) / 2 for i in range(BINS))
        return max(0.0, sum(w * m for w, m in zip(alive, middles, strict=True)) / sum(alive) - self.elapsed_s)

    def _alive(self) -> list[float]:
        """Bins beyond the elapsed time. A stall that has outlived most of what was seen may last as long again."""
        alive = [0.0] * BINS
        for index, weight in enumerate(self.weights):
            low, high = _edge(index), _edge(index + 1)
            if high > self.elapsed_s:
                alive[index] = weight * (high - max(low, self.elapsed_s)) / (high - low)
        outlived = UNSEEN_SHARE * (1.0 - sum(alive))
        if outlived > UNSEEN_SHARE / 2:
            longer = _spread(2 * self.elapsed_s, ESTIMATE_SIGMA, from_s=self.elapsed_s)
            alive = [seen + outlived * unseen for seen, unseen in zip(alive, longer, strict=True)]
        return alive


def _spread(median_s: float, sigma: float, from_s: float = 0.0) -> tuple[float, ...]:
    """A log-normal distribution over the bins beyond `from_s`."""
    center = log(max(median_s, SHORTEST_S) / SHORTEST_S) * BINS_PER_E
    scale = sigma * BINS_PER_E * sqrt(2.0)
    cumulated = [0.0, *(0.5 * (1 + erf((edge - center) / scale)) for edge in range(1, BINS)), 1.0]
    first = _bin(from_s) if from_s else 0
    weights = [max(0.0, high - low) for low, high in pairwise(cumulated)]
    kept = [weight if index >= first else 0.0 for index, weight in enumerate(weights)]
    total = sum(kept)
    return tuple(weight / total for weight in kept) if total else tuple(weights)


BACK_NOW: Final = DurationDistribution((1.0,) + (0.0,) * (BINS - 1))
"""Nothing is left to wait for."""


class _History:
    """The faded histogram of one key."""

    __slots__ = ("total", "weights")

    def __init__(self) -> None:
        self.weights: dict[int, float] = {}
        self.total = 0.0

    def add(self, seconds: float) -> None:
        for index in list(self.weights):
            self.weights[index] *= FADE
            if self.weights[index] < 1e-4:  # noqa: PLR2004  # forgotten
                del self.weights[index]
        index = _bin(seconds)
        self.weights[index] = self.weights.get(index, 0.0) + 1.0
        self.total = sum(self.weights.values())


class Forecast:
    """Durations of the stalls of every (role, tool). At most `MAX_KEYS` keys, shared fairly between tenants."""

    def __init__(self) -> None:
        self._histories: FairLRU[tuple[Role, str], _History] = FairLRU(MAX_KEYS)

    def learn(self, role: Role, tool: str | None, seconds: float) -> None:
        """A stall of this kind lasted `seconds`."""
        key = (role, tool or "")
        history = self._histories.get(key) or _History()
        history.add(seconds)
        self._histories.put(key, history, role.tenant)

    def stall(self, role: Role, tool: str | None, estimate_s: float | None = None) -> DurationDistribution:
        """The whole duration of a stall that begins now, from history and estimate."""
        history = self._histories.get((role, tool or ""))
        if history is None or not history.total:
            if estimate_s is None:
                return DurationDistribution(_spread(UNKNOWN_S, UNKNOWN_SIGMA))
            return DurationDistribution(_spread(estimate_s, ESTIMATE_SIGMA))
        seen = [history.weights.get(index, 0.0) / history.total for index in range(BINS)]
        if history.total >= ENOUGH or estimate_s is None:
            if history.total >= ENOUGH:
                return DurationDistribution(tuple(seen))
            prior = _spread(_edge(self._center(history)), UNKNOWN_SIGMA / 2)
        else:
            prior = _spread(estimate_s, ESTIMATE_SIGMA)
        return DurationDistribution(tuple((s + p) * _SPLIT_EVENLY for s, p in zip(seen, prior, strict=True)))

    def knows(self, role: Role, tool: str | None) -> bool:
        """Whether such a stall was ever seen."""
        return (role, tool or "") in self._histories

    @staticmethod
    def _center(history: _History) -> float:
        return sum(index * weight for index, weight in history.weights.items()) / history.total + _SPLIT_EVENLY

    def __len__(self) -> int:
        return len(self._histories)

    # --- across restarts ----------------------------------------------------------------------------

    def dump(self) -> list[Any]:
        """Everything learned, as JSON."""
        return [
            [*role, tool, {str(index): round(weight, 4) for index, weight in history.weights.items()}]
            for (role, tool), history in self._histories.items()
        ]

    def restore(self, dumped: Iterable[Any]) -> None:
        """Load the result of `dump`; malformed entries are left out."""
        for entry in dumped:
            if not isinstance(entry, list | tuple) or len(entry) != _DUMPED or not isinstance(entry[-1], Mapping):
                continue
            *parts, tool, weights = entry
            role = Role(*map(str, parts))
            history = _History()
            for index, weight in weights.items():
                if str(index).isdigit() and int(index) < BINS and isinstance(weight, int | float) and 0 < weight < inf:
                    history.weights[int(index)] = float(weight)
            history.total = sum(history.weights.values())
            if history.total and len(self._histories) < MAX_KEYS:
                self._histories.put((role, str(tool)), history, role.tenant)
