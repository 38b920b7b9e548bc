"""Cluster files of `ray up`: Amazon, Google, and machines that are there.

Ray runs in our image on every machine. The dashboard listens on the loopback address of the head alone (`ray dashboard
FILE` forwards it); every request needs the token, which `ray up` copies from the file of the caller.
"""

from typing import Any

from pipelines.cluster_config import ClusterValues
from pipelines.cluster_machines import AwsValues, GcpValues, LocalValues
from pipelines.kubernetes_yaml import document

TOKEN = "~/.ray/auth_token"  # where Ray looks for it, in the container
STOP = "ray stop"
HEAD, WORKER = "head", "worker"

COMMENT = """\
Needs {token} (`ray get-auth-token --generate`, mode 0600), which is copied to the machines.
The image runs as user {user_id}, so the SSH user must have that number to share the file with it.
The dashboard is bound to 127.0.0.1: reach it by `ray dashboard FILE`, then submit to http://127.0.0.1:8265.
{own}"""
AWS_COMMENT = """\
Your security group: all traffic inside of itself, port 22 from where you work, nothing else."""
GCP_COMMENT = """\
Machines have no public address. Your firewall: all traffic inside of the subnetwork, port 22 from where you work."""
LOCAL_COMMENT = """\
Close all ports but 22 to other networks: Ray's own ports are open between the machines, behind the token."""


def render_ray_up(values: ClusterValues) -> dict[str, str]:
    """Files by path below `ray-up/`."""
    clusters = values.ray_up
    files = {}
    if clusters.aws:
        files["aws.yaml"] = _document(values, _aws(values, clusters.aws), AWS_COMMENT)
    if clusters.gcp:
        files["gcp.yaml"] = _document(values, _gcp(values, clusters.gcp), GCP_COMMENT)
    if clusters.local:
        files["local.yaml"] = _document(values, _local(values, clusters.local), LOCAL_COMMENT)
    return files


def _document(values: ClusterValues, cluster: dict[str, Any], own: str) -> str:
    return document(cluster, COMMENT.format(token=values.ray_up.token_file, user_id=values.kubernetes.user_id, own=own))


def _aws(values: ClusterValues, aws: AwsValues) -> dict[str, Any]:
    def node(instance_type: str) -> dict[str, Any]:
        config: dict[str, Any] = {"InstanceType": instance_type}
        if aws.ami:
            config["ImageId"] = aws.ami
        config["SecurityGroupIds"] = [aws.security_group]
        config["SubnetId"] = aws.subnet
        config["BlockDeviceMappings"] = [
            {"DeviceName": "/dev/sda1", "Ebs": {"VolumeSize": 200, "VolumeType": "gp3", "Encrypted": True}}
        ]
        # Version 1 of that service gives the machine's rights to whoever makes a process fetch a URL.
        config["MetadataOptions"] = {"HttpTokens": "required", "HttpPutResponseHopLimit": 1}
        return config

    worker = node(aws.worker_type)
    if aws.worker_profile:
        worker["IamInstanceProfile"] = {"Arn": aws.worker_profile}
    provider = {
        "type": "aws",
        "region": aws.region,
        "availability_zone": aws.zones,
        "use_internal_ips": True,
        "cache_stopped_nodes": False,
    }
    return _cloud(values, provider, node(aws.head_type), worker)


def _gcp(values: ClusterValues, gcp: GcpValues) -> dict[str, Any]:
    def node(machine_type: str) -> dict[str, Any]:
        disk = {"diskSizeGb": 200, "sourceImage": gcp.source_image}
        return {
            "machineType": machine_type,
            "disks": [{"boot": True, "autoDelete": True, "type": "PERSISTENT", "initializeParams": disk}],
            # No accessConfigs: no public address.
            "networkInterfaces": [{"kind": "compute#networkInterface", "subnetwork": gcp.subnetwork}],
            "scheduling": {"onHostMaintenance": "TERMINATE", "automaticRestart": False},  # machines with GPUs need it
        }

    provider = {
        "type": "gcp",
        "region": gcp.region,
        "availability_zone": gcp.zone,
        "project_id": gcp.project,
        "use_internal_ips": True,
    }
    return _cloud(values, provider, node(gcp.head_type), node(gcp.worker_type))


def _local(values: ClusterValues, local: LocalValues) -> dict[str, Any]:
    provider = {"type": "local", "head_ip": local.head, "worker_ips": list(local.workers)}
    cluster = _cluster(values, provider, is_scaling=False)
    cluster["docker"]["run_options"].append(f"--volume={local.mount_path}:{local.mount_path}")
    return {**cluster, "max_workers": len(local.workers)}


def _cloud(
    values: ClusterValues, provider: dict[str, Any], head: dict[str, Any], worker: dict[str, Any]
) -> dict[str, Any]:
    clusters = values.ray_up
    return {
        **_cluster(values, provider, is_scaling=True),
        "max_workers": clusters.max_workers,
        "available_node_types": {
            HEAD: {"resources": {"CPU": 0}, "node_config": head},
            # Ray counts the CPUs and GPUs of a type of machine itself.
            WORKER: {
                "min_workers": clusters.min_workers,
                "max_workers": clusters.max_workers,
                "resources": {},
                "node_config": worker,
            },
        },
        "head_node_type": HEAD,
    }


def _cluster(values: ClusterValues, provider: dict[str, Any], is_scaling: bool) -> dict[str, Any]:
    clusters = values.ray_up
    return {
        "cluster_name": f"{values.name}-{provider['type']}",
        "provider": provider,
        "auth": {"ssh_user": clusters.ssh_user},
        "docker": {
            "image": f"{values.image}-ray-up",
            "container_name": values.name,
            "pull_before_run": True,
            "run_options": ["--ulimit=nofile=65536:65536", "--security-opt=no-new-privileges", "--cap-drop=ALL"],
        },
        **({"idle_timeout_minutes": clusters.idle_minutes} if is_scaling else {}),
        "file_mounts": {TOKEN: clusters.token_file},
        "head_start_ray_commands": [STOP, _start("--head --port=6379 --num-cpus=0 " + _HEAD_OPTIONS)],
        "worker_start_ray_commands": [STOP, _start("--address=$RAY_HEAD_IP:6379")],
    }


_HEAD_OPTIONS = "--dashboard-host=127.0.0.1 --dashboard-port=8265 --autoscaling-config=~/ray_bootstrap_config.yaml"


def _start(options: str) -> str:
    variables = "RAY_AUTH_MODE=token GLIBC_TUNABLES=glibc.malloc.hugetlb=1"
    return f"chmod 600 {TOKEN} && {variables} ray start {options} --disable-usage-stats"
