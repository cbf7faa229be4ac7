"""Pair metrics on cases worked out by hand."""

import numpy as np
import pytest

from gram_engine.metrics import pair_metrics, reward_of_first


def test_consistent_right_verdicts():
    found = pair_metrics([7, 7, 9, 9], [0, 1, 0, 1], [2.0, -2.0, -1.0, 1.0], [1, 0, 0, 1])
    assert (found["accuracy"], found["accuracy_single"], found["swap_consistency"]) == (1, 1, 1)
    assert found["prefers_a"] == 0.5 and found["margin"] == 1.5 and found["pairs"] == 2


def test_always_a_is_half_right_and_never_consistent():
    found = pair_metrics([0, 0, 1, 1], [0, 1, 0, 1], [3.0] * 4, [1, 0, 0, 1])
    assert (found["accuracy_single"], found["swap_consistency"], found["prefers_a"]) == (0.5, 0, 1)
    assert found["accuracy"] == 0.5, "the two orders cancel: an even reward counts half"


def test_reward_weighs_both_orders():
    # As given weakly wrong, swapped strongly right: Eq. 3 is right.
    found = pair_metrics([0, 0], [0, 1], [-0.5, -4.0], [1, 0])
    assert found["accuracy"] == 1 and found["swap_consistency"] == 0 and found["accuracy_single"] == 0.5


def test_rewards_of_the_two_responses_add_up_to_one():
    margins, swapped = np.array([3.0, -800.0]), np.array([1.0, 800.0])
    total = reward_of_first(margins, swapped) + reward_of_first(swapped, margins)
    assert total == pytest.approx([1, 1])


def test_ties_and_lone_orders_do_not_count_towards_accuracy():
    found = pair_metrics([0, 0, 1], [0, 1, 0], [1.0, -1.0, 2.0], [0.5, 0.5, 1])
    assert (found["ties"], found["pairs"], found["accuracy_single"]) == (1, 0, 1)
    assert np.isnan(found["accuracy"])


def test_unlabelled_pairs_count_towards_consistency_alone():
    found = pair_metrics([0, 0, 1, 1], [0, 1, 0, 1], [1.0, -1.0, 2.0, 2.0], [1, 0, np.nan, np.nan])
    assert (found["accuracy"], found["accuracy_single"], found["margin"]) == (1, 1, 1)
    assert (found["pairs"], found["ties"], found["swap_consistency"]) == (1, 0, 0.5)
