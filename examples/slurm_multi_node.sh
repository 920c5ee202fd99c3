#!/usr/bin/env bash
#SBATCH --job-name=anchor-128k
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=anchor-128k.%j.log
#
# A run on several machines that ends in good order before its time is over or when it is preempted, and comes back.
#
#     sbatch examples/slurm_multi_node.sh run.yaml [section.field=value ...]
#
# Ten minutes before the end Slurm signals this script, which asks every rank to stop: they finish the step, save and
# leave outcome.json in checkpoint.directory. If that says "stopped" and not "finished", the job is queued again and
# goes on from there. A rank that dies is brought back by torchrun without Slurm, up to --max-restarts times; a job
# whose machine is lost is queued again by Slurm (--requeue). checkpoint.directory has to be on a disk that all
# machines share.
set -uo pipefail

config=$1
shift
directory=$(python - "$config" "$@" << 'PYTHON'
import sys
from anchor_megatron.config import load_config
print(load_config(sys.argv[1], sys.argv[2:]).checkpoint.directory)
PYTHON
) || exit 2
if [[ $directory == None ]]; then
    echo "slurm_multi_node.sh: checkpoint.directory: got null, expected a folder that all machines share" >&2
    exit 2
fi
rm -f "$directory/outcome.json"

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# a store of its own for every start: torchrun would keep the addresses of ranks that are gone
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS=8

# torchrun itself must outlive the signal, which its ranks take: they install handlers of their own
srun --kill-on-bad-exit=0 bash -c 'trap "" USR1; exec "$@"' rank \
    torchrun --nnodes "$SLURM_NNODES" --nproc-per-node 8 --max-restarts 3 --shutdown-timeout 120 \
    --rdzv-backend c10d --rdzv-endpoint "$first:29400" --rdzv-id "$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    pretrain_anchor.py "$config" "$@" &
job=$!

ask_to_stop() {
    echo "slurm_multi_node.sh: asking the ranks to stop"
    scancel --signal=USR1 "$SLURM_JOB_ID" # to all processes of its steps, not to this script
}
trap ask_to_stop USR1 TERM

wait "$job"
status=$?
while kill -0 "$job" 2> /dev/null; do # a signal ends `wait` early
    wait "$job"
    status=$?
done

if grep -qs '"outcome": "stopped"' "$directory/outcome.json"; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
