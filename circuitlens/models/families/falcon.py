"""Falcon in its three layouts: grouped (40B), multi-query (7B) and ALiBi (RW)."""

from __future__ import annotations

from typing import Any

from circuitlens.models.families.family import Family

__all__ = ["FalconFamily"]


class FalconFamily(Family):
    """Falcon, of which TransformerLens misreads two variants."""

    def adapt(self, adapter: Any) -> None:
        """Correct the number of key/value heads, the name of a norm, and what ALiBi adds."""
        super().adapt(adapter)
        config = self.hf.config
        block = adapter.components["blocks"].submodules
        if config.new_decoder_architecture:
            # multi_query is to be ignored here, but is true by default and in checkpoints.
            adapter.cfg.n_key_value_heads = config.num_kv_heads
            if config.num_ln_in_parallel_attn == 1:
                block["ln1"].name = "input_layernorm"
        # The model's mask contains the bias already. In its eager attention, Hugging Face adds it
        # a second time, as the bridge does; in the others, the default among them, it does not.
        if config.alibi and config._attn_implementation != "eager":
            block["attn"].register_forward_pre_hook(_without_alibi, with_kwargs=True)


def _without_alibi(
    module: Any, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return arguments, keywords | {"alibi": None}
