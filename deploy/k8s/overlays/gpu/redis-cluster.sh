#!/bin/sh
# Forms a Redis Cluster from the given nodes, which are empty or members already: `redis-cluster.sh NODE-1 … NODE-6`.
# The first three become masters and the others replicas. The script is idempotent. It makes a node that restarted empty a replica,
# and announces a node that restarted with another address.
set -eu
[ $# -ge 6 ] || { echo "error: at least six nodes are needed (three masters and three replicas); $# were given" >&2; exit 1; }

cli() { redis-cli -h "$@" 2>/dev/null | tr -d '\r'; }
info() { cli "$1" cluster info | sed -n "s/^$2://p"; }

assigned() {  # number of assigned slots, according to the node that knows most of them
  for node; do info "$node" cluster_slots_assigned; done | sort -n | tail -1
}

needy_master() {  # id of the master with the fewest replicas
  cli "$1" cluster nodes | awk '
    $3 ~ /fail/ {next}
    $3 ~ /master/ && NF > 8 {count[$1] += 0}
    $3 ~ /slave/ {count[$4]++; replica[$4]}
    END {for (id in count) if (best == "" || count[id] < count[best]) best = id; print best}'
}

converge() {  # performs one step; a refused step is repeated by the caller
  for node; do
    [ "$(cli "$node" ping)" = PONG ] || { state="$node does not answer"; return; }
  done
  for node; do
    for other; do cli "$node" cluster meet "$(getent ahostsv4 "$other" | awk '{print $1; exit}')" 6379 >/dev/null; done
  done
  for node; do
    [ "$(info "$node" cluster_known_nodes)" -ge $# ] || { state="$node does not know all other nodes yet"; return; }
  done
  if [ "$(assigned "$@")" -lt 16384 ]; then
    cli "$1" cluster addslotsrange 0 5460 >/dev/null
    cli "$2" cluster addslotsrange 5461 10922 >/dev/null
    cli "$3" cluster addslotsrange 10923 16383 >/dev/null
    state="slots are being assigned"; return
  fi
  for node; do
    [ "$(info "$node" cluster_state)" = ok ] || { state="$node is not ready"; return; }
  done
  for node; do
    if cli "$node" cluster nodes | grep myself | awk '{exit !($3 ~ /master/ && NF == 8)}'; then
      cli "$node" cluster replicate "$(needy_master "$node")" >/dev/null
      state="$node becomes a replica"; return
    fi
    if cli "$node" info replication | grep -q 'master_link_status:down'; then state="$node is synchronising with its master"; return; fi
  done
  state=
}

tries=120
while converge "$@"; [ -n "$state" ]; do
  tries=$((tries - 1))
  [ $tries -gt 0 ] || { echo "error: the cluster was not formed: $state" >&2; exit 1; }
  sleep 0.5
done
cli "$1" cluster nodes
echo "the cluster is formed: $(info "$1" cluster_size) masters, $(info "$1" cluster_known_nodes) nodes"
