#!/usr/bin/env bash
# Train on several nodes with DeepSpeed's launcher and its hostfile (lines of "HOST slots=RANKS").
#
#   launch/deepspeed.sh --hostfile hostfile CONFIG [--key value ...]            on one machine; it starts the others by pdsh
#   launch/deepspeed.sh --hostfile hostfile --no-ssh --node-rank I CONFIG ...   on every machine; I: its line, from 0
#   launch/deepspeed.sh --hostfile hostfile --network                           test the network instead of training
#
# Options, before the config:
#   --hostfile FILE     the nodes                                         (/job/hostfile)
#   --head HOST[:PORT]  where the ranks meet; port 29500                  (the first host of the file)
#   --no-ssh            start the ranks of this machine alone
#   --node-rank I       with --no-ssh: which line of the hostfile this machine is
#   --interface NAME    of the network between the nodes                  (the one over which the head is reached)
#   --dry-run           print everything, start nothing
#
# With pdsh, all nodes need this path, this Python and the config at the same place, and ssh without a password.
# SIGTERM, SIGUSR1 or Ctrl-C: the ranks write a checkpoint and the exit code is 75; the same command goes on from it.
# This launcher never restarts: a lost rank or node ends the job.
set -euo pipefail
SCRIPT=${BASH_SOURCE[0]} HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) LAUNCHER=launch/deepspeed.sh
# shellcheck source=launch/env.sh
source "$HERE/env.sh"

HOSTFILE=/job/hostfile HEAD='' NODE_RANK='' NO_SSH=0
OPTIONS=([--hostfile]=HOSTFILE [--head]=HEAD [--node-rank]=NODE_RANK [--interface]=INTERFACE)
FLAGS=([--no-ssh]=NO_SSH)
parse_arguments "$@"
find_python
[ -f "$HOSTFILE" ] || die "there is no hostfile $HOSTFILE"

# ---- the hostfile: its hosts, and the most ranks on one of them
HOSTS=() RANKS=0 NPROC=1
while read -r line; do
    line=${line%%#*}
    [[ $line =~ [^[:space:]] ]] || continue
    [[ $line =~ ^([^[:space:]]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$ ]] || die "$HOSTFILE: a line must be 'HOST slots=N', not '$line'"
    HOSTS+=("${BASH_REMATCH[1]}")
    RANKS=$((RANKS + BASH_REMATCH[2]))
    [ "${BASH_REMATCH[2]}" -le "$NPROC" ] || NPROC=${BASH_REMATCH[2]}
done <"$HOSTFILE"
[ "${#HOSTS[@]}" -gt 0 ] || die "$HOSTFILE names no host"
NODES=${#HOSTS[@]}
if [ "$NO_SSH" = 1 ]; then
    whole_number --node-rank "$NODE_RANK" 0
    [ "$NODE_RANK" -lt "$NODES" ] || die "--node-rank must be less than the $NODES hosts of $HOSTFILE, not $NODE_RANK"
elif [ -n "$NODE_RANK" ]; then
    die "--node-rank goes with --no-ssh"
fi

HEAD=${HEAD:-${HOSTS[0]}}
split_head 29500
resolve_addresses
set_environment
MEETING="$HEAD_ADDRESS:$PORT"
export SSM_JOB
SSM_JOB=$(uname -n)-$$-$RANDOM # see supervise; here it goes to the other nodes too

COMMAND=("$PYTHON" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --master_addr "$HEAD_ADDRESS" --master_port "$PORT")
if [ "$NO_SSH" = 1 ]; then
    COMMAND+=(--no_ssh --node_rank "$NODE_RANK")
else
    # pdsh passes the words through a shell on the other side, and fills in what begins with %
    for word in "${MODULE[@]}"; do
        [[ $word =~ ^[A-Za-z0-9_./:=,@+\ -]*$ ]] || die "pdsh cannot pass '$word' on as it is; write it into the config"
    done
    # force_multi: with one host in the file DeepSpeed would start the ranks here, whatever the host's name
    COMMAND+=(--launcher pdsh --force_multi)
fi
COMMAND+=(--no_local_rank --module "${MODULE[@]}")

# ---- .deepspeed_env: the settings for the other nodes; of the rest of the environment DeepSpeed passes on only PYTHON*
# (and, where it sees a GPU, NCCL*)
deepspeed_env() {
    local name
    for name in "${SETTINGS[@]}" SSM_JOB $(compgen -e | grep -E '^(HF_|NCCL_|GLOO_|TORCH_|WANDB_)'); do
        # guessed from this machine, which may be a login node: the ranks find these out themselves
        if [[ $name =~ ^(OMP_NUM_THREADS|DS_ACCELERATOR)$ && " ${OWN[*]} " == *" $name "* ]]; then continue; fi
        echo "$name=${!name}"
    done | sort -u
    cat ~/.deepspeed_env .deepspeed_env 2>/dev/null | grep '=' || true
}

print_plan "${COMMAND[@]}"
[ "$DRY_RUN" = 0 ] || finish_dry_run

if [ "$NO_SSH" = 0 ]; then
    command -v pdsh >/dev/null || die "pdsh is not installed (apt-get install pdsh); or use --no-ssh on every node"
    DS_ENV_FILE=$(mktemp)
    export DS_ENV_FILE
    trap 'rm -f "$DS_ENV_FILE"' EXIT
    deepspeed_env >"$DS_ENV_FILE"
fi

# The ranks are asked themselves, not the launcher: on SIGTERM that kills them after 30 s, and over pdsh it runs `pkill -f`
# on every host, which ends all DeepSpeed jobs of this Python there. One rank of the job is enough, for they agree.
ask_to_leave() {
    # shellcheck disable=SC2029  # SSM_JOB is to be filled in here
    if [ "$NO_SSH" = 1 ]; then bash -c "$(to_ranks USR1)"; else ssh "${HOSTS[0]}" "$(to_ranks USR1)"; fi
}
supervise "${COMMAND[@]}"
