"""Manifests against schemas: of KubeRay as published, of Kubernetes' own kinds as far as we use them; always closed."""

import json
from functools import cache
from typing import Any

import jsonschema

from tests.support.shared_data import shared_path

KUBERAY = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayCronJob": "raycronjobs"}
TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
LABELS = {"type": "object", "additionalProperties": TEXT, "minProperties": 1}


def validate_manifest(manifest: dict[str, Any]) -> None:
    """Raises where the API server would refuse the manifest, or drop a key of it without a word."""
    kind = manifest["kind"]
    if kind in KUBERAY:
        assert manifest["apiVersion"] == "ray.io/v1"
        published(KUBERAY[kind]).validate(manifest)
        return
    api, keys = CORE[kind]
    assert manifest["apiVersion"] == api
    meta = node(name=TEXT, namespace=TEXT, labels=LABELS)
    schema = node(apiVersion=TEXT, kind=TEXT, metadata=meta, **keys)
    jsonschema.Draft202012Validator(schema).validate(manifest)
    for template in templates_of(manifest):
        published("rayclusters", "spec", "headGroupSpec", "template").validate(template)


def templates_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """All pod templates in a manifest, wherever they are."""
    found = []
    for value in manifest.values():
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, dict):
                is_template = "containers" in child.get("spec", {})
                found += [child] if is_template else templates_of(child)
    return found


@cache
def published(name: str, *path: str) -> jsonschema.Draft202012Validator:
    """Schema of a resource of KubeRay, or of a key of it: pod templates are the same everywhere."""
    schema = json.loads(shared_path(f"schemas/kuberay_v1.7.0_{name}.json").read_text())
    for key in path:
        schema = schema["properties"][key]
    return jsonschema.Draft202012Validator(closed(schema))


def closed(schema: Any) -> Any:
    """The schema with unknown keys as errors; the API server would drop them without a word."""
    if isinstance(schema, list):
        return [closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: closed(value) for key, value in schema.items()}
    is_open = schema.get("x-kubernetes-preserve-unknown-fields") is True
    if isinstance(schema.get("properties"), dict) and schema.get("type") == "object" and not is_open:
        found.setdefault("additionalProperties", False)
    return found


def node(*optional: str, **keys: Any) -> dict[str, Any]:
    """An object of exactly these keys; those that are named first may be missing."""
    required = [key for key in keys if key not in optional]
    return {"type": "object", "properties": keys, "required": required, "additionalProperties": False}


def listing(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


TEMPLATE = {"type": "object"}  # checked by itself
REQUIREMENT = node(key=TEXT, operator={"enum": ["In", "NotIn", "Exists", "DoesNotExist"]}, values=listing(TEXT))
SELECTOR = node("matchExpressions", matchLabels=LABELS, matchExpressions=listing(REQUIREMENT))
PEER = node("namespaceSelector", podSelector=SELECTOR, namespaceSelector=SELECTOR)
PORT = node(protocol={"enum": ["TCP", "UDP"]}, port=NUMBER)
RULE = node(
    "resourceNames", apiGroups=listing(TEXT), resources=listing(TEXT), verbs=listing(TEXT), resourceNames=listing(TEXT)
)
SUBJECT = node(kind={"const": "ServiceAccount"}, name=TEXT, namespace=TEXT)
ROLE_REF = node(apiGroup=TEXT, kind={"const": "Role"}, name=TEXT)
RBAC = "rbac.authorization.k8s.io/v1"
CORE: dict[str, tuple[str, dict[str, Any]]] = {
    "PersistentVolumeClaim": (
        "v1",
        {
            "spec": node(
                "storageClassName",
                accessModes={"const": ["ReadWriteMany"]},
                resources=node(requests=node(storage=TEXT)),
                storageClassName=TEXT,
            )
        },
    ),
    "ConfigMap": ("v1", {"data": LABELS}),
    "ServiceAccount": ("v1", {}),
    "Service": (
        "v1",
        {
            "spec": node(
                type={"const": "ClusterIP"},
                selector=LABELS,
                ports=listing(node(name=TEXT, port=NUMBER, targetPort=TEXT)),
            )
        },
    ),
    "Role": (RBAC, {"rules": listing(RULE)}),
    "RoleBinding": (RBAC, {"roleRef": ROLE_REF, "subjects": listing(SUBJECT)}),
    "NetworkPolicy": (
        "networking.k8s.io/v1",
        {
            "spec": node(
                podSelector=SELECTOR,
                policyTypes={"const": ["Ingress"]},
                ingress=listing(node("ports", **{"from": listing(PEER), "ports": listing(PORT)})),
            )
        },
    ),
    "CronJob": (
        "batch/v1",
        {
            "spec": node(
                schedule=TEXT,
                timeZone=TEXT,
                suspend=FLAG,
                concurrencyPolicy={"const": "Forbid"},
                startingDeadlineSeconds=NUMBER,
                successfulJobsHistoryLimit=NUMBER,
                failedJobsHistoryLimit=NUMBER,
                jobTemplate=node(spec=node(backoffLimit=NUMBER, activeDeadlineSeconds=NUMBER, template=TEMPLATE)),
            )
        },
    ),
    "Deployment": (
        "apps/v1",
        {
            "spec": node(
                replicas=NUMBER,
                strategy=node(type={"enum": ["Recreate", "RollingUpdate"]}),
                selector=node(matchLabels=LABELS),
                template=TEMPLATE,
            )
        },
    ),
}
