"""What single families of models need beyond the hooks that all of them share."""

from circuitlens.families.family import ActivationSite, Family, family_of

__all__ = ["ActivationSite", "Family", "family_of"]
