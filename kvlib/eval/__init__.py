"""The yardstick: what a recipe gives up, measured on models that really retrieve."""

from kvlib.eval.models import load
from kvlib.eval.results import Answer, Cell, Results
from kvlib.eval.run import evaluate
from kvlib.eval.tasks import TASKS, Task, parse_tasks

__all__ = ["TASKS", "Answer", "Cell", "Results", "Task", "evaluate", "load", "parse_tasks"]
