"""Gates: is a caption pair worth an engine's time (pairs), and is the fused caption good (judge, with the gates of table)?"""

from capsfusion_ray.core.gates.judge import judge, judge_failed, judge_table, judge_text
from capsfusion_ray.core.gates.pairs import is_boilerplate, judge_pair, judge_sources, kept_text, shared_content
from capsfusion_ray.core.gates.table import GATES
from capsfusion_ray.core.gates.triple import Fault, Triple

__all__ = [
    "GATES",
    "Fault",
    "Triple",
    "is_boilerplate",
    "judge",
    "judge_failed",
    "judge_pair",
    "judge_sources",
    "judge_table",
    "judge_text",
    "kept_text",
    "shared_content",
]
