"""The command line of the course: python -m teaching starter | grade | handout."""

from errors import Parser, run_script

from .grade import PUBLIC_SEED, SECONDS, grade
from .parts import PARTS
from .starter import write_starter


def make_parser():
    """Return the parser of the command line."""
    parser = Parser(prog="python -m teaching", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    starter = commands.add_parser("starter", help="write a copy without the answers, for students")
    starter.add_argument("out", help="the new folder")
    starter.add_argument(
        "--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what students write; default: all"
    )
    grading = commands.add_parser("grade", help="print the points of a copy, and what to look at")
    grading.add_argument("submission", help="the folder with the student's .py files")
    grading.add_argument("part", nargs="*", choices=[[], *PARTS], help=f"of {', '.join(PARTS)}; default: all")
    grading.add_argument("--seed", type=int, default=PUBLIC_SEED, help="draws other models, vocabularies and shapes")
    grading.add_argument("--time", type=int, default=SECONDS, help="seconds for each part")
    grading.add_argument("--results", help="also write Gradescope's results.json to this file")
    return parser


def main(argv=None):
    """Run one command. Returns the exit status."""
    flags = make_parser().parse_args(argv)
    if flags.command == "starter":
        write_starter(flags.out, flags.parts)
    elif flags.command == "grade":
        grade(flags.submission, flags.part, flags.seed, flags.time, flags.results)


if __name__ == "__main__":
    run_script(main)
