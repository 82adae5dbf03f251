#!/usr/bin/env python3
"""The course's first script: a sentiment classifier for SST, then one for CFIMDB, as two runs of multitask_classifier.

    python classifier.py --option finetune --lr 1e-5 --use_gpu

Each run is in runs/classifier-OPTION-TASK. The predictions are copied to predictions/OPTION-TASK-dev-out.csv and
-test-out.csv, where the course's prepare_submit.py looks for them. The flags are those of multitask_classifier.py,
which also resumes and evaluates these runs.

Source: classifier.py of the CS224N default final project.
Differs: the two runs take the usual defaults of multitask_classifier.py, and CFIMDB keeps the batch size that is given.
"""

import sys

# imported first: it prints what to do where torch is not installed
import multitask_classifier
from errors import run_script
from flags import parse_flags


def main(argv=None):
    """Train and predict for SST, then for CFIMDB. Returns the exit status of the first run that did not end well."""
    argv = sys.argv[1:] if argv is None else argv
    option = parse_flags(argv)[0]["option"]
    for task in ("sst", "cfimdb"):
        files = [f"--{task}_{split}_out=predictions/{option}-{task}-{split}-out.csv" for split in ("dev", "test")]
        run = ["--tasks", task, "--run_dir", f"runs/classifier-{option}-{task}"]
        if status := multitask_classifier.main([*run, *files, *argv]):
            return status


if __name__ == "__main__":
    run_script(main)
