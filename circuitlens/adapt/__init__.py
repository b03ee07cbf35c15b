"""Training: competence in the source language, transfer to a target language.

The names are in ``__init__.pyi`` and are imported when they are first used, so that settings can be
checked before torch is imported.
"""

import lazy_loader as _lazy

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)
