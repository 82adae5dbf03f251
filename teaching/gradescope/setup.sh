#!/usr/bin/env bash
# Gradescope runs this once, to build the image. Make the zip that it takes with:
#     git archive --prefix=minbert/ --output=autograder.zip HEAD
#     zip --junk-paths autograder.zip teaching/gradescope/*
# It installs the first of three Python versions that the image has, and torch without CUDA, which is much smaller.
set -euo pipefail
cd "${AUTOGRADER:-/autograder}/source/minbert"
apt-get update
for version in 3.11 3.12 3.13; do
    apt-get install --yes "python$version" "python$version-venv" && break
done
"python$version" -m venv .venv
.venv/bin/pip install --requirement requirements.txt --extra-index-url https://download.pytorch.org/whl/cpu
