"""Manifests for KubeRay v1.7: the staying cluster, jobs, schedules, storage, and who may reach them."""

from typing import Any

from pipelines.cluster_config import ClusterValues
from pipelines.cluster_jobs import RefreshSchedule, StageJob, SweepSchedule
from pipelines.kubernetes_config import KubernetesConfig
from pipelines.kubernetes_cron import Timing, metadata, render_cron_job
from pipelines.kubernetes_ray import START_SECONDS, Identity, WorkerGroup, ray_cluster_spec, ray_job_spec
from pipelines.kubernetes_yaml import document
from pipelines.sweep_kubernetes import REPORT_SECONDS, render_kubernetes
from pipelines.sweep_schedule import ScheduleConfig

CLIENT_LABEL = "userrep/ray-client"
DASHBOARD_PORT = 8265
COMMANDS = {"sweep": "userrep sweep run"}  # of a stage; else its name

CLUSTER_COMMENT = """\
A cluster that stays, for `userrep submit`. Every request needs the token; the head runs no tasks.
Pods bind to their own address, as KubeRay and Kubernetes need it; the NetworkPolicy above closes that to all others."""
JOB_COMMENT = """\
Runs once, on a Ray cluster of its own: kubectl create -f FILE (a second one while it exists is refused).
backoffLimit 0: a retry is a new cluster, whose pods may overlap those of the first (kuberay#5211). Workers are
restarted from checkpoints; to go on after the job ended, delete it and create it again."""
POLICY_COMMENT = """\
Into these pods come: pods of the same cluster, the KubeRay operator, the submitter of the job, and pods of this
namespace with the label {label}={name}, which reach the dashboard's port alone. Nobody else."""
CLAIM_COMMENT = "Working directories and raw data; all pods write it at once."


def render_kuberay(values: ClusterValues) -> dict[str, str]:
    """Files by path below `kuberay/`.

    Raises:
        ValueError: a schedule with a sweep that pods could not run.
    """
    files = {"raycluster.yaml": _staying_cluster(values)}
    claim = values.kubernetes.storage.claim
    if claim and claim.create:
        files["storage.yaml"] = _claim(values)
    for stage, job in values.jobs.present().items():
        files[f"job-{stage}.yaml"] = _job(values, stage, job)
    for stage, schedule in values.schedules.present().items():
        is_sweep = isinstance(schedule, SweepSchedule)
        files[f"schedule-{stage}.yaml"] = _sweep(values, schedule) if is_sweep else _refresh(values, schedule)
    return files


def entrypoint(stage: str, job: StageJob | RefreshSchedule) -> str:
    """The command of a job; none of its words means anything to a shell."""
    words = [COMMANDS.get(stage, f"userrep {stage}"), "--config", job.config, "--workdir", job.workdir]
    if job.data is not None:
        words += ["--data", job.data]
    if stage == "sweep":
        words += ["--max-hours", f"{job.max_hours:g}"]
    for override in job.overrides:
        words += ["--set", override]
    return " ".join([*words, *(job.options if isinstance(job, StageJob) else ["--since", job.table])])


def network_policy(values: ClusterValues, identity: Identity) -> dict[str, Any]:
    """Who may reach the pods of one cluster, or of the jobs of one name."""
    labels, operator = identity.labels(), values.kubernetes.operator_namespace
    nodes = {
        "matchLabels": labels,
        "matchExpressions": [
            {"key": "app.kubernetes.io/component", "operator": "In", "values": ["ray-head", "ray-worker"]}
        ],
    }
    callers = [
        {"podSelector": {"matchLabels": identity.labels("ray-submitter")}},
        {"podSelector": {"matchLabels": {CLIENT_LABEL: values.name}}},
        {
            "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": operator}},
            "podSelector": {"matchLabels": {"app.kubernetes.io/name": "kuberay-operator"}},
        },
    ]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(identity, values.kubernetes.namespace),
        "spec": {
            "podSelector": {"matchLabels": labels},  # creators and submitters too, which nothing may reach
            "policyTypes": ["Ingress"],
            "ingress": [
                {"from": [{"podSelector": nodes}]},
                {"from": callers, "ports": [{"protocol": "TCP", "port": DASHBOARD_PORT}]},
            ],
        },
    }


def _staying_cluster(values: ClusterValues) -> str:
    identity = Identity(f"{values.name}-cluster", values.name)
    groups = [
        WorkerGroup(group.name, values.size(group.preset), group.min, group.max) for group in values.kubernetes.groups
    ]
    head = values.size(values.kubernetes.head)
    cluster = {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": metadata(identity, values.kubernetes.namespace),
        "spec": ray_cluster_spec(values.pods(), identity, head, groups, _variables(values)),
    }
    return _policy(values, identity) + document(cluster, CLUSTER_COMMENT)


def _job(values: ClusterValues, stage: str, job: StageJob) -> str:
    identity = Identity(f"{values.name}-{stage}", values.name)
    manifest = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata(identity, values.kubernetes.namespace),
        "spec": _job_spec(values, identity, stage, job),
    }
    return _policy(values, identity) + document(manifest, JOB_COMMENT)


def _job_spec(values: ClusterValues, identity: Identity, stage: str, job: StageJob | RefreshSchedule) -> dict[str, Any]:
    pods, workers = values.pods(), job.num_workers
    group = WorkerGroup("workers", values.size(job.worker), workers, workers)
    seconds = START_SECONDS + round(job.max_hours * 3600) + (REPORT_SECONDS if stage == "sweep" else 0)
    spec = ray_cluster_spec(pods, identity, values.size(job.head), [group], _variables(values))
    return ray_job_spec(pods, identity, spec, entrypoint(stage, job), seconds, ttl_seconds=600)


def _sweep(values: ClusterValues, schedule: SweepSchedule) -> str:
    found = ScheduleConfig.parse(
        {
            "name": f"{values.name}-sweep-again",
            "cron": schedule.cron,
            "mlflow_uri": values.mlflow_uri,
            "suspend": schedule.suspend,
            "sweep": {
                "config": schedule.config,
                "root": schedule.workdir,
                "data": schedule.data,
                "overrides": schedule.overrides,
                "max_hours": schedule.max_hours,
                "flops_per_s": schedule.flops_per_s,
                "time_zone": schedule.time_zone,
            },
        }
    )
    identity = Identity(found.name, values.name)
    return _policy(values, identity) + render_kubernetes(found, _own_cluster(values, schedule), part_of=values.name)


def _refresh(values: ClusterValues, schedule: RefreshSchedule) -> str:
    identity = Identity(f"{values.name}-embed-daily", values.name)
    timing = Timing(schedule.cron, schedule.time_zone, schedule.suspend)
    spec = _job_spec(values, identity, "embed", schedule)
    return _policy(values, identity) + render_cron_job(identity, timing, spec, _own_cluster(values, schedule))


def _own_cluster(values: ClusterValues, job: SweepSchedule | RefreshSchedule) -> KubernetesConfig:
    return KubernetesConfig.parse(
        {
            **values.pods().model_dump(),
            "head": values.size(job.head).model_dump(),
            "worker": values.size(job.worker).model_dump(),
            "num_workers": job.num_workers,
            "kubectl_image": values.kubernetes.kubectl_image,
        }
    )


def _claim(values: ClusterValues) -> str:
    claim = values.kubernetes.storage.claim
    assert claim is not None, "asked for a claim that is not wanted"
    identity = Identity(claim.name, values.name)
    spec: dict[str, Any] = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": claim.size}}}
    if claim.storage_class:
        spec["storageClassName"] = claim.storage_class
    meta = metadata(identity, values.kubernetes.namespace)
    return document(
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": meta, "spec": spec}, CLAIM_COMMENT
    )


def _policy(values: ClusterValues, identity: Identity) -> str:
    comment = POLICY_COMMENT.format(label=CLIENT_LABEL, name=values.name)
    return document(network_policy(values, identity), comment)


def _variables(values: ClusterValues) -> dict[str, str]:
    return {"MLFLOW_TRACKING_URI": values.mlflow_uri} if values.mlflow_uri else {}
