#!/usr/bin/env bash
# One rank under srun; launch/slurm.sbatch starts it. Slurm's variables become those that torch and DeepSpeed read, and the
# rank takes the place of this shell, so that it gets Slurm's signals itself.
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd) LAUNCHER=launch/slurm_task.sh
# shellcheck source=launch/env.sh
source "$HERE/env.sh"
read_site

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
# shellcheck disable=SC2034  # read in env.sh
HEAD=$MASTER_ADDR NPROC=$LOCAL_WORLD_SIZE DRY_RUN=0 CACHE=${CACHE:-${SLURM_TMPDIR:-${TMPDIR:-/tmp}}/ssm_lm-cache-$(id -u)}
resolve_addresses
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
set_environment
# the Hub's files too: hundreds of ranks that lock files of one home folder wait for each other
default HF_HOME "$CACHE/huggingface"
[ "$LOCAL_RANK" != 0 ] || echo "node $SLURM_NODEID: $ADDRESS on $INTERFACE, ranks from $RANK, caches in $CACHE"
exec "${CONTAINER[@]}" "$PYTHON" -m "$@"
