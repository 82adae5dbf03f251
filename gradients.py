"""How the tasks' gradients become one update. Read first: nothing.

The loop hands every loss to `add` and calls `combine` once before the optimiser's step.
"""


class Sum:
    """The ordinary way: gradients of all losses of a step add up in the parameters' .grad."""

    def __init__(self, parameters):
        pass

    def add(self, task, loss):
        """Backpropagate one loss of a task."""
        loss.backward()

    def combine(self):
        """Leave the sum in the parameters' .grad."""
