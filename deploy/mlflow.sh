#!/usr/bin/env bash
# Starts MLflow's server on this machine's private address, for the nodes of its cluster. sdan-mlflow.service runs it.
# ~/sdan.env gives SDAN_BUCKET (artifacts), and where the database lies (SDAN_MLFLOW_FOLDER, default ~/mlflow).
set -euo pipefail
folder=${SDAN_MLFLOW_FOLDER:-$HOME/mlflow}
if [ -n "${SDAN_MLFLOW_VOLUME:-}" ] && ! mountpoint -q "$folder"; then
    echo "mlflow, $folder: expected the mounted volume $SDAN_MLFLOW_VOLUME, got an ordinary folder;" \
        "see deploy/aws/volume.py" >&2
    exit 2
fi
mkdir -p "$folder"
address=$(hostname -I | cut -d' ' -f1)
# MLflow's jobs evaluate language models; they would be seven more processes.
export MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
~/venv/bin/mlflow db upgrade "sqlite:///$folder/mlflow.db"
# One process: with several, MLflow's web server kills each that is silent for five seconds, so on a busy head all of them
# before they have started.
exec ~/venv/bin/mlflow server --workers 1 --backend-store-uri "sqlite:///$folder/mlflow.db" \
    --artifacts-destination "$SDAN_BUCKET/mlartifacts" --host "$address" --port 5000 \
    --allowed-hosts "$address:5000,localhost:5000,127.0.0.1:5000"
