"""What things cost here, learned while running."""

from __future__ import annotations

import pytest

from keepwarm.core.rates import Mean, Rates


def test_the_first_observation_replaces_the_prior_at_once() -> None:
    mean = Mean(5.0)
    mean.learn(1.0)
    assert mean.value == 1.0


def test_nine_tenths_of_the_past_are_forgotten_in_about_ten_observations() -> None:
    mean = Mean(0.0)
    mean.learn(1.0)
    for _ in range(11):
        mean.learn(0.0)
    assert mean.value < 0.1


def test_a_short_prefill_teaches_nothing_of_long_ones() -> None:
    rates = Rates()
    before = rates.prefill_s_per_token.value
    for tokens in (1, 5, 40, 100):
        rates.observe_prefill(tokens=tokens, seconds=3.0)
    rates.observe_prefill(tokens=500, seconds=0.0)
    assert rates.prefill_s_per_token.value == before
    rates = Rates()
    rates.observe_prefill(tokens=500, seconds=1.0)
    assert rates.prefill_s(1000) == pytest.approx(2.0)


def test_the_first_tokens_of_a_prefill_cost_what_short_ones_did() -> None:
    rates = Rates()
    rates.observe_prefill(tokens=1000, seconds=4.0)
    assert rates.prefill_s(20) == pytest.approx(0.08)
    rates.observe_prefill(tokens=20, seconds=0.2)
    assert rates.prefill_s(30) == pytest.approx(0.3)
    assert rates.prefill_s(64 + 1000) == pytest.approx(0.64 + 4.0)


def test_a_small_file_teaches_nothing_of_the_bandwidth() -> None:
    rates = Rates()
    before = rates.restore_s_per_byte.value
    rates.observe_bytes(rates.restore_s_per_byte, size_bytes=1000, seconds=1.0)
    assert rates.restore_s_per_byte.value == before
    rates.observe_bytes(rates.restore_s_per_byte, size_bytes=100_000_000, seconds=0.052)
    assert rates.restore_s(100_000_000, ready=True) == pytest.approx(0.052)


def test_a_file_that_must_be_assembled_costs_more_than_a_ready_one() -> None:
    rates = Rates()
    assert rates.restore_s(10_000_000, ready=False) > rates.restore_s(10_000_000, ready=True)


def test_an_empty_save_still_costs_a_round_trip() -> None:
    assert Rates().save_s(0) > 0
    assert Rates().prefill_s(-3) == 0
