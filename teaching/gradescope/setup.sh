#!/usr/bin/env bash
# Gradescope runs this once, to build the image. Make the zip that it takes with:
#     git archive --prefix=minbert/ --output=autograder.zip HEAD
#     zip --junk-paths autograder.zip teaching/gradescope/*
set -euo pipefail
cd "${AUTOGRADER:-/autograder}/source/minbert"
apt-get update
apt-get install --yes python3.11 python3.11-venv
python3.11 -m venv .venv
.venv/bin/pip install --requirement requirements.txt
