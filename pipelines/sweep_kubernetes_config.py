"""Where a sweep that comes back runs in Kubernetes: image, storage, secrets by name, sizes of pods."""

from typing import Self

from pydantic import Field, model_validator

from pipelines.sweep_schedule import NAME, check_text, texts_of
from userrep.config import Config

OBJECT_NAME = r"^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$"
MIN_RAY_OF_TOKENS = (2, 52)


class PodSize(Config):
    """Resources of a pod, as requests and as limits.

    Attributes:
        cpus: whole ones.
        memory_gib: memory; the object store takes 30% of it.
        gpus: nvidia.com/gpu.
    """

    cpus: int = Field(default=4, ge=1)
    memory_gib: int = Field(default=16, ge=2)
    gpus: int = Field(default=0, ge=0)


class KubernetesConfig(Config):
    """Where a sweep runs.

    Attributes:
        image: with Ray, Python and the package with its `train` extra, the same for all pods.
        namespace: of all objects; it must exist.
        claim: persistent volume claim that all nodes can write at once (ReadWriteMany).
        mount_path: where all pods see it; the sweep's root, and its files, lie below.
        secret: secret with MLFLOW_TRACKING_TOKEN and the like as keys, which become environment variables; must exist.
        service_account: of the creator; None: one is made, with rights for this RayJob only.
        head: pod of the driver; it takes no tasks, so a task cannot starve it.
        worker: one pod of workers.
        num_workers: pods of workers.
        ttl_seconds: how long a finished run keeps its cluster, for a look at its logs.
        ray_version: of the image, three numbers.
        token_auth: every request to the cluster needs a token, which KubeRay makes; else whoever reaches it can run
            code in it.
        auth_secret: secret with the token as `auth_token`; None: KubeRay makes one.
        kubectl_image: with sh and kubectl.
    """

    image: str = Field(min_length=1)
    namespace: str = Field(default="default", pattern=f"^{NAME}$")
    claim: str = Field(pattern=OBJECT_NAME)
    mount_path: str = Field(default="/mnt/userrep", pattern="^/[^:]+$")
    secret: str | None = Field(default=None, pattern=OBJECT_NAME)
    service_account: str | None = Field(default=None, pattern=OBJECT_NAME)
    head: PodSize = PodSize()
    worker: PodSize = PodSize()
    num_workers: int = Field(default=1, ge=1)
    ttl_seconds: int = Field(default=600, ge=0)
    ray_version: str = Field(default="2.60.0", pattern=r"^\d+\.\d+\.\d+$")
    token_auth: bool = True
    auth_secret: str | None = Field(default=None, pattern=OBJECT_NAME)
    kubectl_image: str = "alpine/k8s:1.34.1"

    @model_validator(mode="after")
    def _can_run(self) -> Self:
        for text in texts_of(self.model_dump()):
            check_text(text)
        if self.num_workers * self.worker.cpus < 2:
            raise ValueError("training and its input need 2 CPUs; raise worker.cpus or num_workers")
        if self.token_auth and tuple(map(int, self.ray_version.split(".")[:2])) < MIN_RAY_OF_TOKENS:
            raise ValueError(f"Ray {self.ray_version} knows no tokens; take 2.52 or newer, or token_auth=false")
        return self
