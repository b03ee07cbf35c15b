"""circuitlens: find the heads that carry a task, check them, train only them.

The public names are in ``__init__.pyi`` and are imported when they are first used (SPEC 1), so
that ``circuitlens --help`` need not wait for torch.
"""

from importlib.metadata import version as _version

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
__version__ = _version("circuitlens")
