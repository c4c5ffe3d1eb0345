#!/usr/bin/env bash
# BLIP-2, both stages and all three tasks, on a laptop: environment, data, training, report.
#
#   ./launch/quickstart.sh [--workdir=DIR] [--seed=N] [--fresh]
#
#   --workdir=DIR   where everything goes (default: runs/quickstart)
#   --seed=N        of initialization, data order and negatives (default: 0)
#   --fresh         start over: removes what an earlier quickstart left in the workdir
#
# A run that was stopped, however it was, goes on where it was; a finished one returns at once.
set -euo pipefail
cd "$(dirname "$0")/.."

workdir=runs/quickstart seed=0 fresh=no
for argument in "$@"; do
  case "$argument" in
    --workdir=*) workdir="${argument#*=}" ;;
    --seed=*) seed="${argument#*=}" ;;
    --fresh) fresh=yes ;;
    -h | --help) sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "quickstart.sh: unknown argument $argument; try --help" >&2; exit 2 ;;
  esac
done
source launch/environment.sh
blip2_environment ""

if [ "$fresh" = yes ]; then
  # Only what a quickstart writes, so that a mistyped --workdir cannot remove anything else.
  for part in data stage1 stage2 predictions metrics.json report.html; do
    rm -rf -- "${workdir:?}/$part"
  done
fi

echo "== Data"
blip2 prepare --source=digits --out="$workdir/data"
echo "== Stage 1: queries learn to read the frozen image encoder"
blip2 train --config=configs/digits/stage1.py --workdir="$workdir/stage1" \
  --config.data.dir="$workdir/data" --config.seed="$seed"
echo "== Stage 2: queries learn to speak to the frozen language model"
blip2 train --config=configs/digits/stage2.py --workdir="$workdir/stage2" \
  --config.data.dir="$workdir/data" --config.seed="$seed" \
  --config.init.checkpoint="$workdir/stage1"
echo "== Evaluation"
blip2 evaluate --config=configs/digits/evaluate.py --workdir="$workdir" \
  --config.data.dir="$workdir/data" \
  --config.models.retrieval="$workdir/stage1" \
  --config.models.captioning="$workdir/stage2" \
  --config.models.vqa="$workdir/stage2"
echo "Next: source ${BLIP2_VENV:-.venv}/bin/activate makes blip2 a command of your shell; blip2 --help"
