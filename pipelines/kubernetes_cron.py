"""A CronJob whose small pod creates a RayJob.

RayJobs have one fixed name, so the API server itself refuses a second one while the first exists: two runs never
overlap, whoever starts them.
"""

from dataclasses import dataclass
from typing import Any

from pipelines.kubernetes_config import KubernetesConfig
from pipelines.kubernetes_ray import CONTAINER_SECURITY, Identity, pod_security
from pipelines.kubernetes_yaml import document, to_yaml

STARTING_DEADLINE_SECONDS = 12 * 3600  # a run that the control plane missed is made up for within half a day
NOBODY = 65534

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
    echo "the last run is not finished ($found): no new one is started"
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
    "To continue a run that failed, the same day:\n"
    "  kubectl create job --from=cronjob/{name} {name}-again\n"
    "submitterConfig.backoffLimit only repeats the submission, which the job's id makes harmless.",
    "CronJob": "Starts the creator only, which ends at once; its backoffLimit repeats that, never a run.",
}


@dataclass(frozen=True)
class Timing:
    """When something starts: five fields, an IANA time zone, and whether it is held back."""

    cron: str
    time_zone: str
    suspend: bool


def render_cron_job(identity: Identity, timing: Timing, ray_job_spec: dict[str, Any], cluster: KubernetesConfig) -> str:
    """All manifests as YAML documents, for `kubectl apply -f`."""
    meta = metadata(identity, cluster.namespace)
    job = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": meta, "spec": ray_job_spec}
    files = {"rayjob.yaml": to_yaml(job), "create.sh": CREATE_SCRIPT}
    spec = {
        "schedule": timing.cron,
        "timeZone": timing.time_zone,
        "suspend": timing.suspend,
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": STARTING_DEADLINE_SECONDS,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
        "jobTemplate": {
            "spec": {"backoffLimit": 3, "activeDeadlineSeconds": 3600, "template": _creator_pod(identity, cluster)}
        },
    }
    manifests = [
        *_access(identity, cluster),
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": files},
        {"apiVersion": "batch/v1", "kind": "CronJob", "metadata": meta, "spec": spec},
    ]
    return "".join(document(manifest, COMMENTS[manifest["kind"]].format(**meta)) for manifest in manifests)


def metadata(identity: Identity, namespace: str) -> dict[str, Any]:
    """Metadata of the objects of an instance, which all have its name."""
    return {"name": identity.instance, "namespace": namespace, "labels": identity.labels()}


def _creator_pod(identity: Identity, cluster: KubernetesConfig) -> dict[str, Any]:
    resources = {"cpu": "100m", "memory": "128Mi"}
    container = {
        "name": "creator",
        "image": cluster.kubectl_image,
        "command": ["sh", "/schedule/create.sh"],
        "env": [{"name": "NAME", "value": identity.instance}, {"name": "HOME", "value": "/tmp"}],
        "resources": {"requests": resources, "limits": dict(resources)},
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [{"name": "schedule", "mountPath": "/schedule", "readOnly": True}],
    }
    return {
        "metadata": {"labels": identity.labels("creator")},
        "spec": {
            "serviceAccountName": _account(identity, cluster),
            "restartPolicy": "Never",
            "securityContext": pod_security(NOBODY),
            "containers": [container],
            "volumes": [{"name": "schedule", "configMap": {"name": identity.instance}}],
        },
    }


def _access(identity: Identity, cluster: KubernetesConfig) -> list[dict[str, Any]]:
    meta, api = metadata(identity, cluster.namespace), "rbac.authorization.k8s.io"
    rayjobs = {"apiGroups": ["ray.io"], "resources": ["rayjobs"]}
    rules = [
        {**rayjobs, "verbs": ["create"]},
        {**rayjobs, "resourceNames": [identity.instance], "verbs": ["get", "list", "watch", "delete"]},
    ]
    subject = {"kind": "ServiceAccount", "name": _account(identity, cluster), "namespace": cluster.namespace}
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {**meta, "name": subject["name"]}}
    return [
        *([] if cluster.service_account else [account]),
        {"apiVersion": f"{api}/v1", "kind": "Role", "metadata": meta, "rules": rules},
        {
            "apiVersion": f"{api}/v1",
            "kind": "RoleBinding",
            "metadata": meta,
            "roleRef": {"apiGroup": api, "kind": "Role", "name": identity.instance},
            "subjects": [subject],
        },
    ]


def _account(identity: Identity, cluster: KubernetesConfig) -> str:
    return cluster.service_account or identity.instance
