"""The command line of the course: python -m teaching starter | grade | grade-all | handout | notebook | expected."""

from errors import Parser, run_script
from methods import positive_int, seed

from .grade import PUBLIC_SEED, SECONDS, grade, grade_all
from .handout import write_handout
from .notebook import write_notebook
from .parts import PARTS
from .scores import RUNS, run_expected
from .starter import write_starter


def make_parser():
    """Return the parser of the command line."""
    parser = Parser(prog="python -m teaching", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    starter = commands.add_parser("starter", help="write a copy without the answers, for students")
    starter.add_argument("out", help="the new folder")
    sandbox = "The limits of the process that runs a student's functions are no sandbox against malice."
    grading = commands.add_parser("grade", help="print the points of a copy, and what to look at", epilog=sandbox)
    grading.add_argument("submission", help="the folder or the zip with the student's .py files")
    every = commands.add_parser("grade-all", help="grade a class: a report for each, and a table", epilog=sandbox)
    every.add_argument("submissions", help="the folder with a folder or a zip for each student")
    every.add_argument("out", help="the new folder for the reports and grades.csv")
    for command in (grading, every):
        command.add_argument("part", nargs="*", choices=[[], *PARTS], help=f"of {', '.join(PARTS)}; default: all")
        command.add_argument("--seed", type=seed, default=PUBLIC_SEED, help="draws other models and shapes")
        command.add_argument("--time", type=positive_int, default=SECONDS, help="seconds for each part")
    grading.add_argument("--results", help="also write Gradescope's results.json to this file")
    handout = commands.add_parser("handout", help="write a page for each part, and a cover page")
    handout.add_argument("out", help="the new folder")
    for command in (starter, handout):
        command.add_argument(
            "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what students write; default: all"
        )
    notebook = commands.add_parser("notebook", help="make a Jupyter notebook of the walk-through")
    notebook.add_argument("out", help="the .ipynb file; keep it beside bert.py")
    expected = commands.add_parser("expected", help="train the runs of the expected scores that have no result yet")
    expected.add_argument("--only", nargs="+", choices=RUNS, metavar="RUN", default=[], help="names of runs; --list")
    expected.add_argument("--seeds", type=int, help="at most this many seeds of each run")
    expected.add_argument("--data_dir", help="folder of the course's data; default: data/")
    expected.add_argument("--list", action="store_true", help="print the commands, train nothing")
    return parser


def main(argv=None):
    """Run one command. Returns the exit status."""
    flags = make_parser().parse_args(argv)
    if flags.command == "starter":
        write_starter(flags.out, flags.parts)
    elif flags.command == "grade":
        grade(flags.submission, flags.part, flags.seed, flags.time, flags.results)
    elif flags.command == "grade-all":
        grade_all(flags.submissions, flags.out, flags.part, flags.seed, flags.time)
    elif flags.command == "handout":
        write_handout(flags.out, flags.parts)
    elif flags.command == "notebook":
        write_notebook(flags.out)
    elif flags.command == "expected":
        run_expected(flags.only, flags.seeds, flags.data_dir, flags.list)


if __name__ == "__main__":
    run_script(main)
