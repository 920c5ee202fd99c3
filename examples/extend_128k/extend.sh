#!/usr/bin/env bash
# One model from Hugging Face to 128K tokens and back, on one machine of 8 GPUs:
#
#   examples/extend_128k/extend.sh llama-3-8b models/Llama-3-8B corpus.jsonl books/
#
# NAME is that of a configuration beside this file; then the model's folder, JSON lines with a field "text" to train
# on, and a folder of long text files to judge with. For 64K: EXTEND=64k and the overrides of docs/evaluation.md behind
# the four arguments. On several machines the training line goes through examples/slurm_multi_node.sh.
set -euo pipefail
name=$1 model=$2 corpus=$3 texts=$4
shift 4
here=$(dirname "$0") extend=${EXTEND:-128k}
config=$here/$name.yaml checkpoint=checkpoints/$name-$extend run=runs/$name-$extend

python tools/preprocess_data.py "$corpus" --tokenizer "$model" --output "data/$name/long" --workers 16
python tools/convert_checkpoint.py import --hf "$model" --out "$checkpoint" --extend "$extend"
python tools/estimate.py "$config" --ranks 8 "$@"
torchrun --nproc-per-node 8 pretrain_anchor.py "$config" \
    checkpoint.pretrained="$checkpoint" checkpoint.directory="$run" "$@"
python tools/convert_checkpoint.py export --megatron "$run" --out "models/$name-$extend"
torchrun --nproc-per-node 8 tools/evaluate_long.py before="$checkpoint" after="$run" --tokenizer "$model" \
    --text "$texts" --documents "$texts" --lengths 4k 16k 64k 128k --greedy --output "results/$name-$extend"
