"""KubeRay manifests: against the published schemas; who reaches what; what pods may do."""

import shlex
from typing import Any

import jsonschema
import pytest
import typer.main

from pipelines.cli import app
from pipelines.cluster_config import ClusterValues
from pipelines.cluster_kuberay import CLIENT_LABEL, DASHBOARD_PORT, entrypoint
from pipelines.sweep_recurring import REQUEST_VARIABLE, RecurringSweep
from tests.support.kubernetes import templates_of, validate_manifest
from tests.support.rendered import VARIANTS, documents, texts_below, values_of


def ray_specs(name: str) -> dict[str, dict[str, Any]]:
    """Specs of all Ray clusters by file."""
    found = {}
    for file, document in documents(name, "kuberay"):
        if document["kind"] in ("RayCluster", "RayJob"):
            found[file] = document["spec"].get("rayClusterSpec", document["spec"])
    return found


def job_of(name: str, file: str) -> dict[str, Any]:
    (found,) = [
        job
        for path, job in documents(name, "kuberay")
        if path.startswith(f"kuberay/{file}") and job["kind"] == "RayJob"
    ]
    return found["spec"]


@pytest.mark.parametrize("name", VARIANTS)
def test_manifests_fit_their_schemas(name: str) -> None:
    for file, document in documents(name, "kuberay"):
        try:
            validate_manifest(document)
        except jsonschema.ValidationError as error:
            pytest.fail(f"{file}: {document['kind']}: {error.message} at {list(error.absolute_path)}")


def test_a_key_that_no_schema_has_is_seen() -> None:
    for kind, path in (("NetworkPolicy", "spec"), ("RayCluster", "spec")):
        manifest = next(document for _, document in documents("default", "kuberay") if document["kind"] == kind)
        manifest[path]["polcyTypes"] = []
        with pytest.raises(jsonschema.ValidationError, match="polcyTypes"):
            validate_manifest(manifest)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_cluster_asks_for_the_token_and_runs_nothing_on_its_head(name: str) -> None:
    specs = ray_specs(name)
    assert specs
    for spec in specs.values():
        assert spec["authOptions"]["mode"] == "token"
        assert spec["authOptions"].get("secretName") == values_of(name).kubernetes.auth_secret
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert spec["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_the_staying_cluster_scales_by_the_second_autoscaler() -> None:
    spec = ray_specs("default")["kuberay/raycluster.yaml"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert [(g["minReplicas"], g["maxReplicas"]) for g in spec["workerGroupSpecs"]] == [(1, 4), (0, 4)]
    # The autoscaler runs in the pod of the head, and asks the API for pods.
    assert spec["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"] is True


def test_a_group_of_one_size_needs_no_autoscaler_and_no_access_to_the_api() -> None:
    spec = ray_specs("large, named, own token")["kuberay/raycluster.yaml"]
    assert "enableInTreeAutoscaling" not in spec
    assert spec["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("part", ["kuberay", "mlflow"])
def test_no_pod_has_more_rights_than_it_needs(name: str, part: Any) -> None:
    templates = [template for _, document in documents(name, part) for template in templates_of(document)]
    assert templates
    for template in templates:
        pod = template["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] >= 1000
        for container in pod["containers"]:
            security = container["securityContext"]
            assert (security["allowPrivilegeEscalation"], security["readOnlyRootFilesystem"]) == (False, True)
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert container["resources"]["requests"] == container["resources"]["limits"]
    for key in ("privileged", "hostNetwork", "hostPID", "hostIPC", "hostPath", "hostPort", "ingressOptions"):
        assert texts_below([document for _, document in documents(name, part)], key) == []
    kinds = texts_below([document for _, document in documents(name, part)], "type")
    assert not {"LoadBalancer", "NodePort"} & {kind for kind in kinds if isinstance(kind, str)}


def admitted(policy: dict[str, Any], pod: dict[str, str], namespace: str, port: int) -> bool:
    """Whether a pod may connect, as the API defines it."""
    own = policy["metadata"]["namespace"]
    for rule in policy["spec"]["ingress"]:
        if "ports" in rule and port not in [entry["port"] for entry in rule["ports"]]:
            continue
        for peer in rule["from"]:
            wanted = peer.get("namespaceSelector", {}).get("matchLabels", {}).get("kubernetes.io/metadata.name", own)
            if namespace == wanted and matches(peer["podSelector"], pod):
                return True
    return False


def matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector["matchLabels"].items()) and all(
        labels.get(entry["key"]) in entry["values"] for entry in selector.get("matchExpressions", [])
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_only_the_cluster_and_its_clients_reach_it(name: str) -> None:
    values = values_of(name)
    own, files = values.kubernetes.namespace, {}
    for file, document in documents(name, "kuberay"):
        files.setdefault(file.split(":")[0], []).append(document)
    operator, client = {"app.kubernetes.io/name": "kuberay-operator"}, {CLIENT_LABEL: values.name}
    checked = 0
    for file, found in files.items():
        templates = [template for document in found for template in templates_of(document)]
        if not templates:
            continue
        (policy,) = [document for document in found if document["kind"] == "NetworkPolicy"]
        labels = {
            pod["metadata"]["labels"]["app.kubernetes.io/component"]: pod["metadata"]["labels"] for pod in templates
        }
        assert all(matches(policy["spec"]["podSelector"], pod) for pod in labels.values()), file
        for port in (DASHBOARD_PORT, 6379, 10001, 12345):
            is_dashboard = port == DASHBOARD_PORT
            assert admitted(policy, labels["ray-worker"], own, port)
            assert admitted(policy, labels["ray-head"], own, port)
            assert admitted(policy, client, own, port) is is_dashboard
            assert admitted(policy, operator, values.kubernetes.operator_namespace, port) is is_dashboard
            if "ray-submitter" in labels:
                assert admitted(policy, labels["ray-submitter"], own, port) is is_dashboard
            for stranger in ({}, {"app.kubernetes.io/name": "userrep"}, operator, {CLIENT_LABEL: "other"}):
                assert not admitted(policy, stranger, own, port)
            for pod in (labels["ray-worker"], client):
                assert not admitted(policy, pod, "elsewhere", port)
        checked += 1
    assert checked >= 6


def test_clusters_of_one_rendering_do_not_reach_each_other() -> None:
    policies = {d["metadata"]["name"]: d for _, d in documents("default", "kuberay") if d["kind"] == "NetworkPolicy"}
    pods = {
        name: template["metadata"]["labels"]
        for _, document in documents("default", "kuberay")
        for template in templates_of(document)
        for name in [template["metadata"]["labels"]["app.kubernetes.io/instance"]]
        if template["metadata"]["labels"]["app.kubernetes.io/component"] == "ray-worker"
    }
    assert len(pods) == len(policies) == 9
    for name, policy in policies.items():
        assert [other for other, pod in pods.items() if admitted(policy, pod, "userrep", 6379)] == [name]


@pytest.mark.parametrize("name", VARIANTS)
def test_entrypoints_are_commands_that_exist(name: str) -> None:
    values = values_of(name)
    group = typer.main.get_command(app)
    for stage, job in values.jobs.present().items():
        words = shlex.split(entrypoint(stage, job))
        assert words == entrypoint(stage, job).split(" ")  # no shell changes it
        command, arguments = group, words[1:]
        while hasattr(command, "commands"):
            word, *arguments = arguments
            command = command.commands[word]
        command.make_context(stage, list(arguments))
        assert job_of(name, f"job-{stage}.yaml")["entrypoint"] == " ".join(words)


def test_the_daily_refresh_follows_its_table() -> None:
    spec = job_of("default", "schedule-embed")
    assert spec["entrypoint"].startswith("userrep embed ")
    assert spec["entrypoint"].endswith(" --since user_embeddings@champion")


def test_the_schedule_of_sweeps_is_the_one_of_userrep_sweep_schedule() -> None:
    spec = job_of("default", "schedule-sweep")
    container = spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    variables = {entry["name"]: entry["value"] for entry in container["env"]}
    request = RecurringSweep.model_validate_json(variables[REQUEST_VARIABLE])
    schedule = values_of("default").schedules.sweep
    assert schedule is not None
    assert (request.root, request.data, request.config) == (schedule.workdir, schedule.data, schedule.config)
    assert spec["entrypoint"] == "python -m pipelines.sweep_recurring"


def test_pods_have_what_their_preset_says() -> None:
    spec = job_of("large, named, own token", "job-pretrain")["rayClusterSpec"]
    (group,) = spec["workerGroupSpecs"]
    assert group["replicas"] == 4
    assert group["template"]["spec"]["containers"][0]["resources"]["limits"] == {
        "cpu": "96",
        "memory": "768Gi",
        "nvidia.com/gpu": "8",
    }


def test_an_object_store_comes_by_a_secret_and_a_claim_by_a_volume() -> None:
    for spec in ray_specs("object store alone").values():
        pod = spec["headGroupSpec"]["template"]["spec"]
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "userrep-s3"}}]
        assert [volume["name"] for volume in pod["volumes"]] == ["tmp"]
    kinds = {document["kind"] for _, document in documents("object store alone", "kuberay")}
    assert "PersistentVolumeClaim" not in kinds
    assert "PersistentVolumeClaim" in {document["kind"] for _, document in documents("default", "kuberay")}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kubernetes": {"head": "huge"}}, "'huge' is not among presets: cpu-large, cpu-small"),
        ({"jobs": {"pretrain": {"workdir": "/data/x"}}}, "/data/x: pods would not find it; allowed here: paths below"),
        ({"jobs": {"pretrain": {"workdir": "s3://b/x"}}}, "s3://b/x: pods would not find it"),
        ({"kubernetes": {"storage": {"s3_secret": "s"}}, "jobs": {"sweep": {"workdir": "s3://b/x"}}}, "s3://b/x"),
        ({"jobs": {"pretrain": {"overrides": ["a=$(rm)"]}}}, "String should match pattern"),
        ({"schedules": {"embed": {"cron": "* * * * *"}}}, "fires 1440 times a day"),
        ({"schedules": {"embed": {"time_zone": "Mars"}}}, "time zone 'Mars' is not known"),
        ({"kubernetes": {"groups": [{"name": "a", "preset": "gpu-1", "min": 5}]}}, "min 5 is larger than max 4"),
        ({"name": "a-name-that-is-longer-than-24"}, "at most 24 characters"),
        ({"image": "registry.example/userrep"}, "image"),
    ],
)
def test_values_that_no_cluster_could_run_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ClusterValues.parse(values)
