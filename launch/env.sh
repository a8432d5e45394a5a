# shellcheck shell=bash
# What every launcher here shares; it is sourced, not run. It reads the arguments, resolves nodes, ranks, addresses and
# the interface, sets what NCCL, gloo, DeepSpeed and the compilers read from the environment, prints what it resolved,
# and passes a scheduler's signal on to the training.
#
# Whatever is set in the environment already is kept: NCCL_DEBUG=INFO launch/torchrun.sh ... does what it says.
# A wrong argument is one line on stderr and exit code 2.

set -euo pipefail

CONTAINER=() # words before a rank's Python, of a site file
REQUEUE=75        # EX_TEMPFAIL: a checkpoint was written, start the same command again
GRACE=${GRACE:-110}  # seconds that the ranks have for that checkpoint, once they were asked to leave

die() {
    echo "${LAUNCHER:-launch}: $*" >&2
    exit 2
}

# SBATCH_OPTIONS, CONTAINER, PYTHON and the like of the site file, where there is one. SITE: its path.
read_site() {
    SBATCH_OPTIONS=() CONTAINER=() SITE=${SSM_LM_SITE:-$HERE/site.sh}
    if [ -f "$SITE" ]; then
        # shellcheck source=launch/site.example.sh
        source "$SITE"
    else
        [ -z "${SSM_LM_SITE:-}" ] || die "SSM_LM_SITE names $SITE, which is not there"
        SITE=
    fi
}

# The comment at the head of a launcher is its help.
usage() {
    sed -n '2,/^[^#]/{/^#SBATCH/d; s/^# \{0,1\}//p}' "$SCRIPT"
}

# OPTIONS, declared by the launcher, maps its options to variables. They come before the config; what comes after the config
# belongs to `ssm-lm train`. FLAGS does so for options without a value, which become 1. Sets those variables, DRY_RUN, and
# MODULE: what python -m is to run.
declare -A OPTIONS FLAGS
parse_arguments() {
    local option variable
    DRY_RUN=0 MODULE=()
    while [ $# -gt 0 ]; do
        case $1 in
            -h | --help) usage; exit 0 ;;
            --dry-run) DRY_RUN=1; shift ;;
            --network) MODULE=(ssm_lm doctor --network); shift; MODULE+=("$@"); return ;;
            --*)
                if [ -n "${FLAGS[$1]:-}" ]; then
                    printf -v "${FLAGS[$1]}" 1
                    shift
                    continue
                fi
                option=${1%%=*} variable=${OPTIONS[${1%%=*}]:-}
                if [ -z "$variable" ] && [ -n "${PASS_ON:-}" ]; then
                    PASSED+=("$1")
                    shift
                    continue
                fi
                [ -n "$variable" ] || die "unknown option $option before the config (options of training come after it); see --help"
                if [[ $1 == *=* ]]; then
                    printf -v "$variable" %s "${1#*=}"
                    shift
                else
                    [ $# -ge 2 ] || die "$option needs a value; see --help"
                    printf -v "$variable" %s "$2"
                    shift 2
                fi
                ;;
            *) break ;;
        esac
    done
    [ $# -gt 0 ] || die "which config? a YAML file, see configs/train/, or --network to test the network; see --help"
    [ -f "$1" ] || die "there is no config $1${PASSED:+ (options of $PASS_ON are written --name=value)}"
    MODULE=(ssm_lm train "$@")
}

whole_number() { # NAME VALUE LEAST
    if ! [[ $2 =~ ^[0-9]{1,9}$ ]] || [ "$((10#$2))" -lt "$3" ]; then
        die "$1 must be a whole number of at least $3, not '$2'"
    fi
}

# GPUs that this process may use, 0 where there is none.
count_gpus() {
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        [ -z "$CUDA_VISIBLE_DEVICES" ] && echo 0 && return
        tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .
    elif command -v nvidia-smi >/dev/null; then
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    else
        echo 0
    fi
}

# PYTHON: the one given, that of the repository's virtual environment, or the one on the path.
find_python() {
    local root
    [ -z "${CONTAINER[*]:-}" ] || { PYTHON=${PYTHON:-python3}; return; } # it is in the container
    root=$(dirname "$HERE")
    if [ -z "${PYTHON:-}" ]; then
        if [ -x "$root/.venv/bin/python" ]; then PYTHON=$root/.venv/bin/python; else PYTHON=$(command -v python3 || true); fi
    fi
    command -v "${PYTHON:-none}" >/dev/null || die "no Python at '${PYTHON:-}'; set PYTHON"
}

# NPROC: ranks on a node. One a GPU; without GPUs one, for more ranks on the same cores gain nothing.
resolve_ranks_per_node() {
    if [ -z "${NPROC:-}" ]; then
        NPROC=$(count_gpus)
        [ "$NPROC" -gt 0 ] || NPROC=1
    fi
    whole_number --nproc "$NPROC" 1
}

# HEAD and PORT from HEAD=HOST[:PORT]; [..] around an IPv6 address.
split_head() { # DEFAULT_PORT
    PORT=$1
    if [[ $HEAD =~ ^([^:]+|\[.*\]):([0-9]+)$ ]]; then HEAD=${BASH_REMATCH[1]} PORT=${BASH_REMATCH[2]}; fi
    HEAD=${HEAD#[} HEAD=${HEAD%]}
    whole_number "the port of --head" "$PORT" 1
}

# INTERFACE, ADDRESS, HEAD_ADDRESS, IS_HEAD from HEAD. Any that is given is kept.
resolve_addresses() {
    local found found_interface found_address found_head found_here wait=60
    [ "$DRY_RUN" = 0 ] || wait=0
    if [ -z "${INTERFACE:-}" ] || [ -z "${ADDRESS:-}" ] || [ -z "${HEAD_ADDRESS:-}" ] || [ -z "${IS_HEAD:-}" ]; then
        # shellcheck disable=SC2153  # HEAD is the launcher's
        found=$("${CONTAINER[@]}" "$PYTHON" -m ssm_lm.network "$HEAD" "$wait" 2>&1) || die "${found##*ssm-lm: }"
        read -r found_interface found_address found_head found_here <<<"${found##*$'\n'}"
        INTERFACE=${INTERFACE:-$found_interface} ADDRESS=${ADDRESS:-$found_address}
        HEAD_ADDRESS=${HEAD_ADDRESS:-$found_head} IS_HEAD=${IS_HEAD:-$found_here}
    fi
}

# ---- the environment of the ranks. SETTINGS lists what is set here, for the plan and for launchers that use ssh.
SETTINGS=() OWN=() # OWN: those of them that were not set before
default() { # NAME VALUE: unless it is set
    if [ -z "${!1+set}" ]; then
        export "$1=$2"
        OWN+=("$1")
    fi
    SETTINGS+=("$1")
}

set_environment() {
    local gpus
    gpus=$(count_gpus)
    # Both libraries otherwise guess an interface, and on a machine with several (docker0, a management network) the
    # nodes guess differently and wait for each other. "=" makes NCCL take the name as it is, not as a prefix.
    if [ -n "${INTERFACE:-}" ]; then
        default GLOO_SOCKET_IFNAME "$INTERFACE"
        default NCCL_SOCKET_IFNAME "=$INTERFACE"
    fi
    # Says which transport failed, once, and nothing else. INFO shows rings and transports: "NET/IB" is InfiniBand or
    # RoCE, "NET/Socket" is TCP.
    default NCCL_DEBUG WARN
    # A rank whose peer is gone ends with a named error when ddp_timeout (a key of the config) is over, and does not
    # wait for ever; it is also what lets torchrun restart the others.
    default TORCH_NCCL_ASYNC_ERROR_HANDLING 1
    # The last collectives of every rank are written to a file when one times out: which rank was not there.
    default TORCH_FR_BUFFER_SIZE 2000
    default TORCH_NCCL_DUMP_ON_TIMEOUT 1
    # Without it the survivors of a lost node never publish MASTER_ADDR again, and a node that comes back dies with
    # them after 60 s (dynamic_rendezvous.py caches the store's address).
    default TORCH_DISABLE_SHARE_RDZV_TCP_STORE 1
    # DeepSpeed looks for an accelerator and warns, once a rank; without a GPU, say so.
    [ "$gpus" -gt 0 ] || default DS_ACCELERATOR cpu
    # Threads for what runs on the CPU: the cores of the node, shared by its ranks.
    default OMP_NUM_THREADS "$(($(nproc) > NPROC ? $(nproc) / NPROC : 1))"
    # Output of ranks appears when it is written, not when a buffer is full or the process is killed.
    default PYTHONUNBUFFERED 1
    # Compiled kernels on the node's own disk: many ranks that write one folder of a shared file system corrupt it.
    local cache=${CACHE:-${TMPDIR:-/tmp}/ssm_lm-cache-$(id -u)}
    default TRITON_CACHE_DIR "$cache/triton"
    default TORCHINDUCTOR_CACHE_DIR "$cache/inductor"
    default TORCH_EXTENSIONS_DIR "$cache/torch_extensions"
}

# ---- the plan: lines of "name value", then the settings, then the command
print_plan() { # COMMAND...
    local name head=
    [ "${IS_HEAD:-0}" = 0 ] || head=", the head"
    [ -z "${NODES:-}" ] || echo "nodes        $NODES x $NPROC ranks = $RANKS ranks"
    [ -z "${ADDRESS:-}" ] || echo "this node    $ADDRESS on $INTERFACE$head"
    [ -z "${MEETING:-}" ] || echo "meeting at   $MEETING"
    echo "python       $PYTHON, on $(uname -n)"
    for name in "${SETTINGS[@]}"; do echo "setting      $name=${!name}"; done
    echo "command      $(quoted "$@")"
}

quoted() {
    local word line=
    for word; do
        if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then line+=" $word"; else line+=" $(printf %q "$word")"; fi
    done
    echo "${line# }"
}

# The dry run: the plan above, then what the config makes of these ranks (batch, tokens a step); nothing is started.
# With `--nodes MIN:MAX` that is for MAX. A config that is wrong ends it with exit code 2, before a queue is waited in.
finish_dry_run() {
    if [ "${MODULE[1]}" = train ]; then
        WORLD_SIZE=${RANKS##* } "${CONTAINER[@]}" "$PYTHON" -m "${MODULE[@]}" --dry-run
    fi
    exit 0
}

# supervise COMMAND...: run it to its end and exit as it does. On SIGTERM, SIGUSR1 or SIGINT the ranks are asked to leave:
# they write one checkpoint together, and the exit code is 75. `ask_to_leave`, which the launcher defines, asks them.
# DETACH gives the command a session of its own, for a Ctrl-C is to reach it through here alone. Ranks that it leaves
# behind are killed: those of a torchrun that was itself killed would train on, beside the ones that take their place.
DETACH=(setsid)
supervise() {
    local code=0
    LEAVING=0
    # a mark in the environment of every rank, by which it is found
    export SSM_JOB=${SSM_JOB:-$(uname -n)-$$-$RANDOM}
    "${DETACH[@]}" "$@" &
    CHILD=$!
    trap 'leave' TERM USR1 INT
    while :; do
        code=0
        wait "$CHILD" || code=$?
        kill -0 "$CHILD" 2>/dev/null || break # or a signal has ended `wait` alone
    done
    bash -c "$(to_ranks KILL)"
    if [ "$LEAVING" = 1 ] && [ "$code" != 0 ]; then code=$REQUEUE; fi
    [ "$code" != "$REQUEUE" ] || echo "$LAUNCHER: exit code $REQUEUE: start the same command again"
    return "$code"
}

# Shell text that sends a signal to every rank of this job on the machine where it runs.
to_ranks() { # SIGNAL
    printf '%s' "for p in /proc/[0-9]*; do grep -qszx SSM_JOB=$SSM_JOB \$p/environ && grep -qsz ^RANK= \$p/environ &&
        tr '\\0' ' ' <\$p/cmdline | grep -q 'ssm_lm [td]' && kill -$1 \${p#/proc/}; done 2>/dev/null; true"
}

leave() {
    [ "$LEAVING" = 0 ] || return 0
    LEAVING=1
    echo "$LAUNCHER: asked to leave; the ranks have $GRACE s to write a checkpoint"
    ask_to_leave
}
