"""Pages of records: each record in one page, whatever comes and goes meanwhile, and a bound on what a page costs."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tokencake.registry.timeline import MAX_VISITED, MAX_WEIGHT, Timeline, after, page_of


def timeline(count: int) -> Timeline[int]:
    records: Timeline[int] = Timeline()
    for number in range(1, count + 1):
        records.add(float(number), number)
    return records


def test_a_page_has_the_newest_records_and_says_where_the_next_begins() -> None:
    records = timeline(5)
    first = page_of(records.newest_first(), 2)
    assert [item for _, item in first.entries] == [5, 4]
    second = page_of(records.newest_first(first.next_s), 2)
    assert [item for _, item in second.entries] == [3, 2]
    third = page_of(records.newest_first(second.next_s), 2)
    assert [item for _, item in third.entries] == [1]
    assert third.next_s is None


def test_records_of_the_same_moment_have_times_of_their_own() -> None:
    last_s = 0.0
    times_s = [last_s := after(1_000.0, last_s) for _ in range(100)]
    assert sorted(set(times_s)) == times_s


@given(
    st.lists(st.tuples(st.sampled_from(["add", "remove", "read"]), st.integers(0, 50)), max_size=80),
    st.integers(1, 4),
    st.floats(0, 1e7),
    st.floats(1.6e9, 2e9),
)
def test_whatever_comes_and_goes_a_record_that_stays_is_read_once(
    steps: list[tuple[str, int]], limit: int, start_s: float, offset_s: float
) -> None:
    """`before` travels as rounded seconds since the epoch."""
    records: Timeline[int] = Timeline()
    kept: dict[int, float] = {}
    last_s = 0.0
    for number in range(20):
        last_s = after(start_s, last_s)
        records.add(last_s, number)
        kept[number] = last_s
    first = set(kept)
    seen: list[int] = []
    before: float | None = None
    is_over = False
    for number, (step, which) in enumerate([*steps, *[("read", 0)] * 40], start=100):
        if step == "add":
            last_s = after(start_s, last_s)
            records.add(last_s, number)
            kept[number] = last_s
        elif step == "remove" and kept:
            gone = sorted(kept)[which % len(kept)]
            records.remove(kept.pop(gone))
        elif not is_over:
            page = page_of(records.newest_first(None if before is None else before - offset_s), limit)
            seen += [item for _, item in page.entries]
            is_over = page.next_s is None
            before = None if page.next_s is None else round(page.next_s + offset_s, 6)
    assert is_over
    assert len(seen) == len(set(seen))
    assert first & set(kept) <= set(seen)


def test_one_page_looks_at_a_bounded_number_of_records() -> None:
    visited = 0

    def is_wanted(number: int) -> bool:
        nonlocal visited
        visited += 1
        return number == 1

    records = timeline(5 * MAX_VISITED)
    before_s: float | None = None
    for _ in range(5):
        visited = 0
        page = page_of(records.newest_first(before_s), 10, is_wanted)
        assert visited <= MAX_VISITED
        before_s = page.next_s
    assert [item for _, item in page.entries] == [1]


def test_gaps_count_as_looked_at_and_are_closed() -> None:
    records = timeline(100_000)
    for number in range(1, 99_991):
        records.remove(float(number))
    assert sum(1 for _ in records.newest_first()) <= 20
    records = timeline(10 * MAX_VISITED)
    for number in range(1, 10 * MAX_VISITED, 2):
        records.remove(float(number))
    page = page_of(records.newest_first(), 10 * MAX_VISITED)
    assert len(page.entries) == MAX_VISITED // 2


def test_heavy_records_make_a_page_short_and_one_of_any_weight_fits() -> None:
    records = timeline(10)
    page = page_of(records.newest_first(), 10, weight=lambda number: MAX_WEIGHT // 2)
    assert [item for _, item in page.entries] == [10, 9]
    page = page_of(records.newest_first(page.next_s), 10, weight=lambda number: 3 * MAX_WEIGHT)
    assert [item for _, item in page.entries] == [8]
    page = page_of(records.newest_first(page.next_s), 10)
    assert [item for _, item in page.entries] == [7, 6, 5, 4, 3, 2, 1]
