"""Ray clusters and Ray jobs for KubeRay v1.7: the one shape of pods that everything here is made of.

Pods run as an ordinary user with no rights to gain more, on a root file system that they cannot write; what Ray writes
goes to /tmp (an emptyDir, and the home directory), to /dev/shm (KubeRay mounts it) and to the storage.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.kubernetes_config import PodsConfig, PodSize

START_SECONDS = 3600  # nodes may have to be bought, and images of Ray with torch are large
SMALL = {"cpu": "500m", "memory": "1Gi"}
CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


@dataclass(frozen=True)
class WorkerGroup:
    """Pods of one size. The autoscaler keeps their number between `low` and `high`, both included."""

    name: str
    size: PodSize
    low: int
    high: int


@dataclass(frozen=True)
class Identity:
    """Labels of what belongs together: `instance` is a cluster or schedule, `part_of` all of one values file."""

    instance: str
    part_of: str

    def labels(self, component: str | None = None) -> dict[str, str]:
        """Of an object; of a pod with a `component`: ray-head, ray-worker, ray-submitter or creator."""
        found = {"app.kubernetes.io/name": "userrep", "app.kubernetes.io/instance": self.instance}
        if self.part_of != self.instance:
            found["app.kubernetes.io/part-of"] = self.part_of
        return found if component is None else {**found, "app.kubernetes.io/component": component}


def ray_cluster_spec(
    pods: PodsConfig,
    identity: Identity,
    head: PodSize,
    groups: Sequence[WorkerGroup],
    head_variables: Mapping[str, str],
) -> dict[str, Any]:
    """Spec of a RayCluster, with the autoscaler v2 where the size of a group may vary.

    Args:
        pods: image, storage, secrets by name.
        identity: its labels.
        head: takes no tasks, so a task cannot starve it.
        groups: of workers.
        head_variables: environment of the head, where drivers run.
    """
    is_scaling = any(group.low < group.high for group in groups)
    auth: dict[str, Any] = {"mode": "token" if pods.token_auth else "disabled"}
    if pods.token_auth and pods.auth_secret:
        auth["secretName"] = pods.auth_secret
    template = pod_template(pods, identity, "ray-head", head, head_variables)
    if is_scaling:
        # KubeRay's autoscaler runs beside the head and asks for pods by a service account that KubeRay makes for it.
        template["spec"]["automountServiceAccountToken"] = True
    found: dict[str, Any] = {"rayVersion": pods.ray_version, "authOptions": auth}
    if is_scaling:
        found["enableInTreeAutoscaling"] = True
        found["autoscalerOptions"] = {
            "version": "v2",
            "idleTimeoutSeconds": 300,
            "upscalingMode": "Default",
            "securityContext": CONTAINER_SECURITY,
            "env": [{"name": "HOME", "value": "/tmp"}],
            "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
            "resources": {"requests": dict(SMALL), "limits": dict(SMALL)},
        }
    found["headGroupSpec"] = {
        "serviceType": "ClusterIP",
        "rayStartParams": {"num-cpus": "0"},
        "template": template,
    }
    found["workerGroupSpecs"] = [_group(pods, identity, group) for group in groups]
    return found


def ray_job_spec(
    pods: PodsConfig,
    identity: Identity,
    cluster_spec: dict[str, Any],
    entrypoint: str,
    run_seconds: int,
    ttl_seconds: int,
) -> dict[str, Any]:
    """Spec of a RayJob that has a Ray cluster of its own, and ends.

    Args:
        pods: image and secrets of the submitter.
        identity: its labels.
        cluster_spec: of `ray_cluster_spec`.
        entrypoint: passes through two shells, so only what no shell changes.
        run_seconds: time from its creation until it is ended.
        ttl_seconds: how long a finished one keeps its cluster.
    """
    return {
        "entrypoint": entrypoint,
        "submissionMode": "K8sJobMode",  # the sidecar ends jobs whose submitter stumbles (kuberay#4285)
        "submitterConfig": {"backoffLimit": 3},
        "submitterPodTemplate": _submitter(pods, identity),
        "backoffLimit": 0,
        "preRunningDeadlineSeconds": START_SECONDS,
        "activeDeadlineSeconds": run_seconds,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": ttl_seconds,
        "rayClusterSpec": cluster_spec,
    }


def pod_template(
    pods: PodsConfig, identity: Identity, component: str, size: PodSize, variables: Mapping[str, str]
) -> dict[str, Any]:
    """Template of a pod of Ray, with one container of the name of its component."""
    resources: dict[str, Any] = {"cpu": str(size.cpus), "memory": f"{size.memory_gib}Gi"}
    if size.gpus:
        resources["nvidia.com/gpu"] = str(size.gpus)
    variables = {**variables, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "HOME": "/tmp"}
    container: dict[str, Any] = {
        "name": component,
        "image": pods.image,
        "env": [{"name": name, "value": escape_variable(value)} for name, value in variables.items()],
        # Equal, so that a node never has more of them than it can feed, and Ray sees the memory that it really has.
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    secrets = [name for name in (pods.secret, pods.storage_secret) if name]
    if secrets:
        container["envFrom"] = [{"secretRef": {"name": name}} for name in secrets]
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {}}]
    if pods.claim:
        container["volumeMounts"].insert(0, {"name": "storage", "mountPath": pods.mount_path})
        volumes.insert(0, {"name": "storage", "persistentVolumeClaim": {"claimName": pods.claim}})
    return {
        "metadata": {"labels": identity.labels(component)},
        "spec": {
            "automountServiceAccountToken": False,
            "securityContext": pod_security(pods.user_id),
            "containers": [container],
            "volumes": volumes,
        },
    }


def pod_security(user_id: int) -> dict[str, Any]:
    """Security context of a pod. A large shared volume is given to the group once, not at every start."""
    return {
        "runAsNonRoot": True,
        "runAsUser": user_id,
        "runAsGroup": user_id,
        "fsGroup": user_id,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def escape_variable(value: str) -> str:
    """A value for a pod's environment, where Kubernetes replaces $(NAME) and makes $$ a $."""
    return value.replace("$", "$$")


def _group(pods: PodsConfig, identity: Identity, group: WorkerGroup) -> dict[str, Any]:
    return {
        "groupName": group.name,
        "replicas": group.low,
        "minReplicas": group.low,
        "maxReplicas": group.high,
        "rayStartParams": {},
        "template": pod_template(pods, identity, "ray-worker", group.size, {}),
    }


def _submitter(pods: PodsConfig, identity: Identity) -> dict[str, Any]:
    # KubeRay adds its command and the token; it has no other secret, for it only follows the job's log.
    container = {
        "name": "ray-job-submitter",
        "image": pods.image,
        "env": [{"name": "HOME", "value": "/tmp"}],
        "resources": {"requests": dict(SMALL), "limits": dict(SMALL)},
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],
    }
    return {
        "metadata": {"labels": identity.labels("ray-submitter")},
        "spec": {
            "automountServiceAccountToken": False,
            "restartPolicy": "Never",
            "securityContext": pod_security(pods.user_id),
            "containers": [container],
            "volumes": [{"name": "tmp", "emptyDir": {}}],
        },
    }
