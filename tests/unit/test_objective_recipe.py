from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, get_args

import pydantic
import pytest

from tuner import training
from tuner.data.noise import Draws
from tuner.objective import Loss, Objective, ObjectiveError, Options
from tuner.weighting import HuberSchedule, Shape, Weighting

STABLE_DIFFUSION: dict[str, Any] = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
}
PREDICTIONS = ("epsilon", "v_prediction")


def test_names_of_the_recipe_are_those_of_the_options() -> None:
    recipe, own = training.Objective.model_fields, {field.name: field for field in fields(Options)}
    draws = {field.name: field for field in fields(Draws)}
    assert set(recipe) == set(own) | set(draws) and not set(own) & set(draws) and len(own) == 14
    for name, literal in {
        "weighting": Weighting,
        "loss": Loss,
        "huber_schedule": HuberSchedule,
        "timestep_shape": Shape,
    }.items():
        assert get_args(recipe[name].annotation) == get_args(literal)
    assert get_args(recipe["prediction"].annotation) == ("auto", *PREDICTIONS)
    plain = training.Objective()
    assert Options(**plain.options()) == Options() and Draws(**plain.draws()) == Draws()


@pytest.mark.parametrize(
    "options",
    [
        {"prediction": "sample"},
        {"weighting": "p3"},
        {"loss": "l2"},
        {"huber_schedule": "linear"},
        {"timestep_shape": "beta"},
        {"snr_gamma": 0.0},
        {"p2_gamma": -1.0},
        {"p2_k": 0.0},
        {"huber_delta": -1.0},
        {"huber_delta": math.inf},
        {"logit_std": 0.0},
        {"logit_mean": math.nan},
        {"mode_scale": -1.1},
        {"mode_scale": 1.76},
        {"weighting": "as_epsilon"},
        {"weighting": "as_v", "prediction": "v_prediction"},
        {"zero_terminal_snr": True},
    ],
    ids=str,
)
def test_impossible_options_are_errors(options: dict[str, Any]) -> None:
    with pytest.raises(ObjectiveError):
        Options(**options)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"snr_gamma": 5.0},
            "snr_gamma: has no effect: it belongs to weighting min_snr or soft",
        ),
        ({"weighting": "p2", "snr_gamma": 5.0}, "snr_gamma: has no effect"),
        ({"p2_gamma": 1.0}, "p2_gamma: has no effect"),
        ({"weighting": "min_snr", "p2_k": 1.0}, "p2_k: has no effect"),
        (
            {"loss": "l1", "huber_delta": 1.0},
            "huber_delta: has no effect: it belongs to loss huber or",
        ),
        ({"huber_schedule": "snr"}, "huber_schedule: has no effect"),
        ({"logit_mean": 0.0}, "logit_mean: has no effect"),
        ({"timestep_shape": "mode", "logit_std": 1.0}, "logit_std: has no effect"),
        ({"mode_scale": 1.0}, "mode_scale: has no effect"),
        (
            {"pyramid_levels": 3},
            "pyramid_levels: has no effect: it belongs to pyramid_noise, and",
        ),
        (
            {"zero_terminal_snr": True, "prediction": "epsilon"},
            "zero_terminal_snr: needs prediction v",
        ),
        ({"weighting": "as_v", "prediction": "v_prediction"}, "weighting: found as_v, which has no effect"),
        (
            {"weighting": "as_epsilon", "prediction": "epsilon"},
            "weighting: found as_epsilon, which has no",
        ),
        ({"timesteps": [5, 5]}, r"timesteps: found \[5, 5\]"),
    ],
    ids=str,
)
def test_keys_of_the_recipe_that_do_not_go_together(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(pydantic.ValidationError, match=message):
        training.Objective(**keys)


@pytest.mark.parametrize(
    "keys",
    [
        {"weighting": "soft_min_snr", "snr_gamma": 4.0, "zero_terminal_snr": True},
        {"weighting": "p2", "p2_gamma": 0.5, "p2_k": 2.0, "loss": "smooth_l1", "huber_schedule": "snr"},
        {"timestep_shape": "logit_normal", "logit_mean": 0.5, "logit_std": 2.0, "timesteps": [0, 999]},
        {"timestep_shape": "mode", "mode_scale": -1.0, "loss": "huber", "huber_delta": 1.0},
    ],
    ids=str,
)
def test_the_recipes_choice_reaches_the_objective(keys: dict[str, Any]) -> None:
    chosen = training.Objective(**keys).options()
    options = Objective.from_scheduler_config({"prediction_type": "v_prediction"}, **chosen).options
    assert options.prediction == "v_prediction" and len(keys) >= 3
    for key, value in keys.items():
        assert getattr(options, key) == (tuple(value) if isinstance(value, list) else value)


def test_an_impossible_prediction_of_the_base_is_an_error_too() -> None:
    # The recipe says auto, so only here it is known what the base predicts.
    chosen = training.Objective(zero_terminal_snr=True).options()
    with pytest.raises(ObjectiveError, match="needs prediction v_prediction"):
        Objective.from_scheduler_config(STABLE_DIFFUSION, **chosen)
