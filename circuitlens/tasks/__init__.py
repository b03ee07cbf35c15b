"""Tasks: examples, prompts, label words, leak-safe pools, and the data sets known by name."""

from circuitlens.tasks import toy
from circuitlens.tasks.encoding import Encoded
from circuitlens.tasks.evaluation import Evaluation, evaluate
from circuitlens.tasks.examples import Example, Pool, Pools
from circuitlens.tasks.sources import DataSet, data_sets, load_task
from circuitlens.tasks.task import Source, Task

__all__ = [
    "DataSet",
    "Encoded",
    "Evaluation",
    "Example",
    "Pool",
    "Pools",
    "Source",
    "Task",
    "data_sets",
    "evaluate",
    "load_task",
    "toy",
]
