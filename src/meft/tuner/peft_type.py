"""`PeftType.MEFT`: PEFT keeps its methods in a closed enumeration, which gets one more member here.

The member is made the way `enum` makes its own, so that `PeftType("MEFT")`, identity, hashing, pickling and JSON work.
"""

from __future__ import annotations

import sys
from typing import Any

from peft import PeftType

_NAME = "MEFT"


def _member() -> PeftType:
    members: dict[str, Any] = PeftType._member_map_
    if _NAME in members:
        return members[_NAME]
    member: Any = str.__new__(PeftType, _NAME)
    member._name_, member._value_ = _NAME, _NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(members)
    PeftType._member_names_.append(_NAME)
    members[_NAME] = member
    PeftType._value2member_map_[_NAME] = member
    if sys.version_info >= (3, 12):
        type.__setattr__(PeftType, _NAME, member)
    return member


MEFT = _member()
