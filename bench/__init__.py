"""fastsal side by side with baselines: `python -m bench` measures, `python -m bench report` writes the tables and plots.

A case is one piece of work; its implementations are timed in interleaved rounds. No speed is reported before the answer has
been checked.

    harness/     how a piece of work is checked, timed and stored
    cases/       what is measured: the shapes, the models, the awkward inputs
    baselines/   what fastsal is compared with: formulas and peers; and the networks that they are given
    report/      how stored figures are shown
    tools/       commands that are no cases

fastsal never imports any of this, nor any peer.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

# Run from a checkout whose native modules were not built in place: the fastsal to measure is the installed one, and the
# checkout comes last, where a fresh process finds bench.
if not list((ROOT / "fastsal").glob("_cpu.*")):
    sys.path[:] = [*(folder for folder in sys.path if Path(folder).resolve() != ROOT), str(ROOT)]
