#!/usr/bin/env bash
# Train on several nodes with torchrun: start this on every one of them, with the same arguments.
#
#   launch/torchrun.sh --nodes 4 --head node0 configs/train/wikitext103.yaml [--key value ...]
#   launch/torchrun.sh --nodes 2:4 --head node0 CONFIG      elastic: goes on while at least 2 nodes are there
#   launch/torchrun.sh --nodes 4 --head node0 --network     test the network instead of training
#
# Options, before the config:
#   --nodes N | MIN:MAX   how many nodes take part                                      (1; Kubernetes: PET_NNODES)
#   --nproc N             ranks on a node             (its GPUs, or 1 where there are none; PET_NPROC_PER_NODE)
#   --head HOST[:PORT]    the node where the others meet; port 29400                    (PET_RDZV_ENDPOINT)
#   --id NAME             of the job, the same on all nodes                             (ssm_lm; PET_RDZV_ID)
#   --max-restarts N      how often lost or failed ranks are started again              (10; PET_MAX_RESTARTS)
#   --join-timeout S      how long nodes wait for each other                            (900)
#   --last-call S         elastic: how long to wait for more nodes once MIN are there   (30)
#   --head-timeout S      a head that is silent for so long is given up                 (300)
#   --interface NAME      of the network between the nodes            (the one over which the head is reached)
#   --dry-run             print everything, start nothing
#
# SIGTERM or SIGUSR1 to this script: the ranks write a checkpoint, this node leaves with exit code 75, and the others wait
# for it (N) or go on without it (MIN:MAX). When a rank or a node is lost without a word, the others start again from the
# last whole checkpoint in the same way. The loss of the head ends the job, with 75: whoever started it starts it again.
set -euo pipefail
SCRIPT=${BASH_SOURCE[0]} HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) LAUNCHER=launch/torchrun.sh
# shellcheck source=launch/env.sh
source "$HERE/env.sh"

NODES=${PET_NNODES:-1} NPROC=${PET_NPROC_PER_NODE:-} HEAD=${PET_RDZV_ENDPOINT:-} ID=${PET_RDZV_ID:-ssm_lm}
MAX_RESTARTS=${PET_MAX_RESTARTS:-10} JOIN_TIMEOUT=900 LAST_CALL=30 HEAD_TIMEOUT=300
OPTIONS=([--nodes]=NODES [--nproc]=NPROC [--head]=HEAD [--id]=ID [--max-restarts]=MAX_RESTARTS
    [--join-timeout]=JOIN_TIMEOUT [--last-call]=LAST_CALL [--head-timeout]=HEAD_TIMEOUT
    [--interface]=INTERFACE)
parse_arguments "$@"
find_python
resolve_ranks_per_node

LEAST=${NODES%%:*} MOST=${NODES##*:}
[ "$NODES" = "$LEAST" ] || [ "$NODES" = "$LEAST:$MOST" ] || die "--nodes must be N or MIN:MAX, not '$NODES'"
whole_number --nodes "$LEAST" 1
whole_number --nodes "$MOST" "$LEAST"
whole_number --max-restarts "$MAX_RESTARTS" 0
whole_number --join-timeout "$JOIN_TIMEOUT" 1
whole_number --last-call "$LAST_CALL" 1
whole_number --head-timeout "$HEAD_TIMEOUT" 1
RANKS=$((MOST * NPROC))
[ "$LEAST" = "$MOST" ] || RANKS="$((LEAST * NPROC)) to $RANKS"

if [ -z "$HEAD" ]; then
    [ "$MOST" = 1 ] || die "--head HOST is needed for several nodes"
    HEAD=127.0.0.1
fi
split_head 29400
resolve_addresses
set_environment
[[ $HEAD_ADDRESS != *:* ]] || HEAD_ADDRESS="[$HEAD_ADDRESS]" # IPv6
MEETING="$HEAD_ADDRESS:$PORT, job $ID"

COMMAND=("$PYTHON" -m torch.distributed.run
    --nnodes "$NODES" --nproc-per-node "$NPROC" --max-restarts "$MAX_RESTARTS"
    --rdzv-backend c10d --rdzv-endpoint "$HEAD_ADDRESS:$PORT" --rdzv-id "$ID"
    # is_host: torch looks for the host of the store by comparing names, and where the head's name does not resolve to the
    # address that the others use, all nodes become clients and time out; so it is said here
    --rdzv-conf "is_host=$IS_HEAD,join_timeout=$JOIN_TIMEOUT,last_call_timeout=$LAST_CALL"
    # or the ranks are told to meet at this machine's full name, which other nodes may not know
    --local-addr "$ADDRESS"
    # torchrun gives ranks 30 s after a signal, less than a checkpoint may take
    --signals-to-handle "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1" --shutdown-timeout "$GRACE"
    -m "${MODULE[@]}")

print_plan "${COMMAND[@]}"
[ "$DRY_RUN" = 0 ] || finish_dry_run

ask_to_leave() { kill -TERM "$CHILD"; } # torchrun passes it to its ranks, waits for them and does not restart them

# torchrun itself waits for a silent head for ever, its ranks long ended by their own timeout
watch_head() {
    "$PYTHON" -m ssm_lm.network watch "${HEAD_ADDRESS//[][]/}" "$PORT" "$HEAD_TIMEOUT" && kill -USR2 $$
}
give_up() {
    echo "$LAUNCHER: the head $HEAD_ADDRESS has not answered for $HEAD_TIMEOUT s; the job cannot go on without it" >&2
    LEAVING=1
    kill -KILL "$CHILD"
}
if [ "$IS_HEAD" = 0 ]; then
    trap give_up USR2
    watch_head &
    WATCHER=$!
    trap 'kill $(cat "/proc/$WATCHER/task/$WATCHER/children" 2>/dev/null) "$WATCHER" 2>/dev/null || true' EXIT
fi
supervise "${COMMAND[@]}"
