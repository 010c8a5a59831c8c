"""How much detail does each method keep at the same brevity? Between a method's points (means of its seeds) on a line.

python results/published/assistant/equal_brevity.py
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

AT = (0.5, 0.6, 0.7, 0.8)


def main() -> None:
    """Print the table from the record beside this file."""
    record = json.loads((Path(__file__).parent / "compare.json").read_text(encoding="utf-8"))
    print("| method | " + " | ".join(f"{at:g}" for at in AT) + " |\n| --- |" + " ---: |" * len(AT))
    for row in record["rows"]:
        points = np.array(sorted(point["mean"] for point in row["points"]))
        kept = np.interp(AT, points[:, 0], points[:, 1], left=np.nan, right=np.nan)
        print(f"| `{row['label']}` | " + " | ".join("" if np.isnan(value) else f"{value:.3f}" for value in kept) + " |")


if __name__ == "__main__":
    main()
