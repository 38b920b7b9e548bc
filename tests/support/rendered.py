"""What `userrep cluster render` makes, as plain values."""

import copy
from functools import cache
from typing import Any

import yaml

from pipelines.cluster_config import ClusterValues
from pipelines.cluster_render import Part, render

COMMAND = "userrep cluster render --out DIR"
ON_S3 = {
    "config": "parquet",
    "data": "s3://bucket/raw",
    "workdir": "s3://bucket/jobs/main",
    "worker": "cpu-large",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "object store alone": {
        "kubernetes": {"storage": {"claim": None, "s3_secret": "userrep-s3"}, "mlflow_secret": None},
        "jobs": {
            **dict.fromkeys(("ingest", "tokenize", "pretrain", "embed"), ON_S3),
            **dict.fromkeys(("sweep", "continual")),
        },
        "schedules": {"sweep": None, "embed": ON_S3},
        "mlflow": {"s3_endpoint": "https://minio.example:9000"},
    },
    "large, named, own token": {
        "name": "team-a",
        "mlflow_uri": None,
        "kubernetes": {
            "namespace": "team",
            "auth_secret": "ray-token",
            "user_id": 2000,
            "storage": {"claim": {"create": False}, "s3_secret": "userrep-s3"},
            "groups": [{"name": "big", "preset": "gpu-8", "min": 2, "max": 2}],
        },
        "jobs": {"pretrain": {"worker": "gpu-8", "num_workers": 4, "overrides": ["workers.num_workers=[2,4]"]}},
        "ray_up": {"aws": {"ami": "ami-1", "worker_profile": "arn:aws:iam::1:instance-profile/x"}, "min_workers": 1},
    },
}


def values_of(name: str) -> ClusterValues:
    return ClusterValues.parse(VARIANTS[name])


@cache
def rendered(name: str, only: Part | None = None) -> dict[str, str]:
    return render(values_of(name), COMMAND, only)


def documents(name: str, only: Part) -> list[tuple[str, dict[str, Any]]]:
    """Every YAML document with its file; those that a ConfigMap holds are among them."""
    return copy.deepcopy(_documents(name, only))


@cache
def _documents(name: str, only: Part) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for file, text in rendered(name, only).items():
        if file.endswith(".yaml"):
            found += [(file, document) for document in yaml.safe_load_all(text)]
    nested = [
        (f"{file}:{key}", yaml.safe_load(text))
        for file, document in found
        if document.get("kind") == "ConfigMap"
        for key, text in document["data"].items()
        if key.endswith(".yaml")
    ]
    return found + nested


def texts_below(value: Any, key: str) -> list[Any]:
    """Values of a key, wherever it is."""
    if isinstance(value, list):
        return [found for item in value for found in texts_below(item, key)]
    if not isinstance(value, dict):
        return []
    own = [value[key]] if key in value else []
    return own + [found for item in value.values() for found in texts_below(item, key)]
