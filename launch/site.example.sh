# shellcheck shell=bash disable=SC2034,SC1091  # read by slurm.sbatch and slurm_task.sh; the modules are the site's
# What a site wants of every Slurm job. Copy this file to launch/site.sh, which git ignores, or name it by SSM_LM_SITE,
# and keep the lines that you need. It is bash, and read three times: where `launch/slurm.sbatch CONFIG` submits the job, in
# the batch script on the first node, and by every rank.

# Options of sbatch, one a word, each --NAME=VALUE. What is said on the command line goes before them, and they go before
# the #SBATCH lines of slurm.sbatch: `launch/slurm.sbatch --dry-run CONFIG` prints what comes of it. A plain
# `sbatch launch/slurm.sbatch` does not read them.
SBATCH_OPTIONS=(--partition=gpu --account=my_project --time=24:00:00 --ntasks-per-node=4 --gpus-per-node=4)

# Options of srun, in one word: --mpi=none, or --container-image=IMAGE --container-mounts=/project where the site has pyxis.
SRUN_OPTIONS=""

# Called in the batch script before the ranks start, who get what it exports: modules, a virtual environment.
site_setup() {
    source /etc/profile.d/modules.sh
    module load cuda
}

# The words before every rank's Python: a container of Apptainer or Singularity. PYTHON is the one in it then, and the
# repository, the data and the output folder have to be seen in it.
# CONTAINER=(apptainer exec --nv --bind /project /project/ssm_lm.sif)
# PYTHON=python3

# The folder of a node's own disk for what is compiled (default: SLURM_TMPDIR, or TMPDIR).
# CACHE=/local/$USER/ssm_lm
