#!/bin/sh
# Does a sweep on GKE or another Kubernetes: sh launch/gke/sweep.sh CONFIG WORKDIR DATA_DIR [OVERRIDE...]
#
# It submits one Job a run and shows the progress. If it ends early, the Jobs go on. The same command
# finds them again, and submits no run twice. Ctrl-C lets all runs save their state, and deletes the Jobs.
#
# The image must have the modjax of this machine. Pods and this machine must see WORKDIR and DATA_DIR
# at the same path. If that is gcsfuse, whose locks do not hold, add --lease=120.
set -eu
config=${1:?CONFIG} workdir=${2:?WORKDIR} data_dir=${3:?DATA_DIR}
shift 3

set -- "$@" --engine.image=IMAGE            # REGISTRY/NAME:TAG
set -- "$@" --engine.python=python          # in the image
set -- "$@" --engine.namespace=default
set -- "$@" --engine.account=default        # a service account
set -- "$@" --engine.queue=user-queue       # Kueue's LocalQueue; "" if there is no Kueue
set -- "$@" --engine.claim=files            # a PersistentVolumeClaim,
set -- "$@" --engine.mount=/mnt/files       # which pods and this machine see here
set -- "$@" --engine.accelerator=tpu-v5-lite-podslice
set -- "$@" --engine.topology=2x4           # of a slice
set -- "$@" --engine.hosts=1                # of a slice. JobSet must be there for more than one
set -- "$@" --engine.tpus=8                 # chips of a host
set -- "$@" --engine.gpus=0                 # of a host; so are cores and memory, in GB
set -- "$@" --engine.cores=0
set -- "$@" --engine.memory=0
set -- "$@" --engine.slices=1               # that do each run together
set -- "$@" --engine.spot=True
set -- "$@" --engine.notice=25              # seconds to save its state; spot machines give 30
set -- "$@" --engine.jobs=0                 # the most at a time; 0 leaves it to the cluster
# --engine.pod=FILE has more of the pods' template (`spec`, `metadata`), such as a volume of gcsfuse
# and its annotation.
# --engine.render=FOLDER only writes the manifests, and needs neither a cluster nor kubectl.

exec modjax sweep --engine=gke --config="$config" --workdir="$workdir" --data-dir="$data_dir" "$@"
