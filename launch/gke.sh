#!/usr/bin/env bash
# Train on the TPUs of a GKE cluster: a JobSet that Kubernetes starts again, after pre-emption and failures.
#
#   IMAGE=REGISTRY/IMAGE ACCELERATOR=tpu-v5-lite-podslice TOPOLOGY=4x4 SPOT=1 \
#     ./launch/gke.sh CONFIG gs://BUCKET/PATH [--config.KEY=VALUE ...]
#   ./launch/gke.sh status | logs | delete WORKDIR
#
#   IMAGE             with this checkout: docker build -f launch/Dockerfile -t REGISTRY/IMAGE . (then push it)
#   ACCELERATOR       the nodes' cloud.google.com/gke-tpu-accelerator
#   TOPOLOGY          the nodes' cloud.google.com/gke-tpu-topology
#   CHIPS             of one node (default: 4)
#   SLICES            that train as one (default: 1)
#   SPOT=1            on nodes that can be taken away
#   RETRIES           restarts after failures; those after pre-emption do not count (default: 2)
#   SERVICE_ACCOUNT   of Kubernetes, that may use the bucket (default: default)
#   NAMESPACE         default: that of the kubectl context
#   DRY_RUN=1         show the manifest and the command
#
# gs://BUCKET is mounted as /gcs/BUCKET (the cluster needs the Cloud Storage FUSE driver and JobSet 0.7 or newer).
# The job's name follows from WORKDIR, so a WORKDIR whose job is alive is not started twice.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

case "${1:-}" in -h | --help) usage; exit 0 ;; esac
dry_run || need kubectl "Install it with: gcloud components install kubectl gke-gcloud-auth-plugin"
kubectl=(kubectl)
[ -z "${NAMESPACE:-}" ] || kubectl+=("--namespace=$NAMESPACE")

# At most 30 characters, for Kubernetes' own suffixes must fit behind: blip2-LAST-CHECKSUM.
job_name() {
  local last
  last="$(printf '%s' "${1##*/}" | LC_ALL=C tr '[:upper:]' '[:lower:]' | LC_ALL=C tr -c 'a-z0-9' '-' | cut -c 1-12)"
  printf 'blip2-%s-%s' "${last%%-}" "$(printf '%s' "$1" | cksum | cut -d ' ' -f 1)"
}

# A string as YAML and JSON have it, on one line.
json() { python3 -c 'import json, sys; print(json.dumps(sys.argv[1]))' "$1"; }

manifest() {
  local word side chips=1 per_node="${CHIPS:-4}" spot=""
  for side in ${TOPOLOGY//x/ }; do chips=$((chips * side)); done
  local nodes=$(((chips + per_node - 1) / per_node))
  if [ "${SPOT:-0}" = 1 ]; then
    spot=$'\n              cloud.google.com/gke-spot: "true"'
  fi
  cat << YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
    blip2/workdir: $(json "$workdir")
spec:
  failurePolicy:
    maxRestarts: ${RETRIES:-2}
    rules: # a run that saved itself, or whose node was taken away, starts again as often as need be
    - action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: ${SLICES:-1}
    template:
      spec:
        parallelism: $nodes
        completions: $nodes
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: blip2, operator: In, values: [42]}
          - action: FailJob
            onPodConditions: [{type: DisruptionTarget, status: "True"}]
        template:
          metadata:
            annotations:
              gke-gcsfuse/volumes: "$([ "$buckets" = yes ] && echo true || echo false)"
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            serviceAccountName: $(json "${SERVICE_ACCOUNT:-default}")
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $(json "$ACCELERATOR")
              cloud.google.com/gke-tpu-topology: $(json "$TOPOLOGY")$spot
            containers:
            - name: blip2
              image: $(json "$IMAGE")
              ports: [{containerPort: 8471}, {containerPort: 8080}, {containerPort: 8482}]
              env: [{name: BLIP2_DISTRIBUTED, value: "1"}]
              command:
              - blip2
              - train
$(for word in "${flags[@]}"; do
    # Kubernetes replaces \$(NAME); a doubled \$ stands for itself.
    echo "              - $(json "${word//\$/\$\$}")"
  done)
              resources:
                limits: {google.com/tpu: $per_node}
$(if [ "$buckets" = yes ]; then
    cat << VOLUMES
              volumeMounts: [{name: buckets, mountPath: /gcs}]
            volumes:
            - name: buckets
              csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes: {bucketName: _, mountOptions: "implicit-dirs,rename-dir-limit=1000000"}
VOLUMES
  fi)
YAML
}

case "${1:-}" in
  check) require IMAGE ACCELERATOR TOPOLOGY ;;
  status | logs | delete)
    [ $# = 2 ] || die "$1 takes WORKDIR."
    name="$(job_name "$2")"
    case "$1" in
      status) run "${kubectl[@]}" get "jobset/$name" ;;
      logs) run "${kubectl[@]}" logs --follow "--selector=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0" ;;
      delete) run "${kubectl[@]}" delete "jobset/$name" ;;
    esac
    ;;
  *)
    arguments "$@"
    name="$(job_name "$workdir")"
    elsewhere
    require IMAGE ACCELERATOR TOPOLOGY
    [[ $TOPOLOGY =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || die "TOPOLOGY is $TOPOLOGY; write it as 4x4 or 2x2x4."
    for number in "${CHIPS:-4}" "${SLICES:-1}" "${RETRIES:-2}"; do
      [[ $number =~ ^[0-9]+$ ]] || die "$number is no whole number (CHIPS, SLICES, RETRIES)."
    done
    if dry_run; then
      manifest
      run "${kubectl[@]}" apply --filename=-
      exit 0
    fi
    if ended="$("${kubectl[@]}" get "jobset/$name" --ignore-not-found --output='jsonpath={.metadata.name} {.status.terminalState}')" &&
      [ -n "$ended" ]; then
      if [ "${ended#* }" = "" ]; then
        say "$workdir is running already, as jobset/$name."
        exit 0
      fi
      "${kubectl[@]}" delete "jobset/$name"
    fi
    manifest | "${kubectl[@]}" apply --filename=-
    ;;
esac
