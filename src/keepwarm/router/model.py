"""The learned scores: logistic regressions over named features, in plain Python.

A model is a list of (feature, weight) with an intercept, already folded with the scaling it was
learned with, for some scores the weights of single words and pairs (grams), and a Platt pair
(slope, offset) that calibrates its logit. Scoring one costs a few ten microseconds, and every
contribution can be shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from keepwarm.errors import ConfigError
from keepwarm.router.catalog import WordWeights

FORMAT: Final = 2
#: The scores a weights file holds.
SCORES: Final = ("tools_offered", "tools_open", "context", "depth")


def sigmoid(logit: float) -> float:
    """The probability of a logit, without overflow."""
    if logit >= 0:
        return 1.0 / (1.0 + math.exp(-min(logit, 60.0)))
    power = math.exp(max(logit, -60.0))
    return power / (1.0 + power)


@dataclass(frozen=True, slots=True)
class Platt:
    """A calibration: logit -> slope * logit + offset. (1, 0) changes nothing."""

    slope: float = 1.0
    offset: float = 0.0

    def apply(self, logit: float) -> float:
        """The calibrated logit."""
        return self.slope * logit + self.offset


@dataclass(frozen=True, slots=True)
class LinearScore:
    """One logistic regression. `centers` are the features' means: a contribution is told against
    them, so that what is usual contributes nothing."""

    name: str
    intercept: float
    weights: Mapping[str, float]
    centers: Mapping[str, float]
    platt: Platt = Platt()
    grams: Mapping[str, float] = field(default_factory=dict)

    def logit(
        self, values: Mapping[str, float], grams: Iterable[str] = (), share: float = 1.0
    ) -> float:
        """The calibrated logit of a request's features and grams, each of which counts `share`.

        What is absent, or unknown, counts as 0.
        """
        get = values.get
        raw = self.intercept
        for feature, weight in self.weights.items():
            value = get(feature)
            if value:
                raw += weight * value
        if self.grams:
            known = self.grams.get
            raw += share * sum(known(gram, 0.0) for gram in grams)
        return self.platt.apply(raw)

    def contributions(
        self, values: Mapping[str, float], grams: Iterable[str] = (), share: float = 1.0
    ) -> list[tuple[str, float, float]]:
        """(feature, value, logits against the usual value), largest effect first."""
        slope = self.platt.slope
        told = [
            (name, value, slope * weight * (value - self.centers.get(name, 0.0)))
            for name, weight in self.weights.items()
            for value in (values.get(name, 0.0),)
        ]
        told += [
            (f"'{gram}'", 1.0, slope * share * self.grams[gram])
            for gram in grams
            if gram in self.grams
        ]
        return sorted(told, key=lambda each: -abs(each[2]))


@dataclass(frozen=True, slots=True)
class Weights:
    """All that was learned: word weights and the four scores."""

    words: WordWeights
    scores: Mapping[str, LinearScore]
    trained_on: str = ""


def weights_from_json(data: Any) -> Weights:
    """Weights out of a decoded JSON document.

    Raises:
        ConfigError: it isn't a weights file of this format; nothing was changed.
    """
    try:
        if data["format"] != FORMAT:
            raise ConfigError(
                f"The router's weights have format {data['format']!r}; this version reads {FORMAT}."
                " Learn them again with scripts/learn_router.py."
            )
        scores = {
            name: LinearScore(
                name=name,
                intercept=float(data["scores"][name]["intercept"]),
                weights={k: float(v[0]) for k, v in data["scores"][name]["features"].items()},
                centers={k: float(v[1]) for k, v in data["scores"][name]["features"].items()},
                platt=Platt(*map(float, data["scores"][name]["platt"])),
                grams={str(k): float(v) for k, v in data["scores"][name]["grams"].items()},
            )
            for name in SCORES
        }
        words = WordWeights({str(k): float(v) for k, v in data["words"].items()})
        return Weights(words=words, scores=scores, trained_on=str(data.get("trained_on", "")))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"The router's weights can't be read ({error!r})."
            " Learn them again with scripts/learn_router.py."
        ) from error


def weights_to_json(weights: Weights) -> dict[str, Any]:
    """Weights as a JSON document, rounded so that a retraining gives a readable difference."""
    return {
        "format": FORMAT,
        "trained_on": weights.trained_on,
        "scores": {
            name: {
                "intercept": round(score.intercept, 4),
                "platt": [round(score.platt.slope, 4), round(score.platt.offset, 4)],
                "features": {
                    feature: [round(weight, 4), round(score.centers.get(feature, 0.0), 4)]
                    for feature, weight in score.weights.items()
                },
                "grams": {gram: round(weight, 2) for gram, weight in sorted(score.grams.items())},
            }
            for name, score in weights.scores.items()
        },
        "words": {word: round(weight, 2) for word, weight in sorted(weights.words.listed.items())},
    }
