"""The MLflow server: basic auth, PostgreSQL, artifacts in S3; for Docker Compose and for Kubernetes.

No file holds a secret. PostgreSQL's host, user and password come to libpq from its own variables (PGHOST, PGUSER,
PGPASSWORD), so the URI of the database, which is an argument that every process list shows, names the database alone.
"""

from typing import Any

from pipelines.cluster_config import ClusterValues
from pipelines.cluster_machines import MlflowValues
from pipelines.kubernetes_cron import metadata
from pipelines.kubernetes_ray import CONTAINER_SECURITY, Identity, pod_security
from pipelines.kubernetes_yaml import document

CLIENT_LABEL = "userrep/mlflow-client"
AUTH_FILE = "/etc/mlflow/basic_auth.ini"
PACKAGES = ("mlflow[auth]==3.17.2", "psycopg[binary]==3.3.9", "Flask-WTF==1.3.0", "boto3==1.44.8")
POSTGRES_IMAGE = "postgres:17.6-bookworm"
SECRET_KEYS = (
    "PGPASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "MLFLOW_AUTH_ADMIN_PASSWORD",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
)
NEW_USERS_MAY = "READ"

DOCKERFILE = """\
# In the root of the repository:
#   docker build --file cluster/mlflow/Dockerfile --tag {image} .

FROM python:{python}-slim-bookworm
WORKDIR /opt/mlflow
COPY constraints.txt ./
RUN pip install --no-cache-dir --constraint constraints.txt {packages} \\
 && useradd --uid {user_id} --create-home mlflow
USER {user_id}:{user_id}
"""

IGNORED = """\
*
!constraints.txt
"""

AUTH = """\
# Users and their rights are in the same database as runs. The password of `admin` is not here: the server takes it
# from MLFLOW_AUTH_ADMIN_PASSWORD when it makes that user, and refuses to start without it.
[mlflow]
default_permission = {permission}
database_uri = {uri}
admin_username = admin
authorization_function = mlflow.server.auth:authenticate_request_basic_auth
"""

COMPOSE_COMMENT = """\
Secrets are variables of the shell, or of a file that git never sees (mode 0600):
  docker compose --file compose.yaml --env-file ~/.userrep-mlflow.env up --detach
  {keys}
The port is open on this machine's loopback address alone; a proxy with TLS goes before it."""
DEPLOYMENT_COMMENT = """\
The server, after: kubectl create secret generic {secret} --from-env-file=FILE, with the keys
{keys}.
Its user `admin` makes the others, who may read what nobody gave them more of."""
POLICY_COMMENT = "Into the server come pods of Ray, and pods of this namespace with the label {label}={name}."


def render_mlflow(values: ClusterValues) -> dict[str, str]:
    """Files by path below `mlflow/`."""
    mlflow = values.mlflow
    dockerfile = DOCKERFILE.format(
        image=mlflow.image,
        python=values.docker.python,
        packages=" ".join(f'"{package}"' for package in PACKAGES),
        user_id=values.kubernetes.user_id,
    )
    return {
        "Dockerfile": dockerfile,
        "Dockerfile.dockerignore": IGNORED,
        "basic_auth.ini": auth_file(mlflow),
        "compose.yaml": document(_compose(values), COMPOSE_COMMENT.format(keys=", ".join(SECRET_KEYS))),
        "kubernetes.yaml": _kubernetes(values),
    }


def database_uri(mlflow: MlflowValues) -> str:
    """URI of the database: neither host nor user, which libpq takes from PGHOST, PGUSER and PGPASSWORD."""
    return f"postgresql+psycopg:///{mlflow.database}"


def auth_file(mlflow: MlflowValues) -> str:
    """Settings of basic auth, for MLFLOW_AUTH_CONFIG_PATH."""
    return AUTH.format(permission=NEW_USERS_MAY, uri=database_uri(mlflow))


def server_arguments(mlflow: MlflowValues, host: str, names: list[str]) -> list[str]:
    """Arguments of `mlflow`.

    Args:
        mlflow: database, artifacts, port.
        host: address to listen on.
        names: by which clients call it; every other Host header is refused.
    """
    hosts = [f"{name}{port}" for name in names for port in ("", f":{mlflow.port}")]
    return [
        "server",
        f"--host={host}",
        f"--port={mlflow.port}",
        f"--workers={mlflow.workers}",
        f"--backend-store-uri={database_uri(mlflow)}",
        f"--artifacts-destination={mlflow.artifacts}",
        "--app-name=basic-auth",
        f"--allowed-hosts={','.join(hosts)}",
    ]


def variables(mlflow: MlflowValues) -> dict[str, str]:
    """Environment of the server without its secrets."""
    found = {
        "MLFLOW_AUTH_CONFIG_PATH": AUTH_FILE,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "PGUSER": mlflow.database_user,
        "HOME": "/tmp",
    }
    return {**found, "MLFLOW_S3_ENDPOINT_URL": mlflow.s3_endpoint} if mlflow.s3_endpoint else found


def _compose(values: ClusterValues) -> dict[str, Any]:
    mlflow = values.mlflow
    secrets = {key: f"${{{key}:?is not set}}" for key in SECRET_KEYS}
    security = {"security_opt": ["no-new-privileges:true"], "restart": "unless-stopped"}
    server = {
        "image": mlflow.image,
        "command": ["mlflow", *server_arguments(mlflow, "0.0.0.0", ["localhost", "127.0.0.1", *mlflow.hosts])],
        "environment": {**variables(mlflow), "PGHOST": "postgres", **secrets},
        "ports": [f"127.0.0.1:{mlflow.port}:{mlflow.port}"],
        "volumes": [f"./basic_auth.ini:{AUTH_FILE}:ro"],
        "depends_on": {"postgres": {"condition": "service_healthy"}},
        "cap_drop": ["ALL"],
        "read_only": True,
        "tmpfs": ["/tmp"],
        **security,
    }
    database = {
        "image": POSTGRES_IMAGE,
        "environment": {
            "POSTGRES_DB": mlflow.database,
            "POSTGRES_USER": mlflow.database_user,
            "POSTGRES_PASSWORD": secrets["PGPASSWORD"],
        },
        "volumes": ["postgres:/var/lib/postgresql/data"],
        "healthcheck": {"test": ["CMD", "pg_isready", f"--username={mlflow.database_user}"], "interval": "5s"},
        **security,
    }
    return {
        "name": f"{values.name}-mlflow",
        "services": {"mlflow": server, "postgres": database},
        "volumes": {"postgres": {}},
    }


def _kubernetes(values: ClusterValues) -> str:
    mlflow, namespace = values.mlflow, values.kubernetes.namespace
    identity = Identity(f"{values.name}-mlflow", values.name)
    meta, name = metadata(identity, namespace), identity.instance
    names = [name, f"{name}.{namespace}", f"{name}.{namespace}.svc", f"{name}.{namespace}.svc.cluster.local"]
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": meta, "data": {"basic_auth.ini": auth_file(mlflow)}}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": meta,
        "spec": {
            "type": "ClusterIP",
            "selector": identity.labels("mlflow"),
            "ports": [{"name": "http", "port": mlflow.port, "targetPort": "http"}],
        },
    }
    deployment = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": meta,
        "spec": {
            "replicas": 1,
            "strategy": {"type": "Recreate"},  # a new version migrates the database, which the old one then cannot read
            "selector": {"matchLabels": identity.labels("mlflow")},
            "template": _pod(values, identity, [*names, "localhost", *mlflow.hosts]),
        },
    }
    comments = {
        "Deployment": DEPLOYMENT_COMMENT.format(secret=mlflow.secret, keys=", ".join(SECRET_KEYS)),
        "NetworkPolicy": POLICY_COMMENT.format(label=CLIENT_LABEL, name=values.name),
    }
    manifests = [_policy(values, identity), config, deployment, service]
    return "".join(document(manifest, comments.get(manifest["kind"], "")) for manifest in manifests)


def _pod(values: ClusterValues, identity: Identity, names: list[str]) -> dict[str, Any]:
    mlflow = values.mlflow
    plain = {**variables(mlflow), "PGHOST": mlflow.database_host, "PGSSLMODE": mlflow.sslmode}
    secrets = [{"name": key, "valueFrom": {"secretKeyRef": {"name": mlflow.secret, "key": key}}} for key in SECRET_KEYS]
    probe = {"httpGet": {"path": "/health", "port": "http"}, "periodSeconds": 10}
    resources = {"cpu": "1", "memory": "2Gi"}
    container = {
        "name": "mlflow",
        "image": mlflow.image,
        "command": ["mlflow"],
        "args": server_arguments(mlflow, "0.0.0.0", names),  # the pod's own address; the NetworkPolicy closes it
        "env": [*({"name": name, "value": value} for name, value in plain.items()), *secrets],
        "ports": [{"name": "http", "containerPort": mlflow.port}],
        "startupProbe": {**probe, "failureThreshold": 30},
        "readinessProbe": probe,
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "auth", "mountPath": "/etc/mlflow", "readOnly": True},
        ],
    }
    return {
        "metadata": {"labels": identity.labels("mlflow")},
        "spec": {
            "automountServiceAccountToken": False,
            "securityContext": pod_security(values.kubernetes.user_id),
            "containers": [container],
            "volumes": [
                {"name": "tmp", "emptyDir": {}},
                {"name": "auth", "configMap": {"name": identity.instance}},
            ],
        },
    }


def _policy(values: ClusterValues, identity: Identity) -> dict[str, Any]:
    nodes = {
        "matchLabels": {"app.kubernetes.io/name": "userrep", "app.kubernetes.io/part-of": values.name},
        "matchExpressions": [
            {"key": "app.kubernetes.io/component", "operator": "In", "values": ["ray-head", "ray-worker"]}
        ],
    }
    callers = [{"podSelector": nodes}, {"podSelector": {"matchLabels": {CLIENT_LABEL: values.name}}}]
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": metadata(identity, values.kubernetes.namespace),
        "spec": {
            "podSelector": {"matchLabels": identity.labels()},
            "policyTypes": ["Ingress"],
            "ingress": [{"from": callers, "ports": [{"protocol": "TCP", "port": values.mlflow.port}]}],
        },
    }
