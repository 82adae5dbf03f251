"""A course made from this project: a starter copy without answers, a grader, and a handout.

    python -m teaching starter OUT [--parts PART ...]     a copy in which students write the parts themselves
    python -m teaching grade SUBMISSION [PART]            points, and what to look at where one is missing
    python -m teaching handout OUT [--parts PART ...]     a page for each part, and a cover page
    python -m teaching notebook FILE                      the walk-through as a Jupyter notebook
    python -m teaching expected                           trains the runs whose scores the handout shows

parts.py is the table that the first three are made from. walkthrough.py takes a sentence through BERT, with exercises.
teaching/ imports the modules at the top level; nothing there imports teaching/.
"""
