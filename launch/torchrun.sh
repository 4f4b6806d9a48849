#!/usr/bin/env bash
# One torchrun agent on this host. Run the same line on every host, with its own NODE_RANK:
#
#   NNODES=3 NODE_RANK=0 MASTER_ADDR=host0.example launch/torchrun.sh configs/experiments/three-regions.yaml [key=value ...]
#   ... launch/torchrun.sh profile --out cluster.yaml          (or generate, evaluate, collect: any with its options)
#
# NODE_RANK follows the order of `nodes` in the cluster file, so that each plan node runs on the host it was planned for.
# NPROC_PER_NODE (default 1) is the number of ranks, usually GPUs, on each host. Hosts need share no disk
# (docs/multi-node.md). A rank that dies is started again MAX_RESTARTS times: with one rank on each of three hosts or
# more the others go on meanwhile and take it in (docs/recovery.md), else all begin again at the newest checkpoint.
# SHUTDOWN_TIMEOUT (seconds, default 100) is what a signal leaves for the present step and a checkpoint; it must be
# longer than both, and shorter than what stops the job waits. Exit code 75: stopped by a signal, the same line goes on.
set -euo pipefail

: "${1:?usage: NNODES=N NODE_RANK=I MASTER_ADDR=HOST launch/torchrun.sh CONFIG [key=value ...]}"
: "${NNODES:?set NNODES to the number of hosts}"
: "${NODE_RANK:?set NODE_RANK to the index of this host, 0 to NNODES-1}"
: "${MASTER_ADDR:?set MASTER_ADDR to the name or address of the host with NODE_RANK 0}"
case "$1" in
  train | profile | generate | evaluate | collect) ;;
  *) set -- train --config "$@" ;;
esac

exec python -m skippipe.cli.agent \
  --nnodes "$NNODES" \
  --nproc-per-node "${NPROC_PER_NODE:-1}" \
  --node-rank "$NODE_RANK" \
  --master-addr "$MASTER_ADDR" \
  --master-port "${MASTER_PORT:-29500}" \
  --max-restarts "${MAX_RESTARTS:-3}" \
  --shutdown-timeout "${SHUTDOWN_TIMEOUT:-100}" \
  -m skippipe "$@"
