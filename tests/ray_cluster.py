"""A Ray cluster of one machine that serves one config twice, as a program: `ray_cluster.py PORT CONFIG`.

At `/` there are two replicas, under `/alone` there is one. It says `ready`; each line on its standard input kills all
replicas, to which it says `killed`; the end of its input stops the cluster. A program of its own, because Ray's
libraries warn, and its processes are to be counted.
"""

from __future__ import annotations

import sys

import ray
from ray import serve
from ray.util import list_named_actors

from brlite.ray_serve import build

LOOPBACK = "127.0.0.1"
STORE_BYTES = 80_000_000  # about the least that Ray takes


def main(port: int, config: str) -> None:
    ray.init(
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=STORE_BYTES,
        _node_ip_address=LOOPBACK,
    )
    try:
        serve.start(http_options={"host": LOOPBACK, "port": port})
        for name, prefix, replicas in (("pair", "/", "2"), ("alone", "/alone", "1")):
            arguments = {"config": config, "min_replicas": replicas, "max_replicas": replicas}
            serve.run(build(arguments), name=name, route_prefix=prefix)
        say("ready")
        for _ in sys.stdin:
            kill_replicas()
            say("killed")
        serve.shutdown()
    finally:
        ray.shutdown()


def kill_replicas() -> None:
    for actor in list_named_actors(all_namespaces=True):
        if actor["name"].startswith("SERVE_REPLICA::"):
            ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))


def say(word: str) -> None:
    print(word, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
