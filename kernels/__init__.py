"""Triton kernels and their launchers, installed as the package `pyflocality.kernels`.

Nothing here is imported before an operation runs on the Triton backend: importing pyflocality
needs neither Triton nor a GPU.
"""

from __future__ import annotations

# In a checkout the folder can also be found as a top-level package. Importing it twice under two
# names would compile and register every kernel twice.
if __name__ != "pyflocality.kernels":
    raise ImportError(
        f"the kernels must be imported as 'pyflocality.kernels', not as {__name__!r}: "
        "install pyflocality (pip install -e . in a checkout) and import that name"
    )
