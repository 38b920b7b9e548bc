"""Manifests: against the published schemas of KubeRay, and the creator's script with a kubectl that takes notes."""

import os
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipelines.kubernetes_config import KubernetesConfig
from pipelines.kubernetes_ray import escape_variable
from pipelines.sweep_kubernetes import Kind, ray_job_spec, render_kubernetes
from pipelines.sweep_recurring import REQUEST_VARIABLE, RecurringSweep
from pipelines.sweep_schedule import ScheduleConfig
from tests.support.kubernetes import validate_manifest

SIZES = [
    {},
    {"secret": "mlflow", "auth_secret": "ray-token", "num_workers": 3, "worker": {"gpus": 2}},
    {"token_auth": False, "service_account": "ours", "head": {"cpus": 1, "memory_gib": 4}},
]


def schedule_of(**values: Any) -> ScheduleConfig:
    sweep = {"config": "weekly", "root": "/mnt/userrep/sweeps", "time_zone": "Asia/Seoul", **values.pop("sweep", {})}
    return ScheduleConfig.parse({"name": "weekly", "cron": "0 3 * * mon", "sweep": sweep, **values})


def cluster_of(**values: Any) -> KubernetesConfig:
    return KubernetesConfig.parse({"image": "registry.example/userrep:1", "claim": "userrep", **values})


def documents_of(text: str) -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def ray_job_of(documents: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return yaml.safe_load(documents["ConfigMap"]["data"]["rayjob.yaml"])


@pytest.mark.parametrize("values", SIZES)
def test_manifests_fit_their_schemas(values: dict[str, Any]) -> None:
    documents = documents_of(render_kubernetes(schedule_of(mlflow_uri="http://mlflow:5000"), cluster_of(**values)))
    for document in [*documents.values(), ray_job_of(documents)]:
        validate_manifest(document)


@pytest.mark.parametrize("values", SIZES)
def test_ray_cron_job_fits_its_schema(values: dict[str, Any]) -> None:
    (manifest,) = documents_of(render_kubernetes(schedule_of(), cluster_of(**values), "RayCronJob")).values()
    validate_manifest(manifest)
    assert manifest["spec"]["jobTemplate"] == ray_job_spec(schedule_of(), cluster_of(**values))


def test_a_key_that_the_schema_lacks_is_seen() -> None:
    job = ray_job_of(documents_of(render_kubernetes(schedule_of(), cluster_of())))
    job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["contaners"] = []
    with pytest.raises(jsonschema.ValidationError, match="contaners"):
        validate_manifest(job)


@pytest.mark.parametrize("values", SIZES)
@pytest.mark.parametrize("kind", ["CronJob", "RayCronJob"])
def test_objects_name_each_other(values: dict[str, Any], kind: Kind) -> None:
    text = render_kubernetes(schedule_of(), cluster_of(namespace="team", **values), kind)
    documents = documents_of(text)
    assert all(document["metadata"]["namespace"] == "team" for document in documents.values())
    timing = documents[kind]["spec"]
    assert (timing["schedule"], timing["timeZone"], timing["suspend"]) == ("0 3 * * mon", "Asia/Seoul", False)
    if kind == "CronJob":
        pod = timing["jobTemplate"]["spec"]["template"]["spec"]
        (subject,) = documents["RoleBinding"]["subjects"]
        assert pod["serviceAccountName"] == subject["name"]
        assert ("ServiceAccount" in documents) == ("service_account" not in values)
        assert documents["RoleBinding"]["roleRef"]["name"] == documents["Role"]["metadata"]["name"]
        assert pod["volumes"][0]["configMap"]["name"] == documents["ConfigMap"]["metadata"]["name"]
        named = [rule for rule in documents["Role"]["rules"] if rule["verbs"] != ["create"]]
        assert [rule["resourceNames"] for rule in named] == [[ray_job_of(documents)["metadata"]["name"]]]


def test_pods_have_what_they_were_given() -> None:
    schedule = schedule_of(mlflow_uri="http://mlflow:5000", sweep={"overrides": ["a=$(HOME) $$ 'x'"]})
    cluster = cluster_of(secret="mlflow", num_workers=3, worker={"cpus": 8, "memory_gib": 64, "gpus": 1})
    spec = ray_job_spec(schedule, cluster)["rayClusterSpec"]
    (group,) = spec["workerGroupSpecs"]
    head, worker = (g["template"]["spec"]["containers"][0] for g in (spec["headGroupSpec"], group))
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert worker["resources"]["limits"] == {"cpu": "8", "memory": "64Gi", "nvidia.com/gpu": "1"}
    for container in (head, worker):
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["envFrom"] == [{"secretRef": {"name": "mlflow"}}]
        assert container["volumeMounts"][0]["mountPath"] == "/mnt/userrep"
    variables = {entry["name"]: entry["value"] for entry in head["env"]}
    assert variables["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    request = expanded(variables[REQUEST_VARIABLE])
    assert RecurringSweep.model_validate_json(request) == schedule.sweep


def expanded(value: str) -> str:
    """What Kubernetes makes of a value of a variable where no other is referred to."""
    found, rest = "", value
    while rest:
        assert not rest.startswith("$(")
        found, rest = found + rest[0], rest[2:] if rest.startswith("$$") else rest[1:]
    return found


@pytest.mark.parametrize("value", ["", "$", "$$", "$(A)", "a$$(A)$"])
def test_variables_are_not_expanded(value: str) -> None:
    assert expanded(escape_variable(value)) == value


def test_a_run_ends_and_is_not_repeated() -> None:
    spec = ray_job_spec(schedule_of(sweep={"max_hours": 10}), cluster_of(ttl_seconds=120))
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] == 120
    assert spec["backoffLimit"] == 0
    assert spec["activeDeadlineSeconds"] > 10 * 3600 + spec["preRunningDeadlineSeconds"]


def test_ray_cron_jobs_that_could_overlap_are_refused() -> None:
    daily = {"cron": "0 3 * * *", "sweep": {"max_hours": 22}}
    with pytest.raises(ValueError, match=r"may take 24.* h .* cannot forbid overlaps: lower max_hours"):
        render_kubernetes(schedule_of(**daily), cluster_of(), "RayCronJob")
    assert "concurrencyPolicy: Forbid" in render_kubernetes(schedule_of(**daily), cluster_of())


@pytest.mark.parametrize(
    "sweep", [{"root": "/data/sweeps"}, {"root": "/mnt/userrep2"}, {"config": "mine.yaml"}, {"data": "raw/{date}"}]
)
def test_paths_that_pods_do_not_see_are_refused(sweep: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="is not below mount_path /mnt/userrep"):
        render_kubernetes(schedule_of(sweep=sweep), cluster_of())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"worker": {"cpus": 1}}, "need 2 CPUs"),
        ({"ray_version": "2.51.0"}, "knows no tokens"),
        ({"secret": "MLFLOW_TRACKING_TOKEN=hunter2"}, "secret"),
        ({"image": "https://me:hunter2@registry/x"}, "holds credentials"),
        ({"mount_path": "mnt"}, "mount_path"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster_of(**values)


def create(tmp_path: Path, state: str, failing: str = "none") -> tuple[int, list[str]]:
    """Runs the creator's script.

    Args:
        tmp_path: empty directory.
        state: what kubectl says of the RayJob.
        failing: verb with which kubectl fails.
    """
    script = documents_of(render_kubernetes(schedule_of(), cluster_of()))["ConfigMap"]["data"]["create.sh"]
    calls = tmp_path / "calls"
    kubectl = tmp_path / "kubectl"
    lines = [
        "#!/bin/sh",
        f'echo "$@" >> {calls}',
        f'[ "$1" != {failing} ] || exit 1',
        f'[ "$1" != get ] || printf %s "{state}"',
    ]
    kubectl.write_text("\n".join(lines))
    kubectl.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NAME": "weekly"}
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True)
    return done.returncode, [line.split()[0] for line in calls.read_text().splitlines()]


@pytest.mark.parametrize(
    ("state", "verbs"),
    [
        ("", ["get", "create"]),
        ("weekly=Complete", ["get", "delete", "create"]),
        ("weekly=Failed", ["get", "delete", "create"]),
        ("weekly=ValidationFailed", ["get", "delete", "create"]),
        ("weekly=", ["get"]),
        ("weekly=Running", ["get"]),
        ("weekly=Retrying", ["get"]),
        ("weekly=StateOfALaterVersion", ["get"]),
    ],
)
def test_the_creator_starts_nothing_beside_a_running_sweep(tmp_path: Path, state: str, verbs: list[str]) -> None:
    assert create(tmp_path, state) == (0, verbs)


@pytest.mark.parametrize(("failing", "verbs"), [("get", ["get"]), ("delete", ["get", "delete"])])
def test_the_creator_fails_where_it_cannot_know(tmp_path: Path, failing: str, verbs: list[str]) -> None:
    status, called = create(tmp_path, "weekly=Failed", failing)
    assert status != 0
    assert called == verbs
