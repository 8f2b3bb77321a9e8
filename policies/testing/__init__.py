"""Checks for authors of policies: see :func:`~policies.testing.checks.check_policy`.

In a test of one's own, with any test runner::

    from policies.testing import check_policy

    def test_my_policy_keeps_its_promises():
        check_policy("mypkg.mymodule:MyPolicy:alpha=0.5")
"""

from policies.testing.checks import PROMISES, check_policy
from policies.testing.steps import Text, make_texts, play, take_step

__all__ = ["PROMISES", "Text", "check_policy", "make_texts", "play", "take_step"]
