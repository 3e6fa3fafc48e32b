#!/bin/sh
# Runs the image as two ranks, each in a container of its own with a GPU and FreeFlow's NIC: ./run.sh IMAGE
set -eu
image=${1:?usage: ./run.sh IMAGE}
docker=${DOCKER:-docker}

# Once a host; a router that runs already is as good.
freeflow router --detach 2>/dev/null || true
freeflow doctor --nccl || echo "run.sh: see above; inside the containers the variables are set" >&2

# PyTorch's rendezvous is plain TCP over the engine's own network; NCCL_NET=FreeFlow allows no fallback.
$docker network inspect freeflow-example >/dev/null 2>&1 || $docker network create freeflow-example >/dev/null
rank() {
    # Words of --flags are meant to be split.
    # shellcheck disable=SC2046
    $docker run --rm --name "rank$1" --network freeflow-example --gpus "device=$1" \
        $(freeflow container add "rank$1" --flags) \
        -e NCCL_NET=FreeFlow -e NCCL_DEBUG=INFO \
        -e RANK="$1" -e WORLD_SIZE=2 -e MASTER_ADDR=rank0 -e MASTER_PORT=29500 "$image"
}
rank 0 &
first=$!
trap '$docker rm -f rank0 rank1 >/dev/null 2>&1 || true' EXIT
rank 1
wait "$first"
freeflow ps
