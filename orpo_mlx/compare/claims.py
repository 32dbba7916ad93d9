"""The course chapter's five claims about ORPO and DPO, and the words of verdicts on them.

Two programs hold them against what they measure: a comparison by accuracy (`chapter_claims.py`), and the exercise by
reward and KL (`exercise/verdicts.py`).
"""

from __future__ import annotations

ORPO, DPO = "orpo", "dpo"
COPY = "dpo --reference copy"
"""DPO as other trainers run it, with a second copy of the weights."""

REFERENCE = "DPO needs a reference model, ORPO does not"
PHASES = "DPO takes two phases, ORPO one"
MEMORY = "DPO takes twice the memory"
CONVERGENCE = "ORPO converges faster"
SENSITIVITY = "DPO's sensitivity to hyper-parameters is moderate, ORPO's low"

CONFIRMED, REFUTED, OPEN = "confirmed", "refuted", "not decided"
