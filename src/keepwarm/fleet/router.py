"""The router inside Ray Serve: each request to the node that `routing.Fleet` ranks first.

Needs Ray. Serve makes one router for each process that holds a handle (here: each front), tells it
which replicas there are, and passes on what they report (`record_routing_stats`) with its own
updates. If all that is lost, the router begins with nothing and routes by load.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import msgspec
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from keepwarm.fleet import status
from keepwarm.fleet.costs import NodeCosts
from keepwarm.fleet.routing import Choice, Fleet, Want, preferring
from keepwarm.fleet.wire import TOKENS_PER_CHAR, Ask, NodeNote

log = logging.getLogger("keepwarm.fleet")

# Of a node that hasn't reported yet: a slow CPU's, so that it is tried, and not preferred.
_UNKNOWN = NodeCosts(
    prefill_s=0.005,
    restore_s=2e-5,
    restore_call_s=0.002,
    fetch_s=0.0,
    fetch_call_s=0.0,
    can_fetch=False,
)


class WarmRouter(RequestRouter):  # type: ignore[misc] # Ray isn't typed
    """See the module."""

    def initialize_state(self, **_: Any) -> None:
        """Begin with nothing."""
        self.fleet = Fleet()
        self.told: dict[str, NodeNote] = {}
        self.heard_s: dict[str, float] = {}
        self._reports: dict[str, bytes] = {}
        self._tokens_per_char = TOKENS_PER_CHAR
        self._chosen: dict[int, tuple[Want, str, dict[str, Choice]]] = {}
        status.ROUTERS.add(self)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take in which replicas there are and what they told."""
        super().update_replicas(replicas)
        now_s = time.time()
        here = {str(replica.replica_id.unique_id): replica for replica in replicas}
        for name in set(self.fleet.nodes) - here.keys():
            self._forget(name)
        for name, replica in here.items():
            self.fleet.join(name, _UNKNOWN, now_s=now_s)
            report = (replica.routing_stats or {}).get("keepwarm")
            if isinstance(report, bytes) and report != self._reports.get(name):
                self._reports[name] = report
                self._hear(name, report, now_s)

    def _hear(self, name: str, report: bytes, now_s: float) -> None:
        try:
            told = msgspec.msgpack.decode(report, type=NodeNote)
            self.fleet.report(name, told.report(), now_s=now_s)
        except (msgspec.MsgspecError, ValueError) as error:
            log.warning("a node's report can't be read: %s", error)
            return
        self.told[name], self.heard_s[name] = told, now_s
        self._tokens_per_char = told.tokens_per_char

    def _forget(self, name: str) -> None:
        self.fleet.leave(name)
        for known in (self.told, self.heard_s, self._reports):
            known.pop(name, None)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """A node is gone, and its warmth with it."""
        super().on_replica_actor_died(replica_id)
        self._forget(str(replica_id.unique_id))

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """All candidates, one a rank, best first."""
        replicas = {str(r.replica_id.unique_id): r for r in candidate_replicas}
        ask = self._ask(pending_request)
        want = ask.want(self._tokens_per_char) if ask else Want((), (), 1)
        ranked = self.fleet.rank(want, now_s=time.time(), among=replicas)
        if ask and ask.node:
            ranked = preferring(ranked, self._named(ask.node))
        if pending_request is not None and ranked:
            given = self._given_to(pending_request, want)
            if given is None:
                # Given at once, not when it is routed: of several that come in the same moment each
                # must see what the others were given.
                given = ranked[0].node
                if want.prefixes:
                    self.fleet.give(want, ranked[0], now_s=time.time())
            self._chosen[id(pending_request)] = want, given, {c.node: c for c in ranked}
            if len(self._chosen) > 4096:  # what was never routed: its client has gone
                del self._chosen[next(iter(self._chosen))]
        known = [[replicas[choice.node]] for choice in ranked]
        return known or [list(candidate_replicas)]

    def _given_to(self, pending: PendingRequest, want: Want) -> str | None:
        """The node that a request which is tried again was given to at first.

        One that went away unrouted leaves its entry behind, and another may get its id: that wants
        something else.
        """
        known, given, _ = self._chosen.get(id(pending), (None, "", {}))
        return given if known == want else None

    @staticmethod
    def _ask(pending: PendingRequest | None) -> Ask | None:
        values = (*pending.args, *pending.kwargs.values()) if pending else ()
        return next((value for value in values if isinstance(value, Ask)), None)

    def _named(self, node: str) -> str | None:
        """The replica of a name: the fleet's own, or one that a single node calls itself."""
        if node in self.fleet.nodes:
            return node
        called = [r for r, told in self.told.items() if told.about.get("node") == node]
        return called[0] if len(called) == 1 else None

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        """Where it went instead, if its first choice couldn't take it: busy from now on, too."""
        super().on_request_routed(pending_request, replica_id, result)
        want, given, choices = self._chosen.pop(id(pending_request), (None, "", {}))
        choice = choices.get(str(replica_id.unique_id))
        if want is not None and want.prefixes and choice is not None and choice.node != given:
            self.fleet.give(want, choice, now_s=time.time())
