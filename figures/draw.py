"""Draw the figures of our own results from the tables beside them; no model is needed.

    python -m figures.draw

Every folder here with a ``comparison.json`` gets its figures as SVG and PDF at page width, each
with the numbers that it shows as CSV.
"""

from __future__ import annotations

from pathlib import Path

import circuitlens as cl

HERE = Path(__file__).parent


def main() -> None:
    for file in sorted(HERE.glob("*/comparison.json")):
        folder = file.parent
        written = cl.view.write_figures(folder, folder / "drawn", ("svg",), width="page")
        print(f"{folder.name}: {len(written)} files")


if __name__ == "__main__":
    main()
