"""Scales and bins of actions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nanochat.actions import N_BINS, Scale

VALUES = hnp.arrays(np.float32, (12, 3), elements=st.floats(-1e3, 1e3, width=32))


@given(VALUES)
def test_scale_restores_what_it_normalized(values):
    scale = Scale.fit(values)
    np.testing.assert_allclose(scale.restore(scale.normalize(values)), values, rtol=1e-4, atol=1e-3)


@given(VALUES)
def test_bins_are_as_fine_as_promised(values):
    scale = Scale.fit(values)
    bins = scale.to_bins(values)
    assert bins.min() >= 0 and bins.max() < N_BINS
    inside = np.clip(values, scale.center - scale.half, scale.center + scale.half)
    # half a bin, and what float32 loses on the way
    assert (np.abs(scale.from_bins(bins) - inside) <= scale.half / N_BINS + 1e-5 * np.abs(values).max() + 1e-6).all()
    np.testing.assert_array_equal(scale.to_bins(scale.from_bins(bins)), bins)


def test_percentiles_are_minus_one_and_one():
    values = np.random.default_rng(0).normal(3, 2, (5000, 1))
    low, high = np.quantile(values, (0.01, 0.99))
    np.testing.assert_allclose(Scale.fit(values).normalize(np.array([[low], [high]])), [[-1], [1]], atol=1e-5)


def test_a_dimension_that_hardly_moves_does_not_explode():
    rng = np.random.default_rng(0)
    values = np.stack([rng.normal(0, 1, 500), 0.7 + rng.normal(0, 1e-7, 500), np.full(500, 2.0)], 1)
    normalized = Scale.fit(values).normalize(values)
    assert np.abs(normalized[:, 1:]).max() < 1e-3
    assert np.abs(normalized[:, 0]).max() > 0.9


@pytest.mark.parametrize("values", [np.zeros((0, 2)), np.array([[np.nan]]), np.zeros(3)])
def test_scale_of_nothing_is_refused(values):
    with pytest.raises(ValueError, match="finite"):
        Scale.fit(values)


def test_scale_of_a_strangers_config_is_checked():
    with pytest.raises(ValueError, match="finite lists"):
        Scale([0.0, float("nan")], [1.0, 1.0])
    with pytest.raises(ValueError, match="below"):
        Scale([1.0], [0.0])
