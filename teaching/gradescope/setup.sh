#!/usr/bin/env bash
# Gradescope runs this once, when it builds the image: packages for the grader, in an environment of its own.
# The zip that you upload holds the project, with these two scripts copied to its top; README of the cover page.
set -euo pipefail
apt-get update && apt-get install -y python3 python3-venv util-linux
cd /autograder/source
python3 -m venv .venv
.venv/bin/pip install --extra-index-url https://download.pytorch.org/whl/cpu -r requirements.txt
