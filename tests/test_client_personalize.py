"""The private output layer: closed form against an obvious solver, and what a device without records gets."""

import numpy as np
import pytest

from client.personal.personalize import PERSONAL_METHODS, fit_ridge
from shared.config import PersonalConfig

MEAN = np.array([0.5, -0.2, 0.1])


def test_the_dual_form_is_the_primal_ridge():
    draw = np.random.default_rng(0)
    features, residuals = draw.normal(size=(7, 3)), draw.normal(size=7)
    personal = PersonalConfig(ridge=2.0, bias_shrinkage=3.0)
    found = fit_ridge(features, residuals, mean=MEAN, personal=personal)
    level = residuals.sum() / (7 + 3.0)
    centred = features - MEAN
    weight = np.linalg.solve(centred.T @ centred + 2.0 * np.eye(3), centred.T @ (residuals - level))
    np.testing.assert_allclose(found.weight, weight)
    np.testing.assert_allclose(found.predict(features, np.zeros(7)), level + centred @ weight)


def test_many_records_of_one_taste_are_believed_and_few_are_not():
    features = np.tile(MEAN, (100, 1))
    personal = PersonalConfig(bias_shrinkage=10.0)
    assert fit_ridge(features, np.ones(100), mean=MEAN, personal=personal).predict(
        MEAN[None], np.array([3.0])
    ) == pytest.approx(3 + 100 / 110)
    assert fit_ridge(features[:1], np.ones(1), mean=MEAN, personal=personal).predict(
        MEAN[None], np.array([3.0])
    ) == pytest.approx(3 + 1 / 11)


@pytest.mark.parametrize("method", [name for name, method in PERSONAL_METHODS.items() if method.closed])
def test_a_device_without_records_predicts_what_the_shared_part_does(method):
    fitted = PERSONAL_METHODS[method](np.zeros((0, 3)), np.zeros(0), mean=MEAN, personal=PersonalConfig())
    assert fitted.predict(np.ones((1, 3)), np.array([2.5])).tolist() == [2.5]
