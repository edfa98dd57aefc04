"""The table of the gates that judge a fused caption.

To add one: write a function of a Triple that returns a Fault or None, and add its line here, under a new Reason (core/types) and
a key of the same name with its default (config/gates). The tests name a missing key and a missing line of docs/gates.md.
"""

from __future__ import annotations

from collections.abc import Callable

from capsfusion_ray.core.gates.entities import lost_entity, unsupported_name, unsupported_number
from capsfusion_ray.core.gates.language import wrong_script
from capsfusion_ray.core.gates.triple import Fault, Triple
from capsfusion_ray.core.gates.wording import (
    concatenation,
    copy_of_one,
    cut_off,
    empty_output,
    instruction_echo,
    repetition,
    too_long,
    too_short,
)
from capsfusion_ray.core.types import Reason

Gate = Callable[[Triple], Fault | None]

# In the order in which the first gate that rejects gives the reason. Further gates that match become flags.
GATES: tuple[tuple[Reason, Gate], ...] = (
    (Reason.EMPTY_OUTPUT, empty_output),
    (Reason.INSTRUCTION_ECHO, instruction_echo),
    (Reason.REPETITION, repetition),
    (Reason.WRONG_SCRIPT, wrong_script),
    (Reason.CONCATENATION, concatenation),
    (Reason.COPY_OF_ONE, copy_of_one),
    (Reason.UNSUPPORTED_NUMBER, unsupported_number),
    (Reason.UNSUPPORTED_NAME, unsupported_name),
    (Reason.CUT_OFF, cut_off),
    (Reason.LOST_ENTITY, lost_entity),
    (Reason.TOO_SHORT, too_short),
    (Reason.TOO_LONG, too_long),
)
