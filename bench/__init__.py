"""Side by side with the peers: `python -m bench` measures, `python -m bench report` writes the tables and plots.

A case is one piece of work; contestants do it in turns. No speed is reported before the answer has been checked.
`cases/` says what is measured, `contestants/` who does it, `suite/` how it is checked and timed, `tools/` holds commands of
their own. fastsal never imports any of this, nor any peer.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# Run from a checkout whose native modules were not built in place: the fastsal to measure is the installed one.
if not list((ROOT / "fastsal").glob("_cpu.*")):
    sys.path[:] = [folder for folder in sys.path if Path(folder).resolve() != ROOT]
