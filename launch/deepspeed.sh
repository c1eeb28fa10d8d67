#!/usr/bin/env bash
# Run a DeepSpeed training script, unchanged, with the "ssdtrain" block of its config in force.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: launch/deepspeed.sh [-n RANKS] [-p PORT] CONFIG SCRIPT [ARGUMENT...]

  CONFIG    DeepSpeed JSON file with an "ssdtrain" block; passed on as --deepspeed_config
  SCRIPT    training script that takes --deepspeed_config
  -n RANKS  processes on this machine (default: one per device)
  -p PORT   port of the rendezvous (default: DeepSpeed's)

example: launch/deepspeed.sh -n 2 my_config.json train.py --steps 100
TEXT
}

fail() {
    printf 'launch/deepspeed.sh: %s\n' "$1" >&2
    exit 2
}

launcher=() ranks='' port=''
while getopts ':n:p:h' option; do
    case "$option" in
        n) ranks=$OPTARG launcher+=(--num_gpus "$OPTARG") ;;
        p) port=$OPTARG launcher+=(--master_port "$OPTARG") ;;
        h) usage; exit 0 ;;
        *) usage >&2; exit 2 ;;
    esac
done
shift $((OPTIND - 1))
if (($# < 2)); then
    usage >&2
    exit 2
fi
config=$1 script=$2
shift 2
[[ -z $ranks || $ranks =~ ^[1-9][0-9]*$ ]] || fail "-n: \`$ranks\` (expected a whole number of at least 1)"
[[ -z $port || $port =~ ^[1-9][0-9]{0,4}$ ]] || fail "-p: \`$port\` (expected a port)"
[[ -r $config && ! -d $config ]] || fail "cannot read \`$config\` (expected a DeepSpeed config)"

exec deepspeed ${launcher[@]+"${launcher[@]}"} --module ssdtrain_plugin.run "$script" --deepspeed_config "$config" "$@"
