#!/usr/bin/env bash
# One model from Hugging Face to a longer context and back, on one machine of 8 GPUs:
#
#   examples/extend_128k/extend.sh llama-3-8b 128k models/Llama-3-8B corpus.jsonl books/
#
# NAME is that of a configuration beside this file, then the context (16k, 64k or 128k), the model's folder, JSON lines
# with a field "text" to train on, a folder of long text files to judge with; what follows goes to pretrain_anchor.py.
# On several machines the training command goes through examples/slurm_multi_node.sh.
set -euo pipefail
name=$1 context=$2 model=$3 corpus=$4 texts=$5
shift 5
config=$(dirname "$0")/$name.yaml checkpoint=checkpoints/$name-$context run=runs/$name-$context
case $context in # 1 M tokens a step and the paper's theta
16k) shape=(data.seq_length=16384 model.rotary_base=1e6 parallel.context=1 train.global_batch_size=64) lengths="4k 16k" ;;
64k) shape=(data.seq_length=65536 model.rotary_base=5e6 parallel.context=4 train.global_batch_size=16) lengths="4k 16k 64k" ;;
128k) shape=(data.seq_length=131072) lengths="4k 16k 64k 128k" ;;
*) echo "context: got $context, expected 16k, 64k or 128k" >&2 && exit 2 ;;
esac
shape+=("model.max_position_embeddings=$((${context%k} * 1024))" "data.train=data/$name/long"
    "checkpoint.pretrained=$checkpoint" "checkpoint.directory=$run" "log.jsonl=$run/metrics.jsonl")

python tools/preprocess_data.py "$corpus" --tokenizer "$model" --output "data/$name/long" --workers 16
python tools/convert_checkpoint.py import --hf "$model" --out "$checkpoint" --extend "$context"
python tools/estimate.py "$config" --ranks 8 "${shape[@]}" "$@"
torchrun --nproc-per-node 8 pretrain_anchor.py "$config" "${shape[@]}" "$@"
python tools/convert_checkpoint.py export --megatron "$run" --out "models/$name-$context"
# shellcheck disable=SC2086 (several lengths)
torchrun --nproc-per-node 8 tools/evaluate_long.py before="$checkpoint" after="$run" --tokenizer "$model" \
    --text "$texts" --documents "$texts" --lengths $lengths --greedy --output "results/$name-$context"
