"""Kubernetes manifests of a sweep that comes back, for KubeRay v1.7.

Two kinds of schedules, with the same RayJob in both:

- CronJob (default): a small pod creates the RayJob. RayJobs have one fixed name, so the API server itself refuses a
  second one while the first exists: two sweeps never overlap, whoever starts them.
- RayCronJob: KubeRay's own kind. It is alpha, ignored without a word where the operator's feature gate is off, has no
  concurrency policy, and keeps every RayJob that it made. It is rendered only where the deadline of a run ends before
  the next one starts.
"""

import re
from typing import Any, Literal

import yaml

from pipelines.sweep_kubernetes_config import KubernetesConfig, PodSize
from pipelines.sweep_recurring import REQUEST_VARIABLE
from pipelines.sweep_schedule import ScheduleConfig
from userrep.config import ConfigError

Kind = Literal["CronJob", "RayCronJob"]

START_SECONDS = 3600  # nodes may have to be bought, and images of Ray with torch are large
REPORT_SECONDS = 3600  # cells are planned to end by `max_hours`; a slow last one, fit and report need time
STARTING_DEADLINE_SECONDS = 12 * 3600  # a sweep that the control plane missed is made up for within half a day

# A finished RayJob is removed with its pods before the next one is made: pods of an earlier attempt can outlive it
# (ray-project/kuberay#5211), and would be a second writer. `case` takes every unknown state as running.
CREATE_SCRIPT = """\
set -eu
found=$(kubectl get rayjob "$NAME" --ignore-not-found \
-o 'jsonpath={.metadata.name}={.status.jobDeploymentStatus}')
case "$found" in
  "") ;;
  "$NAME=Complete" | "$NAME=Failed" | "$NAME=ValidationFailed")
    kubectl delete rayjob "$NAME" --cascade=foreground --timeout=15m ;;
  *)
    echo "the last sweep is not finished ($found): no new one is started"
    exit 0 ;;
esac
kubectl create -f /schedule/rayjob.yaml
"""

COMMENTS = {
    "ServiceAccount": "Of the pod that creates the RayJob; the pods of Ray have no access to the API.",
    "Role": "No secrets, no pods. `create` cannot be limited to a name; all else is limited to this one RayJob.",
    "RoleBinding": "Gives the role to that account.",
    "ConfigMap": "The RayJob of every run, and the script that creates it unless the last one still runs.\n"
    "Its backoffLimit is 0: a retry is a new Ray cluster, whose pods may overlap those of the first (kuberay#5211),\n"
    "and it could start on another day, in another directory. In a run, workers are restarted from checkpoints.\n"
    "To continue a run that failed, the same day: kubectl create job --from=cronjob/{name} {name}-again\n"
    "submitterConfig.backoffLimit only repeats the submission, which the job's id makes harmless.",
    "CronJob": "Starts the creator only, which ends at once; its backoffLimit repeats that, never a sweep.",
    "RayCronJob": "Needs the operator's feature gate RayCronJob=true (alpha), else nothing happens.\n"
    "It has no concurrency policy: activeDeadlineSeconds ends a run before the next starts. backoffLimit 0: a retry\n"
    "is a new Ray cluster whose pods may overlap those of the first (kuberay#5211).",
}


def render_kubernetes(schedule: ScheduleConfig, cluster: KubernetesConfig, kind: Kind = "CronJob") -> str:
    """All manifests as YAML documents, for `kubectl apply -f`.

    Raises:
        ConfigError: paths that the pods would not see, or runs of a RayCronJob that could overlap.
    """
    _check_paths(schedule, cluster)
    documents = _cron_job(schedule, cluster) if kind == "CronJob" else [_ray_cron_job(schedule, cluster)]
    return "".join(_document(manifest) for manifest in documents)


def ray_job_spec(schedule: ScheduleConfig, cluster: KubernetesConfig) -> dict[str, Any]:
    """Spec of the RayJob of one run; why its limits are as they are is in COMMENTS."""
    auth = {"mode": "token" if cluster.token_auth else "disabled"}
    if cluster.token_auth and cluster.auth_secret:
        auth["secretName"] = cluster.auth_secret
    # The request is a variable of the head, not part of the entrypoint: that one passes through two shells.
    request = {REQUEST_VARIABLE: schedule.sweep.model_dump_json(exclude_none=True)}
    if schedule.mlflow_uri is not None:
        request["MLFLOW_TRACKING_URI"] = schedule.mlflow_uri
    head = {"rayStartParams": {"num-cpus": "0"}, "template": _pod("ray-head", cluster.head, cluster, request)}
    workers = {
        "groupName": "workers",
        "replicas": cluster.num_workers,
        "minReplicas": cluster.num_workers,
        "maxReplicas": cluster.num_workers,
        "rayStartParams": {},
        "template": _pod("ray-worker", cluster.worker, cluster, {}),
    }
    return {
        "entrypoint": "python -m pipelines.sweep_recurring",
        "submissionMode": "K8sJobMode",  # the sidecar ends jobs whose submitter stumbles (kuberay#4285)
        "submitterConfig": {"backoffLimit": 3},
        "backoffLimit": 0,
        "preRunningDeadlineSeconds": START_SECONDS,
        "activeDeadlineSeconds": deadline_seconds(schedule),
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": cluster.ttl_seconds,
        "rayClusterSpec": {
            "rayVersion": cluster.ray_version,
            "authOptions": auth,
            "headGroupSpec": head,
            "workerGroupSpecs": [workers],
        },
    }


def deadline_seconds(schedule: ScheduleConfig) -> int:
    """Seconds after which a run is ended: time to start, to compute, and to write the report."""
    return START_SECONDS + round(schedule.sweep.max_hours * 3600) + REPORT_SECONDS


def _pod(container: str, size: PodSize, cluster: KubernetesConfig, variables: dict[str, str]) -> dict[str, Any]:
    resources: dict[str, Any] = {"cpu": str(size.cpus), "memory": f"{size.memory_gib}Gi"}
    if size.gpus:
        resources["nvidia.com/gpu"] = str(size.gpus)
    variables = {**variables, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    spec: dict[str, Any] = {
        "name": container,
        "image": cluster.image,
        "env": [{"name": name, "value": escape_variable(value)} for name, value in variables.items()],
        # Equal, so that a node never has more of them than it can feed, and Ray sees the memory that it really has.
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "volumeMounts": [{"name": "storage", "mountPath": cluster.mount_path}],
    }
    if cluster.secret:
        spec["envFrom"] = [{"secretRef": {"name": cluster.secret}}]
    volume = {"name": "storage", "persistentVolumeClaim": {"claimName": cluster.claim}}
    return {"spec": {"automountServiceAccountToken": False, "containers": [spec], "volumes": [volume]}}


def escape_variable(value: str) -> str:
    """A value for a pod's environment, where Kubernetes replaces $(NAME) and makes $$ a $."""
    return value.replace("$", "$$")


def _ray_cron_job(schedule: ScheduleConfig, cluster: KubernetesConfig) -> dict[str, Any]:
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
        "metadata": _metadata(schedule, cluster),
        "spec": {
            "schedule": schedule.cron,
            "timeZone": schedule.sweep.time_zone,
            "suspend": schedule.suspend,
            "jobTemplate": ray_job_spec(schedule, cluster),
        },
    }


def _cron_job(schedule: ScheduleConfig, cluster: KubernetesConfig) -> list[dict[str, Any]]:
    meta = _metadata(schedule, cluster)
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": meta,
        "spec": ray_job_spec(schedule, cluster),
    }
    files = {"rayjob.yaml": yaml.safe_dump(job, sort_keys=False), "create.sh": CREATE_SCRIPT}
    spec = {
        "schedule": schedule.cron,
        "timeZone": schedule.sweep.time_zone,
        "suspend": schedule.suspend,
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": STARTING_DEADLINE_SECONDS,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
        "jobTemplate": {
            "spec": {"backoffLimit": 3, "activeDeadlineSeconds": 3600, "template": _creator_pod(schedule, cluster)}
        },
    }
    return [
        *_access(schedule, cluster),
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": files},
        {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": meta, "spec": spec},
    ]


def _creator_pod(schedule: ScheduleConfig, cluster: KubernetesConfig) -> dict[str, Any]:
    resources = {"cpu": "100m", "memory": "128Mi"}
    container = {
        "name": "creator",
        "image": cluster.kubectl_image,
        "command": ["sh", "/schedule/create.sh"],
        "env": [{"name": "NAME", "value": schedule.name}, {"name": "HOME", "value": "/tmp"}],
        "resources": {"requests": resources, "limits": dict(resources)},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [{"name": "schedule", "mountPath": "/schedule", "readOnly": True}],
    }
    return {
        "metadata": {"labels": _labels(schedule)},
        "spec": {
            "serviceAccountName": _account(schedule, cluster),
            "restartPolicy": "Never",
            "securityContext": {
                "runAsNonRoot": True,
                "runAsUser": 65534,
                "seccompProfile": {"type": "RuntimeDefault"},
            },
            "containers": [container],
            "volumes": [{"name": "schedule", "configMap": {"name": schedule.name}}],
        },
    }


def _access(schedule: ScheduleConfig, cluster: KubernetesConfig) -> list[dict[str, Any]]:
    meta, api = _metadata(schedule, cluster), "rbac.authorization.k8s.io"
    rayjobs = {"apiGroups": ["ray.io"], "resources": ["rayjobs"]}
    rules = [
        {**rayjobs, "verbs": ["create"]},
        {**rayjobs, "resourceNames": [schedule.name], "verbs": ["get", "list", "watch", "delete"]},
    ]
    subject = {"kind": "ServiceAccount", "name": _account(schedule, cluster), "namespace": cluster.namespace}
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {**meta, "name": subject["name"]}}
    return [
        *([] if cluster.service_account else [account]),
        {"apiVersion": f"{api}/v1", "kind": "Role", "metadata": meta, "rules": rules},
        {
            "apiVersion": f"{api}/v1",
            "kind": "RoleBinding",
            "metadata": meta,
            "roleRef": {"apiGroup": api, "kind": "Role", "name": schedule.name},
            "subjects": [subject],
        },
    ]


def _account(schedule: ScheduleConfig, cluster: KubernetesConfig) -> str:
    return cluster.service_account or schedule.name


def _labels(schedule: ScheduleConfig) -> dict[str, str]:
    return {"app.kubernetes.io/name": "userrep", "app.kubernetes.io/instance": schedule.name}


def _metadata(schedule: ScheduleConfig, cluster: KubernetesConfig) -> dict[str, Any]:
    return {"name": schedule.name, "namespace": cluster.namespace, "labels": _labels(schedule)}


def _check_paths(schedule: ScheduleConfig, cluster: KubernetesConfig) -> None:
    mount = cluster.mount_path.rstrip("/") + "/"
    files = [schedule.sweep.config] if re.search(r"\.(ya?ml|json)$", schedule.sweep.config) else []
    paths = [schedule.sweep.root, *files, *filter(None, [schedule.sweep.data])]
    for path in paths:
        if not path.startswith(mount):
            raise ConfigError(
                f"{path} is not below mount_path {cluster.mount_path}, so the pods would not find it; put it on the "
                f"claim {cluster.claim!r} and give the path there, or change mount_path"
            )


def _document(manifest: dict[str, Any]) -> str:
    comment = "".join(f"# {line}\n" for line in COMMENTS[manifest["kind"]].split("\n")).format(**manifest["metadata"])
    return f"---\n{comment}{yaml.dump(manifest, Dumper=_Dumper, sort_keys=False)}"


class _Dumper(yaml.SafeDumper):
    """Writes files as blocks, and repeats what is the same instead of naming it."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)
