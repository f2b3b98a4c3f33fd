"""Why a cluster's replicas do not start, out of what Ray Serve keeps of it.

Serve's own error names the deployment that failed; the replica's is the end of a long traceback.
"""

from __future__ import annotations

import re
from typing import Any

from ponderttt.errors import UnavailableError

# The last of these lines, below a chain of tracebacks, is the error that was raised in the end.
_RAISED = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*: ", re.MULTILINE)


def start_failure(application: Any) -> UnavailableError:
    """The error that tells why an application could not be deployed.

    Args:
        application: Serve's status of it.
    """
    reasons = [
        f"{name}: {raised(deployment.message)}"
        for name, deployment in application.deployments.items()
        if deployment.message
    ]
    said = "; ".join(reasons) or application.message or "Serve does not say why"
    return UnavailableError(f"the cluster does not start: {said}")


def raised(text: str) -> str:
    """The message of the error at the end of a text with tracebacks; all of it without one."""
    found = list(_RAISED.finditer(text))
    # Ours say by themselves what is wrong; of others the name helps.
    if not found:
        return " ".join(text.split())
    last = found[-1]
    start = last.end() if last[0].startswith("ponderttt.") else last.start()
    return " ".join(text[start:].split())
