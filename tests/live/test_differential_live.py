"""The law: Keepwarm evaluates no more prompt tokens than the bare engine, whatever is asked."""

from __future__ import annotations

import pytest

from differential import Place, compared, row

# Long runs with other seeds: `make soak-series`.
SEED = 20
SERIES = 2
# Both templates on each would take half as long again; the long run has all five.
PAIRS = [("P", "thinking"), ("P", "late"), ("H", "thinking"), ("W", "late")]

pytestmark = pytest.mark.live


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("series"))


@pytest.mark.parametrize(("kind", "template"), PAIRS)
def test_no_series_costs_more_than_on_the_bare_engine(
    place: Place, kind: str, template: str
) -> None:
    verdicts = list(compared(place, kind, template, SERIES, SEED))
    failed = [verdict for verdict in verdicts if verdict.troubles]
    told = [f"{row(one)}\n{one.written}\n" + "\n".join(one.requests()) for one in failed]
    assert not failed, "\n".join(told)
