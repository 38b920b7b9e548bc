"""Files of `ray up`: as Ray itself reads them before it starts a machine."""

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from pipelines.cluster_config import ClusterValues
from pipelines.cluster_ray_up import render_ray_up
from tests.support.rendered import VARIANTS, documents, rendered

SCHEMA = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
EVERYWHERE = ("0.0.0.0", "::", "*")


def clusters(name: str) -> dict[str, dict[str, Any]]:
    return {Path(file).stem: document for file, document in documents(name, "ray-up")}


@pytest.mark.parametrize("name", VARIANTS)
def test_files_fit_the_schema_of_ray(name: str) -> None:
    schema = json.loads(SCHEMA.read_text())
    assert set(clusters(name)) == {"aws", "gcp", "local"}
    for cluster in clusters(name).values():
        jsonschema.validate(cluster, schema)


def test_a_key_that_the_schema_lacks_is_seen() -> None:
    cluster = clusters("default")["aws"]
    with pytest.raises(jsonschema.ValidationError, match="setup_comands"):
        jsonschema.validate({**cluster, "setup_comands": []}, json.loads(SCHEMA.read_text()))


@pytest.mark.parametrize("provider", ["aws", "gcp", "local"])
def test_ray_takes_them_with_its_defaults(provider: str) -> None:
    prepared = prepare_config(clusters("default")[provider])
    validate_config(prepared)
    assert prepared["max_workers"] == (2 if provider == "local" else 4)
    assert sum(kind["min_workers"] for kind in prepared["available_node_types"].values()) == (provider == "local") * 2


@pytest.mark.parametrize("name", VARIANTS)
def test_dashboards_answer_the_machine_alone_and_the_token_is_asked_for(name: str) -> None:
    for cluster in clusters(name).values():
        (start,) = [line for line in cluster["head_start_ray_commands"] if "ray start" in line]
        options = start.split()
        assert "--dashboard-host=127.0.0.1" in options
        assert "--num-cpus=0" in options
        assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in options
        lines = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
        for line in [line for line in lines if "ray start" in line]:
            assert "RAY_AUTH_MODE=token" in line.split("ray start")[0]
        assert cluster["file_mounts"] == {"~/.ray/auth_token": "~/.ray/auth_token"}
        assert not [line for line in lines if any(host in line for host in EVERYWHERE)]


def test_clouds_give_no_machine_a_public_address() -> None:
    found = clusters("default")
    for name in ("aws", "gcp"):
        assert found[name]["provider"]["use_internal_ips"] is True
    for node_type in found["aws"]["available_node_types"].values():
        config = node_type["node_config"]
        assert config["SecurityGroupIds"] == ["sg-0123456789abcdef0"]  # else Ray makes one that is open to everybody
        assert config["MetadataOptions"]["HttpTokens"] == "required"
    for node_type in found["gcp"]["available_node_types"].values():
        for interface in node_type["node_config"]["networkInterfaces"]:
            assert "accessConfigs" not in interface


def test_containers_gain_no_rights() -> None:
    for cluster in clusters("default").values():
        options = cluster["docker"]["run_options"]
        assert {"--security-opt=no-new-privileges", "--cap-drop=ALL"} <= set(options)
        assert not [option for option in options if "privileged" in option or "docker.sock" in option]


def test_files_are_rendered_for_what_is_wanted() -> None:
    values = ClusterValues().with_overrides(["ray_up.gcp=null", "ray_up.local.workers=[a.example]"])
    files = render_ray_up(values)
    assert set(files) == {"aws.yaml", "local.yaml"}
    assert yaml.safe_load(files["local.yaml"])["provider"]["worker_ips"] == ["a.example"]
    assert len(rendered("default", "ray-up")) == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"local": {"workers": ["10.0.0.1"]}}, "an address is given twice"),
        ({"min_workers": 9}, "min_workers 9 is larger than max_workers 4"),
        ({"token_file": "hunter2"}, "token_file"),
        ({"aws": {"security_group": "sg-1; curl x"}}, "security_group"),
    ],
)
def test_refusals(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterValues.parse({"ray_up": values})
