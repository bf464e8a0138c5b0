"""Parsing of the engine's settings: public and advanced keys, former values, errors that name the way out."""

from __future__ import annotations

from typing import Any

import pytest

from tokencake.policies.registry import ADMISSION, EVICTION, OFFLOAD
from tokencake.settings import SettingsError, section
from tokencake.space_scheduler.settings import SpaceSettings
from tokencake.time_scheduler.settings import TimeSettings


def space(**raw: Any) -> SpaceSettings:
    return section({"tokencake": {"space": raw}}, "space", SpaceSettings)


def time(**raw: Any) -> TimeSettings:
    return section({"tokencake": {"time": raw}}, "time", TimeSettings)


def test_an_advanced_key_means_the_same_in_the_section_and_under_advanced() -> None:
    assert (
        space(advanced={"pass_s": 3, "guarded": 0}) == space(pass_s=3, guarded=0) == SpaceSettings(pass_s=3, guarded=0)
    )
    assert time(advanced={"job_mib": 1}) == time(job_mib=1) == TimeSettings(job_mib=1)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"advanced": {"swap": False}},
            r"space\.advanced\.swap does not stand under advanced; write tokencake\.space\.sw",
        ),
        ({"advanced": {"pas_s": 3}}, r"space\.advanced\.pas_s is not known; the settings there are .*pass_s"),
        (
            {"advanced": {"pass_s": 3}, "pass_s": 4},
            r"space\.advanced\.pass_s is set in tokencake\.space\.pass_s as well",
        ),
        ({"advanced": 3}, r"space\.advanced is 3; expected an object"),
        ({"advanced": {"pass_s": -1}}, r"space\.pass_s is -1; expected a number"),
        ({"advancd": {}}, r"space\.advancd is not known; the settings are enabled, head_start_s, .*advanced are ans"),
        ({"policy": "best"}, r"space\.policy is 'best'; expected one of default, paper"),
    ],
)
def test_an_error_names_the_key_and_the_way_out(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        space(**raw)


def test_an_unknown_eviction_policy_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(SettingsError, match=r"time\.eviction is 'mru'; expected one of next_use, lru"):
        time(advanced={"eviction": "mru"})


def test_former_names_of_policies_are_todays() -> None:
    assert space(policy="ours") == SpaceSettings()
    assert time(policy="ours") == TimeSettings()
    assert time(policy="lru") == TimeSettings(eviction="lru")


def test_every_default_is_registered() -> None:
    assert SpaceSettings().policy in ADMISSION
    assert TimeSettings().policy in OFFLOAD
    assert TimeSettings().eviction in EVICTION


def test_without_swap_no_request_is_swapped_out() -> None:
    assert ADMISSION["default"](space()).swaps
    assert not ADMISSION["default"](space(swap=False)).swaps
    assert not ADMISSION["default"](space(swap_oldest=0)).swaps
    assert not ADMISSION["paper"](space()).swaps
