#!/usr/bin/env bash
# Train on this machine, one rank a GPU.
#
#   launch/single_node.sh configs/train/quickstart.yaml [--key value ...]
#   launch/single_node.sh --network                       test the links between the GPUs instead of training
#
# Options, before the config:
#   --nproc N          ranks                                            (the GPUs, or 1 where there are none)
#   --max-restarts N   how often failed ranks are started again         (3)
#   --dry-run          print everything, start nothing
#
# SIGTERM, SIGUSR1 or Ctrl-C: the ranks write a checkpoint and the exit code is 75; the same command goes on from it.
set -euo pipefail
SCRIPT=${BASH_SOURCE[0]} HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) LAUNCHER=launch/single_node.sh
# shellcheck source=launch/env.sh
source "$HERE/env.sh"

NODES=1 NPROC='' MAX_RESTARTS=3
# shellcheck disable=SC2034  # read by parse_arguments
OPTIONS=([--nproc]=NPROC [--max-restarts]=MAX_RESTARTS)
parse_arguments "$@"
find_python
resolve_ranks_per_node
whole_number --max-restarts "$MAX_RESTARTS" 0
# shellcheck disable=SC2034  # read by print_plan
RANKS=$NPROC MEETING="a free port of this machine"
set_environment

COMMAND=("$PYTHON" -m torch.distributed.run
    --standalone --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS"
    --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --shutdown-timeout "$GRACE"
    -m "${MODULE[@]}")

print_plan "${COMMAND[@]}"
[ "$DRY_RUN" = 0 ] || finish_dry_run

ask_to_leave() { kill -TERM "$CHILD"; } # torchrun passes it to its ranks, waits for them and does not restart them
supervise "${COMMAND[@]}"
