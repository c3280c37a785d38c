from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from slidetl.errors import FederationError, UsageError
from slidetl.federation.combine import (
    CoordinateMedian,
    Krum,
    MultiKrum,
    Rule,
    TrimmedMean,
    WeightedMean,
    check_sites,
    combine_round,
)
from slidetl.federation.weights import SiteUpdate, Weights

SENT: Weights = {"w": np.array([1.0, -2.0, 0.5], np.float32), "steps": np.array(10, np.int64)}
RULES = (WeightedMean(), CoordinateMedian(2), TrimmedMean(2), Krum(2), MultiKrum(2))
ROBUST = RULES[1:]


def updates_of(changes: NDArray[np.float64], examples: Sequence[int] | None = None) -> list[SiteUpdate]:
    """Makes updates of sites a, b, c... from changes [n, 3] of ``w``."""
    return [
        SiteUpdate(
            chr(97 + number),
            {"w": (SENT["w"] + change).astype(np.float32), "steps": np.array(11 + number, np.int64)},
            5 if examples is None else examples[number],
        )
        for number, change in enumerate(changes)
    ]


def declared(n: int, examples: int = 100) -> dict[str, int]:
    return {chr(97 + number): examples for number in range(n)}


def change_of(updates: Sequence[SiteUpdate], rule: Rule) -> NDArray[np.float64]:
    found = combine_round(SENT, updates, declared(len(updates)), rule).weights["w"].astype(np.float64)
    return np.asarray(found - SENT["w"], np.float64)


def test_the_mean_is_weighted_by_examples() -> None:
    changes = np.array([[1.0, 0, 0], [0, 2, 0], [0, 0, 4]])
    found = change_of(updates_of(changes, [1, 2, 5]), WeightedMean())
    np.testing.assert_allclose(found, [1 / 8, 4 / 8, 20 / 8], atol=1e-6)


def test_a_claim_above_the_declared_examples_is_capped_and_noted() -> None:
    changes = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    found = combine_round(SENT, updates_of(changes, [10, 10, 10**9]), declared(3, 20), WeightedMean())
    np.testing.assert_allclose(found.weights["w"] - SENT["w"], [0.25, 0.25, 0.5], atol=1e-6)
    assert found.notes == {"c": "claims 1000000000 examples of 20 declared: 20 are counted"}


def test_integers_keep_their_type_and_take_the_lower_middle_value() -> None:
    for rule, steps in ((WeightedMean(), 12), (CoordinateMedian(), 12)):
        found = combine_round(SENT, updates_of(np.zeros((4, 3))), declared(4), rule).weights["steps"]
        assert found.dtype == np.int64
        assert found == steps


def test_a_frozen_entry_stays_to_the_last_bit() -> None:
    sent: Weights = {"w": np.random.default_rng(0).normal(size=100).astype(np.float32)}
    same = [SiteUpdate(site, sent, claim) for site, claim in (("a", 3), ("b", 7), ("c", 11))]
    for rule in (WeightedMean(), CoordinateMedian(1), TrimmedMean(1), Krum(0)):
        assert np.array_equal(combine_round(sent, same, declared(3), rule).weights["w"], sent["w"])


def test_krum_takes_the_update_with_the_nearest_neighbours() -> None:
    """Blanchard et al.: with n = 5 and f = 1 a score is the sum over the two nearest."""
    found = combine_round(
        SENT,
        updates_of(np.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [2.5, 0, 0], [9, 0, 0]])),
        declared(5),
        Krum(1),
    )
    assert found.used == ("c",)  # scores 5, 2, 1.25, 2.5, 91.25
    many = combine_round(
        SENT,
        updates_of(np.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [2.5, 0, 0], [9, 0, 0]])),
        declared(5),
        MultiKrum(1),
    )
    assert many.used == ("b", "c")


def test_krum_compares_changes_and_not_weights_in_float32() -> None:
    """Changes of a thousandth on weights of a thousand: squares of weights in float32 cannot tell them."""
    sent: Weights = {"w": np.full(4, 1000.0, np.float64)}
    changes = np.array([1.0, 1.1, 1.2, 1.3, -5.0]) * 1e-3
    sites = [SiteUpdate(chr(97 + n), {"w": sent["w"] + change}, 5) for n, change in enumerate(changes)]
    assert combine_round(sent, sites, declared(5), Krum(1)).used == ("b",)


@pytest.mark.parametrize(
    ("rule", "needed"), [(WeightedMean(), 1), (CoordinateMedian(2), 5), (TrimmedMean(2), 5), (Krum(2), 7)]
)
def test_the_size_conditions_are_enforced(rule: Rule, needed: int) -> None:
    check_sites(rule, needed)
    with pytest.raises(UsageError, match=f"needs at least {needed} sites, not {needed - 1}"):
        check_sites(rule, needed - 1)
    if needed > 1:
        with pytest.raises(FederationError, match=f"needs {needed} usable updates"):
            combine_round(SENT, updates_of(np.zeros((needed - 1, 3))), declared(needed), rule)


def test_a_mean_tolerates_no_malicious_site() -> None:
    with pytest.raises(UsageError, match="a mean tolerates 0 malicious sites"):
        WeightedMean(1)
    with pytest.raises(UsageError, match="0 or more, not -1"):
        Krum(-1)


@pytest.mark.parametrize("rule", RULES)
def test_a_bad_update_is_left_out_and_spends_a_malicious_site(rule: Rule) -> None:
    sites = updates_of(np.ones((7, 3)))
    sites[1] = replace(sites[1], weights={**SENT, "w": np.full(3, np.nan, np.float32)})
    sites[4] = replace(sites[4], weights={**SENT, "w": np.ones(4, np.float32)})
    found = combine_round(SENT, sites, declared(7), rule)
    np.testing.assert_allclose(found.weights["w"] - SENT["w"], 1, atol=1e-6)
    assert found.left_out == {
        "b": "w has values that are not finite",
        "e": "w is float32 [4], expected float32 [3]",
    }


def test_two_updates_of_one_site_and_a_stranger_are_left_out() -> None:
    sites = updates_of(np.array([[1.0] * 3, [1] * 3, [9] * 3]))
    found = combine_round(
        SENT, [*sites[:2], sites[0], replace(sites[2], site="x")], declared(2), WeightedMean()
    )
    assert found.used == ("b",)
    assert found.left_out == {"a": "sent 2 updates in one round", "x": "is not in the configuration"}


def test_too_few_sites_are_an_error_with_each_reason() -> None:
    sites = [replace(update, examples=0) for update in updates_of(np.zeros((2, 3)))]
    with pytest.raises(FederationError, match=r"0 of 2 sites sent one .a: claims 0 examples.*; b: claims 0"):
        combine_round(SENT, sites, declared(2), WeightedMean())
    with pytest.raises(FederationError, match="needs 3 usable updates, and 2 of 3"):
        combine_round(SENT, updates_of(np.zeros((2, 3))), declared(3), WeightedMean(), fewest=3)


def test_server_momentum_adds_up_for_parameters_alone() -> None:
    sent: Weights = {"w": np.zeros(1, np.float32), "bn.running_var": np.ones(1, np.float32)}
    velocity = None
    for expected in (-0.5, -0.5 - 0.95, -1.45 - 1.355):
        step = {"w": sent["w"] - np.float32(0.5), "bn.running_var": np.full(1, 0.1, np.float32)}
        found = combine_round(
            sent, [SiteUpdate("a", step, 5)], declared(1), WeightedMean(), momentum=0.9, velocity=velocity
        )
        sent, velocity = found.weights, found.velocity
        assert sent["w"][0] == pytest.approx(expected, abs=1e-6)
        assert sent["bn.running_var"][0] == pytest.approx(0.1)
    with pytest.raises(UsageError, match="at least 0 and below 1"):
        combine_round(sent, updates_of(np.zeros((1, 3))), declared(1), WeightedMean(), momentum=1.0)


def test_a_network_beyond_its_type_is_an_error() -> None:
    sent: Weights = {"w": np.zeros(1, np.float16)}
    step = SiteUpdate("a", {"w": np.full(1, 6e4, np.float16)}, 5)
    first = combine_round(sent, [step], declared(1), WeightedMean(), momentum=0.9)
    with pytest.raises(FederationError, match="not finite after the round"):
        combine_round(sent, [step], declared(1), WeightedMean(), momentum=0.9, velocity=first.velocity)


numbers = st.floats(-10, 10, width=32)
changes_of_seven = st.lists(st.lists(numbers, min_size=3, max_size=3), min_size=7, max_size=7).map(np.array)


@given(changes=changes_of_seven, order=st.permutations(range(7)), rule=st.sampled_from(RULES))
def test_the_order_of_arrival_makes_no_difference(
    changes: NDArray[np.float64], order: list[int], rule: Rule
) -> None:
    sites = updates_of(changes, [1, 2, 3, 4, 5, 6, 7])
    first = combine_round(SENT, sites, declared(7), rule).weights
    second = combine_round(SENT, [sites[number] for number in order], declared(7), rule).weights
    assert all(np.array_equal(first[name], second[name]) for name in SENT)


@given(
    changes=changes_of_seven,
    places=st.sets(st.integers(0, 6), min_size=2, max_size=2),
    attack=st.sampled_from([1e3, -1e6, 1e12]),
    rule=st.sampled_from(ROBUST),
)
def test_two_of_seven_move_a_robust_rule_no_further_than_the_honest_and_a_mean_anywhere(
    changes: NDArray[np.float64], places: set[int], attack: float, rule: Rule
) -> None:
    attacked = changes.copy()
    attacked[sorted(places)] = attack
    honest = np.delete(changes, sorted(places), axis=0)
    found = change_of(updates_of(attacked), rule)
    assert (found >= honest.min(axis=0) - 1e-5).all()
    assert (found <= honest.max(axis=0) + 1e-5).all()
    assert np.abs(change_of(updates_of(attacked), WeightedMean())).max() > 200


@pytest.mark.parametrize("rule", [CoordinateMedian(2), TrimmedMean(2), Krum(2), MultiKrum(2)])
def test_beyond_the_breakdown_point_the_attackers_win(rule: Rule) -> None:
    """Four of seven that agree are the majority: the conditions are not merely cautious."""
    changes = np.random.default_rng(0).normal(size=(7, 3))
    changes[:4] = 1e3
    assert np.abs(change_of(updates_of(changes), rule)).max() > 100
