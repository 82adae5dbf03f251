"""The checks: one file for each part, one function for each check.

A check draws inputs from its seed, calls the functions of its part, and returns {name: result}. Where it calls several
functions, a result may be a function that returns it: then one that is not written yet does not hide the others.
The grader runs a check twice: in a process with the student's functions, and in one with the reference's. So a check
has no expected values.
"""
