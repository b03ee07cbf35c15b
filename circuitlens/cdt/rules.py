"""Rule sets: which maps are frozen at the clean run, and how β passes through activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from circuitlens.errors import InputError, check_choice

__all__ = ["RULES", "RuleSet"]


Activation = Literal["difference", "gradient", "secant"]


@dataclass(frozen=True)
class RuleSet:
    """What β may not change, and how it passes what remains nonlinear.

    With total t, relevant part β and irrelevant part γ = t − β:

    * frozen *patterns* and *scales* (attention weights, norm denominators) are constants of the
      clean run, so they pass β as linear maps; with the patterns a mixture of experts keeps its
      routing (which experts a token goes to, and their weights);
    * activations go by ``difference``, β' = f(t) − f(t − β); by ``gradient``, β' = f'(t) β; or by
      ``secant``, β' = (f(t)/t) β. For a gated MLP f is act(gate) · up, and the secant gives half
      of the product to each factor.

    By ``difference``, β at the output is the clean output minus that of the network with the
    source patched and the frozen parts held. By ``gradient`` or ``secant`` β is linear in the
    source, so one backward pass gives all sources.

    A name that scorers already have (:data:`circuitlens.METHODS`) is rejected where the rules are
    used, unless they are those of that name.

    Raises:
        InputError: for an activation other than these, or a field of another type.
    """

    name: str
    freeze_patterns: bool
    freeze_scales: bool
    activation: Activation

    def __post_init__(self) -> None:
        check_choice("activation", self.activation, get_args(Activation))
        if not (isinstance(self.name, str) and self.name):
            raise InputError(f"The name of a rule set must be a string, but is {self.name!r}.")
        for part in ("freeze_patterns", "freeze_scales"):
            if not isinstance(value := getattr(self, part), bool):
                raise InputError(f"{part} of a rule set must be True or False, but is {value!r}.")


# `ablation` freezes nothing: the difference is then exact mean ablation. `attribution` is its
# first-order version. The others vary what CD-T holds.
RULES: dict[str, RuleSet] = {
    rules.name: rules
    for rules in (
        RuleSet("cdt", True, True, "difference"),
        RuleSet("cdt-linear", True, True, "secant"),
        RuleSet("cdt-live", True, False, "difference"),
        RuleSet("attribution", False, False, "gradient"),
        RuleSet("ablation", False, False, "difference"),
    )
}
