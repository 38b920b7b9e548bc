"""Ray itself where pods run it: on a root file system that cannot be written, with /tmp as its home."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.rendered import documents

# A PID namespace of its own: whatever Ray starts ends with it.
NAMESPACE = ["unshare", "--mount", "--pid", "--fork", "--mount-proc"]
SCRIPT = """\
set -eu
mount -t tmpfs tmpfs /tmp
mount -o remount,ro,bind /
if touch /written 2>/dev/null; then echo "the root file system can be written"; exit 1; fi
cd /tmp
"$RAY" start --head {options} --object-store-memory=100000000 --port="$PORT" \\
  --dashboard-host=127.0.0.1 --dashboard-port="$DASHBOARD" >&2
"$PYTHON" -c "
import ray
ray.init(address='127.0.0.1:$PORT', log_to_driver=False)
print(ray.get(ray.remote(num_cpus=0)(lambda: 'answered').remote()))
"
"""


@pytest.mark.slow
def test_ray_runs_on_a_read_only_root_file_system() -> None:
    if shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("namespaces of mounts cannot be made here")
    spec = next(d["spec"] for _, d in documents("default", "kuberay") if d["kind"] == "RayCluster")
    head = spec["headGroupSpec"]
    (container,) = head["template"]["spec"]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    written = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert written == {"/mnt/userrep", "/tmp"}
    variables = {entry["name"]: entry["value"] for entry in container["env"] if entry["name"] != "MLFLOW_TRACKING_URI"}
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        ports = {"PORT": str(first.getsockname()[1]), "DASHBOARD": str(second.getsockname()[1])}
    tools = {"RAY": str(Path(sys.executable).parent / "ray"), "PYTHON": sys.executable}
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 2}
    options = " ".join(f"--{name}={value}" for name, value in head["rayStartParams"].items())
    done = subprocess.run(
        [*NAMESPACE, "sh", "-c", SCRIPT.format(options=options)],
        env={"PATH": os.environ["PATH"], **variables, **ports, **tools, **token},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == ["answered"]
