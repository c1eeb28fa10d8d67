#!/usr/bin/env bash
# Run a training script of Megatron-LM, unchanged, with the flags of a file and the plugin.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/megatron.sh [-n RANKS] [-p PORT] [-H HOSTFILE | -S] [-d] CONFIG SCRIPT [FLAG...]

  CONFIG       file with one flag and its values a line, `#` begins a comment; see configs/megatron
  SCRIPT       pretrain_gpt.py, pretrain_bert.py or pretrain_t5.py of Megatron-LM
  FLAG...      more flags of Megatron and of the plugin; where CONFIG has them too, these count
  -n RANKS     processes on each machine (default: one per GPU)
  -p PORT      port of the rendezvous (default: the launcher's)
  -H HOSTFILE  run on the machines of this file, by the deepspeed launcher; without it, here, by torchrun
  -S           be one rank of a Slurm job; launch/slurm.sh uses it
  -d           print the command, one word a line, instead of running it

example: launch/megatron.sh -n 2 configs/megatron/gpt.flags pretrain_gpt.py --mock-data \
             --tokenizer-type NullTokenizer --vocab-size 50257

With -H, variables that the other machines need too belong in a file .deepspeed_env in the home directory, for example
CUDA_DEVICE_MAX_CONNECTIONS=1 and PYTHONPATH.
TEXT
}

fail() {
    printf 'launch/megatron.sh: %s\n' "$1" >&2
    exit 2
}

ranks='' port='' hostfile='' is_slurm='' is_dry=''
while getopts ':n:p:H:Sdh' option; do
    case "$option" in
        n) ranks=$OPTARG ;;
        p) port=$OPTARG ;;
        H) hostfile=$OPTARG ;;
        S) is_slurm=1 ;;
        d) is_dry=1 ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
if (($# < 2)); then
    usage >&2
    exit 2
fi
[[ -z $hostfile || -z $is_slurm ]] || fail 'both -H and -S were given (expected one of them)'
config=$1 script=$2
shift 2
[[ -z $ranks || $ranks =~ ^[1-9][0-9]*$ ]] || fail "-n: \`$ranks\` (expected a whole number of at least 1)"
[[ -z $port || $port =~ ^[1-9][0-9]{0,4}$ ]] || fail "-p: \`$port\` (expected a port)"
[[ -r $config && ! -d $config ]] || fail "cannot read \`$config\` (expected a file such as configs/megatron/gpt.flags)"
[[ -z $hostfile || -r $hostfile ]] || fail "cannot read \`$hostfile\` (expected lines such as \`node1 slots=8\`)"

flags=()
while IFS= read -r line || [[ -n $line ]]; do
    if [[ $line =~ ^[[:space:]]*(#|$) ]]; then
        continue
    fi
    read -r -a words <<<"${line%%[[:space:]]#*}"
    flags+=("${words[@]}")
done <"$config"

# Megatron needs it where tensors are parallel, on GPUs before Blackwell.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}

if [[ -n $is_slurm ]]; then
    per_node=${SLURM_NTASKS_PER_NODE:-${SLURM_STEP_TASKS_PER_NODE:-1}}
    export RANK=${SLURM_PROCID:?not a task of srun} LOCAL_RANK=${SLURM_LOCALID:?not a task of srun}
    export WORLD_SIZE=${SLURM_NTASKS:?not a task of srun} LOCAL_WORLD_SIZE=${per_node%%[(,]*}
    : "${MASTER_ADDR:?set by launch/slurm.sh}" "${MASTER_PORT:?set by launch/slurm.sh}"
    command=(python -m ssdtrain_plugin.run)
elif [[ -n $hostfile ]]; then
    command=(deepspeed --hostfile "$hostfile")
    [[ -z $ranks ]] || command+=(--num_gpus "$ranks")
    [[ -z $port ]] || command+=(--master_port "$port")
    command+=(--module ssdtrain_plugin.run)
else
    command=(torchrun --nproc_per_node "${ranks:-gpu}")
    if [[ -n $port ]]; then
        command+=(--master_port "$port")
    else
        command+=(--standalone)
    fi
    command+=(-m ssdtrain_plugin.run)
fi
command+=("$script" ${flags[@]+"${flags[@]}"} "$@")

if [[ -n $is_dry ]]; then
    printf '%s\n' "${command[@]}"
    exit 0
fi
exec "${command[@]}"
