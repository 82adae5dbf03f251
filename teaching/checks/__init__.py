"""The checks: one file for each part, one function for each check.

A check draws inputs from its seed, calls the functions of its part, and returns {name: result}. The grader runs it
twice: in a process with the student's functions, and in its own with the reference. So a check has no expected values.
"""
