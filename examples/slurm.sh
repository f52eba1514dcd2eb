#!/usr/bin/env bash
# Four machines with eight GPUs each: sbatch examples/slurm.sh DATA OUT [key=value ...]
# The same line goes on where a job was stopped or ran out of time: --resume starts anew where
# there is nothing to resume. Not run on a cluster yet; docs/scale.md says what was tested.
#SBATCH --job-name=captune
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
set -euo pipefail

data=${1:?the data, on a folder that all machines share}
out=${2:?the folder of the run, shared as well}
shift 2

# Caption banks and features of photos: written by one process, read by all.
export CAPTUNE_CACHE=${CAPTUNE_CACHE:-$PWD/cache}
# The network between the machines, where the first one found is not it (ip -brief address).
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
exec srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" \
  --nproc-per-node 8 \
  --rdzv-backend c10d \
  --rdzv-endpoint "$first:29500" \
  --rdzv-id "$SLURM_JOB_ID" \
  -m captune train "$data" --out "$out" --resume "$@"
