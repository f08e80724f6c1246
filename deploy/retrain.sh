#!/usr/bin/env bash
# Submits one retraining to the cluster of this head and waits for its end. sdan-retrain.service runs it.
# ~/sdan.env gives SDAN_BUCKET, and SDAN_RETRAIN_OPTIONS for `sdan retrain`.
set -euo pipefail
exec 9> ~/.sdan-retrain.lock
if ! flock --nonblock 9; then
    echo "sdan-retrain: another run holds ~/.sdan-retrain.lock; this one does nothing"
    exit 0
fi
export RAY_AUTH_MODE=token
exec ~/venv/bin/ray job submit --address http://127.0.0.1:8265 -- bash -lc \
    "~/venv/bin/sdan --data ~/data retrain $SDAN_BUCKET/raw $SDAN_BUCKET/shards ${SDAN_RETRAIN_OPTIONS:-}"
