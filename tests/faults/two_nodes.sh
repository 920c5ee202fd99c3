#!/usr/bin/env bash
# Two "nodes" on one machine, each in a network namespace of its own, under torchrun's rendezvous: one is cut off
# while the run goes on, and brought back. Needs root (ip netns) on Linux; no GPU.
#
#     tests/faults/two_nodes.sh PREFIX OUTPUT      # PREFIX: a data set of tools/preprocess_data.py
#
# node 0 is 10.77.0.1 and keeps the rendezvous, node 1 is 10.77.0.2. The run is the same as on one machine:
# training goes on from the last checkpoint once the second node is back, and ends with outcome.json.
set -euo pipefail
prefix=$(realpath "$1.bin"); prefix=${prefix%.bin}
output=$(realpath -m "$2")
cd "$(dirname "$0")/../.."
mkdir -p "$output"

nodes=(anchor-node0 anchor-node1)
agents=()
cleanup() {
    for agent in "${agents[@]}"; do kill -KILL -- "-$agent" 2>/dev/null || true; done
    for node in "${nodes[@]}"; do
        for pid in $(ip netns pids "$node" 2>/dev/null); do kill -KILL "$pid" 2>/dev/null || true; done
        ip netns del "$node" 2>/dev/null || true
    done
}
trap cleanup EXIT

ip netns add "${nodes[0]}"
ip netns add "${nodes[1]}"
ip link add anchor0 netns "${nodes[0]}" type veth peer name anchor1 netns "${nodes[1]}"
for n in 0 1; do
    ip -n "${nodes[$n]}" addr add "10.77.0.$((n + 1))/24" dev "anchor$n"
    ip -n "${nodes[$n]}" link set "anchor$n" up
    ip -n "${nodes[$n]}" link set lo up
done

start() { # node
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 OMP_NUM_THREADS=1 GLOO_SOCKET_IFNAME="anchor$1" \
        setsid ip netns exec "${nodes[$1]}" python -m torch.distributed.run \
        --nnodes 2 --nproc-per-node 1 --max-restarts 5 --rdzv-backend c10d --rdzv-endpoint 10.77.0.1:29400 \
        --rdzv-id rehearsal --rdzv-conf is_host=$((1 - $1)),keep_alive_interval=1,keep_alive_max_attempt=3,last_call_timeout=2 \
        --local-addr "10.77.0.$(($1 + 1))" --shutdown-timeout 5 \
        pretrain_anchor.py examples/tiny.yaml data.train="$prefix" parallel.context=2 train.steps=60 \
        train.distributed_timeout_minutes=0.3 checkpoint.directory="$output" checkpoint.save_interval=10 \
        checkpoint.keep_last=2 >> "$output/node$1.log" 2>&1 &
    agents[$1]=$!
}

wait_for() { # seconds, command
    local left=$1
    shift
    until "$@"; do
        left=$((left - 1))
        if ((left < 0)); then
            echo "two_nodes.sh: gave up waiting for: $*" >&2
            tail -n 15 "$output"/node*.log >&2
            exit 1
        fi
        sleep 1
    done
}

start 0
start 1
wait_for 120 test -d "$output/step_0000020"
echo "step 20 is saved; cutting node 1 off"
ip -n "${nodes[1]}" link set anchor1 down
sleep 3
kill -KILL -- "-${agents[1]}" 2>/dev/null || true # what its machine's failure would do
for pid in $(ip netns pids "${nodes[1]}"); do kill -KILL "$pid" 2>/dev/null || true; done
wait_for 60 grep -qE "^rank 0, step [0-9]+" "$output/node0.log"
grep -hE -A2 "^rank 0, step [0-9]+" "$output/node0.log" | head -n 3
echo "bringing node 1 back"
ip -n "${nodes[1]}" link set anchor1 up
start 1
wait_for 180 test -f "$output/outcome.json"
for agent in "${agents[@]}"; do wait_for 30 bash -c "! kill -0 $agent 2> /dev/null"; done
grep -hE "^resumed from" "$output"/node*.log
cat "$output/outcome.json"
grep -q '"outcome": "finished"' "$output/outcome.json"
