"""Find the few attention heads that carry a task in a language model, and train only those.

The verbs, in the order in which a study uses them:

    model    = cl.load("Qwen/Qwen2.5-0.5B")             a hub name, a folder, or a model in memory
    task     = cl.load_task("nusax", "indonesian")      or cl.Task.from_csv, from_records, …
    model    = cl.finetune(model, task)                 competence in the source language
    baseline = cl.label_balanced_mean(model, task)      what every head outputs whatever the answer
    scores   = cl.relevance(model, task, baseline)      how much each head supports the task
    circuit  = scores.top(0.05)                         the heads that carry it
    curve    = cl.faithfulness(model, task, scores, baseline)    how much the circuit keeps alone
    result   = cl.transfer(model, circuit, task.to("javanese"))  train only those heads
    table    = cl.compare(model, circuit, task, ["javanese"])    against LoRA, full fine-tuning, …

Figures are in ``cl.view``. Results have ``save``, ``load`` and ``to_frame``, and display
themselves in notebooks. ``circuitlens run`` does all of it from the command line.
"""

# Names are in __init__.pyi and are imported when they are first used (SPEC 1), so that
# ``circuitlens --help`` need not wait for torch.
from importlib.metadata import version as _version

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
__version__ = _version("circuitlens")
