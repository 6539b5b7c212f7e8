#!/bin/sh
# Does a sweep on a Slurm cluster: sh launch/slurm/sweep.sh CONFIG WORKDIR DATA_DIR [OVERRIDE...]
#
# Give it on a login node, in screen or tmux: it submits one job array and shows its progress. If it
# ends early, the array goes on. The same command finds its tasks again, and submits no run twice.
# Ctrl-C lets all tasks save their state, and cancels them.
#
# WORKDIR and DATA_DIR must be on a file system that all nodes share, whose locks hold between
# machines (NFS version 4, Lustre, GPFS). modjax and its Python must be there, too.
set -eu
config=${1:?CONFIG} workdir=${2:?WORKDIR} data_dir=${3:?DATA_DIR}
shift 3

set -- "$@" --engine.partition=gpu      # as sbatch takes it; so are the next two
set -- "$@" --engine.account=           # empty: the cluster's default
set -- "$@" --engine.constraint=
set -- "$@" --engine.time=4:00:00       # of one run. A run that needs more goes on in a next turn
set -- "$@" --engine.notice=300         # seconds to save its state before that
set -- "$@" --engine.gpus=1             # of each host
set -- "$@" --engine.cores=8            # of each process
set -- "$@" --engine.memory=32          # GB of each host
set -- "$@" --engine.hosts=1            # more do each run together, with one process for each GPU
set -- "$@" --engine.jobs=0             # the most at a time; 0 submits all at once
set -- "$@" --engine.more='--nice=100'  # other options of sbatch

exec modjax sweep --engine=slurm --config="$config" --workdir="$workdir" --data-dir="$data_dir" "$@"
