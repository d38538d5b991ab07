"""A fleet over a request trace, without the fleet: the real decisions on a virtual clock."""

from keepwarm.simulate.report import Outcome, Spread, oracle_hit_rate
from keepwarm.simulate.trace import Request, Trace, read_trace
from keepwarm.simulate.world import POLICIES, Hardware, Policy, simulate

__all__ = [
    "POLICIES",
    "Hardware",
    "Outcome",
    "Policy",
    "Request",
    "Spread",
    "Trace",
    "oracle_hit_rate",
    "read_trace",
    "simulate",
]
