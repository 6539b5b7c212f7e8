#!/usr/bin/env bash
# Runs a plan on one Cloud TPU slice, run by run; every host takes part in every run.
#   launch/tpu_slice.sh NAME ZONE CONFIG WORKDIR [--config.a.b=value ...]
# Expects modjax installed on the hosts in the current folder of the login, with the extra `tpu`,
# and WORKDIR and $DATA_DIR in a folder that all hosts share.
set -euo pipefail
name=$1 zone=$2 config=$3 workdir=$4
shift 4
printf -v overrides '%q ' "$@"
[[ $# -gt 0 ]] || overrides=

on_every_host="
set -euo pipefail
run_ids=\$(modjax plan --config=$config $overrides --data-dir=${DATA_DIR:?} --json |
  python3 -c 'import json, sys; print(*(cell[\"run_id\"] for cell in json.load(sys.stdin)))')
for run_id in \$run_ids; do
  modjax train --distributed --config=$config $overrides --run=\$run_id \
    --workdir=$workdir --data-dir=$DATA_DIR
done
"
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$on_every_host"
