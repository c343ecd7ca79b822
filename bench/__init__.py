"""fastsal side by side with its peers: `python -m bench` measures, `python -m bench report` writes the tables and plots.

A case is one piece of work; contestants do it in turns. No speed is reported before the answer has been checked.

    cases/         what is measured: the shapes, the models, the awkward inputs
    contestants/   who does the work beside fastsal: formulas and peers; and the networks that they are given
    suite/         how a piece of work is checked, timed and kept
    report/        how stored figures are shown
    tools/         the other commands

fastsal never imports any of this, nor any peer.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

# Run from a checkout whose native modules were not built in place: the fastsal to measure is the installed one.
if not list((ROOT / "fastsal").glob("_cpu.*")):
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != ROOT]
