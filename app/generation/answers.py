"""What a model answers: one forecast, or a mean and samples."""

from functools import partial

from torch import nn

from tubelet.generation.forecasts import Forecast
from tubelet.generation.latent_video import LatentVideoModel


def point_forecast(model: nn.Module) -> Forecast:
    """Return the forecast whose error is measured: the mean where the model has one, else its answer or first draw."""
    return partial(model, draw=None if isinstance(model, LatentVideoModel) else 0)


def measured_forecasts(model: nn.Module) -> dict[str, Forecast]:
    """Return the point forecast as `model`, and beside a mean also a `sample`."""
    forecasts = {"model": point_forecast(model)}
    if isinstance(model, LatentVideoModel) and model.is_stochastic:
        forecasts["sample"] = partial(model, draw=0)
    return forecasts


def shown_forecasts(model: nn.Module, draws: int) -> dict[str, Forecast]:
    """Return the forecasts of the pictures by title."""
    if not model.is_stochastic:
        return {"prediction": point_forecast(model)}
    mean = {"mean": point_forecast(model)} if isinstance(model, LatentVideoModel) else {}
    return mean | {f"draw {draw + 1}": partial(model, draw=draw) for draw in range(draws)}
