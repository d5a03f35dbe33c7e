#!/bin/bash
#SBATCH --job-name=mbfn
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --time=240
#SBATCH --signal=USR1@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --chdir=/lustre/me
#SBATCH --output=/lustre/logs/%j.log
#SBATCH --partition=batch
#SBATCH --account=my_account

run=/lustre/me/runs/70b
job=/lustre/me/runs/70b/slurm/job_0.json
attempt="$run/slurm/${SLURM_JOB_ID}_${SLURM_RESTART_COUNT:-0}"
mkdir -p "$attempt"
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR=$(scontrol -o show node "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
export HF_HOME=/lustre/cache/huggingface
srun --kill-on-bad-exit=1 --container-image=/lustre/images/mbfn.sqsh --container-mounts=/lustre:/lustre --container-workdir=/lustre/me --no-container-mount-home python -u -m mbfn.launch.slurm_task "$job" "$attempt"
code=$?
if [ $code -eq 0 ] && [ -e "$attempt/saved" ]; then
  if [ "${SLURM_RESTART_COUNT:-0}" -lt 20 ] && [ "$(squeue -h -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID" && sleep 60  # Slurm ends this script
  fi
  code=75
fi
exit $code
