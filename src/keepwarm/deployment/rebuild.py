"""Make a tier's snapshot while requests are served: there is none, or it turned out useless.

It is a job like any request, of the lowest priority: granted a slot when nobody else wants one,
filled, saved, and ended without anything being forwarded.
"""

from __future__ import annotations

import logging
import math
import time
import uuid

from keepwarm.core.job import Job
from keepwarm.core.plan import Stored
from keepwarm.deployment.deployment import Deployment
from keepwarm.deployment.warm import KeptPrefix, keep
from keepwarm.errors import KeepwarmError

log = logging.getLogger("keepwarm")

# Behind interactive requests (0) and batches (1).
_PRIORITY = 2


async def rebuild(runtime: Deployment, target: KeptPrefix) -> Stored | None:
    """Fill, save and pin a tier's prefix; None, and a line in the log, if that failed."""
    assert target.prompt
    job = Job(
        id=uuid.uuid4().hex[:16],
        namespace=target.namespace,
        prompt=target.prompt,
        arrived_s=time.monotonic(),
        deadline_s=math.inf,
        reply_tokens=1,
        priority=_PRIORITY,
        static_shared=True,
        must_save=True,
    )
    try:
        await runtime.dispatcher.acquire(job, target.tokens)
        runtime.dispatcher.finish(job, counts=None, reply=None, touched=False)
        # The store works in the order of the calls, so the save has been taken in before this.
        stored = await runtime.slot_store.match(target.tokens, target.namespace)
        if stored is None or stored.tokens != len(target.tokens):
            log.warning("%s was filled but couldn't be kept", target.name)
            return None
        await keep(runtime.slot_store, target, stored, rates=runtime.dispatcher.rates)
    except KeepwarmError as error:
        log.warning("%s couldn't be warmed: %s", target.name, error)
        return None
    log.info("%s is warm (%d tokens)", target.name, len(target.tokens))
    return stored
