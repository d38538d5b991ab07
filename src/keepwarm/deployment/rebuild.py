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
from keepwarm.deployment.kept_engine import KeptEngine
from keepwarm.deployment.warm import KeptPrefix, keep
from keepwarm.errors import KeepwarmError

log = logging.getLogger("keepwarm")

# Behind interactive requests (0) and batches (1).
_PRIORITY = 2


async def rebuild(deployment: KeptEngine, prefix: KeptPrefix) -> Stored | None:
    """Fill, save and pin a tier's prefix; None, and a line in the log, if that failed."""
    assert prefix.prompt
    job = Job(
        id=uuid.uuid4().hex[:16],
        namespace=prefix.namespace,
        prompt=prefix.prompt,
        arrived_s=time.monotonic(),
        deadline_s=math.inf,
        reply_tokens=1,
        priority=_PRIORITY,
        static_shared=True,
        must_save=True,
    )
    try:
        await deployment.dispatcher.acquire(job, prefix.tokens)
        deployment.dispatcher.finish(job, counts=None, reply=None, touched=False)
        # The store works in the order of the calls, so the save has been taken in before this.
        stored = await deployment.slot_store.match(prefix.tokens, prefix.namespace)
        if stored is None or stored.tokens != len(prefix.tokens):
            log.warning("%s was filled but couldn't be kept", prefix.name)
            return None
        await keep(deployment.slot_store, prefix, stored, rates=deployment.dispatcher.rates)
    except KeepwarmError as error:
        log.warning("%s couldn't be warmed: %s", prefix.name, error)
        return None
    log.info("%s is warm (%d tokens)", prefix.name, len(prefix.tokens))
    return stored
