"""What each tier would cost a request now, by what is in slots, in the store, and nowhere."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from keepwarm.core.rates import Rates
from keepwarm.deployment.prefixes import Prefixes

ROW_BYTES = 23_040
SIZES = {"minimal": 241, "standard": 2083, "full": 3633}


def prefixes(*, held: tuple[str, ...], stored: tuple[str, ...], slots: int = 2) -> Prefixes:
    """A deployment's prefixes with these tiers in slots and in the store."""
    digests = {name: name.encode() for name in SIZES}
    contents: list[Any] = [SimpleNamespace(marks={digests[name]: 0}) for name in held]
    contents += [None] * (slots - len(held))

    def lookup(wanted: list[bytes], *, namespace: str) -> Any:
        name = wanted[0].decode()
        if name not in stored:
            return None
        size = SIZES[name] * ROW_BYTES
        return SimpleNamespace(restore_bytes=size, is_ready=True, at_tokens=SIZES[name])

    scheduler = SimpleNamespace(slots=[SimpleNamespace(content=each) for each in contents])
    deployment: Any = SimpleNamespace(
        dispatcher=SimpleNamespace(rates=Rates(), scheduler=scheduler),
        store=SimpleNamespace(lookup=lookup),
        machine=SimpleNamespace(row_bytes=ROW_BYTES),
    )
    made = Prefixes(deployment, leaves=False, on_progress=None)
    made.kept = [
        SimpleNamespace(name=f"tier:{name}", digest=digests[name], tokens=range(size))  # type: ignore[misc]
        for name, size in SIZES.items()
    ]
    return made


def test_what_is_in_a_slot_costs_its_task_alone_and_what_is_nowhere_its_prefill() -> None:
    minimal, standard, full = prefixes(held=("full",), stored=("standard",)).costs()
    rates = Rates()
    assert (minimal.tier, standard.tier, full.tier) == tuple(SIZES)
    assert full.first_s < standard.first_s < minimal.first_s
    assert minimal.first_s - full.first_s == pytest.approx(rates.prefill_s(241))
    assert standard.first_s - full.first_s == pytest.approx(
        rates.restore_s(2083 * ROW_BYTES, ready=True)
    )


def test_a_token_costs_more_behind_a_larger_tier_by_what_was_measured() -> None:
    warm = prefixes(held=("minimal", "standard"), stored=("full",))
    at = [cost.token_s for cost in warm.costs()]
    assert at == sorted(at)
    assert at[0] < at[2]
    rates = warm._deployment.dispatcher.rates
    rates.decode_cost.observe(context_tokens=300, tokens=100, seconds=0.4)
    assert warm.costs()[0].token_s == pytest.approx(0.004, rel=0.01)


def test_rows_displace_nothing_while_a_slot_is_empty() -> None:
    free = prefixes(held=("minimal",), stored=("standard", "full"), slots=2).costs()
    taken = prefixes(held=("minimal", "full"), stored=("standard", "full"), slots=2).costs()
    assert [cost.displaced_s for cost in free] == [0.0, 0.0, 0.0]
    at = [cost.displaced_s for cost in taken]
    assert 0.0 < at[0] < at[1] < at[2]
