"""The image of all nodes: Python, the package with its `train` extra, versions from constraints.txt, no root."""

from pipelines.cluster_config import ClusterValues

# The rest of what a node needs is in the package's own constraints; these are of the launcher of machines alone.
LAUNCHER_PACKAGES = ("boto3==1.44.8", "google-api-python-client==2.202.0")

DOCKERFILE = """\
# In the root of the repository; what may be copied is in {folder}/Dockerfile.dockerignore:
#   docker build --file {folder}/Dockerfile --target cluster --tag {image} .
#   docker build --file {folder}/Dockerfile --target ray-up --tag {image}-ray-up .

FROM python:{python}-slim-bookworm AS cluster
# wget: KubeRay's probes of health call it. tzdata: schedules have time zones.
RUN apt-get update \\
 && apt-get install --yes --no-install-recommends wget tzdata \\
 && rm -rf /var/lib/apt/lists/*
WORKDIR /opt/userrep
COPY constraints.txt ./
# By itself, so that a change of the code does not load it again. No virtual environment: KubeRay and `ray up` start
# login shells, which forget a PATH that was set here and find /usr/local/bin.
RUN pip install --no-cache-dir --constraint constraints.txt torch "ray[default,train,data,tune]=={ray_version}"
COPY pyproject.toml README.md ./
COPY userrep userrep
COPY pipelines pipelines
RUN pip install --no-cache-dir --constraint constraints.txt ".[train]" \\
 && useradd --uid {user_id} --create-home userrep
ENV HOME=/home/userrep PYTHONUNBUFFERED=1 MLFLOW_DISABLE_TELEMETRY=true RAY_USAGE_STATS_ENABLED=0
WORKDIR /home/userrep
# By number: Kubernetes cannot see otherwise that it is not root.
USER {user_id}:{user_id}

# `ray up` copies files into the container, and its head starts machines from there.
FROM cluster AS ray-up
USER root
RUN apt-get update \\
 && apt-get install --yes --no-install-recommends openssh-client rsync \\
 && rm -rf /var/lib/apt/lists/* \\
 && pip install --no-cache-dir --constraint /opt/userrep/constraints.txt {launcher}
USER {user_id}:{user_id}
"""

IGNORED = """\
# Nothing but what the image is made of: no data, no jobs, no credentials.
*
!constraints.txt
!pyproject.toml
!README.md
!userrep
!pipelines
**/__pycache__
"""


def render_docker(values: ClusterValues) -> dict[str, str]:
    """Files by path below `docker/`."""
    text = DOCKERFILE.format(
        folder="cluster/docker",
        image=values.image,
        python=values.docker.python,
        ray_version=values.ray_version,
        user_id=values.kubernetes.user_id,
        launcher=" ".join(f'"{package}"' for package in LAUNCHER_PACKAGES),
    )
    return {"Dockerfile": text, "Dockerfile.dockerignore": IGNORED}
