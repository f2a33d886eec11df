#!/bin/bash
#SBATCH --job-name=blip2mgm
#SBATCH --array=0-1                 # one task for each profile below
#SBATCH --nodes=1
#SBATCH --cpus-per-task=8
#SBATCH --mem=48G
#SBATCH --gpus=1                    # for the profiles 24gb and 80gb; the demo needs none
#SBATCH --time=04:00:00
#SBATCH --signal=B:TERM@300         # five minutes before the time is up
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=runs/slurm-%A_%a.log
# From the project's folder: sbatch examples/slurm.sh demo controls
# Each task runs one profile in a run folder of its own, so many can share runs/. Training saves as it goes: when the time
# is up, the job asks to be queued again, and the next one goes on from there.
set -uo pipefail
profiles=("$@")
[ "${#profiles[@]}" -gt 0 ] || profiles=(demo controls)
profile="${profiles[${SLURM_ARRAY_TASK_ID:-0}]:-}"
[ -n "$profile" ] || { echo "there is no profile number ${SLURM_ARRAY_TASK_ID:-0}; name as many as the array has tasks" >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
"${BLIP2MGM:-.venv/bin/blip2mgm}" run "$profile" &
run=$!
trap 'kill -TERM "$run" 2>/dev/null' TERM INT
wait "$run"; status=$?
[ "$status" -le 128 ] || { wait "$run"; status=$?; }   # the first wait ends with the signal, the second with the run
if [ "$status" -eq 130 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
  scontrol requeue "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
fi
exit "$status"
