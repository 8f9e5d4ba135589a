"""A Ray cluster of two one-CPU nodes on this machine; prints its address, and the CPUs of its nodes for each line of standard input.

It lives until that closes.
"""

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    print(cluster.address, flush=True)
    for _ in sys.stdin:
        nodes = [node for node in cluster.global_state.node_table() if node["Alive"]]
        print([int(node["Resources"]["CPU"]) for node in nodes], flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
