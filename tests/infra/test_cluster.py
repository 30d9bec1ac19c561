"""A real local cluster, once, in a process of its own. Run: pytest tests/infra/test_cluster.py"""

import json
from ipaddress import ip_address
from pathlib import Path

import pytest

from bitdgdm.infra.cluster import connect
from bitdgdm.infra.errors import ClusterUnavailable

PROGRAM = """
import contextlib, json, sys
from bitdgdm.infra.cluster import connect, disconnect
cluster = connect(cpus=2)
again = connect(cpus=7)
import psutil, ray

@ray.remote(num_cpus=1)
def look():
    import os
    import bitdgdm.infra.commit
    print("a worker's word")
    return os.environ["OMP_NUM_THREADS"], list(bitdgdm.__path__)

@ray.remote(num_cpus=1)
class Holds:
    def ready(self):
        return True

threads, path = ray.get(look.remote())
pool = [Holds.remote() for _ in range(cluster.cpus)]
assert all(ray.get([actor.ready.remote() for actor in pool]))
ray.get(look.remote())  # the pool has all it may claim and a task still finds room
listens = set()
for process in psutil.Process().children(recursive=True):
    with contextlib.suppress(psutil.NoSuchProcess):  # a helper of Ray that ends meanwhile listens nowhere
        listens |= {c.laddr.ip for c in process.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN}
dashboard = ray._private.worker._global_node.webui_url
print(json.dumps([cluster.cpus, again == cluster, cluster.local, cluster.nodes, cluster.gpus, threads, path,
                  sorted(listens), dashboard]))
disconnect()
assert not ray.is_initialized()
"""


def test_a_local_cluster_is_quiet_private_and_leaves_room_for_one_task(python, tmp_path):
    root = str(Path(__file__).resolve().parents[2])
    # a bare checkout: the program finds bitdgdm by sys.path alone, the workers must be told
    code = f"import sys; sys.path.insert(0, {root!r})\n{PROGRAM}"
    environment = {"PYTHONPATH": "", "RAY_ADDRESS": "", "CUDA_VISIBLE_DEVICES": ""}
    process = python(code, env=environment, cwd=tmp_path)
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 0, errors
    cpus, same, local, nodes, gpus, threads, path, listens, dashboard = json.loads(output)
    assert (cpus, same, local, nodes, gpus) == (2, True, True, 1, 0)
    assert (threads, path) == ("1", [root])
    assert listens and all(ip_address(ip.removeprefix("::ffff:")).is_loopback for ip in listens)
    assert not dashboard
    assert errors == ""


@pytest.mark.parametrize("form", ["127.0.0.1:{}", "ray://127.0.0.1:{}", "localhost:{}"])
def test_a_cluster_that_is_not_there_is_told_at_once(form, unused_port, monkeypatch, one_line):
    address = form.format(unused_port)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ClusterUnavailable) as caught:
        connect()
    assert address in one_line(caught.value) and caught.value.exit_code == 75
