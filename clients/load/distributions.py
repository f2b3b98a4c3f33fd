"""Lengths and times that are drawn: constant, uniform or lognormal."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

from ponderttt.errors import InvalidRequestError

Kind = Literal["constant", "uniform", "lognormal"]

_FORMS = "give VALUE, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA[:MOST]"
# Of a lognormal distribution without a bound of its own: one draw in 30,000 lies above.
_SIGMAS = 4.0


@dataclass(frozen=True, slots=True)
class Distribution:
    """Positive numbers.

    Args:
        kind: constant, uniform or lognormal.
        first: the value, the lower bound, or the median.
        second: -, the upper bound, or the standard deviation of the logarithm.
        most: no draw is higher.
    """

    kind: Kind
    first: float
    second: float
    most: float

    def draw(self, generator: random.Random) -> float:
        """One number."""
        match self.kind:
            case "constant":
                return self.first
            case "uniform":
                return generator.uniform(self.first, self.second)
            case "lognormal":
                value = self.first * math.exp(self.second * generator.gauss(0.0, 1.0))
                return min(value, self.most)

    def __str__(self) -> str:
        match self.kind:
            case "constant":
                return f"{self.first:g}"
            case "uniform":
                return f"uniform:{self.first:g}:{self.second:g}"
            case "lognormal":
                return f"lognormal:{self.first:g}:{self.second:g}:{self.most:g}"


def parse_distribution(text: str, param: str, least: float, most: float) -> Distribution:
    """From its form on the command line; `str` of the result gives it back.

    Args:
        text: `64`, `constant:64`, `uniform:32:256`, `lognormal:128:0.6` or `lognormal:128:0.6:512`.
        param: the option, for messages.
        least, most: bounds of what may be drawn.
    Raises:
        InvalidRequestError: another form, or a value out of bounds.
    """
    kind, *rest = text.split(":") if ":" in text else ("constant", text)
    try:
        values = [float(value) for value in rest]
    except ValueError:
        values = []
    # nan fails every comparison, infinity the bounds.
    match kind, values:
        case "constant", [value]:
            made = Distribution("constant", value, value, value)
        case "uniform", [low, high] if low <= high:
            made = Distribution("uniform", low, high, high)
        case "lognormal", [median, sigma, *cap] if (
            len(cap) <= 1 and median > 0 and 0 <= sigma <= 5 and (not cap or cap[0] >= median)
        ):
            bound = cap[0] if cap else min(median * math.exp(_SIGMAS * sigma), most)
            made = Distribution("lognormal", median, sigma, bound)
        case _:
            raise InvalidRequestError(param, f"{text!r} is no distribution; {_FORMS}")
    if not (least <= made.first <= most and least <= made.most <= most):
        raise InvalidRequestError(param, f"{text!r} goes beyond {least:g} to {most:g}; {_FORMS}")
    return made
