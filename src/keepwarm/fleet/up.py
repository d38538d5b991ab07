"""Bringing a fleet up on Ray, and the application that `serve deploy` takes.

Needs Ray. The application is two deployments: `front` (one a machine that takes requests) and
`node` (Keepwarm itself).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import msgspec
import ray
from ray import serve
from ray.serve.config import HTTPOptions, RequestRouterConfig
from ray.serve.schema import ApplicationStatus

from keepwarm.errors import ConfigError, EngineStartError
from keepwarm.fleet.config import FleetConfig, fleet_of
from keepwarm.fleet.front import Front
from keepwarm.fleet.replica import Node

NAME = "keepwarm"
# A node takes what it is given and queues it itself, by what is warm; Serve's bound is only there
# so that a fleet that drowns says so.
_ONGOING = 512


def application(plain: dict[str, Any]) -> serve.Application:
    """The fleet as a Serve application; `plain` is a `fleet.toml` as plain values.

    `serve deploy` calls it with the `args` of the file that `keepwarm fleet config` prints.
    """
    config = fleet_of(plain, source="fleet config")
    fleet = config.fleet
    scale: dict[str, Any] = {"num_replicas": fleet.nodes}
    if fleet.max_nodes > fleet.nodes:
        scale = {
            "autoscaling_config": {
                "min_replicas": fleet.nodes,
                "max_replicas": fleet.max_nodes,
                "target_ongoing_requests": fleet.target_ongoing,
                "upscale_delay_s": fleet.scale_up_s,
                "downscale_delay_s": fleet.scale_down_s,
                "policy": {
                    "policy_function": "keepwarm.fleet.scaling:ByLoad",
                    "policy_kwargs": {
                        "target_ongoing": fleet.target_ongoing,
                        "target_wait_s": fleet.target_wait_s,
                    },
                },
            }
        }
    node = serve.deployment(
        Node,
        name="node",
        max_ongoing_requests=_ONGOING,
        ray_actor_options={"num_cpus": fleet.cpus, "num_gpus": fleet.gpus},
        max_replicas_per_node=1 if fleet.one_per_machine else None,
        health_check_period_s=5,
        health_check_timeout_s=30,
        # A stream that runs is let end; a node that is taken away writes behind what it has.
        graceful_shutdown_wait_loop_s=1,
        graceful_shutdown_timeout_s=fleet.stream_timeout_s,
        request_router_config=RequestRouterConfig(
            request_router_class="keepwarm.fleet.router.WarmRouter",
            request_routing_stats_period_s=fleet.report_s,
            request_routing_stats_timeout_s=30,
        ),
        **scale,
    )
    front = serve.deployment(
        Front,
        name="front",
        max_ongoing_requests=4 * _ONGOING,
        ray_actor_options={"num_cpus": 0},
        # Streams pass through it, and an update replaces it, too.
        graceful_shutdown_wait_loop_s=1,
        graceful_shutdown_timeout_s=fleet.stream_timeout_s,
    )
    told = msgspec.to_builtins(config)
    return front.bind(node.bind(told), told)


def deploy_file(config: FleetConfig) -> dict[str, Any]:
    """What `serve deploy` reads (as YAML; JSON is YAML)."""
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": config.fleet.host, "port": config.fleet.port},
        "applications": [
            {
                "name": NAME,
                "route_prefix": "/",
                "import_path": "keepwarm.fleet.up:application_of",
                "args": {"plain": msgspec.to_builtins(config)},
            }
        ],
    }


def application_of(args: dict[str, Any]) -> serve.Application:
    """`application`, as `serve deploy` calls it."""
    return application(args["plain"])


# Serve's controller goes through what it was told once a tenth of a second.
_SEEN_AFTER_S = 1.0
# Serve gives its proxy 5 s to start and then begins again, for ever on a machine that is busy
# loading models. The processes that `ray.init` starts read this when they start.
PATIENCE = {
    # By default Ray lowers its processes' priority by 15, and an engine's with it.
    "RAY_worker_niceness": "0",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # Nor a process for each core at the start, when a few are needed.
    "RAY_prestart_worker_first_driver": "false",
    "RAY_enable_worker_prestart": "false",
}


def up(config: FleetConfig, *, tell: Callable[[str], None]) -> None:
    """Start the fleet, on the cluster named or on a Ray of this process; returns when it serves.

    Raises: ConfigError if the cluster can't be reached, EngineStartError if no node comes up.
    """
    fleet = config.fleet
    try:
        if fleet.address:
            ray.init(address=fleet.address, namespace=NAME, log_to_driver=False)
        else:
            for name, value in PATIENCE.items():
                os.environ.setdefault(name, value)
            ray.init(
                namespace=NAME,
                num_cpus=max(int(fleet.cpus * (config.most_nodes + 1)) + 1, 2),
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
            )
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"Ray can't be used: {error}") from error
    serve.start(http_options=HTTPOptions(host=fleet.host, port=fleet.port))
    deploy(config, tell=tell)


def deploy(config: FleetConfig, *, tell: Callable[[str], None]) -> None:
    """Have the fleet be as `config` says; returns when it is.

    What runs already is replaced a fifth at a time, at least one node: these are taken away, their
    streams end, and the next ones are taken away only when the new ones are warm.

    Raises: EngineStartError if no node comes up.
    """
    target = serve.RunTarget(
        target=application(msgspec.to_builtins(config)), name=NAME, route_prefix="/"
    )
    # Not waited for by Serve, so that it can be told how far it is.
    serve.run_many(
        [target],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )
    said = ""
    # For a moment a fleet that runs is still told to be as it was.
    time.sleep(_SEEN_AFTER_S)
    while True:
        time.sleep(0.2)
        status = serve.status().applications.get(NAME)
        if status is None:
            continue
        nodes = status.deployments.get("node")
        now = f"{status.status.value.lower()}: {dict(nodes.replica_states) if nodes else ''}"
        if now != said:
            tell(now)
            said = now
        if status.status is ApplicationStatus.RUNNING:
            return
        if status.status in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
            why = nodes.message if nodes else status.message
            raise EngineStartError(f"The fleet doesn't come up: {why}")


def down() -> None:
    """End a fleet of this process: nodes end their streams and write behind what they have."""
    serve.shutdown()
    ray.shutdown()
