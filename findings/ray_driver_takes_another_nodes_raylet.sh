#!/usr/bin/env bash
# Ray 2.55.1: where several nodes of a cluster see one another's processes, a program on any of them joins the head's node.
#
# `ray.init(address=...)` looks for the raylets of its machine in the process list and takes the head's first. Nodes in network
# namespaces, or containers that share a PID namespace, have networks of their own and one process list: a program that starts
# beside the second node's raylet is then a driver of the head's node, advertises the head's address, and resources of "its own"
# node are those of another one. `ray start --node-ip-address` of the second node does not help; `_node_ip_address` does, an
# argument of `ray.init` without a place in the documentation.
#
# Needs the right to make network namespaces (root). Two nodes with one processor each, on addresses of a link of their own.
set -euo pipefail
place=$(mktemp -d)
head="ray-a-$$" other="ray-b-$$"
clean() {
  for name in "$head" "$other"; do
    ip netns pids "$name" 2>/dev/null | xargs -r kill -9 2>/dev/null || true
    ip netns del "$name" 2>/dev/null || true
  done
  rm -rf "$place"
}
trap clean EXIT
ip netns add "$head" 2>/dev/null || { echo "needs the right to make network namespaces" >&2; exit 2; }
ip netns add "$other"
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check ray==2.55.1
ip link add link-a netns "$head" type veth peer name link-b netns "$other"
ip -n "$head" addr add 10.99.0.1/24 dev link-a
ip -n "$other" addr add 10.99.0.2/24 dev link-b
for name in "$head" "$other"; do ip -n "$name" link set lo up; done
ip -n "$head" link set link-a up
ip -n "$other" link set link-b up

start() { ip netns exec "$1" "$place/venv/bin/ray" start "${@:2}" --num-cpus 1 --disable-usage-stats >"$place/$1.log" 2>&1; }
start "$head" --head --port 6379 --node-ip-address 10.99.0.1 --include-dashboard false --temp-dir "$place/ray"
start "$other" --address 10.99.0.1:6379 --node-ip-address 10.99.0.2
cat > "$place/where.py" <<'PYTHON'
import sys
import warnings

warnings.simplefilter("ignore")
import ray

given = {"_node_ip_address": sys.argv[1]} if len(sys.argv) > 1 else {}
ray.init(address="10.99.0.1:6379", log_to_driver=False, logging_level="ERROR", **given)
own = ray.get_runtime_context().get_node_id()
print(*(node["NodeManagerAddress"] for node in ray.nodes() if node["NodeID"] == own))
PYTHON
plain=$(ip netns exec "$other" "$place/venv/bin/python" "$place/where.py" 2>/dev/null)
told=$(ip netns exec "$other" "$place/venv/bin/python" "$place/where.py" 10.99.0.2 2>/dev/null)
echo "started beside the raylet of 10.99.0.2: the driver is on $plain; with _node_ip_address: on $told"
test "$plain" = 10.99.0.1
test "$told" = 10.99.0.2
# Seen (Ray 2.55.1, Python 3.11.7):
# started beside the raylet of 10.99.0.2: the driver is on 10.99.0.1; with _node_ip_address: on 10.99.0.2
