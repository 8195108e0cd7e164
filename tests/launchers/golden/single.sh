#!/bin/bash

# Parameters
#SBATCH --hold
#SBATCH --job-name=sdx-a-sweep-01234567
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --open-mode=append
#SBATCH --output=/cluster/home/ann/outputs/sweeps/a-sweep/slurm/1/%j_0_log.out
#SBATCH --requeue
#SBATCH --signal=USR2@120
#SBATCH --time=1440

# setup
set +eu
sdx_folders=(/cluster/home/ann/outputs/launches/a)
sdx_folder="${sdx_folders[${SLURM_ARRAY_TASK_ID:-0}]}"
rm -f "$sdx_folder/ended.json"
[ ! -e "$sdx_folder/stopped" ] || exit 75
if [ "${SLURM_RESTART_COUNT:-0}" -gt 22 ]; then
  echo "sdx: restarted $SLURM_RESTART_COUNT times, 22 are allowed; not again."
  exit 1
fi
export SLURM_EXIT_ERROR=121
trap : TERM USR2
echo; echo "sdx: start ${SLURM_RESTART_COUNT:-0} of job $SLURM_JOB_ID on $SLURM_JOB_NODELIST"

# command
export SUBMITIT_EXECUTOR=slurm
srun --unbuffered --output /cluster/home/ann/outputs/sweeps/a-sweep/slurm/1/%j_%t_log.out --kill-on-bad-exit=1 /opt/python/bin/python3.11 -P -u -m submitit.core._submit /cluster/home/ann/outputs/sweeps/a-sweep/slurm/1


# teardown
sdx_code=$?
/usr/bin/env PYTHONPATH=/cluster/home/ann/outputs/snapshots/0123456789abcdef:/cluster/home/ann/outputs/snapshots/0123456789abcdef/launchers /home/ann/venv/bin/python -P -m sdx_launchers.slurm.after "$sdx_folder" "$sdx_code" --max-requeues=20 --retries=2
sdx_cause=$?
[ "$sdx_code" -eq 0 ] || [ "$sdx_cause" -eq 0 ] || sdx_code=$sdx_cause
exit "$sdx_code"
