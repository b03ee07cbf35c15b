"""The model that a run made, to answer new texts with."""

from __future__ import annotations

from pathlib import Path

from circuitlens.adapt.result import saved_transfers
from circuitlens.errors import InputError
from circuitlens.models.hooked import HookedModel
from circuitlens.opening import load
from circuitlens.run_folder import RunFolder
from circuitlens.run_settings import check_run

__all__ = ["open_run"]


def open_run(
    folder: Path,
    target: str | None = None,
    strategy: str | None = None,
    device: str | None = None,
) -> HookedModel:
    """The model of a run's transfer; of a run without one, or another folder, its model.

    Args:
        folder: of a run, a transfer, an adapter or a model.
        target, strategy: of the transfer; needed where the run has several.
        device: where to put the weights.

    Raises:
        InputError: if the folder holds none of these, or several transfers and neither is named.
    """
    if not (folder / "run.json").is_file():
        if target or strategy:
            check_run(folder)
        return load(folder, device=device)
    found = [
        result
        for result in saved_transfers(folder / "transfers", ())
        if target in (None, result.target_language) and strategy in (None, result.strategy)
    ]
    if len(found) > 1:
        names = ", ".join(f"--target {r.target_language} --strategy {r.strategy}" for r in found)
        raise InputError(f"{folder} contains several transfers: name one ({names}).")
    if found:
        assert found[0].folder is not None
        model = load(found[0].folder, device=device)
        if model.prompt is None:
            raise InputError(
                f"{found[0].folder} is from an older version and does not say what it was asked: "
                "run the transfer again."
            )
        return model
    if target or strategy:
        raise InputError(
            f"{folder} contains no transfer to {target or 'any language'} by "
            f"{strategy or 'any strategy'}: run circuitlens transfer first, or leave them out."
        )
    run = RunFolder.open(folder, quiet=True)
    model = run.model
    model.prompt = model.prompt or run.task.prompt
    return model
