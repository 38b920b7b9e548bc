"""Values of what runs outside of KubeRay: machines for `ray up`, the image, the MLflow server."""

import ipaddress
from typing import Annotated, Self

from pydantic import Field, StringConstraints, field_validator, model_validator

from pipelines.kubernetes_config import OBJECT_NAME
from userrep.config import Config

Host = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?$")]
Path = Annotated[str, StringConstraints(pattern=r"^[~/][\w./+-]*$")]
Plain = Annotated[str, StringConstraints(pattern=r"^[\w./:+-]+$")]
ObjectName = Annotated[str, StringConstraints(pattern=OBJECT_NAME)]


class AwsValues(Config):
    """Machines of Amazon EC2."""

    region: Plain = Field(default="us-west-2", description="Of all machines.")
    zones: Annotated[str, StringConstraints(pattern=r"^[\w,-]+$")] = Field(
        default="us-west-2a,us-west-2b", description="Availability zones, comma-separated."
    )
    head_type: Plain = Field(default="m7i.xlarge", description="Instance type of the head.")
    worker_type: Plain = Field(default="g6.4xlarge", description="Instance type of the workers.")
    ami: Plain | None = Field(default=None, description="With Docker, and drivers for GPUs; null: Ray's choice.")
    security_group: Plain = Field(
        default="sg-0123456789abcdef0",
        description="Yours: all traffic inside of itself, port 22 from where you work. Without one, Ray makes one that "
        "opens port 22 to everybody.",
    )
    subnet: Plain = Field(default="subnet-0123456789abcdef0", description="Private; the group's VPC.")
    worker_profile: Plain | None = Field(
        default=None, description="ARN of the workers' instance profile, with access to the bucket of your data."
    )


class GcpValues(Config):
    """Machines of Google Compute Engine."""

    project: Plain = Field(default="my-project", description="Project id.")
    region: Plain = Field(default="us-west1", description="Of all machines.")
    zone: Plain = Field(default="us-west1-a", description="Of all machines.")
    head_type: Plain = Field(default="n2-standard-4", description="Machine type of the head.")
    worker_type: Plain = Field(default="g2-standard-16", description="Machine type of the workers, GPUs included.")
    source_image: Plain = Field(
        default="projects/deeplearning-platform-release/global/images/family/common-cu128-ubuntu-2204-nvidia-570",
        description="With Docker, and drivers for GPUs.",
    )
    subnetwork: Plain = Field(
        default="regions/us-west1/subnetworks/default", description="With Cloud NAT: machines get no public address."
    )


class LocalValues(Config):
    """Machines that are there."""

    head: Host = Field(default="10.0.0.1", description="Address of the head, with Docker and an SSH server.")
    workers: tuple[Host, ...] = Field(default=("10.0.0.2", "10.0.0.3"), description="Addresses of the workers.")
    mount_path: Path = Field(default="/mnt/userrep", description="Storage that all machines mount at this path.")

    @model_validator(mode="after")
    def _addresses_differ(self) -> Self:
        if len({self.head, *self.workers}) < 1 + len(self.workers):
            raise ValueError(f"an address is given twice: {[self.head, *self.workers]}; every machine is one node")
        return self


class RayUpValues(Config):
    """Clusters of machines."""

    max_workers: int = Field(default=4, ge=1, description="Machines of workers at most, in a cloud.")
    min_workers: int = Field(default=0, ge=0, description="Machines of workers that are always there, in a cloud.")
    idle_minutes: int = Field(default=10, ge=1, description="After which the autoscaler gives a machine back.")
    ssh_user: Plain = Field(default="ubuntu", description="On the machines.")
    token_file: Path = Field(
        default="~/.ray/auth_token",
        description="File with Ray's token where you call ray up: `ray get-auth-token --generate`, mode 0600. It is "
        "copied to the machines; the token itself is in no rendered file.",
    )
    aws: AwsValues | None = Field(default=AwsValues(), description="ray-up/aws.yaml; null: none.")
    gcp: GcpValues | None = Field(default=GcpValues(), description="ray-up/gcp.yaml; null: none.")
    local: LocalValues | None = Field(default=LocalValues(), description="ray-up/local.yaml; null: none.")

    @model_validator(mode="after")
    def _is_range(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(f"min_workers {self.min_workers} is larger than max_workers {self.max_workers}")
        return self


class DockerValues(Config):
    """The image."""

    python: str = Field(
        default="3.11.13", pattern=r"^3\.(1[1-9])\.\d+$", description="Patch included: drivers must have the same one."
    )


class MlflowValues(Config):
    """The MLflow server: basic auth, PostgreSQL, artifacts in S3."""

    image: str = Field(
        default="registry.example/userrep-mlflow:3.17.2",
        pattern=r"^[\w./:@-]+[:@][\w.:-]+$",
        description="Built from mlflow/Dockerfile, with a tag or digest.",
    )
    port: int = Field(default=5000, ge=1024, le=65535, description="Of the server.")
    workers: int = Field(default=2, ge=1, description="Processes of the server.")
    hosts: tuple[Host, ...] = Field(
        default=("mlflow.example",), description="Names by which clients call it, besides that of the Service."
    )
    artifacts: str = Field(
        default="s3://userrep-mlflow/artifacts", pattern=r"^s3://[\w./-]+$", description="Where artifacts go."
    )
    s3_endpoint: str | None = Field(
        default=None, pattern=r"^https?://[\w.:/-]+$", description="Of another store than Amazon's; null: Amazon's."
    )
    database_host: Host = Field(default="postgres.userrep.svc", description="PostgreSQL, for Kubernetes.")
    database: Plain = Field(default="mlflow", description="Name of the database; it must exist.")
    database_user: Plain = Field(default="mlflow", description="Owner of the database.")
    sslmode: Annotated[str, StringConstraints(pattern="^(require|verify-ca|verify-full|prefer|disable)$")] = Field(
        default="require", description="Of connections to PostgreSQL in Kubernetes, as libpq takes it."
    )
    secret: ObjectName = Field(
        default="mlflow-server",
        description="Secret of the server, with the keys PGPASSWORD, MLFLOW_FLASK_SERVER_SECRET_KEY, "
        "MLFLOW_AUTH_ADMIN_PASSWORD, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY.",
    )

    @field_validator("hosts")
    @classmethod
    def _hosts_are_no_wildcards(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            try:
                is_everywhere = ipaddress.ip_address(host).is_unspecified
            except ValueError:
                is_everywhere = False
            if is_everywhere:
                raise ValueError(f"{host} names every machine; give the names by which clients call the server")
        return hosts
