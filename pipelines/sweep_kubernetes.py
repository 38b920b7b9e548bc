"""Kubernetes manifests of a sweep that comes back, for KubeRay v1.7.

Two kinds of schedules, with the same RayJob in both:

- CronJob (default): a small pod creates the RayJob (`kubernetes_cron.py`).
- RayCronJob: KubeRay's own kind. It is alpha, ignored without a word where the operator's feature gate is off, has no
  concurrency policy, and keeps every RayJob that it made. It is rendered only where the deadline of a run ends before
  the next one starts.
"""

import re
from typing import Any, Literal

from pipelines.kubernetes_config import KubernetesConfig
from pipelines.kubernetes_cron import Timing, metadata, render_cron_job
from pipelines.kubernetes_ray import START_SECONDS, Identity, WorkerGroup, ray_cluster_spec
from pipelines.kubernetes_ray import ray_job_spec as job_spec
from pipelines.kubernetes_yaml import document
from pipelines.sweep_recurring import REQUEST_VARIABLE
from pipelines.sweep_schedule import ScheduleConfig
from userrep.config import ConfigError

Kind = Literal["CronJob", "RayCronJob"]

REPORT_SECONDS = 3600  # cells are planned to end by `max_hours`; a slow last one, fit and report need time
COMMENT = """\
Needs the operator's feature gate RayCronJob=true (alpha), else nothing happens.
It has no concurrency policy: activeDeadlineSeconds ends a run before the next starts. backoffLimit 0: a retry
is a new Ray cluster whose pods may overlap those of the first (kuberay#5211)."""


def render_kubernetes(
    schedule: ScheduleConfig, cluster: KubernetesConfig, kind: Kind = "CronJob", part_of: str | None = None
) -> str:
    """All manifests as YAML documents, for `kubectl apply -f`.

    Args:
        schedule: when to run what.
        cluster: where.
        kind: of the schedule.
        part_of: what else it belongs to, a label of everything; None: nothing.

    Raises:
        ConfigError: paths that the pods would not see, or runs of a RayCronJob that could overlap.
    """
    _check_paths(schedule, cluster)
    identity = Identity(schedule.name, part_of or schedule.name)
    spec = ray_job_spec(schedule, cluster, identity)
    if kind == "CronJob":
        timing = Timing(schedule.cron, schedule.sweep.time_zone, schedule.suspend)
        return render_cron_job(identity, timing, spec, cluster)
    return document(_ray_cron_job(schedule, cluster, identity, spec), COMMENT)


def ray_job_spec(
    schedule: ScheduleConfig, cluster: KubernetesConfig, identity: Identity | None = None
) -> dict[str, Any]:
    """Spec of the RayJob of one run; why its limits are as they are stands above it in the manifest."""
    identity = identity or Identity(schedule.name, schedule.name)
    # The request is a variable of the head, not part of the entrypoint: that one passes through two shells.
    request = {REQUEST_VARIABLE: schedule.sweep.model_dump_json(exclude_none=True)}
    if schedule.mlflow_uri is not None:
        request["MLFLOW_TRACKING_URI"] = schedule.mlflow_uri
    group = WorkerGroup("workers", cluster.worker, cluster.num_workers, cluster.num_workers)
    return job_spec(
        cluster,
        identity,
        ray_cluster_spec(cluster, identity, cluster.head, [group], request),
        entrypoint="python -m pipelines.sweep_recurring",
        run_seconds=deadline_seconds(schedule),
        ttl_seconds=cluster.ttl_seconds,
    )


def deadline_seconds(schedule: ScheduleConfig) -> int:
    """Seconds after which a run is ended: time to start, to compute, and to write the report."""
    return START_SECONDS + round(schedule.sweep.max_hours * 3600) + REPORT_SECONDS


def _ray_cron_job(
    schedule: ScheduleConfig, cluster: KubernetesConfig, identity: Identity, spec: dict[str, Any]
) -> dict[str, Any]:
    gap = schedule.expression.shortest_gap_days * 24 - 1  # an hour less where summer time begins
    hours = (deadline_seconds(schedule) + cluster.ttl_seconds) / 3600
    if hours > gap:
        raise ConfigError(
            f"a run may take {hours:g} h with its start, report and ttl, and {schedule.cron!r} starts one every "
            f"{gap} h; a RayCronJob cannot forbid overlaps: lower max_hours, start it less often, or take kind CronJob"
        )
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCronJob",
        "metadata": metadata(identity, cluster.namespace),
        "spec": {
            "schedule": schedule.cron,
            "timeZone": schedule.sweep.time_zone,
            "suspend": schedule.suspend,
            "jobTemplate": spec,
        },
    }


def _check_paths(schedule: ScheduleConfig, cluster: KubernetesConfig) -> None:
    if cluster.claim is None:
        raise ConfigError("sweeps need a directory that all pods see; name its claim, e.g. --cluster claim=userrep")
    mount = cluster.mount_path.rstrip("/") + "/"
    files = [schedule.sweep.config] if re.search(r"\.(ya?ml|json)$", schedule.sweep.config) else []
    paths = [schedule.sweep.root, *files, *filter(None, [schedule.sweep.data])]
    for path in paths:
        if not path.startswith(mount):
            raise ConfigError(
                f"{path} is not below mount_path {cluster.mount_path}, so the pods would not find it; put it on the "
                f"claim {cluster.claim!r} and give the path there, or change mount_path"
            )
