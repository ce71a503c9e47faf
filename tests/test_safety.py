"""Every action that leaves is finite, within the limits and rate-limited, whatever the network outputs."""

import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nanochat.safety import SafeActions, hold_last


class Stubborn:
    def __float__(self):
        raise RuntimeError("not a number")


LOW, HIGH = np.array([-1.0, -0.1, 0.3]), np.array([1.0, 0.7, 0.3])
ANYTHING = st.one_of(
    hnp.arrays(np.float64, 3, elements=st.floats(allow_nan=True, allow_infinity=True)),
    hnp.arrays(np.float32, 3, elements=st.floats(width=32)),
    hnp.arrays(np.float64, hnp.array_shapes(max_dims=3, max_side=4)),
    st.none(), st.text(max_size=3), st.lists(st.one_of(st.none(), st.floats(), st.text(max_size=2)), max_size=4),
    st.just(np.array([object(), 1, 2], dtype=object)), st.just(np.array([Stubborn()] * 3)), st.just([10**400, 0, 0]),
)  # fmt: skip


@given(st.lists(ANYTHING, min_size=1, max_size=6))
def test_anything_becomes_a_safe_action(actions):
    safe = SafeActions(LOW, HIGH)
    for action in actions:
        out = safe(action)
        assert out.shape == (3,) and out.dtype == np.float32 and np.isfinite(out).all()
        assert (out.astype(np.float64) >= LOW - 1e-7).all() and (out.astype(np.float64) <= HIGH + 1e-7).all()


@given(st.lists(ANYTHING, min_size=2, max_size=8), st.floats(1e-3, 0.5))
def test_no_step_is_larger_than_allowed(actions, most):
    safe = SafeActions(LOW, HIGH, max_change=most)
    sent = np.array([safe(action) for action in actions], np.float64)
    assert (np.abs(np.diff(sent, axis=0)) <= most + 1e-6).all()


@given(hnp.arrays(np.float64, 3, elements=st.floats(-1, 1)))
def test_a_safe_action_is_not_changed(action):
    action = np.clip(action, LOW, HIGH)
    safe = SafeActions(LOW, HIGH, max_change=3.0)
    np.testing.assert_allclose(safe(action), action, atol=1e-6)
    assert not safe.counts.total()


def test_limits_hold_after_rounding_to_float32():
    safe = SafeActions([-0.1], [0.3])  # the nearest float32 of each limit exceeds it
    assert float(safe([-5.0])[0]) >= -0.1 and float(safe([5.0])[0]) <= 0.3


@pytest.mark.parametrize(
    "action, reason",
    [
        ([np.nan, 0, 0], "not finite"),
        ([0, np.inf, 0], "not finite"),
        ([0, 0], "wrong shape"),
        (None, "wrong shape"),
        ("up", "not numeric"),
        (["1", "1", "1"], "not numeric"),
        ([10**400, 0, 0], "not numeric"),
        (np.array([1j, 1, 1]), "not numeric"),
        (np.array([1, 1, 1], "M8[s]"), "not numeric"),
        (np.array([Stubborn()] * 3), "not numeric"),
        (torch.ones(3, requires_grad=True), "not numeric"),
    ],
)
def test_an_unusable_action_is_replaced_and_counted(action, reason, caplog):
    safe = SafeActions([-1] * 3, [1] * 3, hold=[0, 0, np.nan])
    safe([0.5, 0.5, 0.9])
    with caplog.at_level(logging.WARNING):
        held = safe(action if action is not None else np.zeros((2, 3)))
    np.testing.assert_allclose(held, [0, 0, 0.9], atol=1e-6)  # no motion, and the gripper keeps its value
    assert safe.counts == {reason: 1}
    assert reason in caplog.text


def test_few_log_lines_for_many_unusable_actions(caplog):
    safe = SafeActions([-1], [1])
    with caplog.at_level(logging.WARNING):
        for _ in range(999):
            safe([np.nan])
    assert safe.counts["not finite"] == 999 and len(caplog.records) == 3


def test_each_dimension_has_its_own_rate():
    safe = SafeActions([-1, -1], [1, 1], max_change=[0.1, 0.5])
    sent = [safe(action) for action in ([0, 0], [1, 1], [1, 1], [-1, -1], [0.05, 0.5])]
    np.testing.assert_allclose(sent, [[0, 0], [0.1, 0.5], [0.2, 1], [0.1, 0.5], [0.05, 0.5]], atol=1e-6)
    assert safe.counts == {"rate limited": 3}


def test_the_rate_is_measured_from_the_value_that_was_sent():
    safe = SafeActions([-1], [1], max_change=0.1)
    sent = [safe(action)[0] for action in ([5], [-5], [-5], [5], [5], [5])]  # 5 was sent as 1
    np.testing.assert_allclose(sent, [1, 0.9, 0.8, 0.9, 1, 1], atol=1e-6)


def test_limits_are_copied():
    low = np.array([-1.0])
    safe = SafeActions(low, [1])
    low[:] = -9
    assert safe([-5]) == -1


@pytest.mark.parametrize("age", [None, 0.3, float("nan"), -1.0])
def test_the_action_of_a_stale_observation_is_replaced(age):
    safe = SafeActions([-1], [1], max_age_s=0.2)
    assert safe([0.8], age_s=age) == 0 and safe.counts == {"stale observation": 1}
    assert safe([0.8], age_s=0.1)[0] == pytest.approx(0.8)


@pytest.mark.parametrize(
    "settings",
    [
        dict(low=[1], high=[0]),
        dict(low=[0, 0], high=[1]),
        dict(low=[-np.inf], high=[1]),
        dict(low=[np.nan], high=[1]),
        dict(low=[0], high=[1], hold=[0, 0]),
        dict(low=[0], high=[1], hold=[np.inf]),
        dict(low=[0], high=[1], max_change=0),
        dict(low=[0], high=[1], max_change=[0.1, 0.1]),
        dict(low=[0], high=[1], max_age_s=-1),
    ],
)
def test_invalid_limits_are_refused(settings):
    with pytest.raises(ValueError, match="must"):
        SafeActions(**settings)


def test_from_a_start_outside_of_the_limits_it_returns_at_the_allowed_rate_and_holds_where_it_is():
    limits = SafeActions([0.0, 0.0], [2.0, 2.0], hold_last(2), max_change=0.5, start=[3.2, -0.8])
    sent = [limits(action) for action in ([1.0, 1.0], [np.nan, 1.0], [1.0, 1.0], [1.0, 1.0], [9.0, -9.0])]
    expected = [[2.7, -0.3], [2.7, -0.3], [2.2, 0.2], [1.7, 0.7], [2.0, 0.2]]
    np.testing.assert_allclose(sent, np.array(expected), atol=1e-6)
    without_rate = SafeActions([0.0], [2.0], start=[3.2])
    assert without_rate([2.5]) == [2.0]


def test_an_absolute_robot_that_starts_with_nan_stays_where_it_is():
    limits = SafeActions([0.0, 0.0], [2.0, 2.0], hold_last(2), max_change=0.1, start=[1.5, 0.5])
    np.testing.assert_allclose(limits([np.nan, 1.0]), [1.5, 0.5])
    np.testing.assert_allclose(limits([2.0, 0.5]), [1.6, 0.5])
    for wrong in ([1.0], [np.nan, 1.0]):
        with pytest.raises(ValueError, match="start must have 2 finite numbers"):
            SafeActions([0.0, 0.0], [2.0, 2.0], start=wrong)
