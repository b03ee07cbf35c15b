"""Making the method known to PEFT, which has no plug-in interface.

PEFT finds a method's classes by its :class:`peft.PeftType`, an enumeration of its own methods. It
gets one more member here, and then PEFT's own function for its own methods does the rest.
"""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import Any

from circuitlens.errors import InputError

__all__ = ["METHOD", "PREFIX", "SUPPORTED_PEFT", "register", "require_peft"]

METHOD = "headslice"
# What the names of all leaves in the modules and files begin with.
PREFIX = f"{METHOD}_"
SUPPORTED_PEFT = ">=0.18"

_NEEDED = {
    "peft": ("PeftConfig", "PeftType"),
    "peft.mapping": ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING"),
    "peft.tuners._buffer_dict": ("BufferDict",),
    "peft.tuners.tuners_utils": ("BaseTuner", "BaseTunerLayer", "check_adapters_to_merge"),
    "peft.utils": ("register_peft_method",),
}


def require_peft() -> None:
    """Check that the installed PEFT has what the adapter is built on.

    Raises:
        InputError: naming the installed version, what it lacks and the supported range.
    """
    missing = _missing()
    if missing:
        raise InputError(
            f"PEFT {version('peft')} cannot host the head-slice adapter, as it has no {missing}: "
            f"install peft{SUPPORTED_PEFT}."
        )


def _missing() -> str | None:
    for module, names in _NEEDED.items():
        try:
            found = importlib.import_module(module)
        except ImportError:
            return module
        for name in names:
            if not hasattr(found, name):
                return f"{module}.{name}"
    base = importlib.import_module("peft.tuners.tuners_utils").BaseTuner
    # Before 0.18, every method had to bring its own merging and freezing.
    if set(base.__abstractmethods__) != {"_create_and_replace"}:
        return "common code for merging and freezing"
    return None


def register(config_class: type[Any], model_class: type[Any]) -> None:
    """Let PEFT find the two classes under :data:`METHOD`; a second call changes nothing.

    Raises:
        InputError: if another package has taken the name.
    """
    from peft import PeftType
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import register_peft_method

    name = METHOD.upper()
    registered = PEFT_TYPE_TO_TUNER_MAPPING.get(name)
    if registered is model_class:
        return
    if registered is not None or name in PeftType.__members__:
        raise InputError(
            f"Another package has registered a PEFT method named {name}: do not import it together "
            "with circuitlens.adapt.headslice."
        )
    _add_member(PeftType, name)
    register_peft_method(name=METHOD, config_cls=config_class, model_cls=model_class, prefix=PREFIX)


def _add_member(enumeration: Any, name: str) -> None:
    """Add a member whose value is its name to an enumeration of strings."""
    member = str.__new__(enumeration, name)
    member._name_ = member._value_ = name
    # First, because Python 3.11 lets nobody set what is a member already.
    setattr(enumeration, name, member)
    enumeration._member_names_.append(name)
    enumeration._member_map_[name] = member
    enumeration._value2member_map_[name] = member
