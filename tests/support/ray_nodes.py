"""A Ray cluster of two nodes on this machine, each with one CPU: run as a script, driven by lines.

It prints the address when both nodes are there. "kill" ends the second node as a loss of power
would, "end" ends all; each is answered with a line.
"""

from __future__ import annotations

import os
import subprocess
import sys


class Nodes:
    """The cluster of this script, in a process of its own: Ray warns, and leaves threads behind."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "RAY_USAGE_STATS_ENABLED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = self._answer()

    def tell(self, command: str) -> None:
        """Send a command and wait until it is done."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        assert self._answer() == command

    def end(self) -> None:
        """Stop all nodes."""
        self.tell("end")
        self._process.communicate(timeout=60)

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("nodes: "):
                return line.removeprefix("nodes: ").strip()
        raise AssertionError("the cluster has ended")


def _main() -> None:
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 100 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    # Ray's own wait ends after 30 s, which a loaded machine may take.
    second = cluster.add_node(wait=False, **node)
    cluster.wait_for_nodes(timeout=240)
    sys.stdout.write(f"nodes: {cluster.address}\n")
    sys.stdout.flush()
    for line in sys.stdin:
        if line.strip() == "kill":
            cluster.remove_node(second, allow_graceful=False)
        elif line.strip() == "add":
            second = cluster.add_node(wait=False, **node)
            cluster.wait_for_nodes(timeout=240)
        else:
            cluster.shutdown()
        sys.stdout.write(f"nodes: {line}")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
