"""What happens to an agent's KV while it is stalled, and when does it come back?

At the finish of a call a policy says *keep* (pin the blocks on the device), *offload* (copy to the host what is not
there), *drop* (nobody will extend this; the private blocks are the first to be reused) or *leave* (do nothing, as stock
vLLM). For an offloaded chain it says when its upload should start. Decisions are values; seconds are compared with
seconds; nothing here knows vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, Protocol, TypeAlias, assert_never

from tokencake.forecast.costs import Rates
from tokencake.forecast.durations import Stall
from tokencake.forecast.reuse import Claim
from tokencake.protocol import parsing

Action: TypeAlias = Literal["keep", "offload", "drop", "leave"]
PaperReason: TypeAlias = Literal[
    "no waiting demand",
    "host is full",
    "stall too short",
    "window too short",
    "low pressure",
    "important",
    "score",
]
"""Why the published gate rejects a copy."""
Reason: TypeAlias = (
    PaperReason
    | Literal[
        "final",
        "over",
        "short",
        "on host already",
        "recompute is cheaper",
        "reusable",
        "not eligible",
        "emergency",
        "pays",
    ]
)
PolicyName: TypeAlias = Literal["ours", "paper", "lru"]


@dataclass(frozen=True, slots=True)
class TimeSettings:
    """The section `time` of `--additional-config '{"tokencake": {"time": {...}}}'`."""

    enabled: bool = parsing.optional(parsing.flag, True)
    """False: stock vLLM. Default true."""
    policy: PolicyName = parsing.optional(parsing.one_of("ours", "paper", "lru"), "ours")  # noqa: RUF009  # declares a field
    """`paper`: Algorithm 1 and the score with its constants. `lru`: `ours` with least-recently-used replacement."""
    host_kv_gib: float = parsing.optional(parsing.number(0, 16_384), 4.0)
    """Host memory for KV, GiB over all ranks of one engine, allocated once at the start. Default 4."""
    keep_share: float = parsing.optional(parsing.number(0, 0.9), 0.3)
    """At most this share of the device's blocks is pinned for short stalls. Default 0.3; pins are given up before
    anybody has to wait for them (our choice)."""
    short_stall_s: float = parsing.optional(parsing.number(0, 3_600), 0.2)
    """A gap that is probably shorter, queueing included, is never copied. Seconds, default 0.2 (the issue's bound)."""
    upload: bool = parsing.optional(parsing.flag, True)
    """Upload before the agent is back. False: load when the call comes. Default true."""
    upload_quantile: float = parsing.optional(parsing.number(0, 1), 0.2)
    """The upload is timed for the moment at which the agent is back with this probability. Default 0.2: early costs
    only room, late loses the gain (RFC #57103)."""
    upload_lead_s: float = parsing.optional(parsing.number(0, 60), 0.1)
    """The upload starts at least so much before that moment. Seconds, default 0.1 (paper: max(0.1 s, 1.25 T))."""
    job_mib: float = parsing.optional(parsing.number(0.001, 65_536), 64.0)
    """Copies are cut into jobs of so many MiB, so that urgent ones need not wait long. Default 64 (our choice)."""
    debug_checksums: bool = parsing.optional(parsing.flag, False)
    """Checksum every block on its way out and in; a block that differs fails its copy. Slow. Default false."""
    forecast_file: str | None = parsing.optional(parsing.text(4_096))
    """Where the learned durations are kept across restarts. Default: nowhere."""


@dataclass(frozen=True, slots=True)
class Finished:
    """What is known when a call ends; `blocks` count full blocks."""

    claim: Claim | None
    """Why nothing will extend it, where that is believed."""
    rest: Stall
    queue_s: float
    """How long the next call will wait for its slot once it has come."""
    blocks: int
    missing: int
    """Of them not on the host."""
    host_free: int
    device_blocks: int
    free_blocks: int
    pinned_blocks: int
    waiting_calls: int
    waiting_blocks: int
    """What the waiting calls need."""
    fitting_blocks: int
    """What those of them need that could be admitted now (paper: the window)."""
    importance: float
    is_near_end: bool
    recent_stores: int
    """Within the last `CHURN_STEPS` steps."""
    residence_s: float
    """How long what nobody holds stays on the device."""


@dataclass(frozen=True, slots=True)
class Decision:
    """`action` and, in a word or two, why."""

    action: Action
    why: Reason


class TimePolicy(Protocol):
    """Pure: the same arguments give the same answer, and nothing is kept."""

    does_wait_for_demand: bool
    """Whether a `leave` is worth asking again while others wait for room."""

    def at_finish(self, call: Finished, rates: Rates, settings: TimeSettings) -> Decision:
        """What to do with the KV of a call that has ended."""

    def upload_in_s(self, rest: Stall, blocks: int, rates: Rates, settings: TimeSettings) -> float:
        """In how many seconds the upload of `blocks` should start."""

    def may_upload(self, rest: Stall, chance: float, residence_s: float) -> bool:
        """Whether an upload now will be of use.

        Args:
            rest: of the stall.
            chance: that anybody comes at all.
            residence_s: how long what nobody holds stays on the device.
        """


class Ours:
    """Store whatever may be used again; never copy for a gap too short to pay; drop what is dead.

    Why: a copy to the host costs milliseconds beside the computation, recomputing costs seconds on it
    (`lab-findings`). Reads: hint, forecast, queue. Costs: one dictionary operation per block and call.
    """

    does_wait_for_demand = False

    def at_finish(self, call: Finished, rates: Rates, settings: TimeSettings) -> Decision:
        """In seconds: the gap until the blocks are used again, against copying them out and in."""
        if call.claim is not None:
            return Decision("drop", call.claim)
        gap_s = call.rest.quantile(0.9) + call.queue_s
        round_trip_s = rates.store_s(call.missing) + rates.load_s(call.missing)
        if gap_s <= max(settings.short_stall_s, round_trip_s):
            # Beside it another call of this size must still find room, or the pins would only be in the way.
            is_in_budget = call.pinned_blocks + call.blocks <= settings.keep_share * call.device_blocks
            has_room = is_in_budget and call.free_blocks >= call.blocks and not call.waiting_calls
            if has_room:
                return Decision("keep", "short")
            # Where others wait for the room, what is not on the host is lost.
            if not call.missing or (gap_s <= call.residence_s and not call.waiting_calls):
                return Decision("leave", "short")
        if not call.missing:
            return Decision("offload", "on host already")
        if rates.recompute_s(call.missing) <= round_trip_s:
            return Decision("leave", "recompute is cheaper")
        return Decision("offload", "reusable")

    def upload_in_s(self, rest: Stall, blocks: int, rates: Rates, settings: TimeSettings) -> float:
        """The early quantile of the return, less the copy and a margin."""
        lead_s = max(settings.upload_lead_s, 1.25 * rates.load_s(blocks))
        return max(0.0, rest.quantile(settings.upload_quantile) - lead_s)

    def may_upload(self, rest: Stall, chance: float, residence_s: float) -> bool:
        """Only what will probably be there still when the agent is back."""
        return chance >= MIN_CHANCE and chance * rest.share_within(residence_s) >= MIN_USE


MIN_CHANCE: Final = 0.5
"""Below it the next call is taken for one that will not come."""
MIN_USE: Final = 0.8
"""An upload is started where it is used with this probability: nine in ten are to be, and most are surer."""
CHURN_STEPS: Final = 4
LOW_PRESSURE: Final = 0.60
EMERGENCY_USE: Final = 0.85
EMERGENCY_S: Final = 5.0
MIN_WINDOW_S: Final = 0.05
MIN_SCORE: Final = 1.0
PROTECTED_IMPORTANCE: Final = 8.0
PAPER_LEAD_S: Final = 0.1
PAPER_LEAD_TIMES: Final = 1.25


class Paper:
    """The published gate: copy only where somebody waits who can use the room meanwhile (Algorithm 1 and the score).

    Why: to compare. Reads: the predicted stall, pressure, the waiting calls that could be admitted. Costs: one
    walk over the head of the queue per decision.
    """

    does_wait_for_demand = True

    def at_finish(self, call: Finished, rates: Rates, settings: TimeSettings) -> Decision:  # noqa: ARG002  # the interface
        """Reject reasons in the published order."""
        if call.claim is not None or not call.blocks:
            return Decision("leave", "not eligible")
        if not call.missing:
            return Decision("offload", "on host already")
        stall_s = call.rest.mean_s
        transfer_s = rates.store_s(call.missing) + rates.load_s(call.blocks)
        window_s = stall_s - transfer_s
        use = 1.0 - call.free_blocks / max(1, call.device_blocks)
        is_emergency = use >= EMERGENCY_USE and window_s >= max(4 * transfer_s, EMERGENCY_S) and call.waiting_calls > 0
        why = self._rejection(call, stall_s, transfer_s, use, is_emergency=is_emergency)
        if why is None and self.score(call, stall_s, transfer_s, use) < MIN_SCORE and not is_emergency:
            why = "score"
        return Decision("offload", "emergency" if is_emergency else "pays") if why is None else Decision("leave", why)

    @staticmethod
    def _rejection(
        call: Finished, stall_s: float, transfer_s: float, use: float, *, is_emergency: bool
    ) -> PaperReason | None:
        window_s = stall_s - transfer_s
        has_queue_pressure = call.waiting_blocks > call.free_blocks
        is_shielded = call.importance >= PROTECTED_IMPORTANCE and not is_emergency
        checks: tuple[tuple[bool, PaperReason], ...] = (
            (not call.fitting_blocks, "no waiting demand"),
            (call.host_free < call.missing, "host is full"),
            (stall_s <= transfer_s, "stall too short"),
            (window_s < max(MIN_WINDOW_S, 2 * transfer_s) and not is_emergency, "window too short"),
            (
                use < LOW_PRESSURE
                and (not has_queue_pressure or call.fitting_blocks < call.blocks or not call.waiting_calls),
                "low pressure",
            ),
            (
                is_shielded and (call.is_near_end or window_s < max(0.5, 8 * transfer_s) or stall_s < 2 * transfer_s),
                "important",
            ),
        )
        return next((why for is_rejected, why in checks if is_rejected), None)

    @staticmethod
    def score(call: Finished, stall_s: float, transfer_s: float, use: float) -> float:
        """The published score; offload from `MIN_SCORE` on."""
        churn = min(4.0, (call.recent_stores - 64) / 8) if call.recent_stores > 64 else 0.0  # noqa: PLR2004  # published
        return (
            min(6.0, (stall_s - transfer_s) / max(0.25, transfer_s))
            + max(0.0, (use - LOW_PRESSURE) * 6)
            + min(2.0, call.waiting_blocks / (call.blocks + 1))
            + min(2.0, call.fitting_blocks / max(1, call.blocks))
            + (1.0 if stall_s >= 2 * transfer_s else -1.0)
            + (1.0 if call.host_free >= call.missing else -4.0)
            - 0.35 * min(10.0, call.importance)
            - (2.0 if call.is_near_end else 0.0)
            - churn
        )

    def upload_in_s(self, rest: Stall, blocks: int, rates: Rates, settings: TimeSettings) -> float:  # noqa: ARG002  # as above
        """The predicted return less `max(0.1 s, 1.25 T)`."""
        return max(0.0, rest.mean_s - max(PAPER_LEAD_S, PAPER_LEAD_TIMES * rates.load_s(blocks)))

    def may_upload(self, rest: Stall, chance: float, residence_s: float) -> bool:  # noqa: ARG002  # as above
        """Always."""
        return True


def policy_of(settings: TimeSettings) -> TimePolicy:
    """The policy by its name in the settings."""
    match settings.policy:
        case "ours" | "lru":
            return Ours()
        case "paper":
            return Paper()
        case _:
            assert_never(settings.policy)
