#!/usr/bin/env bash
# Installs and starts the units of this folder for this user, and lets them run while nobody is logged in.
# Run it on the head after ~/sdan and ~/sdan.env are there; again after a change.
set -euo pipefail
cd "$(dirname "$0")"
sudo loginctl enable-linger "$USER"
export XDG_RUNTIME_DIR=/run/user/$(id -u)
mkdir -p ~/.config/systemd/user
cp ./*.service ./*.timer ~/.config/systemd/user/
systemctl --user daemon-reload
systemctl --user enable --quiet sdan-mlflow.service sdan-retrain.timer
systemctl --user restart sdan-mlflow.service sdan-retrain.timer
