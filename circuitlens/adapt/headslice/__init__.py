"""The head-slice adapter, a PEFT method: small trainable leaves for chosen heads and norms.

Importing this package makes the method known to PEFT::

    from peft import PeftModel, get_peft_model
    from circuitlens.adapt.headslice import HeadSliceConfig

    model = get_peft_model(hf, HeadSliceConfig(heads=circuit))
    ...  # train
    model.save_pretrained("javanese")  # the leaves only
    model = PeftModel.from_pretrained(hf, "javanese")
    merged = model.merge_and_unload()

It trains the same entries as gradient masking on full weights (:mod:`circuitlens.adapt.masking`,
after CT-SFT, arXiv 2601.08146) along the same trajectory, but gradients and the optimiser's state
exist for these entries only.
"""

from circuitlens.adapt.headslice.registration import register, require_peft

# Before anything below imports what an older PEFT may lack.
require_peft()

from circuitlens.adapt.headslice.config import HeadSliceConfig  # noqa: E402
from circuitlens.adapt.headslice.geometry import geometry_of  # noqa: E402
from circuitlens.adapt.headslice.layer import HeadSliceLayer  # noqa: E402
from circuitlens.adapt.headslice.model import HeadSliceModel  # noqa: E402
from circuitlens.adapt.headslice.selection import selected_slices  # noqa: E402

register(HeadSliceConfig, HeadSliceModel)

__all__ = [
    "HeadSliceConfig",
    "HeadSliceLayer",
    "HeadSliceModel",
    "geometry_of",
    "selected_slices",
]
