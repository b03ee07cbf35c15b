"""What single families of models need beyond the hooks that all of them share."""

from circuitlens.models.families.family import ActivationSite, Family
from circuitlens.models.families.misread import refuse_misread, refuse_type
from circuitlens.models.families.registry import family_of, is_encoder, is_tested, tested_types

__all__ = [
    "ActivationSite",
    "Family",
    "family_of",
    "is_encoder",
    "is_tested",
    "refuse_misread",
    "refuse_type",
    "tested_types",
]
