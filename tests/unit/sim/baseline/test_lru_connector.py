from hypothesis import given
from hypothesis import strategies as st

from tokencake_sim.baseline.lru_cache import LruHostCache
from tokencake_sim.device.worker import Links


def stored(host, *keys):
    count = host.reserve(keys)
    host.arrive(keys[:count])
    host.unpin(keys[:count])
    return count


def test_the_least_recently_used_block_goes_first_and_the_tail_of_a_chain_before_its_head():
    host = LruHostCache(3)
    stored(host, b"a", b"b", b"c")
    host.touch([b"a", b"b", b"c"])

    stored(host, b"d")

    assert [key for key in (b"a", b"b", b"c", b"d") if host.has(key)] == [b"a", b"b", b"d"]


def test_a_block_on_its_way_is_known_but_cannot_be_loaded():
    host = LruHostCache(2)
    host.reserve([b"a"])

    assert host.is_known(b"a")
    assert not host.has(b"a")


def test_a_pinned_block_stays():
    host = LruHostCache(1)
    stored(host, b"a")
    host.pin([b"a"])

    assert stored(host, b"b") == 0
    assert host.has(b"a")


@given(st.integers(0, 6), st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=5, unique=True), max_size=25))
def test_the_host_never_holds_more_than_its_capacity(capacity, chains):
    host = LruHostCache(capacity)

    for chain in chains:
        keys = [bytes([key]) for key in chain if not host.is_known(bytes([key]))]
        stored(host, *keys)
        host.touch([bytes([key]) for key in chain])
        assert len(host) <= capacity


def test_copies_of_one_direction_queue_and_those_of_the_other_do_not():
    links = Links.of(100.0)

    assert links.to_host.copy(200, ready_s=1.0) == 3.0
    assert links.to_host.copy(100, ready_s=1.5) == 4.0
    assert links.to_device.copy(100, ready_s=1.5) == 2.5
    assert links.to_host.busy_s == 3.0
