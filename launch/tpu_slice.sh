#!/usr/bin/env bash
# Runs a plan on one Cloud TPU slice, run by run. Every host takes part in every run.
#   DATA_DIR=DIR launch/tpu_slice.sh NAME ZONE CONFIG WORKDIR [--config.a.b=value ...]
# Install modjax with the extra `tpu` in the login folder of every host. WORKDIR must be a folder that
# all hosts share. $DATA_DIR must be in one too, or in a bucket.
set -euo pipefail

usage() {
  echo "launch/tpu_slice.sh: $1" >&2
  echo "usage: DATA_DIR=DIR launch/tpu_slice.sh NAME ZONE CONFIG WORKDIR [--config.a.b=value ...]" >&2
  exit 2
}

[[ $# -ge 4 ]] || usage "needs NAME, ZONE, CONFIG and WORKDIR"
[[ -n ${DATA_DIR:-} ]] || usage "needs DATA_DIR, the folder of the token caches, set"
name=$1 zone=$2 config=$3 workdir=$4
shift 4
for argument in "$name" "$zone" "$config" "$workdir"; do
  [[ -n $argument && $argument != -* ]] || usage "'$argument' is no NAME, ZONE, CONFIG or WORKDIR"
done
for override in "$@"; do
  [[ $override == --config.?*=* ]] || usage "'$override' is no --config.a.b=value"
done

# The shell of each host parses the command again, so %q quotes every argument.
printf -v plan '%q ' "--config=$config" "$@" "--data-dir=$DATA_DIR"
printf -v place '%q' "--workdir=$workdir"

on_every_host="
set -euo pipefail
run_ids=\$(modjax plan $plan --json |
  python3 -c 'import json, sys; print(*(cell[\"run_id\"] for cell in json.load(sys.stdin)))')
for run_id in \$run_ids; do
  modjax train --distributed $plan --run=\"\$run_id\" $place
done
"
gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$on_every_host"
