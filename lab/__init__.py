"""Measurements of this project: speed beside transformers (benchmark), and the runs behind results/ (experiments).

Nothing outside this folder imports it. Run its programs from the repository's folder, `python -m lab.benchmark`.
"""
