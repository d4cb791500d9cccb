"""Programs that tests start as processes of their own: python -m support.runs.programs.NAME"""

from __future__ import annotations
