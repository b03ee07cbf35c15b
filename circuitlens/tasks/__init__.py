"""Tasks: examples, prompts, label words, leak-safe pools, and the data sets known by name."""

from circuitlens.tasks import toy
from circuitlens.tasks.encoding import Encoded
from circuitlens.tasks.examples import Example, Pool, Pools
from circuitlens.tasks.sources import load_task
from circuitlens.tasks.task import Source, Task

__all__ = ["Encoded", "Example", "Pool", "Pools", "Source", "Task", "load_task", "toy"]
