"""Where something runs in Kubernetes: image, storage, secrets by name, sizes of pods."""

from typing import Self

from pydantic import Field, model_validator

from pipelines.rendered_text import check_text, texts_of
from userrep.config import Config

NAME = r"[a-z]([-a-z0-9]*[a-z0-9])?"
# KubeRay makes names of at most 47 characters from that of a RayJob, and a RayCronJob adds six to its own.
MAX_NAME_CHARS = 40
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


class PodsConfig(Config):
    """What the pods of all Ray clusters have in common.

    Attributes:
        image: with Ray, Python and the package with its `train` extra, the same for all pods.
        namespace: of all objects; it must exist.
        claim: persistent volume claim that all nodes can write at once (ReadWriteMany); None: no storage is mounted,
            and every path is a URI of an object store.
        mount_path: where all pods see the claim; the sweep's root, and its files, lie below.
        secret: secret with MLFLOW_TRACKING_TOKEN and the like as keys, which become environment variables; must exist.
        storage_secret: likewise, of the object store: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION,
            AWS_ENDPOINT_URL.
        ray_version: of the image, three numbers.
        token_auth: every request to the cluster needs a token, which KubeRay makes; else whoever reaches it can run
            code in it.
        auth_secret: secret with the token as `auth_token`; None: KubeRay makes one.
        user_id: user and group that all pods run as, never root; 1000 is the one of Ray's images and of ours.
    """

    image: str = Field(min_length=1)
    namespace: str = Field(default="default", pattern=f"^{NAME}$")
    claim: str | None = Field(default=None, pattern=OBJECT_NAME)
    mount_path: str = Field(default="/mnt/userrep", pattern="^/[^:]+$")
    secret: str | None = Field(default=None, pattern=OBJECT_NAME)
    storage_secret: str | None = Field(default=None, pattern=OBJECT_NAME)
    ray_version: str = Field(default="2.60.0", pattern=r"^\d+\.\d+\.\d+$")
    token_auth: bool = True
    auth_secret: str | None = Field(default=None, pattern=OBJECT_NAME)
    user_id: int = Field(default=1000, ge=1)

    @model_validator(mode="after")
    def _holds_no_secret(self) -> Self:
        for text in texts_of(self.model_dump()):
            check_text(text)
        if self.token_auth and tuple(map(int, self.ray_version.split(".")[:2])) < MIN_RAY_OF_TOKENS:
            raise ValueError(f"Ray {self.ray_version} knows no tokens; take 2.52 or newer, or token_auth=false")
        return self


class KubernetesConfig(PodsConfig):
    """Where a job runs that has a Ray cluster of its own, and what starts it again and again.

    Attributes:
        service_account: of the creator; None: one is made, with rights for this RayJob only.
        head: pod of the driver; it takes no tasks, so a task cannot starve it.
        worker: one pod of workers.
        num_workers: pods of workers.
        ttl_seconds: how long a finished run keeps its cluster, for a look at its logs.
        kubectl_image: with sh and kubectl.
    """

    service_account: str | None = Field(default=None, pattern=OBJECT_NAME)
    head: PodSize = PodSize()
    worker: PodSize = PodSize()
    num_workers: int = Field(default=1, ge=1)
    ttl_seconds: int = Field(default=600, ge=0)
    kubectl_image: str = "alpine/k8s:1.34.1"

    @model_validator(mode="after")
    def _can_train(self) -> Self:
        if self.num_workers * self.worker.cpus < 2:
            raise ValueError("training and its input need 2 CPUs; raise worker.cpus or num_workers")
        return self
