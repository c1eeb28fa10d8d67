#!/usr/bin/env bash
# Run a training script of Megatron-LM on all machines of a Slurm job, one rank a task:
#
#   sbatch --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 launch/slurm.sh CONFIG SCRIPT [FLAG...]
#
# from the root of the checkout, in an environment that the compute nodes have too. What CONFIG, SCRIPT and FLAG are
# says `launch/megatron.sh -h`. Partition, account and time are given to sbatch; a directory on a drive of the node is
# named by `--ssdtrain-paths`, in which {local_rank} and {node} are replaced.
#SBATCH --job-name=ssdtrain
set -euo pipefail

: "${SLURM_JOB_ID:?run it with sbatch, or inside of salloc}"
# sbatch runs a copy of this file from another directory.
cd "${SLURM_SUBMIT_DIR:-$PWD}"
hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${MASTER_ADDR:-${hosts%%$'\n'*}}
# Jobs that share a machine should not share a port.
export MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}

exec srun --kill-on-bad-exit=1 launch/megatron.sh -S "$@"
