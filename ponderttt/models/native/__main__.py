"""`python -m ponderttt.models.native`: compile the kernels into the package, as images do."""

from __future__ import annotations

import sys

from ponderttt.models.native.library import NativeUnavailableError, prebuild


def main() -> int:
    """Compile; 1 where that is not possible, with the reason."""
    try:
        print(prebuild())
    except NativeUnavailableError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
