"""The one values file from which everything in `cluster/` is rendered.

Every key has a description, which `userrep cluster values` prints above it. Values name secrets and never hold one.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from pipelines.cluster_jobs import JobsValues, SchedulesValues
from pipelines.cluster_machines import DockerValues, MlflowValues, RayUpValues
from pipelines.kubernetes_config import NAME, OBJECT_NAME, PodsConfig, PodSize
from pipelines.rendered_text import check_values
from userrep.config import Config

MAX_PREFIX_CHARS = 24  # "-continual", "-embed-daily" and the like follow, and KubeRay takes 40 in all
ObjectName = Annotated[str, StringConstraints(pattern=OBJECT_NAME)]
Label = Annotated[str, StringConstraints(pattern=f"^{NAME}$")]

PRESETS = {
    "cpu-small": PodSize(cpus=4, memory_gib=16),
    "cpu-large": PodSize(cpus=16, memory_gib=64),
    "gpu-1": PodSize(cpus=8, memory_gib=64, gpus=1),
    "gpu-8": PodSize(cpus=96, memory_gib=768, gpus=8),
}


class ClaimValues(Config):
    """A volume that all pods share."""

    name: ObjectName = Field(default="userrep", description="Persistent volume claim, ReadWriteMany.")
    create: bool = Field(default=True, description="Render the claim; false: it exists already.")
    size: str = Field(default="500Gi", pattern=r"^\d+[KMGT]i$", description="Of the claim, where it is rendered.")
    storage_class: ObjectName | None = Field(
        default=None, description="With ReadWriteMany (NFS, Filestore, EFS, CephFS); null: the cluster's default one."
    )
    mount_path: str = Field(default="/mnt/userrep", pattern="^/[^:]+$", description="Where all pods see it.")


class StorageValues(Config):
    """Where working directories are: a claim, an object store, or both."""

    claim: ClaimValues | None = Field(
        default=ClaimValues(),
        description="A volume that all pods share; null: paths are s3:// URIs. Sweeps and continual need one.",
    )
    s3_secret: ObjectName | None = Field(
        default=None,
        description="Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and, for another store than "
        "Amazon's, AWS_ENDPOINT_URL as keys; null: s3:// paths are refused.",
    )


class GroupValues(Config):
    """Workers of one size."""

    name: Label = Field(description="Of the group.")
    preset: str = Field(description="A key of presets.")
    min: int = Field(default=0, ge=0, description="Pods that are always there.")
    max: int = Field(default=4, ge=1, description="Pods at most; the autoscaler (v2) decides where it is larger.")

    @model_validator(mode="after")
    def _is_range(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"group {self.name}: min {self.min} is larger than max {self.max}")
        return self


class KubernetesValues(Config):
    """What all manifests for KubeRay have in common, and the cluster that stays."""

    namespace: Label = Field(default="userrep", description="Of all objects; it must exist.")
    operator_namespace: Label = Field(
        default="kuberay-system", description="Where the KubeRay operator runs: it must reach every head, others not."
    )
    storage: StorageValues = Field(default=StorageValues(), description="Where working directories are.")
    mlflow_secret: ObjectName | None = Field(
        default="mlflow-client",
        description="Secret with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD as keys; null: none.",
    )
    auth_secret: ObjectName | None = Field(
        default=None, description="Secret with Ray's token as key auth_token; null: KubeRay makes one per cluster."
    )
    user_id: int = Field(default=1000, ge=1, description="User and group of all pods of Ray, never root.")
    kubectl_image: str = Field(default="alpine/k8s:1.34.1", description="With sh and kubectl, for schedules.")
    head: str = Field(default="cpu-small", description="Preset of the staying cluster's head; it takes no tasks.")
    groups: tuple[GroupValues, ...] = Field(
        default=(GroupValues(name="cpu", preset="cpu-large", min=1), GroupValues(name="gpu", preset="gpu-1")),
        min_length=1,
        description="Workers of the staying cluster: name, preset, min and max number of pods.",
    )


class ClusterValues(Config):
    """Everything that is rendered."""

    name: str = Field(
        default="userrep",
        pattern=f"^{NAME}$",
        max_length=MAX_PREFIX_CHARS,
        description="What all names of objects begin with, and the label of what belongs together.",
    )
    image: str = Field(
        default="registry.example/userrep:0.1.0",
        pattern=r"^[\w./:@-]+[:@][\w.:-]+$",
        description="Built from docker/Dockerfile, with a tag or digest; the same for all nodes.",
    )
    ray_version: Literal["2.60.0"] = Field(default="2.60.0", description="Of the image: what constraints.txt pins.")
    mlflow_uri: str | None = Field(
        default="http://userrep-mlflow.userrep.svc:5000",
        pattern="^https?://",
        description="Tracking server, without credentials; null: a database in each working directory.",
    )
    presets: dict[str, PodSize] = Field(
        default=PRESETS, description="Sizes of pods by name: whole CPUs, GiB of memory, GPUs; requests equal limits."
    )
    kubernetes: KubernetesValues = Field(default=KubernetesValues(), description="For kuberay/ and mlflow/.")
    jobs: JobsValues = Field(default=JobsValues(), description="A RayJob per stage; null: none for that one.")
    schedules: SchedulesValues = Field(default=SchedulesValues(), description="CronJobs that create RayJobs.")
    ray_up: RayUpValues = Field(default=RayUpValues(), description="Clusters of machines, for `ray up`.")
    docker: DockerValues = Field(default=DockerValues(), description="The image.")
    mlflow: MlflowValues = Field(default=MlflowValues(), description="The MLflow server.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_values(self.model_dump(mode="json"))
        named = [self.kubernetes.head, *(group.preset for group in self.kubernetes.groups)]
        for job in [*self.jobs.present().values(), *self.schedules.present().values()]:
            named += [job.head, job.worker]
            self._check_paths(job.paths(), job.needs_directory)
        for preset in named:
            self.size(preset)
        return self

    def size(self, preset: str) -> PodSize:
        """Size of a pod by the name of its preset.

        Raises:
            ValueError: there is no such preset.
        """
        if preset not in self.presets:
            raise ValueError(f"preset {preset!r} is not among presets: {', '.join(sorted(self.presets))}")
        return self.presets[preset]

    def pods(self) -> PodsConfig:
        """What the pods of all clusters have in common."""
        kubernetes, claim = self.kubernetes, self.kubernetes.storage.claim
        return PodsConfig(
            image=self.image,
            namespace=kubernetes.namespace,
            claim=claim.name if claim else None,
            mount_path=claim.mount_path if claim else "/mnt/userrep",
            secret=kubernetes.mlflow_secret,
            storage_secret=kubernetes.storage.s3_secret,
            ray_version=self.ray_version,
            auth_secret=kubernetes.auth_secret,
            user_id=kubernetes.user_id,
        )

    def _check_paths(self, paths: list[str], needs_directory: bool) -> None:
        storage = self.kubernetes.storage
        mount = storage.claim.mount_path.rstrip("/") + "/" if storage.claim else None
        for path in paths:
            if path.startswith("s3://") and storage.s3_secret and not needs_directory:
                continue
            if mount and path.startswith(mount):
                continue
            allowed = [f"paths below {mount}"] if mount else []
            allowed += ["s3:// URIs"] if storage.s3_secret and not needs_directory else []
            raise ValueError(
                f"{path}: pods would not find it; allowed here: {' and '.join(allowed) or 'nothing'}; see "
                "kubernetes.storage (claim, s3_secret; sweep and continual need the claim), or leave the job out (null)"
            )
