"""What single families of models need beyond the hooks that all of them share."""

from circuitlens.families.family import ActivationSite, Family
from circuitlens.families.misread import refuse_misread
from circuitlens.families.registry import family_of, is_encoder, is_tested, tested_types

__all__ = [
    "ActivationSite",
    "Family",
    "family_of",
    "is_encoder",
    "is_tested",
    "refuse_misread",
    "tested_types",
]
